"""The four tasks: what each head must output, its loss, its score and its predictions.

| task   | input         | outputs         | loss                                   | score     |
|--------|---------------|-----------------|----------------------------------------|-----------|
| sst    | one sentence  | 5 class logits  | cross-entropy (ordinal by the head)    | accuracy  |
| cfimdb | one review    | 2 class logits  | cross-entropy                          | accuracy  |
| quora  | two questions | 1 logit         | binary cross-entropy                   | accuracy  |
| sts    | two sentences | 1 similarity    | mean squared error, or 1 - Pearson r   | Pearson r |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STS_LOSSES = ("mse", "pearson")
SST_LOSSES = ("cross-entropy", "ordinal")


@dataclass(frozen=True)
class Task:
    """One task: `outputs` numbers per example, from one sentence or from a `pair`, judged by `metric`."""

    name: str
    title: str
    outputs: int
    pair: bool
    metric: str  # "accuracy" or "pearson"
    csv_header: str  # second column of the course's prediction files
    csv_prefix: str  # first part of their names


TASKS = {
    "sst": Task("sst", "SST-5", 5, False, "accuracy", "Predicted_Sentiment", "sst"),
    "cfimdb": Task("cfimdb", "CFIMDB", 2, False, "accuracy", "Predicted_Sentiment", "cfimdb"),
    "quora": Task("quora", "Quora", 1, True, "accuracy", "Predicted_Is_Paraphrase", "para"),
    # The course's starter code spells its header this way, and its graders read what it writes.
    "sts": Task("sts", "STS-B", 1, True, "pearson", "Predicted_Similiary", "sts"),
}


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson's r of two vectors `(N,)`, in fp64; 0.0 where it is undefined (a constant vector, or N < 2)."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = x.norm() * y.norm()
    if len(x) < 2 or not scale > 0:
        return 0.0
    return float((x @ y) / scale)


def pearson_loss(prediction: Tensor, label: Tensor, eps: float = 1e-6) -> Tensor:
    """`1 - r(prediction, label)` over the batch, `(B,), (B,) -> ()`.

    Where r is undefined (a batch of one, or of equal labels or predictions) the loss is exactly 1 and its gradient
    exactly 0, instead of NaN.
    """
    x, y = prediction - prediction.mean(), label - label.mean()
    xx, yy = (x * x).mean(), (y * y).mean()
    usable = (xx > eps) & (yy > eps)
    # The inner `where` keeps the square root away from 0, whose infinite slope would turn a masked gradient into NaN.
    scale = torch.where(usable, xx * yy, torch.ones_like(xx)).sqrt()
    return 1 - torch.where(usable, (x * y).mean() / scale, torch.zeros_like(xx))


def task_loss(task: str, logits: Tensor, labels: Tensor, *, sts_loss: str = "mse") -> Tensor:
    """Mean loss of a batch, `logits (B, outputs), labels (B,) -> ()`, in fp32.

    Args:
        task: One of `TASKS`.
        logits: What the task's head returned; for STS the similarity itself, on the labels' scale 0..5.
        labels: Class indices (SST, CFIMDB), 0/1 (Quora), or similarities (STS: never rounded).
        sts_loss: `"mse"`, or `"pearson"` for `1 - r` over the batch.

    Raises:
        ValueError: For an unknown task or loss.
    """
    spec = find_task(task)
    if sts_loss not in STS_LOSSES:
        raise ValueError(f"sts_loss {sts_loss!r} is unknown; choose one of {', '.join(STS_LOSSES)}")
    if spec.outputs > 1:
        return F.cross_entropy(logits, labels.long())
    prediction, labels = logits.squeeze(-1), labels.to(logits.dtype)
    if task == "quora":
        return F.binary_cross_entropy_with_logits(prediction, labels)
    if sts_loss == "pearson":
        return pearson_loss(prediction, labels)
    return F.mse_loss(prediction, labels)


def predictions(task: str, logits: Tensor) -> Tensor:
    """Logits `(N, outputs)` to answers `(N,)`: a class, 0/1 for Quora (`sigmoid > 0.5`), the similarity for STS."""
    spec = find_task(task)
    if spec.outputs > 1:
        return logits.argmax(dim=-1)
    if spec.metric == "accuracy":
        return (logits.squeeze(-1) > 0).long()
    return logits.squeeze(-1)


def task_score(task: str, prediction: Tensor, labels: Tensor) -> float:
    """Accuracy, or Pearson's r for STS, of answers `(N,)` against labels `(N,)`."""
    if len(prediction) != len(labels):
        raise ValueError(f"task {task!r}: {len(prediction)} predictions for {len(labels)} labels")
    if len(labels) == 0:
        raise ValueError(f"task {task!r}: no labelled example to score")
    if find_task(task).metric == "pearson":
        return pearson(prediction, labels)
    return float((prediction.long() == labels.long()).double().mean())


def leaderboard_score(scores: dict[str, float]) -> float:
    """Mean over the tasks of accuracy, or of `(r + 1) / 2` for STS.

    For SST, Quora and STS this is the course's `(SST + Quora + (r + 1) / 2) / 3`. Tasks that were not trained do not
    count; CFIMDB, where it is trained, counts as one more accuracy.
    """
    if not scores:
        raise ValueError("no task was scored, so there is no leaderboard score")
    parts = [(s + 1) / 2 if find_task(task).metric == "pearson" else s for task, s in scores.items()]
    return sum(parts) / len(parts)


def find_task(name: str) -> Task:
    """The task of that name; ValueError naming the choices if there is none."""
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown; choose from {', '.join(TASKS)}")
    return TASKS[name]
