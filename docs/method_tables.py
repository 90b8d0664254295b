"""The tables of `benchmarks.methods`, from its result files; for `docs.generate`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from examples.minbert_multitask.tasks import TASKS

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
Found = Mapping[str, Any]
NONE = "–"
BASELINE = "lora"


def place(facts: Mapping[str, Any]) -> str:
    """Machine, versions and commit of a cell, in words."""
    state = " with changes" if facts["dirty"] else ""
    versions = f"Python {facts['python']}, torch {facts['torch']}"
    commit = (facts["commit"] or "none")[:10]
    return f"{facts.get('gpu') or facts['cpu']}, {facts['threads']} thread(s), {versions}; commit {commit}{state}"


def places(found: Found) -> str:
    """Those of all cells, each once."""
    return "; ".join(sorted({place(cell["machine"]) for cell in found["cells"].values()}))


def size(count: float) -> str:
    """Bytes in KiB, or in MiB from ten of them on."""
    return f"{count / 2**20:.1f} MiB" if count >= 10 * 2**20 else f"{count / 2**10:.0f} KiB"


def cost(found: Found, table: Table) -> str:
    """A table for each model."""
    parts = []
    for key, cell in found["cells"].items():
        settings, figures = cell["settings"], cell["figures"]
        rows = [
            [
                name,
                f"{row['trained']:,}",
                f"{row['relative']['step'][0]:.2f} ({row['relative']['step'][1]:.2f}..{row['relative']['step'][2]:.2f})",
                f"{row['gflop']:.2f}",
                f"{row['saved_mib']:.1f} MiB",
                size(row["checkpoint_bytes"]),
            ]
            for name, row in figures["candidates"].items()
        ]
        milliseconds = figures["candidates"][figures["baseline"]]["ms"]["step"][0]
        note = (
            f"{key}, batch {settings['rows']} × {settings['length']}, fp32. {place(cell['machine'])}. Step times are shares of "
            f"LoRA's, {milliseconds:.0f} ms, in the same round, with their 20 and 80 % quantiles."
        )
        header = ["", "trained", "step time / LoRA's", "GFLOP", "saved for backward", "checkpoint"]
        parts.append(f"{note}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def paired(right: str, other: str) -> tuple[float, float]:
    """Difference of two accuracies on the same examples, and its standard error, from strings of 1 (right) and 0."""
    differences = [int(a) - int(b) for a, b in zip(right, other, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / max(1, len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))


def points(right: str, other: str) -> str:
    """That difference in points, with its standard error."""
    mean, error = paired(right, other)
    return f"{100 * mean:+.1f} ± {100 * error:.1f}"


def protocol(found: Found) -> str:
    """What all cells share, in words."""
    settings = next(iter(found["cells"].values()))["settings"]
    same = {key for key in settings if all(cell["settings"].get(key) == settings[key] for cell in found["cells"].values())}
    names = ("epochs", "batch_size", "search_examples", "held_examples", "grid", "grow", "descend", "amp", "seed")
    shared = ", ".join(f"{name.replace('_', ' ')} {settings[name]}" for name in names if name in same)
    train, dev = settings["examples"][:2]
    title = TASKS[settings.get("task", "sst")].title
    return f"MiniLM on {title}, {train:,} sentences to train on, {dev:,} in dev; {shared}. {places(found)}."


def accuracy(found: Found, table: Table) -> str:
    """Every recipe, best first, beside LoRA."""
    cells = found["cells"]
    reference = cells.get(BASELINE)
    rows = []
    for name, cell in sorted(cells.items(), key=lambda item: -item[1]["figures"]["dev"]):
        figures, settings = cell["figures"], cell["settings"]
        adapted = settings["method"] not in ("full", "linear-probe", "bitfit", "lisa", "ia3")
        against = points(figures["right"], reference["figures"]["right"]) if reference and name != BASELINE else NONE
        rows.append(
            [
                name,
                str(settings["rank"]) if adapted else NONE,
                f"{figures['dev']:.3f}",
                against,
                f"{figures['lr']:.1g}",
                f"{figures['trained']:,}",
                f"{figures['cpu_seconds'] / 60:.1f}",
                size(figures["bytes"]),
            ]
        )
    header = ["", "rank", "dev accuracy", "points beside LoRA", "learning rate", "trained", "CPU minutes", "checkpoint"]
    return f"{protocol(found)}\n\n{table(header, rows)}"


def ranks(found: Found, table: Table) -> str:
    """DyLoRA's one training, in either way of updating, cut to each rank, beside LoRA trained at that rank."""
    cells = found["cells"]
    if "dylora" not in cells:
        return "No result is committed yet."
    dylora = cells["dylora"]["figures"]
    full = cells["dylora"]["settings"]["rank"]
    whole = cells["dylora-full"]["figures"]["ranks"] if "dylora-full" in cells else {}
    rows, minutes = [], []
    for rank, row in dylora["ranks"].items():
        lora = cells.get(BASELINE if int(rank) == full else f"lora-r{rank}")
        own = lora["figures"] if lora else None
        minutes += [own["cpu_seconds"] / 60] if own else []
        rows.append(
            [
                rank,
                f"{row['dev']:.3f}",
                f"{whole[rank]['dev']:.3f}" if whole else NONE,
                f"{own['dev']:.3f}" if own else NONE,
                points(row["right"], own["right"]) if own else NONE,
                points(whole[rank]["right"], own["right"]) if own and whole else NONE,
            ]
        )
    note = (
        f"DyLoRA: one training, {dylora['cpu_seconds'] / 60:.1f} CPU minutes. LoRA: {len(minutes)} trainings, "
        f"{sum(minutes):.1f} CPU minutes together; the searches for the learning rate, one for each training, come on top."
    )
    full_update = 'with update="full"'
    header = ["rank", "DyLoRA cut to it", full_update, "LoRA trained at it", "DyLoRA beside LoRA, points", full_update]
    return f"{table(header, rows)}\n\n{note}"


def intruders(found: Found, table: Table) -> str:
    """Counts at each threshold, and what the updates look like."""
    thresholds = list(next(iter(found["cells"].values()))["figures"]["intruders"])
    rows = []
    for name, cell in found["cells"].items():
        figures = cell["figures"]
        directions = figures["top"] * (figures["matrices"] + figures["unchanged"])
        rows.append(
            [
                name,
                f"{figures['lr']:.1g}",
                f"{figures['dev']:.3f}",
                *(f"{figures['intruders'][threshold]} of {directions}" for threshold in thresholds),
                str(figures["rotations"]),
                f"{figures['median_cosine']:.3f}",
                f"{figures['effective_rank']:.1f}",
                f"{figures['relative_norm']:.3f}",
            ]
        )
    header = ["", "learning rate", "dev accuracy", *(f"cosine < {threshold}" for threshold in thresholds)]
    header += ["rotations", "median cosine", "effective rank of ΔW", "‖ΔW‖ / ‖W‖"]
    return f"{places(found)}.\n\n{table(header, rows)}"


def qlora(found: Found, table: Table) -> str:
    """Bytes of the base, and the short run of several processes beside that of one."""
    cell = found["cells"]["qlora"]
    figures = cell["figures"]
    base, processes = figures["base"], max(figures["seconds"], key=int)
    rows = [
        ["adapted matrices, dense fp32", f"{figures['dense_bytes_per_number']:.4f} bytes per number"],
        ["the same in NF4, as held", f"{base['bytes_per_number']:.4f} bytes per number ({size(base['bytes'])})"],
        ["the format's own figure", f"{figures['format_bits'] / 8:.4f} bytes per number"],
        [f"trained tensors of the {processes} processes", "equal bit for bit" if figures["ranks_equal"] else "differ"],
        [f"{processes} processes beside one", f"{figures['difference']:.1e} of what training changed"],
        ["dev sentences that both answer alike", f"{figures['agreement']:.1%}"],
    ]
    short = cell["settings"]
    note = f"Short run: {short['examples']} sentences, batches of {short['batch_size']}, fp32. {place(cell['machine'])}."
    return f"{note}\n\n{table(['', ''], rows)}"


def qlora_accuracy(found: Found, table: Table) -> str:
    """QLoRA beside LoRA in fp32 and LoRA as the others are trained."""
    cells = found["cells"]
    names = [name for name in ("lora-fp32", BASELINE, "qlora") if name in cells]
    if "lora-fp32" not in names:
        return "No result is committed yet."
    reference = cells["lora-fp32"]["figures"]["right"]
    rows = []
    for name in names:
        figures = cells[name]["figures"]
        against = points(figures["right"], reference) if name != "lora-fp32" else NONE
        rows.append([name, f"{figures['dev']:.3f}", against, f"{figures['lr']:.1g}"])
    return table(["", "dev accuracy", "points beside LoRA in fp32", "learning rate"], rows)
