"""The tables of the suites `memory`, `peers` and `kernels`, from their result files; for `docs.generate`."""

from collections.abc import Mapping
from typing import Any

from benchmarks.kernels import UNITS
from benchmarks.memory import LIMIT
from benchmarks.memory import met as estimate_holds
from benchmarks.parity import JUDGED
from benchmarks.parity import met as curves_agree
from docs.method_tables import NONE, Table, places

Found = Mapping[str, Any]
WORDS = {True: "yes", False: "**no**"}


def memory(found: Found, table: Table) -> str:
    """A row for each cell: the estimate, the step's own peak, the error, and the growth of the resident set."""
    rows = []
    for key, cell in found["cells"].items():
        figures = cell["figures"]
        grown = figures["rss_growth_mib"]
        rows.append(
            [
                key,
                f"{figures['estimate_mib']:.1f}",
                f"{figures['measured_mib']:.1f}",
                f"{figures['error']:+.2%}",
                f"{figures['added_error']:+.2%}",
                f"{figures['estimate_growth_mib']:.1f} / {NONE if grown is None else f'{grown:.1f}'}",
                f"{figures['seconds']:.1f}",
                WORDS[estimate_holds(figures)],
            ]
        )
    header = ["", "estimate, MiB", "measured", "error", "error of what the step adds", "growth: estimate / resident set"]
    return f"{places(found)}.\n\n{table([*header, 'estimated in, s', f'below {LIMIT:.0%}'], rows)}"


def parity(found: Found, table: Table) -> str:
    """A row for each cell: where the curves went, and how far apart."""
    rows = []
    for key, cell in found["cells"].items():
        figures = cell["figures"]
        curve = figures["curves"]["ours"]
        judged = figures["limit"] is not None
        rows.append(
            [
                key,
                f"{curve[0]:.4f} → {curve[-1]:.4f}",
                f"{figures['worst']:.1e}",
                f"{figures['worst_all']:.1e}",
                f"{figures['update_deviation']:.1e}",
                f"{WORDS[curves_agree(figures)]} (≤ {figures['limit']:.0e})" if judged else "not judged",
            ]
        )
    header = ["", "loss", f"largest deviation, first {JUDGED} steps", "all steps", "of an update, after the last", "agree"]
    peft = sorted({str(cell["machine"]["peft"]) for cell in found["cells"].values()})
    return f"{places(found)}; PEFT {', '.join(peft)}.\n\n{table(header, rows)}"


def kernels(found: Found, table: Table) -> str:
    """Two tables for each operation, times and counts, a row for each cell; then what was left out, and who was absent."""
    parts, left = [f"{places(found)}."], []
    measured: dict[str, dict[str, Found]] = {}
    absent: dict[str, None] = {}
    for key, cell in found["cells"].items():
        figures = cell["figures"]
        if "left_out" in figures:
            left.append(f"* {key}: {figures['left_out']}.")
            continue
        operation = cell["settings"]["operation"]
        measured.setdefault(operation, {})[key] = cell
        absent |= dict.fromkeys(f"* {name} of {operation}: {why}." for name, why in figures["absent"].items())
    for operation, cells in measured.items():
        parts.append(_operation(operation, cells, table))
    for title, lines in (("Left out:", left), ("Did not take part:", list(absent))):
        if lines:
            parts += [title, "\n".join(lines)]
    return "\n\n".join(parts)


def _operation(operation: str, cells: Mapping[str, Found], table: Table) -> str:
    """Ours in milliseconds and the others in multiples of that, with the backward pass where there is one; then what counts."""
    ours = next(iter(cells.values()))["figures"]["baseline"]
    others = list(dict.fromkeys(name for cell in cells.values() for name in cell["figures"]["candidates"] if name != ours))
    counted = [name for name in (ours, *others) if any(_counts(cell, name) for cell in cells.values())]
    timed, metered = [], []
    for cell in cells.values():
        settings, candidates = cell["settings"], cell["figures"]["candidates"]
        shape = f"{settings['model']}: {settings['in_features']} → {settings['out_features']}"
        batch = "" if operation == "row_norm" else f", {settings['rows']} rows"
        own = candidates[ours]["ms"]
        last = list(own)[-1]
        times = [f"{own[phase][0]:.3f}" if phase in own else NONE for phase in ("forward", "both")]
        shares = [_spread(candidates[name]["relative"][last]) if name in candidates else NONE for name in others]
        counts = [" / ".join(f"{value:.2f}" for value in _counts(cell, name)) or NONE for name in counted]
        title = f"{shape}{batch}, r = {settings['rank']}, {settings['dtype']}"
        timed.append([title, *times, *shares])
        metered.append([title, *counts])
    header = [operation, f"{ours}, forward, ms", "with backward, ms", *(f"{name}, × that" for name in others)]
    counts_of = f"{operation}: {' / '.join(UNITS.values())}"
    return f"{table(header, timed)}\n\n{table([counts_of, *counted], metered)}"


def _counts(cell: Found, name: str) -> list[float]:
    row = cell["figures"]["candidates"].get(name, {})
    return [row[count] for count in UNITS if count in row]


def _spread(value: list[float]) -> str:
    median, low, high = value
    return f"{median:.2f} ({low:.2f}..{high:.2f})"
