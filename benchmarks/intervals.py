"""How sure a mean is: Student's t over seeds, the bootstrap over examples, and what an interval decides about a margin."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor

from examples.minbert_multitask.tasks import TASKS

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean with the bounds of its interval, which are infinite where one value leaves the spread unknown."""

    mean: float
    low: float
    high: float
    count: int


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """``mean ± t_(n-1) s / √n``, the interval of the mean of independent, normal `values` (Student 1908).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("an interval of no values asked; finish at least one training")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = float(stdtrit(n - 1, (1 + level) / 2)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def difference(values: Sequence[float], others: Sequence[float], level: float = LEVEL) -> Interval:
    """Interval of the mean of ``values[i] - others[i]``: pairs share a seed, and so the order of the data and the head.

    Raises:
        ValueError: the two are not pairs.
    """
    if len(values) != len(others):
        raise ValueError(f"a paired difference of {len(values)} and {len(others)} values asked; take the seeds that both have")
    return t_interval([a - b for a, b in zip(values, others, strict=True)], level)


def not_worse(gap: Interval, margin: float) -> str:
    """Whether a difference is above ``-margin``: "yes" or "no" where the whole interval says so, else "not decided"."""
    if gap.low >= -margin:
        return "yes"
    return "no" if gap.high < -margin else "not decided within the interval"


def resample(examples: int, resamples: int, generator: torch.Generator) -> Tensor:
    """How often each example is drawn in each of `resamples` draws with replacement, `(resamples, examples)` in fp64.

    Source: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7(1).
    """
    drawn = torch.randint(examples, (resamples, examples), generator=generator)
    ones = torch.ones(resamples, examples, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, drawn, ones)


def resampled_scores(task: str, answers: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """The task's score of each resample, `(N,), (N,), (R, N) -> (R,)`: accuracy, or Pearson's r (0 where undefined)."""
    x, y = answers.double(), labels.double()
    if TASKS[task].metric == "accuracy":
        return counts @ (x == y).double() / counts.sum(1)
    x, y = x - x.mean(), y - y.mean()  # r is the same, and the sums below lose fewer digits
    total = counts.sum(1)
    mean_x, mean_y = counts @ x / total, counts @ y / total
    covariance = counts @ (x * y) / total - mean_x * mean_y
    variances = (counts @ (x * x) / total - mean_x**2) * (counts @ (y * y) / total - mean_y**2)
    defined = variances > 0
    return torch.where(defined, covariance / torch.where(defined, variances, torch.ones_like(variances)).sqrt(), 0.0)


def percentiles(estimate: float, samples: Tensor, level: float = LEVEL) -> Interval:
    """`estimate` between the quantiles of its bootstrap `samples` `(R,)` that leave `level` inside."""
    low, high = torch.quantile(samples.double(), torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Interval(estimate, low, high, len(samples))
