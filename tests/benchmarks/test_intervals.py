"""Intervals against scipy, and what they decide."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.ensemble_claim import RESAMPLES, judged
from benchmarks.intervals import Interval, difference, not_worse, percentiles, resample, resampled_scores, t_interval
from examples.minbert_multitask.tasks import pearson


@pytest.mark.parametrize("values", [[0.5, 0.52, 0.47], [1.0, 3.0], list(np.linspace(0, 1, 11) ** 2)])
def test_student_interval_is_scipys(values) -> None:
    found = t_interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert found == pytest.approx(Interval(float(np.mean(values)), low, high, len(values)))


def test_one_value_says_nothing_of_the_spread() -> None:
    assert t_interval([0.5]) == Interval(0.5, -math.inf, math.inf, 1)
    with pytest.raises(ValueError, match=r"an interval of no values asked; finish at least one training"):
        t_interval([])


def test_pairs_cancel_what_the_seeds_share() -> None:
    seeds = [0.40, 0.50, 0.60]
    gap = difference([s - 0.01 for s in seeds], seeds)
    assert gap.mean == pytest.approx(-0.01)
    assert gap.high - gap.low < 1e-9 < t_interval(seeds).high - t_interval(seeds).low
    with pytest.raises(ValueError, match=r"a paired difference of 2 and 1 values asked; take the seeds that both have"):
        difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.015, 0.3, "yes"),
        (-0.016, 0.3, "not decided within the interval"),
        (-0.3, -0.015, "not decided within the interval"),
        (-0.3, -0.016, "no"),
    ],
)
def test_verdicts_take_the_whole_interval(low, high, verdict) -> None:
    assert not_worse(Interval((low + high) / 2, low, high, 3), 0.015) == verdict


def test_resampled_scores_are_those_of_the_drawn_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = resample(30, 5, generator)
    assert counts.sum(1).tolist() == [30.0] * 5
    labels = 5 * torch.rand(30, generator=generator)
    answers = labels + torch.randn(30, generator=generator)
    classes, guesses = labels.long(), (labels + 0.5).long()
    for row, r, accuracy in zip(
        counts, resampled_scores("sts", answers, labels, counts), resampled_scores("sst", guesses, classes, counts), strict=True
    ):
        drawn = torch.repeat_interleave(torch.arange(30), row.long())
        assert float(r) == pytest.approx(pearson(answers[drawn], labels[drawn]))
        assert float(accuracy) == pytest.approx(float((guesses[drawn] == classes[drawn]).double().mean()))
    assert resampled_scores("sts", torch.ones(30), labels, counts).tolist() == [0.0] * 5


def test_bootstrap_interval_of_an_accuracy_is_near_the_binomial() -> None:
    right = torch.tensor([1] * 300 + [0] * 100)
    counts = resample(400, RESAMPLES, torch.Generator().manual_seed(0))
    found = percentiles(0.75, resampled_scores("quora", right, torch.ones(400), counts))
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    # Of 2000 draws the 2.5 % quantile strays by about 3 % of half the interval
    assert found.low == pytest.approx(0.75 - half, abs=0.15 * half)
    assert found.high == pytest.approx(0.75 + half, abs=0.15 * half)


def test_gains_of_an_ensemble() -> None:
    """Of three members each errs on a third of its own: the mean of the logits is always right."""
    labels = torch.arange(90) % 2
    members = []
    for k in range(3):
        logits = 2.0 * labels - 1
        logits[k::3] *= -1
        members.append(logits.unsqueeze(-1))
    found = judged({"quora": members}, {"quora": labels.float()}, resamples=200)
    assert [row["quora"] for row in found["members"]] == pytest.approx([2 / 3] * 3)
    assert found["ensemble"] == {"quora": 1.0, "overall": 1.0}
    best = found["gains"]["best single"]["overall"]
    assert best.mean == pytest.approx(1 / 3)
    assert 0.2 < best.low < 0.3 < 0.35 < best.high < 0.5
    # Every example is wrong in exactly one member, so that the mean of their accuracies is the same in every draw
    assert found["gains"]["mean single"]["quora"] == pytest.approx(Interval(1 / 3, 1 / 3, 1 / 3, 200))
    assert found["examples"] == {"quora": 90}
