"""What must agree: the memory estimate with the measurement, our training with the peer's, and what an operation takes."""

from collections import Counter
from typing import Any

from benchmarks.memory import LIMIT
from benchmarks.memory import met as estimate_holds
from benchmarks.page import Section, blocks, folded, picture, table
from benchmarks.parity import JUDGED
from benchmarks.parity import met as curves_agree
from benchmarks.plots import quality as plots
from benchmarks.sections.results import Results, cells, counted, where
from docs import suite_tables

PARITY_CAPTIONS = {
    "judged": "Relative difference of the losses, step by step, in fp32; a difference of zero is drawn at the foot.",
    "bf16": "The same under bf16 autocast, which is reported and not judged.",
}
OPERATIONS = {
    "lora": "LoRA's linear layer, forward and backward, at the smallest rank",
    "dora": "DoRA's linear layer, forward and backward, at the smallest rank",
    "row_norm": "Norms of the rows of W + sBA, forward alone, at the smallest rank",
}


def memory(results: Results) -> Section:
    """`estimate_memory` beside the measured peak."""
    found = cells(results, "memory")
    claim = "`peftlite.estimate_memory` foretells the peak of a training step before it is taken, to within 10 %."
    command, title = "python -m benchmarks.memory", "Memory, foretold"
    if not found:
        return Section("memory", title, claim, command)
    rows = {key: (cell["figures"]["estimate_mib"], cell["figures"]["measured_mib"]) for key, cell in found.items()}
    worst = max(max(abs(c["figures"]["error"]), abs(c["figures"]["added_error"])) for c in found.values())
    inside = sum(estimate_holds(cell["figures"]) for cell in found.values())
    made = blocks(suite_tables.memory(results["memory"], table))
    caption = "Deviation of the whole peak; the table also has that of what the step adds to what is there between two steps."
    parts = [picture(plots.estimates(rows, LIMIT), "memory", caption), folded("All figures", made)]
    outcome = f"{inside} of {counted(len(found), 'estimate')} within 10 %, the worst off by {worst:.1%}."
    caveat = "Bytes of tensors: what operations take inside themselves, and the allocator's fragments, are not in it."
    return Section("memory", title, claim, command, outcome, parts, caveat, where(found.values()))


def parity(results: Results) -> Section:
    """Training curves beside PEFT's."""
    found = cells(results, "peers")
    claim = "From the same factors, on the same data in the same order, our LoRA and DoRA train as PEFT's do: the losses agree."
    command, title = "python -m benchmarks.parity --data DIR", "The same training as PEFT's"
    if not found:
        return Section("parity", title, claim, command)
    judged = {key: cell["figures"] for key, cell in found.items() if cell["figures"]["limit"] is not None}
    others = {key: cell["figures"] for key, cell in found.items() if key not in judged}
    steps = min(JUDGED, *(len(cell["figures"]["deviation"]) for cell in found.values()))
    limit = max((figures["limit"] for figures in judged.values()), default=0.0)
    parts = []
    for name, group in (("judged", judged), ("bf16", others)):
        if group:
            runs = {_short(key): figures["deviation"] for key, figures in group.items()}
            drawn = plots.deviations(runs, limit if group is judged else None, steps)
            parts.append(picture(drawn, f"parity-{name}", PARITY_CAPTIONS[name]))
    parts.append(folded("All figures", blocks(suite_tables.parity(results["peers"], table))))
    inside = sum(map(curves_agree, judged.values()))
    worst = max((figures["worst"] for figures in judged.values()), default=0.0)
    outcome = (
        f"{inside} of {counted(len(judged), 'fp32 curve')} within {limit:.0e} of PEFT's over the first {steps} steps, the "
        f"farthest {worst:.1e} away."
    )
    caveat = "Roundings differ where operations are fused or in another order, and training magnifies them step by step."
    return Section("parity", title, claim, command, outcome, parts, caveat, where(found.values()))


def _short(key: str) -> str:
    return ", ".join(part for part in key.split(", ") if part != "cpu")


def kernels(results: Results) -> Section:
    """What an operation takes by every implementation."""
    found = cells(results, "kernels")
    measured = {key: cell for key, cell in found.items() if "candidates" in cell["figures"]}
    claim = (
        "One operation, forward and backward: ours takes no longer than its plain reference, than `torch.compile` of that, and "
        "than the peers' formulas written as plain functions."
    )
    command, title = "python -m benchmarks.kernels", "Operations"
    if not measured:
        return Section("kernels", title, claim, command)
    counts: dict[str, Counter[str]] = {}
    listed, drawn, slow = [], {}, 0
    for key, cell in measured.items():
        figures, settings = cell["figures"], cell["settings"]
        for name, row in figures["candidates"].items():
            phase = "both" if "both" in row["ms"] else "forward"
            ratio, ours = row["relative"][phase], name.startswith(figures["baseline"]) or name == "triton"
            ahead = f"{name} is ahead" if ratio[2] < 1 else f"{name} is ahead, within noise" if ratio[0] < 1 else ""
            bytes_ = [f"{row[measure]:.2f}" if measure in row else "–" for measure in ("saved_mib", "forward_peak_mib")]
            time, share = _three(row["ms"][phase]), _three(ratio)
            listed.append([key, name, time, share, *bytes_, "" if ours else ahead])
            if not ours:
                side = "slower" if ratio[2] < 1 else "quicker" if ratio[1] > 1 else "level"
                counts.setdefault(name, Counter())[side] += 1
                slow = max(slow, settings["in_features"], settings["out_features"]) if side == "slower" else slow
            if name != figures["baseline"] and settings["rank"] == min(c["settings"]["rank"] for c in measured.values()):
                size = f"{settings['model']} {settings['in_features']} → {settings['out_features']}, {settings['dtype']}"
                drawn.setdefault(settings["operation"], {}).setdefault(size, {})[name] = plots.Interval(*ratio)
    parts = []
    for operation, rows in drawn.items():
        unit = "time over ours (no unit, logarithmic); bar: 20 to 80 % of the rounds"
        caption = f"{OPERATIONS.get(operation, operation)}. Right of the line ours is quicker."
        parts.append(picture(plots.effects(rows, unit, operation), f"kernels-{operation}", caption))
    header = ["cell", "candidate", "ms (20..80 %)", "over ours", "saved, MiB", "peak of the forward, MiB", "ahead"]
    parts.append(folded("All figures", table(header, listed)))
    left = [[key, cell["figures"]["left_out"]] for key, cell in found.items() if "left_out" in cell["figures"]]
    absent = dict.fromkeys(pair for cell in measured.values() for pair in cell["figures"]["absent"].items())
    if left or absent:
        rows = [*left, *map(list, absent)]
        parts.append(folded("What was left out, and why", table(["what", "why"], rows)))
    words = [f"than {name} in {c['quicker']}, level in {c['level']}, slower in {c['slower']}" for name, c in counts.items()]
    outcome = f"Of {counted(len(measured), 'case')} ours is quicker {'; '.join(words)}."
    caveat = "Times of this machine's processor; what the Triton kernels take on a GPU is not in them unless a row says triton."
    if slow:
        caveat += (
            f" Ours is slower in layers of at most {slow:,} features alone: there the fixed costs of an autograd function in "
            "Python weigh, the compiler fuses what ATen's calls do not, and the formulas have none of the peers' modules and "
            "checks; the training steps above have them."
        )
    return Section("kernels", title, claim, command, outcome, parts, caveat, where(measured.values()))


def _three(values: Any) -> str:
    return f"{values[0]:.3g} ({values[1]:.3g}..{values[2]:.3g})"
