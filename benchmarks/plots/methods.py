"""Figures of the methods beside one another: accuracy against size, cost of a step, intruder dimensions."""

import math
from collections.abc import Mapping, Sequence
from statistics import quantiles
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plots.style import (
    AMBER,
    BLUE,
    GREEN,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SIZE,
    legend,
    logarithmic,
    name_points,
    number,
    panels,
    titles,
)

Cells = Mapping[str, Mapping[str, Any]]
NOT_ADAPTERS = ("full", "linear-probe", "bitfit", "lisa")
KIBI = 2**10


def kind(settings: Mapping[str, Any]) -> tuple[str, str, str]:
    """How a recipe is drawn: label, colour, marker."""
    if settings["method"] in NOT_ADAPTERS:
        return "no adapters", INK, "^"
    return ("LoRA and variants", BLUE, "o") if settings["method"] == "lora" else ("another method", ORANGE, "D")


def error(right: str) -> float:
    """Standard error of an accuracy over its examples, from a string of 1 (right) and 0."""
    share = right.count("1") / len(right)
    return math.sqrt(share * (1 - share) / len(right))


def byte_size(value: float) -> str:
    """Bytes as an axis shows them, in powers of 1024."""
    return f"{value / KIBI**2:g} MiB" if value >= KIBI**2 else f"{value / KIBI:g} KiB" if value >= KIBI else f"{value:g} B"


def floor(values: Sequence[float]) -> float:
    """Least of the `values` that are no outliers below: not 1.5 times the middle half's width under it (Tukey 1977)."""
    if len(values) < 4:
        return min(values)
    low, _, high = quantiles(values, n=4, method="inclusive")
    return min(value for value in values if value >= low - 1.5 * (high - low))


def _accuracy(cells: Cells, x_of: Any, title: str, x: str, *, base: int, form: Any) -> Figure:
    figure, (ax,) = panels(10.2, 5.6)
    points: list[tuple[float, float, str, str]] = []
    named: set[tuple[str, str, str]] = set()
    scores = [100 * cell["figures"]["dev"] for cell in cells.values()]
    least = floor(scores)
    foot = least - 0.12 * (max(scores) - least) - 0.5  # where outliers are drawn
    for name, cell in cells.items():
        label, colour, marker = kind(cell["settings"])
        figures = cell["figures"]
        place, dev = x_of(figures), 100 * figures["dev"]
        if dev < least:
            name, dev, marker = f"{name}: {dev:.1f} ↓", foot, "v"
        else:
            spread = 100 * error(figures["right"])
            ax.plot([place, place], [dev - spread, dev + spread], color=colour, alpha=0.3, linewidth=1)
        ax.plot(place, dev, marker, color=colour, markersize=5.5)
        named.add((label, colour, kind(cell["settings"])[2]))
        points.append((place, dev, name, colour))
    for label, colour, marker in sorted(named):
        ax.plot([], [], marker, color=colour, markersize=5.5, label=label)
    ax.set_xlim(min(p[0] for p in points) / 1.7, max(p[0] for p in points) * 2.4)
    logarithmic(ax.xaxis, base, form)
    titles(ax, title, x, "dev accuracy, %")
    legend(ax, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3, borderaxespad=0)
    name_points(ax, points)
    return figure


def accuracy_by_trained(cells: Cells) -> Figure:
    """Dev accuracy with its standard error over the trained parameters, the head's among them."""
    title = "SST-5 accuracy against what is trained"
    note = "trained parameters, with the head's (logarithmic); bar: standard error over the dev sentences"
    return _accuracy(cells, lambda f: f["trained"] + f["heads"], title, note, base=10, form=number)


def accuracy_by_bytes(cells: Cells) -> Figure:
    """Dev accuracy with its standard error over the bytes of the saved file."""
    title = "SST-5 accuracy against what must be kept for each task"
    note = "saved file, bytes (logarithmic); bar: standard error over the dev sentences"
    return _accuracy(cells, lambda f: f["bytes"], title, note, base=4, form=byte_size)


def _rows(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    for row in range(1, len(names), 2):
        ax.axhspan(row - 0.5, row + 0.5, color=GRID, alpha=0.45, linewidth=0, zorder=0)


def cost(cell: Mapping[str, Any]) -> Figure:
    """Step time relative to the baseline's in the same round, saved bytes and size of the checkpoint, quickest first."""
    baseline = cell["figures"]["baseline"]
    rows = sorted(cell["figures"]["candidates"].items(), key=lambda item: item[1]["relative"]["step"][0])
    figure, axes = panels(10.2, 1.1 + 0.235 * len(rows), 3, sharey=True, width_ratios=[1.5, 1, 1])
    names = [name for name, _ in rows]
    for place, (name, row) in enumerate(rows):
        own = name in NOT_ADAPTERS
        colour, marker = (INK, "^") if own else (BLUE, "o") if name == baseline else (ORANGE, "D")
        middle, low, high = row["relative"]["step"]
        axes[0].plot([low, high], [place, place], color=colour, linewidth=1.5)
        for ax, value in zip(axes, (middle, row["saved_mib"], row["checkpoint_bytes"]), strict=True):
            ax.plot(value, place, marker, color=colour, markersize=5, linestyle="none")
    _rows(axes[0], names)
    for ax in axes[1:]:
        _rows(ax, names)
    axes[0].axvline(1, color=INK, linewidth=1.2)
    sizes = [row["checkpoint_bytes"] for _, row in rows]
    axes[2].set_xlim(min(sizes) / 2, max(sizes) * 2)
    logarithmic(axes[2].xaxis, 16, byte_size)
    axes[1].set_xlim(0, 1.1 * max(row["saved_mib"] for _, row in rows))
    titles(axes[0], "Step time", f"share of {baseline}'s (no unit); bar: 20 to 80 %")
    titles(axes[1], "Saved for backward", "MiB; exact")
    titles(axes[2], "Checkpoint", "bytes (logarithmic)")
    return figure


def intruders(cells: Cells) -> Figure:
    """Share of the leading singular directions that resemble none of the base's, at each threshold of the cosine."""
    figure, (ax,) = panels(8, 1.4 + 0.55 * len(cells))
    thresholds = list(next(iter(cells.values()))["figures"]["intruders"])
    colours = (GREEN, BLUE, PURPLE, AMBER)
    for row, cell in enumerate(cells.values()):
        figures = cell["figures"]
        directions = figures["top"] * (figures["matrices"] + figures["unchanged"])
        for index, threshold in enumerate(thresholds):
            share = 100 * figures["intruders"][threshold] / directions
            place = row + (index - (len(thresholds) - 1) / 2) * 0.8 / len(thresholds)
            ax.barh(place, share, height=0.72 / len(thresholds), color=colours[index % len(colours)],
                    label=f"cosine < {threshold}" if not row else None)  # fmt: skip
            ax.annotate(f"{figures['intruders'][threshold]} of {directions}", (share, place), xytext=(4, 0), va="center",
                        textcoords="offset points", fontsize=SIZE - 1.5, color=MUTED)  # fmt: skip
    _rows(ax, list(cells))
    ax.set_xlim(0, max(5.0, 1.2 * ax.get_xlim()[1]))
    titles(ax, "Intruder dimensions", "share of the leading directions, %")
    legend(ax, loc="lower right")
    return figure
