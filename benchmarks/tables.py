"""Cells of result files as text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.contests import verdict


def _three(values: Sequence[float], form: str) -> str:
    median, low, high = (format(value, form) for value in values)
    return f"{median} ({low}..{high})"


MEASURES = {"step": "time", "cpu": "CPU time", "gflop": "FLOPs", "saved_mib": "saved", "forward_peak_mib": "forward peak"}


def _ratio(value: float | Sequence[float]) -> str:
    return f"{value:.3f}" if isinstance(value, float | int) else _three(value, ".3f")


def _marks(row: Mapping[str, Any]) -> str:
    marks = [f"{label}: {mark}" for measure, label in MEASURES.items() if (mark := verdict(row, measure))]
    return f" [!! {'; '.join(marks)}]" if marks else ""


def steps_table(cell: Mapping[str, Any]) -> str:
    """A cell of `benchmarks.steps` as text: machine, one line per candidate, one line per ratio."""
    facts, figures = cell["machine"], cell["figures"]
    commit = (facts["commit"] or "no commit")[:10] + (" with changes" if facts["dirty"] else "")
    lines = [
        f"{facts.get('gpu', facts['cpu'])}, {facts['threads']} threads, torch {facts['torch']}, {commit}, "
        f"{facts['date']}, load {facts['load_average']}; {figures['checks']} checks green",
        f"medians (20..80 %); x: share of {figures['baseline']}, pairs of a round; ops: forward+backward+optimizer",
        f"{'candidate':30}{'step ms':>26}{'forward':>9}{'backward':>9}{'optim.':>8}{'x wall':>22}{'x CPU':>22}"
        f"{'GFLOP':>8}{'saved MiB':>10}{'peak MiB':>9}{'ops':>16}{'trained':>12}",
    ]
    for name, row in figures["candidates"].items():
        ms = {phase: values[0] for phase, values in row["ms"].items()}
        wall, cpu = (_three(row["relative"][k], ".2f") if "relative" in row else "-" for k in ("step", "cpu"))
        lines.append(
            f"{name:30}{_three(row['ms']['step'], '.1f'):>26}{ms['forward']:9.1f}{ms['backward']:9.1f}"
            f"{ms['optimizer']:8.1f}{wall:>22}{cpu:>22}{row['gflop']:8.2f}{row['saved_mib']:10.1f}"
            f"{row['forward_peak_mib']:9.1f}{'+'.join(map(str, row['operations'].values())):>16}{row['trained']:12,d}"
        )
    lines.append("ratios of the best of each side (time by time, bytes by bytes), pairs of a round; > 1: the first costs more")
    for title, row in figures["ratios"].items():
        parts = [f"{label} {_ratio(row[measure])}" for measure, label in MEASURES.items() if measure in row]
        sides = {measure: " / ".join(row["sides"][measure]) for measure in ("step", "saved_mib")}
        lines.append(f"{title}: {', '.join(parts)}; time of {sides['step']}, bytes of {sides['saved_mib']}{_marks(row)}")
    return "\n".join(lines)


def layer_table(cell: Mapping[str, Any]) -> str:
    """A cell of `benchmarks.layer` as text: one line per candidate, one line per ratio."""
    figures = cell["figures"]
    titles = {"forward_peak_mib": "forward peak MiB", "step_peak_mib": "with backward", "saved_mib": "saved", "gflop": "GFLOP"}
    lines = [f"{figures['checks']} checks green", f"{'candidate':30}" + "".join(f"{title:>18}" for title in titles.values())]
    for name, row in figures["candidates"].items():
        lines.append(f"{name:30}" + "".join(f"{row[key]:18.2f}" for key in titles))
    for title, row in figures["ratios"].items():
        marks = {key: verdict(row, key) for key in titles}
        parts = [f"{label} {row[key]:.3f}" + (f" [!! {marks[key]}]" if marks[key] else "") for key, label in titles.items()]
        lines.append(f"{title}: {', '.join(parts)}")
    return "\n".join(lines)


def aot_table(entries: Sequence[Mapping[str, Any]], *, long: bool = False) -> str:
    """Entries of `benchmarks.aot` as text: a line per kernel, architecture and dtype, or with `long` one per variant.

    A line over several variants shows the greatest number where little is good, and the smallest of those variants that
    have any where much is good.
    """
    worst = {"registers": "regs", "shared": "shared B", "stack": "stack", "spills": "spills"}
    worst |= {"loads_16": "LDG.16", "loads_8": "LDG.8"}
    least = {"hmma": "HMMA", "hgmma": "HGMMA", "tcgen05": "tcgen05", "wide_loads": "LDG.128"}
    lines = [
        f"{'kernel':32}{'target':>8}{'dtype':>10}{'variants':>9}"
        + "".join(f"{title:>9}" for title in [*worst.values(), *least.values(), "atomics"])
        + "  roots and quotients"
    ]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for number, entry in enumerate(entries):
        key = (entry["kernel"], entry["architecture"], entry["dtype"], number if long else 0)
        groups.setdefault(key, []).append(entry)
    for (kernel, architecture, dtype, _), found in sorted(groups.items()):
        compiled = [entry for entry in found if "error" not in entry]
        figures = [max((entry[name] for entry in compiled), default=0) for name in worst]
        figures += [min((entry[name] for entry in compiled if entry[name]), default=0) for name in least]
        figures.append(max((entry["atomics"] for entry in compiled), default=0))
        forms = sorted({form for entry in compiled for form in entry["sqrt"] + entry["div"]})
        lines.append(
            f"{kernel:32}{architecture:>8}{dtype:>10}{len(found):9}"
            + "".join(f"{figure:9}" for figure in figures)
            + f"  {' '.join(forms)}"
            + (f"  {len(found) - len(compiled)} do not compile" if len(compiled) < len(found) else "")
            + (f"  {found[0]['why']}" if long else "")
        )
    return "\n".join(lines)
