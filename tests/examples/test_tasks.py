"""Losses and scores against formulas in fp64, heads against their definitions."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from examples.minbert_multitask.heads import (
    HEADS,
    CosineHead,
    LinearHead,
    OrdinalHead,
    make_head,
    pair_features,
)
from examples.minbert_multitask.tasks import (
    TASKS,
    leaderboard_score,
    pearson,
    pearson_loss,
    predictions,
    task_loss,
    task_score,
)


def close(actual: float, expected: float, terms: int = 64) -> None:
    """Equal but for `terms` roundings in fp64."""
    assert abs(actual - expected) <= terms * np.finfo(np.float64).eps * max(1.0, abs(expected))


def examples(count: int = 17, outputs: int = 1) -> tuple[torch.Tensor, np.random.Generator]:
    rng = np.random.default_rng(3)
    return torch.from_numpy(rng.normal(size=(count, outputs))), rng


def test_cross_entropy_is_minus_the_mean_log_probability():
    logits, rng = examples(outputs=5)
    labels = rng.integers(0, 5, 17)
    x = logits.numpy()
    expected = np.mean([math.log(sum(math.exp(v) for v in row)) - row[k] for row, k in zip(x, labels, strict=True)])
    close(task_loss("sst", logits, torch.from_numpy(labels)).item(), expected)


def test_quora_loss_is_binary_cross_entropy():
    logits, rng = examples()
    labels = rng.integers(0, 2, 17)
    p = 1 / (1 + np.exp(-logits.numpy()[:, 0]))
    expected = -np.mean(np.where(labels == 1, np.log(p), np.log(1 - p)))
    close(task_loss("quora", logits, torch.from_numpy(labels).float()).item(), expected)


def test_sts_losses_and_their_gradients():
    logits, rng = examples()
    labels = torch.from_numpy(rng.random(17) * 5)
    assert (labels != labels.round()).all()  # fractions count in full
    close(task_loss("sts", logits, labels).item(), np.mean((logits.numpy()[:, 0] - labels.numpy()) ** 2))
    r = stats.pearsonr(logits.numpy()[:, 0], labels.numpy()).statistic
    close(task_loss("sts", logits, labels, sts_loss="pearson").item(), 1 - r)
    assert torch.autograd.gradcheck(lambda x: pearson_loss(x, labels), logits[:, 0].requires_grad_())


@pytest.mark.parametrize("labels", [[2.5, 2.5, 2.5], [3.0]])
def test_pearson_loss_of_a_batch_without_a_correlation_is_one_with_a_gradient_of_zero(labels):
    x = torch.linspace(0, 1, len(labels)).requires_grad_()
    loss = pearson_loss(x, torch.tensor(labels))
    loss.backward()
    assert loss.item() == 1.0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_scores_against_scipy_and_counting():
    x, rng = examples()
    y = torch.from_numpy(rng.random(17) * 5)
    close(task_score("sts", x[:, 0], y), stats.pearsonr(x.numpy()[:, 0], y.numpy()).statistic)
    assert pearson(torch.ones(4), torch.arange(4.0)) == 0.0
    assert task_score("sst", torch.tensor([0, 1, 2, 4]), torch.tensor([0, 1, 3, 4])) == 0.75
    assert leaderboard_score({"sst": 0.5, "quora": 0.8, "sts": 0.6}) == pytest.approx((0.5 + 0.8 + 0.8) / 3, rel=1e-15)
    assert leaderboard_score({"sst": 0.5, "cfimdb": 0.9}) == pytest.approx(0.7, rel=1e-15)


def test_predictions():
    assert predictions("sst", torch.tensor([[0.0, 2, 1, 0, 0]])).tolist() == [1]
    assert predictions("quora", torch.tensor([[-0.1], [0.1]])).tolist() == [0, 1]
    assert predictions("sts", torch.tensor([[2.75]])).tolist() == [2.75]


def test_errors_name_the_choices():
    with pytest.raises(ValueError, match="task 'stss' is unknown; choose from sst, cfimdb, quora, sts"):
        task_loss("stss", torch.zeros(1, 1), torch.zeros(1))
    with pytest.raises(ValueError, match="sts_loss 'mae' is unknown; choose one of mse, pearson"):
        task_loss("sts", torch.zeros(1, 1), torch.zeros(1), sts_loss="mae")
    with pytest.raises(ValueError, match="head 'mlp' is unknown; choose one of linear, nonlinear, conv"):
        make_head("mlp", 4, 1)
    with pytest.raises(ValueError, match="task 'sst': 2 predictions for 3 labels"):
        task_score("sst", torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="task 'sst': no labelled example to score"):
        task_score("sst", torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="no task was scored"):
        leaderboard_score({})


def test_pair_features_by_hand():
    u, v = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    expected = torch.tensor([[3, 4, 4, 3, 1, 1, 12, 12, 0.96]])
    # 4 roundings of the cosine: two norms, the product, the quotient
    assert (pair_features(u, v) - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("outputs", [1, 5])
def test_heads_map_features_to_outputs_and_train(kind, outputs):
    head = make_head(kind, 33, outputs)
    head(torch.randn(6, 33)).square().mean().backward()
    assert head(torch.randn(6, 33)).shape == (6, outputs)
    assert all(p.grad is not None for p in head.parameters())


def test_conv_head_has_the_papers_sizes():
    head = make_head("conv", 3073, 1)
    assert head.hidden.weight.shape == (384, 4 * 3071)
    # Conv1d(1, 4, 3), BN(4), Linear, BN(384), Linear
    assert sum(p.numel() for p in head.parameters()) == 16 + 8 + (12284 * 384 + 384) + 768 + 385


@pytest.mark.parametrize("kind", HEADS)
def test_cosine_head_starts_as_the_calibrated_cosine(kind):
    head = CosineHead(make_head(kind, 9, 1), 5.0, -1.0).eval()
    x = torch.randn(4, 9)
    assert torch.equal(head(x), 5.0 * x[:, -1:] - 1.0)


def test_ordinal_head_is_the_cumulative_link_model():
    head = OrdinalHead(LinearHead(3, 1), 5).double()
    nn.init.normal_(head.log_steps)
    x = torch.randn(7, 3, dtype=torch.float64)
    score, thresholds = head.inner(x), head.thresholds()
    assert (thresholds.diff() > 0).all()
    above = torch.cat([torch.ones(7, 1), torch.sigmoid(score - thresholds), torch.zeros(7, 1)], dim=1).double()
    expected = above[:, :-1] - above[:, 1:]  # P(y > k - 1) - P(y > k)
    found = head(x).exp()
    assert (found - expected).abs().max() <= 16 * torch.finfo(torch.float64).eps
    assert (found.sum(dim=1) - 1).abs().max() <= 16 * torch.finfo(torch.float64).eps


def test_ordinal_head_stays_finite_far_out():
    head = OrdinalHead(LinearHead(1, 1), 5)
    nn.init.constant_(head.inner.out.weight, 1.0)
    out = head(torch.tensor([[-80.0], [80.0]]))
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


def test_every_task_has_a_course_header():
    assert {spec.csv_prefix for spec in TASKS.values()} == {"sst", "cfimdb", "para", "sts"}
