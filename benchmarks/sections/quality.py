"""The paper's claims on real data: efficiency, rank against score, the ensemble, and every target."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmarks import efficiency_claim, ensemble_claim, rank_claim
from benchmarks.page import Section, blocks, folded, picture, table
from benchmarks.plots import quality as plots
from benchmarks.sections.results import Results, cells, counted, where
from benchmarks.targets import judge
from docs import quality_tables
from examples.minbert_multitask.tasks import TASKS

COMMAND = "python -m benchmarks.quality --data DIR --claims {}"
PAPER = "Frees, Bhagirath and Bolling 2025, arXiv:2508.17586"
OVERALL = ensemble_claim.OVERALL
BASE = (
    "Unless the command said otherwise the base is MiniLM-L6, tuned for sentence similarity, not the paper's BERT-base, and "
    "Quora's questions were in that tuning; `--weights bert-base-uncased` runs the same where these can be had."
)


def _title(task: str) -> str:
    return "Overall" if task == OVERALL else TASKS[task].title


def _unit(task: str) -> str:
    if task == OVERALL:
        return "overall score, × 100"
    return "Pearson r, × 100" if TASKS[task].metric == "pearson" else "dev accuracy, %"


def _scaled(interval: Any) -> plots.Interval:
    return plots.Interval(*(100 * value for value in interval[:3]))


def _of_claim(results: Results, claim: str) -> dict[str, Any]:
    return {key: cell for key, cell in cells(results, "quality").items() if key.startswith(f"{claim}/")}


def _span(rows: Mapping[str, plots.Interval]) -> str:
    low, high = min(one.middle for one in rows.values()), max(one.middle for one in rows.values())
    return f"{low:.2f}" if len(rows) == 1 else f"{low:.2f} to {high:.2f}"


def efficiency(results: Results) -> Section:
    """Claim A on real data: each effect alone, and what the paper's comparison mixes."""
    costs = {key.split("/")[1]: cell for key, cell in _of_claim(results, "A").items() if key.endswith("/cost")}
    claim = (
        f"Claim A, efficiency ({PAPER}): adapters with autocast train much faster than full fine-tuning in fp32. Here "
        "autocast, the method and the adapted layers each stand alone, and then together."
    )
    command, title = COMMAND.format("A"), "Efficiency on the paper's tasks"
    rows: dict[str, dict[str, plots.Interval]] = {}
    for name in efficiency_claim.effects():
        for task, cell in costs.items():
            if "step" in (row := cell["figures"]["effects"].get(name, {})):
                rows.setdefault(name, {})[_title(task)] = plots.Interval(*row["step"])
    if not rows:
        return Section("efficiency", title, claim, command)
    kinds = [name.split(":")[0] for name in rows]
    rows = dict(sorted(rows.items(), key=lambda item: kinds.index(item[0].split(":")[0])))
    shown = {
        "autocast alone": "autocast alone: full",
        "LoRA alone": "LoRA alone: all-linear, fp32",
        "DoRA alone": "DoRA alone: all-linear, fp32",
        "LoRA with autocast": "both at once, as the paper compares: LoRA",
        "DoRA with autocast": "both at once, as the paper compares: DoRA",
    }
    words = [f"{short} {_span(rows[name])}" for short, name in shown.items() if name in rows]
    outcome = f"Step time as a share of full fine-tuning's in fp32, over the tasks: {', '.join(words)}."
    caption = "A pass over the same batches, over the pass it is compared with, in the same round; left of 1 is faster."
    unit = "ratio of times (no unit, logarithmic); bar: 20 to 80 % of the rounds"
    parts = [
        picture(plots.effects(rows, unit, "Each effect alone"), "effects", caption),
        blocks(quality_tables.verdict(costs)),
        folded("Time, memory and score of each, and all effects", blocks(quality_tables.efficiency(results["quality"], table))),
    ]
    caveat = (
        "An epoch is not run: a pass over a few of its batches is scaled to its steps; tokenising is outside. Scores are of "
        f"one seed. {BASE}"
    )
    return Section("efficiency", title, claim, command, outcome, parts, caveat, where(costs.values()))


def ranks(results: Results) -> Section:
    """Claim B."""
    found = _of_claim(results, "B")
    trained = {key: cell for key, cell in found.items() if not key.endswith("/search")}
    margin = f"{100 * rank_claim.MARGIN:g} points"
    claim = (
        f"Claim B, rank ({PAPER}): deficits at rank 1 are negligible. Here: rank 1 lies within {margin} of full fine-tuning on "
        "each task, every recipe at its own learning rate, searched with the same budget."
    )
    command, title = COMMAND.format("B"), "Rank against score"
    if not trained:
        return Section("ranks", title, claim, command)
    rows = rank_claim.rows(found)
    curves = {}
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        full = [_scaled(row.scores) for row in own if row.rank is None]
        by_rank = {row.rank: _scaled(row.scores) for row in own if row.rank is not None}
        curves[_title(task)] = plots.RankCurve(by_rank, full[0] if full else None)
    units = {_title(row.task): _unit(row.task) for row in rows}
    caption = "Mean over the seeds; bars and band are 95 % intervals (Student's t) of that mean, where there is more than one."
    parts = [
        picture(plots.rank_scores(curves, units), "ranks", caption),
        folded("Every rank on every task", blocks(quality_tables.rank(results["quality"], table))),
    ]
    seeds = Counter(row.scores.count for row in rows)
    caveat = (
        f"{' or '.join(map(str, sorted(seeds)))} seeds for each row, of as many examples for all recipes of a task. The rate "
        f"is settled with one seed and shared by the others. {BASE}"
    )
    return Section("ranks", title, claim, command, quality_tables.verdicts(rows), parts, caveat, where(trained.values()))


def _ensemble(name: str, figures: Mapping[str, Any]) -> str:
    drawn = {}
    for task, score in figures["ensemble"].items():
        members = [100 * member[task] for member in figures["members"]]
        mean, gain = sum(members) / len(members), _scaled(figures["gains"]["mean single"][task])
        drawn[_title(task)] = plots.Ensemble(members, plots.Interval(100 * score, mean + gain.low, mean + gain.high))
    units = {_title(task): _unit(task) for task in figures["ensemble"]}
    caption = f"{name}: dots are members, the stroke their mean; the bar is the 95 % bootstrap interval of the gain over it."
    return picture(plots.ensembles(drawn, units), f"ensemble-{name}", caption)


def ensembles(results: Results) -> Section:
    """Claim C."""
    sets = {key.split("/")[1]: cell for key, cell in _of_claim(results, "C").items() if key.endswith("/ensemble")}
    claim = (
        f"Claim C, ensemble ({PAPER}): several multitask models together are better than one of them. As adapters on one "
        "shared frozen backbone they cost little more than one model."
    )
    command, title = COMMAND.format("C"), "Ensembles on one backbone"
    if not sets:
        return Section("ensembles", title, claim, command)
    words, parts = [], []
    for name, cell in sets.items():
        figures = cell["figures"]
        gain, size = figures["gains"]["mean single"][OVERALL], figures["bytes"]
        verdict = "above" if gain[1] > 0 else "below" if gain[2] < 0 else "not told apart from"
        words.append(
            f"{name}, {counted(len(figures['members']), 'member')}: {verdict} the mean single model, "
            f"{quality_tables.points(gain)} points overall, at {size['shared'] / size['full']:.2f} of the bytes of full models"
        )
        parts.append(_ensemble(name, figures))
    parts.append(folded("Members, gains and bytes", blocks(quality_tables.ensembles(results["quality"], table))))
    caveat = (
        "The intervals resample the dev examples and hold the seeds fixed; the best single model was chosen by the dev set "
        f"that judges it. The overall score is (SST + Quora + (r + 1) / 2) / 3. {BASE}"
    )
    return Section("ensembles", title, claim, command, "; ".join(words) + ".", parts, caveat, where(sets.values()))


def targets(results: Results) -> Section:
    """Every figure of the paper to reproduce, beside ours."""
    found = cells(results, "quality")
    claim = f"What {PAPER} claim, their own raw figures, and ours."
    command, title = COMMAND.format("A,B,C"), "The paper's figures beside ours"
    if not found:
        return Section("targets", title, claim, command)
    met = Counter(row.met for row in judge(found))
    undecided = sum(met.values()) - met["yes"] - met["no"] - met["–"]
    outcome = f"{counted(met['yes'], 'figure')} met, {met['no']} not met, {undecided} not decided, {met['–']} not measured."
    parts = [blocks(quality_tables.targets(results["quality"], table))]
    return Section("targets", title, claim, command, outcome, parts, BASE, where(found.values()))
