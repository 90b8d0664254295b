"""The figures of a run's report, each a function of the run's records that returns a matplotlib figure."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from examples.minbert_multitask.tasks import TASKS, pearson, predictions

COLOURS = {"sst": "#3b6fb6", "cfimdb": "#7a5195", "quora": "#d9822b", "sts": "#2f9e77"}
INK, FAINT = "#2b2f36", "#c9ced6"
SST_CLASSES = ("very\nnegative", "negative", "neutral", "positive", "very\npositive")


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with `columns` axes, drawn without pyplot, whose state would outlive the report."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(1, columns)))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(FAINT)
        ax.tick_params(colors=INK, labelsize=9, length=3, color=FAINT)
    return figure, axes


def _label(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)


def smooth(values: list[float], share: float = 0.05) -> np.ndarray:
    """Centred moving mean of `values` over a window of that share of them; ends use what there is of the window."""
    half = int(len(values) * share / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def learning_curves(metrics: list[dict[str, Any]], tasks: list[str]) -> Figure:
    """Training loss (mean over each logging interval, faint; smoothed, strong) and dev scores over the epochs."""
    figure, (left, right) = _figure(10, 3.6, 2)
    for task in tasks:
        points = [
            (row["epoch"], row["loss"][task]) for row in metrics if row["kind"] == "train" and task in row["loss"]
        ]
        if points:
            epochs, losses = (list(column) for column in zip(*points, strict=True))
            left.plot(epochs, losses, color=COLOURS[task], alpha=0.25, linewidth=1)
            style = {"marker": "o", "markersize": 4} if len(losses) < 3 else {}  # a line of one point is not seen
            left.plot(epochs, smooth(losses), color=COLOURS[task], linewidth=1.8, label=TASKS[task].title, **style)
    _label(left, "Training loss", "epoch", "loss")
    if tasks and left.lines:
        left.set_ylim(bottom=0)
        left.legend(frameon=False, fontsize=9)
    rows = [row for row in metrics if row["kind"] == "dev"]
    ends = []
    for task in tasks:
        values = [row["scores"][task] for row in rows]
        right.plot([row["epoch"] for row in rows], values, "o-", color=COLOURS[task], linewidth=1.8, markersize=4)
        name = f"{TASKS[task].title} {'r' if TASKS[task].metric == 'pearson' else 'acc.'}"
        ends.append((values[-1], name, COLOURS[task]))
    best = [row for row in rows if row["best"]][-1]
    right.axvline(best["epoch"], color=FAINT, linewidth=1, linestyle="--", zorder=0)
    right.annotate("best", (best["epoch"], 0), xycoords=("data", "axes fraction"), xytext=(-3, 3),
                   textcoords="offset points", fontsize=8, color="#7d848f", ha="right", va="bottom")  # fmt: skip
    _label(right, "Dev scores", "epoch", "accuracy or r")
    low, high = right.get_ylim()
    place = -np.inf
    for value, name, colour in sorted(ends):
        place = max(value, place + 0.07 * (high - low))  # labels of close curves are moved apart
        right.annotate(f"{name} {value:.3f}", (1.01, place), xycoords=("axes fraction", "data"), color=colour,
                       fontsize=9, va="center", annotation_clip=False)  # fmt: skip
    for ax in (left, right):
        ax.set_xlim(left=0)
        ax.grid(axis="y", color="#edf0f3")
        ax.set_axisbelow(True)
    return figure


def confusion(logits: Tensor, labels: Tensor, names: tuple[str, ...], title: str) -> Figure:
    """Confusion matrix: each row sums to 100 % of a true class, with the number of examples below each share."""
    classes = len(names)
    places = labels.long() * classes + predictions_of(logits)
    counts = np.bincount(places.numpy(), minlength=classes**2).reshape(classes, classes)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, (ax,) = _figure(5.2, 4.4)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i in range(classes):
        for j in range(classes):
            ax.text(j, i, f"{shares[i, j]:.0%}\n{counts[i, j]}", ha="center", va="center", fontsize=8,
                    color="white" if shares[i, j] > 0.55 else INK)  # fmt: skip
    ax.set_xticks(range(classes), names)
    ax.set_yticks(range(classes), names)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    _label(ax, title, "predicted", "true")
    return figure


def predictions_of(logits: Tensor) -> Tensor:
    """The class of largest logit."""
    return logits.argmax(dim=-1)


def similarity_scatter(logits: Tensor, labels: Tensor) -> Figure:
    """Predicted against given similarity, with r and the line of equality."""
    predicted = predictions("sts", logits)
    figure, (ax,) = _figure(5.2, 4.4)
    ends = [0, 5]
    ax.plot(ends, ends, color=FAINT, linewidth=1.2, linestyle="--", zorder=0)
    ax.scatter(labels, predicted, s=11, alpha=0.4, color=COLOURS["sts"], edgecolors="none")
    ax.set_xlim(-0.15, 5.15)
    ax.text(0.04, 0.95, f"r = {pearson(predicted, labels):.3f}", transform=ax.transAxes, fontsize=11, va="top",
            fontweight="bold", color=INK)  # fmt: skip
    _label(ax, "STS-B: similarity", "given by people", "predicted")
    return figure


def duplicate_histogram(logits: Tensor, labels: Tensor) -> Figure:
    """Predicted probability of a duplicate, for the pairs that are one and those that are not, with the accuracy."""
    probability = logits.squeeze(-1).sigmoid().numpy()
    truth = labels.numpy() > 0.5
    figure, (ax,) = _figure(5.2, 4.4)
    bins = np.linspace(0, 1, 41)
    for mask, name, colour in ((~truth, "no duplicates", "#8a94a3"), (truth, "duplicates", COLOURS["quora"])):
        ax.hist(probability[mask], bins, color=colour, alpha=0.65, label=f"{name} ({mask.sum():,})")
    ax.axvline(0.5, color=INK, linewidth=1, linestyle="--")
    ax.set_xlim(0, 1)
    ax.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.55, 1))
    accuracy = ((probability > 0.5) == truth).mean()
    _label(ax, f"Quora: accuracy {accuracy:.3f}", "predicted probability of a duplicate", "pairs")
    return figure


def figures(metrics: list[dict[str, Any]], outputs: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Figure]:
    """All figures that a run of these tasks has, by their captions."""
    found = {"Learning curves": learning_curves(metrics, list(outputs))}
    for task, logits in outputs.items():
        if task == "sst":
            found["SST-5 confusion"] = confusion(logits, labels[task], SST_CLASSES, "SST-5: share of each true class")
        elif task == "cfimdb":
            names = ("negative", "positive")
            found["CFIMDB confusion"] = confusion(logits, labels[task], names, "CFIMDB: share of each true class")
        elif task == "quora":
            found["Quora probabilities"] = duplicate_histogram(logits, labels[task])
        else:
            found["STS-B scatter"] = similarity_scatter(logits, labels[task])
    return found
