"""Figures of the step and layer suites: who is ahead, against full fine-tuning, and how cost grows with size."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.candidates import BASELINE, of_library
from benchmarks.claims import BASE
from benchmarks.contests import best
from benchmarks.plots.style import (
    AMBER,
    BLUE,
    FAINT,
    GREEN,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PAGE,
    PURPLE,
    SIZE,
    at_values,
    below,
    legend,
    logarithmic,
    panels,
    ratios,
    titles,
)

Cells = Mapping[str, Mapping[str, Any]]


class Series(NamedTuple):
    """How a contest or a candidate is drawn."""

    label: str
    colour: str
    marker: str


PEERS = {
    "peft LoRA / ours": Series("peft LoRA", ORANGE, "o"),
    "peft DoRA / ours": Series("peft DoRA", AMBER, "D"),
    "loralib LoRA / ours": Series("loralib LoRA", PURPLE, "s"),
}
FULL = {
    "ours LoRA / full": Series("LoRA ÷ full, same precision", BLUE, "o"),
    "ours DoRA / full": Series("DoRA ÷ full, same precision", GREEN, "D"),
    "full / full fp32": Series("full, autocast alone ÷ fp32", INK, "^"),
    "ours LoRA / full fp32": Series("LoRA and autocast ÷ full fp32", ORANGE, "s"),
    "ours DoRA / full fp32": Series("DoRA and autocast ÷ full fp32", PURPLE, "v"),
}
KINDS = {  # library and method of what is drawn over size
    (None, BASELINE): Series("full", INK, "^"),
    ("ours", "lora"): Series("LoRA", BLUE, "o"),
    ("ours", "dora"): Series("DoRA", GREEN, "D"),
    ("peft", "lora"): Series("peft LoRA", ORANGE, "o"),
    ("peft", "dora"): Series("peft DoRA", AMBER, "D"),
}
MARKS = {"peft": (ORANGE, "D"), "loralib": (PURPLE, "s"), "": (BLUE, "o")}  # by the library that a candidate is named after
AXES = {"rows": "batch, sequences", "length": "sequence length, tokens", "width": "width, features", "rank": "rank"}


def cell_label(settings: Mapping[str, Any]) -> str:
    """A cell in a few words: its precision, and what is not as in the claims' cell."""
    words = ["fp32" if settings["amp"] == "off" else "bf16 autocast"]
    if (settings["rows"], settings["length"]) != (BASE["rows"], BASE["length"]):
        words.append(f"{settings['rows']}×{settings['length']}")
    for name, form in (("width", "width {}"), ("layers", "{} layers"), ("targets", "{}"), ("rank", "r={}")):
        if settings[name] != BASE[name]:
            words.append(form.format(settings[name]))
    if settings["dropout"]:
        words.append(f"dropout {settings['dropout']:g}")
    return ", ".join(words)


def forest(cells: Cells, series: Mapping[str, Series], *, ahead: tuple[str, str]) -> Figure:
    """Ratios of step time (median, 20 to 80 % of the pairs) and of saved bytes, a row for each cell, with a line at 1.

    Args:
        cells: of the step suite.
        series: the contests to draw, by title.
        ahead: what being left of 1 means, and right of it.
    """
    shown = {key: cell for key, cell in cells.items() if series.keys() & cell["figures"]["ratios"].keys()}
    height = 1.3 + len(shown) * (0.12 * len(series) + 0.14)
    figure, axes = panels(10.2, max(2.6, height), 2, sharey=True, width_ratios=[1.5, 1])
    values: list[float] = [1.0]
    for ax, measure in zip(axes, ("step", "saved_mib"), strict=True):
        ax.axvline(1, color=INK, linewidth=1.2, zorder=1)
        named: dict[str, Series] = {}
        for row, cell in enumerate(shown.values()):
            if row % 2:
                ax.axhspan(row - 0.5, row + 0.5, color=GRID, alpha=0.45, linewidth=0, zorder=0)
            for index, (title, drawn) in enumerate(series.items()):
                found = cell["figures"]["ratios"].get(title, {}).get(measure)
                if found is None:
                    continue
                middle, low, high = found if isinstance(found, list) else (found, found, found)
                values += [low, high]
                place = row + (index - (len(series) - 1) / 2) * 0.72 / len(series)
                ax.plot([low, high], [place, place], color=drawn.colour, linewidth=1.6, zorder=2)
                full = not title.endswith("/ ours") or middle >= 1
                ax.plot(middle, place, drawn.marker, color=drawn.colour, markersize=6, zorder=3,
                        markerfacecolor=drawn.colour if full else PAGE)  # fmt: skip
                named[title] = drawn
        for drawn in named.values():
            ax.plot([], [], drawn.marker, color=drawn.colour, markersize=6, label=drawn.label)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(shown)), [cell_label(cell["settings"]) for cell in shown.values()])
    axes[0].set_ylim(len(shown) - 0.5, -0.5)
    for ax in axes:
        ax.set_xlim(min(values) / 1.15, max(values) * 1.15)
        ratios(ax.xaxis)
        for side, text, align in ((6, f"{ahead[1]} →", "left"), (-6, f"← {ahead[0]}", "right")):
            ax.annotate(text, (1, 1), xycoords=ax.get_xaxis_transform(), xytext=(side, 2), textcoords="offset points", ha=align,
                        fontsize=SIZE - 1.5, color=MUTED, va="bottom")  # fmt: skip
    titles(axes[0], "Step time\n", "ratio of step times (no unit); bar: 20 to 80 % of the rounds")
    titles(axes[1], "Saved for backward\n", "ratio of bytes (no unit); exact")
    below(figure, axes[0], 3, place="upper")  # the figure may be taller than a screen
    return figure


def along(cells: Cells, axis: str, amp: str) -> list[Mapping[str, Any]]:
    """The cells that differ from the claims' cell in `axis` alone, by its value."""
    rest = {key: value for key, value in (BASE | {"dropout": 0.0, "amp": amp}).items() if key != axis}
    found = [cell for cell in cells.values() if rest.items() <= cell["settings"].items()]
    return sorted(found, key=lambda cell: cell["settings"][axis])


def leading(cell: Mapping[str, Any], library: str | None, method: str, measure: str) -> Mapping[str, Any] | None:
    """Of a cell's candidates that are `method` of `library`, in the cell's precision, the figures of the best by `measure`."""
    rows: Mapping[str, Mapping[str, Any]] = cell["figures"]["candidates"]
    names = of_library([name for name in rows if not name.endswith("@fp32")], library, method)
    return rows[best(names, rows, measure)] if names else None


def scaling(cells: Cells, amp: str) -> Figure | None:
    """Step time and saved bytes over batch, sequence, width and rank, one of them at a time; None if none varies."""
    varied = {axis: found for axis in AXES if len(found := along(cells, axis, amp)) > 1}
    if not varied:
        return None
    figure, axes = panels(max(5.4, 2.75 * len(varied)), 5.8, len(varied), 2, sharey="row")
    for column, (axis, found) in enumerate(varied.items()):
        for ax, measure in zip((axes[column], axes[len(varied) + column]), ("step", "saved_mib"), strict=True):
            for (library, method), drawn in KINDS.items():
                points = []
                for cell in found:
                    row = leading(cell, library, method, measure)
                    if row is not None:
                        value = row["ms"]["step"] if measure == "step" else [row[measure]] * 3
                        points.append((cell["settings"][axis], *value))
                if points:
                    x, middle, low, high = zip(*points, strict=True)
                    ax.plot(x, middle, f"{drawn.marker}-", color=drawn.colour, markersize=4.5, linewidth=1.5, label=drawn.label)
                    ax.fill_between(x, low, high, color=drawn.colour, alpha=0.15, linewidth=0)
            logarithmic(ax.xaxis)
            at_values(ax.xaxis, [cell["settings"][axis] for cell in found])
            logarithmic(ax.yaxis)
            titles(ax, "", AXES[axis] if measure == "saved_mib" else "")
    axes[0].set_ylabel("step, ms", fontsize=SIZE, color=INK)
    axes[len(varied)].set_ylabel("saved for backward, MiB", fontsize=SIZE, color=INK)
    below(figure, axes[0])
    return figure


def layer(cells: Cells) -> Figure:
    """Peak bytes of the forward of one large layer, a row for each candidate of each cell."""
    rows = [
        (f"{name}, {'autocast' if cell['settings']['amp'] else 'no autocast'}"
         + (f", dropout {cell['settings']['dropout']:g}" if cell["settings"]["dropout"] else ""),
         row["forward_peak_mib"], name)
        for cell in cells.values()
        for name, row in cell["figures"]["candidates"].items()
    ]  # fmt: skip
    figure, (ax,) = panels(9, 1.1 + 0.26 * len(rows))
    ax.set_xlim(min(value for _, value, _ in rows) / 1.6, max(value for _, value, _ in rows) * 2)
    logarithmic(ax.xaxis)
    for place, (_, value, name) in enumerate(rows):
        library = next((library for library in MARKS if library and name.startswith(library)), "")
        colour, marker = MARKS[library]
        ax.plot([ax.get_xlim()[0], value], [place, place], color=FAINT, linewidth=0.8, linestyle=":")
        ax.plot(value, place, marker, color=colour, markersize=7)
        ax.annotate(f"{value:,.1f}", (value, place), xytext=(8, 0), textcoords="offset points", va="center", fontsize=SIZE - 1,
                    color=INK)  # fmt: skip
    ax.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    titles(ax, "One large layer: what its forward holds at once", "peak, MiB (logarithmic)")
    return figure


def curves(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Overall dev score of minBERT runs over their steps."""
    figure, (ax,) = panels(8, 3.6)
    styles = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "D"), (PURPLE, "v"), (AMBER, "^"), (INK, "x")]
    for index, run in enumerate(runs):
        colour, marker = styles[index % len(styles)]
        steps, scores = [row["step"] for row in run["curve"]], [row["score"] for row in run["curve"]]
        ax.plot(steps, scores, marker=marker, color=colour, markersize=5, linewidth=1.6, label=run["name"],
                linestyle="-" if index < len(styles) else "--")  # fmt: skip
    titles(ax, "minBERT on three tasks", "optimizer steps", "overall dev score, 0 to 1")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    legend(ax, loc="lower right")
    return figure
