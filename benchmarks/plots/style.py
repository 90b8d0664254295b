"""What all figures share: colours that the page sets for light and dark, axes, text that keeps apart, SVG for a page.

The colours are those of Okabe and Ito 2008, "Color Universal Design", moved for contrast; a marker always says the same as
a colour does. A figure is drawn in the light ones; in its SVG each stands as a CSS variable, so that the page decides.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

COLOURS = {  # name of the variable -> on light, on dark; no two light ones are the same
    "page": ("#fefefe", "#1a1e23"),
    "ink": ("#26292e", "#e6e9ed"),
    "muted": ("#606975", "#a3adba"),
    "faint": ("#b9c0ca", "#565f6b"),
    "grid": ("#e6e9ee", "#2d333b"),
    "blue": ("#0072b2", "#62b8ea"),
    "orange": ("#d55e00", "#ff9a57"),
    "purple": ("#a64d86", "#e39fca"),
    "green": ("#00845f", "#45cfa5"),
    "amber": ("#a87800", "#efc04a"),
}
PAGE, INK, MUTED, FAINT, GRID, BLUE, ORANGE, PURPLE, GREEN, AMBER = (light for light, _ in COLOURS.values())
SIZE = 9.5  # of text, in points
OFFSETS = [(x, y) for far in (6, 12, 20, 30, 42, 56) for x, y in ((far, 0), (-far, 0), (0, far), (0, -far), (far, far),
           (far, -far), (-far, far), (-far, -far))]  # fmt: skip


def panels(width: float, height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` inches and its axes, row by row, drawn without pyplot and its global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(FAINT)
        ax.tick_params(which="both", colors=INK, labelsize=SIZE, length=3, color=FAINT)
        ax.grid(color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def titles(ax: Axes, title: str, x: str, y: str = "") -> None:
    """Title on the left, names of the axes with their units."""
    ax.set_title(title, loc="left", fontsize=SIZE + 1, fontweight="bold", color=INK)
    ax.set_xlabel(x, fontsize=SIZE, color=INK)
    ax.set_ylabel(y, fontsize=SIZE, color=INK)


def legend(ax: Axes, **options: Any) -> None:
    """A legend without a frame, in the colour of text, if anything has a label."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**{"frameon": False, "fontsize": SIZE, "labelcolor": INK, **options})


def below(figure: Figure, ax: Axes, columns: int = 5, *, place: str = "lower") -> None:
    """One legend below all panels, or above them in ``upper`` place, of what `ax` shows."""
    handles, labels = ax.get_legend_handles_labels()
    columns = min(columns, len(labels))
    figure.legend(handles, labels, loc=f"outside {place} center", ncols=columns, frameon=False, fontsize=SIZE, labelcolor=INK)


def number(value: float) -> str:
    """`value` as an axis shows it: 0.5, 16, 8k, 2M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def logarithmic(axis: Any, base: int = 10, form: Any = number) -> None:
    """Make an axis logarithmic, with a tick at each power of `base`, or at 1, 2 and 5 where there are few of these."""
    name = axis.axis_name
    getattr(axis.axes, f"set_{name}scale")("log", base=base)
    low, high = getattr(axis.axes, f"get_{name}lim")()
    few = base == 10 and high / low < 100
    axis.set_major_locator(LogLocator(base=base, subs=(1, 2, 5) if few else (1,), numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axis.set_minor_formatter(NullFormatter())


def ratios(axis: Any) -> None:
    """Make an axis of ratios logarithmic, with ticks at powers of two unless they span too little or too much for these."""
    low, high = getattr(axis.axes, f"get_{axis.axis_name}lim")()
    logarithmic(axis, 2 if 3 < high / low < 300 else 10, lambda value: f"{value:g}×")


def at_values(axis: Any, values: Sequence[float]) -> None:
    """A tick at each of `values` alone, on an axis that is already logarithmic."""
    axis.set_ticks(list(values), [number(value) for value in values])


def name_points(ax: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the names `(x, y, name, colour)` beside their points where neither names nor points are; far ones get a line.

    The limits of the axes must be final.
    """
    figure = ax.figure
    figure.canvas.draw()
    places = ax.transData.transform([(x, y) for x, y, _, _ in points])
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    frame = ax.get_window_extent()
    for (px, py), (x, y, name, colour) in sorted(zip(places, points, strict=True), key=lambda item: -item[0][1]):
        scale = figure.dpi / 72
        # The box is a little wider than the letters are: a page may set another font
        width, height = 0.62 * (SIZE - 1.5) * len(name) * scale, 1.15 * (SIZE - 1.5) * scale
        best, least = OFFSETS[0], float("inf")
        for dx, dy in OFFSETS:
            left = px + dx * scale - (0 if dx > 0 else width if dx < 0 else width / 2)
            box = (left, py + dy * scale - height / 2, left + width, py + dy * scale + height / 2)
            outside = box[0] < frame.x0 or box[2] > frame.x1 + 40 or box[1] < frame.y0 or box[3] > frame.y1
            cost = sum(_overlap(box, other) for other in taken) + 1e3 * outside
            if cost < least:
                best, least, chosen = (dx, dy), cost, box
            if not cost:
                break
        taken.append(chosen)
        far = max(map(abs, best)) > 12
        ax.annotate(
            name,
            (x, y),
            xytext=best,
            textcoords="offset points",
            fontsize=SIZE - 1.5,
            color=colour,
            va="center",
            ha="left" if best[0] > 0 else "right" if best[0] < 0 else "center",
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2} if far else None,
        )


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element for an HTML page, the same in every call.

    Args:
        figure: from `panels`.
        name: unlike that of any other figure of the page: what the drawing refers to is named after it.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # would be there again in the next figure
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    for variable, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{variable})")
    size = r'<svg [^>]*viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>'
    text = re.sub(size, r'<svg viewBox="0 0 \1 \2" style="width:\1pt">', text, count=1)
    return re.sub(r"\n\s*", "\n", text).strip()
