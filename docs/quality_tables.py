"""The tables of `benchmarks.quality`, from its result file; for `docs.generate`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.efficiency_claim import TARGETS, candidates, effects, score_cell
from benchmarks.ensemble_claim import OVERALL, VARIANTS
from benchmarks.intervals import Interval, not_worse
from benchmarks.rank_claim import MARGIN, Row, rows
from benchmarks.study import TASKS
from benchmarks.targets import PAPER, judge
from docs.method_tables import NONE, place, size
from examples.minbert_multitask import tasks

QUORA_PAIRS = 141_506
Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
Found = Mapping[str, Any]
NO_RESULT = "No result is committed yet."
BASE = (
    "the base is all-MiniLM-L6-v2, which has an eighth of BERT-base's layer weights and was tuned for sentence similarity: "
    "similarity starts high, and Quora's questions were among its training pairs, so that Quora's figures are contaminated"
)


def caption(cells: Mapping[str, Any]) -> str:
    """What every table says of the base and of the machines that its cells were measured on."""
    settings = next(iter(cells.values()))["settings"]
    base = BASE if settings["weights"] == "minilm" else f"the base is {settings['weights']}"
    places = "; ".join(sorted({place(cell["machine"]) for cell in cells.values()}))
    return f"{places}. Note that {base}."


def of_claim(found: Found, claim: str) -> dict[str, Any]:
    """The cells of one claim."""
    return {key: cell for key, cell in found["cells"].items() if key.startswith(f"{claim}/")}


def title(task: str) -> str:
    """A task's name in a table."""
    return tasks.TASKS[task].title


def points(value: Sequence[float]) -> str:
    """A mean with its bounds, in points."""
    mean, low, high = value[:3]
    bounds = f"{100 * low:+.1f}..{100 * high:+.1f}" if math.isfinite(low) else "one seed"
    return f"{100 * mean:+.1f} ({bounds})"


def score(interval: Interval) -> str:
    """A mean with half the width of its interval."""
    return f"{interval.mean:.4f}" + (f" ± {interval.high - interval.mean:.4f}" if math.isfinite(interval.high) else "")


def rank(found: Found, table: Table) -> str:
    """Claim B: every rank on every task beside full fine-tuning, and what the intervals decide of rank 1."""
    cells = of_claim(found, "B")
    trainings = [cell for key, cell in cells.items() if not key.endswith("/search")]
    if not trainings:
        return NO_RESULT
    judged, settings = rows(cells), trainings[0]["settings"]
    body = [
        [
            title(row.task), row.recipe, f"{row.trained:,}", size(row.bytes), f"{row.lr:.1g}" + (" (edge)" if row.edge else ""),
            f"{score(row.scores)} ({row.scores.count})", points(row.gap) if row.gap else NONE, row.verdict or NONE,
        ]
        for row in judged
    ]  # fmt: skip
    header = ["task", "", "trained", "checkpoint", "learning rate", "dev score (seeds)", "beside full, points"]
    header.append(f"within {100 * MARGIN:g} points")
    length = f"{settings['steps']} steps" if settings["steps"] else f"{settings['epochs']} epoch(s)"
    sizes = {
        cell["settings"]["task"]: f"{title(cell['settings']['task'])} {cell['figures']['examples']['train']:,} and "
        f"{cell['figures']['examples']['dev']:,}"
        for cell in trainings
    }
    note = (
        f"{length} of {settings['batch_size']} examples for every training, autocast {settings['amp']}; examples to train on "
        f"and in dev: {', '.join(sizes.values())}. Quora's official training file has {QUORA_PAIRS:,} pairs. Learning rates: "
        f"{settings['grid']} for every recipe and task, each for {settings['search_examples']} examples, judged on "
        f"{settings['held_examples']} others of train, then whole trainings at the best and at a third of it, judged by the "
        "loss of their last tenth; (edge) marks a rate at an end of what was tried. Intervals are 95 %, Student's t over the "
        "seeds; differences are paired by seed."
    )
    return f"{note} {caption(cells)}\n\n{table(header, body)}\n\n{verdicts(judged)}"


def verdicts(judged: Sequence[Row]) -> str:
    """Claim B in a sentence for each task."""
    first = {row.task: row for row in judged if row.rank == 1 and row.gap is not None}
    parts = [f"{title(task)}: {row.verdict} ({points(row.gap)})" for task, row in first.items()]
    return f"Rank 1 within {100 * MARGIN:g} points of full fine-tuning: {'; '.join(parts) or 'not measured'}."


def ensembles(found: Found, table: Table) -> str:
    """Claim C: members, ensemble, gains and bytes of each variant."""
    cells, parts = of_claim(found, "C"), []
    names = (*TASKS, OVERALL)
    for variant in VARIANTS:
        cell = cells.get(f"C/{variant}/ensemble")
        if cell is None:
            continue
        figures, settings = cell["figures"], cell["settings"]
        members = figures["members"]
        body = [[f"member {i}", *(f"{row[name]:.4f}" for name in names)] for i, row in enumerate(members)]
        body.append(["mean single", *(f"{sum(row[name] for row in members) / len(members):.4f}" for name in names)])
        body.append(["ensemble", *(f"{figures['ensemble'][name]:.4f}" for name in names)])
        for over, gains in figures["gains"].items():
            body.append([f"over the {over}, points", *(points(gains[name]) for name in names)])
        held = figures["bytes"]
        note = (
            f"{variant}: {settings['backbones']} backbone(s), {settings['head']} heads, {settings['sts_loss']} loss for "
            f"similarity, LoRA of rank {settings['rank']} in all linear layers; {settings['members']} members of "
            f"{settings['member_steps']} steps of {settings['batch_size']} examples, the tasks in turn."
        )
        each = {name: size(held[name] / len(members)) for name in ("members", "adapters", "heads")}
        cost = (
            f"Saved: one backbone of {size(held['backbone'])} and {len(members)} members of {each['members']} each (adapters "
            f"{each['adapters']}, heads {each['heads']}), together {size(held['shared'])}, which is "
            f"{held['shared'] / held['full']:.2f} of the {size(held['full'])} of as many full models."
        )
        above = [f"the {over}: {not_worse(Interval(*gains[OVERALL]), 0.0)}" for over, gains in figures["gains"].items()]
        verdict = f"Overall the ensemble is above {', above '.join(above)}."
        parts.append(f"{note}\n\n{table(['', *map(title, TASKS), OVERALL], body)}\n\n{verdict} {cost}")
    if not parts:
        return NO_RESULT
    note = (
        "Gains with 95 % bootstrap intervals over the dev examples, paired; the seeds are held fixed, and dev itself chose the "
        "best single, which favours it. "
    )
    return "\n\n".join([note + caption(cells), *parts])


def efficiency(found: Found, table: Table) -> str:
    """Claim A: cost and score of every candidate on every task, and each effect alone."""
    costs = {task: found["cells"][key] for task in TASKS if (key := f"A/{task}/cost") in found["cells"]}
    if not costs:
        return NO_RESULT
    parts = []
    for task, cell in costs.items():
        figures, body = cell["figures"], []
        for name, row in figures["candidates"].items():
            scored = found["cells"].get(score_cell(task, candidates()[name]))
            times = [f"{a:.0f} ({b:.0f}..{c:.0f})" for a, b, c in (row["epoch_seconds"], row["epoch_cpu_seconds"])]
            bytes_ = [f"{row[key]:.1f}" for key in ("saved_mib", "peak_mib")]
            body.append([name, *times, *bytes_, f"{row['trained']:,}", f"{scored['figures']['dev']:.4f}" if scored else NONE])
        note = (
            f"{title(task)}, batches of {figures['batch_size']}: an epoch of {figures['epoch_steps']:,} steps, scaled from "
            f"passes over {len(figures['widths'])} of its batches, {', '.join(map(str, figures['widths']))} tokens wide."
        )
        header = ["", "s per epoch (20..80 %)", "CPU s", "saved, MiB", "peak, MiB", "trained", "dev score"]
        parts.append(f"{note}\n\n{table(header, body)}")
    parts.append(f"Each effect alone, as ratios of paired passes (20..80 %).\n\n{_effects(costs, table)}")
    note = (
        "Peak is what weights, gradients, optimizer and activations hold at once; saved is what autograd keeps for backward; "
        "both on the longest of the pass's batches. Scores are of one seed, at the learning rates that claim B settled on "
        "under autocast, and after as many steps as there."
    )
    return "\n\n".join([f"{note} {caption(costs)}", *parts, verdict(costs)])


def _effects(costs: Mapping[str, Any], table: Table) -> str:
    body = []
    for name in effects():
        found = [cell["figures"]["effects"][name] for cell in costs.values()]
        times = [f"{row['step'][0]:.2f} ({row['step'][1]:.2f}..{row['step'][2]:.2f})" for row in found]
        body.append([name, *times, *(" / ".join(f"{row[key]:.2f}" for row in found) for key in ("saved_mib", "peak_mib"))])
    names = " / ".join(map(title, costs))
    return table(["", *(f"time, {title(task)}" for task in costs), f"saved: {names}", f"peak: {names}"], body)


def verdict(costs: Mapping[str, Any]) -> str:
    """Of each way to train all linear layers a line: whether it beats full fine-tuning in time and in saved bytes."""
    ways = [f"{name} alone: {TARGETS[1]}, {precision}" for name in ("LoRA", "DoRA") for precision in ("fp32", "bf16")]
    sentences = []
    for way in ways:
        found = [cell["figures"]["effects"][way] for cell in costs.values()]
        medians, highest = [row["step"][0] for row in found], max(row["step"][2] for row in found)
        saved = max(row["saved_mib"] for row in found)
        if highest < 1:
            quick = "yes"
        elif max(medians) < 1:
            quick = "by the median of each task"
        else:
            quick = "no" if min(row["step"][1] for row in found) > 1 else "not on every task"
        sentences.append(
            f"* {way.replace(' alone:', '')}: faster than full fine-tuning: {quick} (medians "
            f"{', '.join(f'{median:.2f}' for median in medians)}; 80 % quantile at most {highest:.2f}); "
            f"fewer saved bytes: {'yes' if saved < 1 else 'no'} (at most {saved:.2f})."
        )
    return "\n".join(sentences)


def targets(found: Found, table: Table) -> str:
    """Every figure to reproduce beside ours."""
    header = ["", "claimed", "authors' raw figure", "ours", "met", "what to bear in mind"]
    note = f"Authors' raw figures: {PAPER['raw']}. Lin: {PAPER['second']}."
    return f"{note} {caption(found['cells'])}\n\n{table(header, judge(found['cells']))}"


BLOCKS = {"efficiency": efficiency, "rank": rank, "ensembles": ensembles, "targets": targets}
