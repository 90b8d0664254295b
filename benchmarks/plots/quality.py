"""Figures of the quality suite: rank against score, single models and their ensemble, time and memory of each effect."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.plots.style import (
    AMBER,
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SIZE,
    at_values,
    below,
    logarithmic,
    panels,
    ratios,
    titles,
)


class Interval(NamedTuple):
    """A figure with its interval, whose bounds are infinite where one value leaves it unknown."""

    middle: float
    low: float
    high: float


class RankCurve(NamedTuple):
    """Scores of one task: by rank, and of full fine-tuning, if that is there."""

    ranks: Mapping[int, Interval]
    full: Interval | None


class Ensemble(NamedTuple):
    """Scores of one task: of each member, and of all of them together with its interval."""

    members: Sequence[float]
    together: Interval


def rank_scores(tasks: Mapping[str, RankCurve], units: Mapping[str, str]) -> Figure:
    """Mean score over the seeds with its 95 % interval against the rank, a panel for each task, full fine-tuning as a band.

    Args:
        tasks: by title.
        units: of the score, by title of the task.
    """
    figure, axes = panels(max(4.4, 3.5 * len(tasks)), 3.7, len(tasks))
    for ax, (title, curve) in zip(axes, tasks.items(), strict=True):
        if curve.full is not None:
            if math.isfinite(curve.full.low):
                ax.axhspan(curve.full.low, curve.full.high, color=INK, alpha=0.1, linewidth=0)
            ax.axhline(curve.full.middle, color=INK, linewidth=1.2, linestyle="--", label="full fine-tuning")
        ranks = sorted(curve.ranks)
        if ranks:
            found = [curve.ranks[rank] for rank in ranks]
            ax.plot(ranks, [f.middle for f in found], "o-", color=BLUE, markersize=5.5, linewidth=1.4, label="LoRA")
            for rank, one in zip(ranks, found, strict=True):
                if math.isfinite(one.low):
                    ax.plot([rank, rank], [one.low, one.high], color=BLUE, linewidth=1.6)
            ax.set_xlim(min(ranks) / 1.3, max(ranks) * 1.3)
            logarithmic(ax.xaxis, 2)
            at_values(ax.xaxis, ranks)
        titles(ax, title, "rank (logarithmic)", units[title])
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, 0), min(high, 100))  # an interval of few seeds may leave what a score can be
    below(figure, axes[0])
    return figure


def ensembles(tasks: Mapping[str, Ensemble], units: Mapping[str, str]) -> Figure:
    """The members' scores, their mean, and the ensemble's with its interval, a panel for each task."""
    figure, axes = panels(max(4.4, 2.6 * len(tasks)), 2.3, len(tasks))
    for ax, (title, found) in zip(axes, tasks.items(), strict=True):
        mean = sum(found.members) / len(found.members)
        ax.plot(found.members, [1] * len(found.members), "o", color=BLUE, alpha=0.6, markersize=6)
        ax.plot([mean, mean], [0.75, 1.25], color=BLUE, linewidth=2)
        ax.plot(found.together[1:], [0, 0], color=ORANGE, linewidth=1.8)
        ax.plot(found.together.middle, 0, "D", color=ORANGE, markersize=7)
        ax.set_yticks([0, 1], ["ensemble", "single models"])
        ax.set_ylim(-0.6, 1.6)
        ax.grid(axis="y", visible=False)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        titles(ax, title, units[title])
    for ax in axes[1:]:
        ax.set_yticklabels([])
        ax.tick_params(axis="y", length=0)
    return figure


def effects(rows: Mapping[str, Mapping[str, Interval]], unit: str, title: str) -> Figure:
    """Ratios with quantiles in rows, a marker for each series, a line at 1.

    Args:
        rows: label of the row -> label of the series -> ratio.
        unit: of the axis.
        title: of the figure.
    """
    styles = [(BLUE, "o"), (ORANGE, "D"), (GREEN, "s"), (PURPLE, "v"), (AMBER, "^"), (INK, "P")]
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    figure, (ax,) = panels(9, 1.5 + (0.15 + 0.09 * len(names)) * len(rows))
    ax.axvline(1, color=INK, linewidth=1.2)
    for place, row in enumerate(rows.values()):
        for index, name in enumerate(names):
            if name not in row:
                continue
            colour, marker = styles[index % len(styles)]
            at = place + (index - (len(names) - 1) / 2) * 0.7 / len(names)
            ax.plot(row[name][1:], [at, at], color=colour, linewidth=1.6)
            ax.plot(row[name].middle, at, marker, color=colour, markersize=6)
    for index, name in enumerate(names):
        colour, marker = styles[index % len(styles)]
        ax.plot([], [], marker, color=colour, label=name)
    ends = [end for row in rows.values() for one in row.values() for end in one]
    ax.set_xlim(min(1.0, *ends) / 1.12, max(1.0, *ends) * 1.12)
    ratios(ax.xaxis)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    titles(ax, title, unit)
    below(figure, ax)
    return figure


def estimates(rows: Mapping[str, tuple[float, float]], limit: float) -> Figure:
    """Estimated beside measured peak memory: its deviation in percent, with the limit as a band.

    Args:
        rows: label -> estimated and measured bytes.
        limit: share of the measured bytes that the estimate may be off by.
    """
    figure, (ax,) = panels(9, 1.2 + 0.25 * len(rows))
    ax.axvspan(-100 * limit, 100 * limit, color=GREEN, alpha=0.12, linewidth=0)
    ax.axvline(0, color=INK, linewidth=1.2)
    off = [100 * (estimated / measured - 1) for estimated, measured in rows.values()]
    for place, value in enumerate(off):
        inside = abs(value) <= 100 * limit
        ax.plot([0, value], [place, place], color=FAINT, linewidth=1.2)
        ax.plot(value, place, "o" if inside else "X", color=BLUE if inside else ORANGE, markersize=6)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    reach = 1.15 * max(100 * limit, *map(abs, off))
    ax.set_xlim(-reach, reach)
    ax.grid(axis="y", visible=False)
    titles(ax, "Estimate against the measured peak", f"estimate minus measurement, % of it; band: ±{100 * limit:g} %")
    return figure


def deviations(runs: Mapping[str, Sequence[float]], limit: float | None, steps: int) -> Figure:
    """Relative difference of two training curves at every step, with the limit over the steps that it is for.

    Args:
        runs: label -> relative difference of the losses at each step.
        limit: of the difference, None where nothing is judged.
        steps: how many first steps it holds for.
    """
    figure, (ax,) = panels(9, 3.7)
    styles = [(BLUE, "-"), (ORANGE, "-"), (GREEN, "--"), (PURPLE, "--"), (INK, ":")]
    positive = [value for run in runs.values() for value in run if value > 0] or [1e-8]
    floor = min(positive)
    for index, (name, run) in enumerate(runs.items()):
        colour, line = styles[index % len(styles)]
        values = [max(value, floor / 2) for value in run]
        ax.plot(range(1, len(run) + 1), values, line, color=colour, linewidth=1.5, label=name)
    if limit is not None:
        ax.plot([1, steps], [limit, limit], color=INK, linewidth=1.4)
        ax.annotate(f"limit {limit:g}", (steps, limit), xytext=(-4, 3), textcoords="offset points", va="bottom", ha="right",
                    fontsize=SIZE - 1, color=INK)  # fmt: skip
    ax.set_ylim(floor / 4, 3 * max([*positive, limit or 0.0]))
    logarithmic(ax.yaxis, form=lambda value: f"{value:.0e}")
    titles(ax, "Loss beside the peer's, from the same factors", "optimizer step", "relative difference (no unit)")
    below(figure, ax, 2)
    return figure
