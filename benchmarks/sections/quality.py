"""The paper's claims on real data: efficiency, rank against score, and the ensemble."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmarks import rank_claim
from benchmarks.efficiency_claim import candidates, score_cell
from benchmarks.ensemble_claim import OVERALL
from benchmarks.page import Section, folded, picture, table
from benchmarks.plots import quality as plots
from benchmarks.sections.results import Results, cells, counted, where
from examples.minbert_multitask.tasks import TASKS

COMMAND = "python -m benchmarks.quality --data DIR --claims {}"
BASE = (
    "The base is MiniLM-L6, tuned on sentence pairs, not BERT-base as in the paper, and Quora's questions were in that tuning: "
    "`--weights bert-base-uncased` runs the same where these can be had."
)


def _title(task: str) -> str:
    return "overall" if task == OVERALL else TASKS[task].title


def _unit(task: str) -> str:
    if task == OVERALL:
        return "overall score, 0 to 1"
    return "Pearson r, × 100" if TASKS[task].metric == "pearson" else "dev accuracy, %"


def _scaled(interval: Any) -> plots.Interval:
    return plots.Interval(*(100 * value for value in interval[:3]))


def _percent(interval: Any, form: str = ".2f") -> str:
    middle, low, high = (format(100 * value, form) for value in interval[:3])
    return f"{middle} ({low}..{high})" if math.isfinite(interval[1]) else f"{middle} (of one)"


def _points(interval: Any) -> str:
    return _percent(interval, "+.2f")


def efficiency(results: Results) -> Section:
    """Claim A on real data: each effect alone, and what the paper's comparison mixes."""
    found = cells(results, "quality")
    costs = {key.split("/")[1]: cell for key, cell in found.items() if key.startswith("A/") and key.endswith("/cost")}
    timed = {task: cell for task, cell in costs.items() if any("step" in row for row in cell["figures"]["effects"].values())}
    claim = (
        "Claim A, efficiency (Frees, Bhagirath and Bolling 2025, arXiv:2508.17586): adapters with autocast train much faster "
        "than full fine-tuning in fp32. Here autocast, the method and the adapted layers each stand alone, and then together."
    )
    command, title = COMMAND.format("A"), "Efficiency on the paper's tasks"
    if not timed:
        return Section("efficiency", title, claim, command)
    rows: dict[str, dict[str, plots.Interval]] = {}
    for task, cell in timed.items():
        for effect, row in cell["figures"]["effects"].items():
            rows.setdefault(effect, {})[_title(task)] = plots.Interval(*row["step"])
    words = []
    for effect in ("autocast alone: full", *(name for name in rows if name.startswith("both at once"))):
        if effect in rows:
            spread = [f"{one.middle:.2f} ({one.low:.2f}..{one.high:.2f}) on {task}" for task, one in rows[effect].items()]
            words.append(f"{effect}: {', '.join(spread)}")
    caption = "A pass over the same batches, over the pass it is compared with, in the same round; left of 1 is faster."
    unit = "ratio of times (no unit, logarithmic); bar: 20 to 80 % of the rounds"
    parts = [picture(plots.effects(rows, unit, "Each effect alone"), "effects", caption)]
    header = ["", "epoch, s (20..80 %)", "saved, MiB", "peak, MiB", "trained", "dev score"]
    for task, cell in timed.items():
        listed = []
        for name, row in cell["figures"]["candidates"].items():
            score = found.get(score_cell(task, candidates()[name]), {}).get("figures", {}).get("dev")
            middle, low, high = row["epoch_seconds"]
            listed.append(
                [name, f"{middle:.0f} ({low:.0f}..{high:.0f})", f"{row['saved_mib']:.1f}", f"{row['peak_mib']:.1f}",
                 f"{row['trained']:,}", "–" if score is None else f"{100 * score:.2f}"]
            )  # fmt: skip
        parts.append(folded(f"{_title(task)}: time, memory and score of each", table(header, listed)))
    caveat = (
        "An epoch is not run: a pass over a few of its batches is scaled to its steps; tokenising is outside. Saved bytes and "
        f"peaks are those of the longest batch. Scores are of one seed. {BASE}"
    )
    outcome = f"Share of the time that is left. {'; '.join(words)}."
    return Section("efficiency", title, claim, command, outcome, parts, caveat, where(timed.values()))


def ranks(results: Results) -> Section:
    """Claim B."""
    found = {key: cell for key, cell in cells(results, "quality").items() if key.startswith("B/")}
    margin = 100 * rank_claim.MARGIN
    claim = (
        "Claim B, rank (Frees, Bhagirath and Bolling 2025, arXiv:2508.17586): deficits at rank 1 are negligible. Here: rank 1 "
        f"lies within {margin:g} points of full fine-tuning on each task, every recipe at its own learning rate, searched with "
        "the same budget."
    )
    command, title = COMMAND.format("B"), "Rank against score"
    trained = {key: cell for key, cell in found.items() if not key.endswith("/search")}
    if not trained:
        return Section("ranks", title, claim, command)
    rows = rank_claim.rows(found)
    curves, verdicts = {}, []
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        full = [_scaled(row.scores) for row in own if row.rank is None]
        by_rank = {row.rank: _scaled(row.scores) for row in own if row.rank is not None}
        curves[_title(task)] = plots.RankCurve(by_rank, full[0] if full else None)
        for row in own:
            if row.rank == 1 and row.gap is not None:
                verdicts.append(f"{_title(task)}: {row.verdict}, {_points(row.gap)} points")
    seeds = Counter(row.scores.count for row in rows)
    listed = [
        [_title(row.task), row.recipe, _percent(row.scores),
         "–" if row.gap is None else _points(row.gap), {"no": "**no**", "": "–"}.get(row.verdict, row.verdict),
         f"{row.lr:.2g}{' (end of grid)' if row.edge else ''}", f"{row.trained:,}"]
        for row in rows
    ]  # fmt: skip
    header = ["task", "recipe", "score (95 %)", "points beside full (95 %)", f"within {margin:g} points", "learning rate"]
    header.append("trained")
    units = {_title(row.task): _unit(row.task) for row in rows}
    caption = "Mean over the seeds; bars and band are 95 % intervals (Student's t) of that mean."
    parts = [picture(plots.rank_scores(curves, units), "ranks", caption), table(header, listed)]
    outcome = f"Rank 1 within {margin:g} points of full fine-tuning? {'; '.join(verdicts)}." if verdicts else (
        f"{counted(len(trained), 'training')}; rank 1 and full fine-tuning are not both there yet."
    )  # fmt: skip
    caveat = (
        f"{' or '.join(map(str, sorted(seeds)))} seeds for each row; short trainings of as many steps for all. The best rate "
        f"is searched with one seed and shared by the others. {BASE}"
    )
    return Section("ranks", title, claim, command, outcome, parts, caveat, where(trained.values()))


def _ensemble(name: str, figures: Mapping[str, Any]) -> list[str]:
    tasks = list(figures["ensemble"])
    drawn = {}
    for task in tasks:
        members = [100 * member[task] for member in figures["members"]]
        mean = sum(members) / len(members)
        gain = _scaled(figures["gains"]["mean single"][task])
        together = plots.Interval(100 * figures["ensemble"][task], mean + gain.low, mean + gain.high)
        drawn[_title(task)] = plots.Ensemble(members, together)
    header = ["variant", "task", "mean single", "best single", "ensemble", "over the mean (95 %)", "over the best (95 %)"]
    rows = []
    for task in tasks:
        singles = [member[task] for member in figures["members"]]
        gains = [_points(figures["gains"][over][task]) for over in ("mean single", "best single")]
        scores = (sum(singles) / len(singles), max(singles), figures["ensemble"][task])
        rows.append([name, _title(task), *(f"{100 * score:.2f}" for score in scores), *gains])
    units = {_title(task): _unit(task).replace(", 0 to 1", ", × 100") for task in tasks}
    caption = (
        f"{name}: dots are the members, the stroke their mean; the bar is the 95 % bootstrap interval of the gain over it."
    )
    return [picture(plots.ensembles(drawn, units), f"ensemble-{name}", caption), table(header, rows)]


def ensembles(results: Results) -> Section:
    """Claim C."""
    found = cells(results, "quality")
    sets = {key.split("/")[1]: cell for key, cell in found.items() if key.startswith("C/") and key.endswith("/ensemble")}
    claim = (
        "Claim C, ensemble: several multitask models together are better than one of them. As adapters on one shared frozen "
        "backbone they cost little more than one model."
    )
    command, title = COMMAND.format("C"), "Ensembles on one backbone"
    if not sets:
        return Section("ensembles", title, claim, command)
    words, parts = [], []
    for name, cell in sets.items():
        figures = cell["figures"]
        gain, size = figures["gains"]["mean single"][OVERALL], figures["bytes"]
        verdict = "above the mean" if gain[1] > 0 else "below the mean" if gain[2] < 0 else "not told apart from the mean"
        share = size["shared"] / size["full"]
        members = counted(len(figures["members"]), "member")
        cost = f"at {share:.2f} of the bytes of as many full models"
        words.append(f"{name}, {members}: {verdict} single model, {_points(gain)} points overall, {cost}")
        parts += _ensemble(name, figures)
    caveat = (
        "The intervals resample the dev examples and hold the seeds fixed; the gain over the best single model is judged on "
        f"the dev set that chose that model. The overall score is (SST + Quora + (r + 1) / 2) / 3. {BASE}"
    )
    return Section("ensembles", title, claim, command, "; ".join(words) + ".", parts, caveat, where(sets.values()))
