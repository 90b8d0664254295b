"""Heads: from pooled sentence vectors to a task's outputs. All run in fp32, whatever precision the backbone uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = ("linear", "nonlinear", "conv")


def pair_features(u: Tensor, v: Tensor) -> Tensor:
    """`[u, v, |u - v|, u ⊙ v, cos(u, v)]`: `(B, H), (B, H) -> (B, 4H + 1)`, the cosine last."""
    return torch.cat([u, v, (u - v).abs(), u * v, F.cosine_similarity(u, v, dim=-1).unsqueeze(-1)], dim=-1)


class ConvHead(nn.Module):
    """The paper's conv head, `(B, D) -> (B, outputs)`.

    Conv1d(1, 4, 3) - BN - flatten - Linear(4(D - 2), D / 8) - BN - ReLU - Linear(D / 8, outputs), after Frees,
    Bhagirath and Bolling (2025, arXiv:2508.17586), whose inner width of 384 belongs to D = 3073.
    """

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        inner = max(8, features // 8)
        self.conv = nn.Conv1d(1, 4, kernel_size=3)
        self.conv_norm = nn.BatchNorm1d(4)
        self.hidden = nn.Linear(4 * (features - 2), inner)
        self.hidden_norm = nn.BatchNorm1d(inner)
        self.out = nn.Linear(inner, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_norm(self.conv(x.unsqueeze(1)))  # (B, 4, D - 2)
        return self.out(F.relu(self.hidden_norm(self.hidden(x.flatten(1)))))  # (B, outputs)


class NonlinearHead(nn.Module):
    """`Linear - BN - ReLU - Linear`, `(B, D) -> (B, outputs)`, with an inner width of min(D, 384)."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        inner = min(features, 384)
        self.hidden = nn.Linear(features, inner)
        self.hidden_norm = nn.BatchNorm1d(inner)
        self.out = nn.Linear(inner, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden_norm(self.hidden(x))))


class LinearHead(nn.Module):
    """`x Wᵀ + b`, `(B, D) -> (B, outputs)`."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.out = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


def make_head(kind: str, features: int, outputs: int) -> nn.Module:
    """A head of that kind, `(B, features) -> (B, outputs)`; ValueError naming the choices for an unknown kind."""
    kinds = {"linear": LinearHead, "nonlinear": NonlinearHead, "conv": ConvHead}
    if kind not in kinds:
        raise ValueError(f"head {kind!r} is unknown; choose one of {', '.join(HEADS)}")
    return kinds[kind](features, outputs)


class CosineHead(nn.Module):
    """`inner(features) + a · cos(u, v) + b` with learned a and b, `(B, 4H + 1) -> (B, 1)`.

    The cosine of a sentence-tuned encoder ranks pairs well before any training, and a head that starts at random would
    first have to find it again among 4H other features. Here the answer starts as the calibrated cosine (the inner
    head's last layer starts at 0) and the head learns the rest.
    """

    def __init__(self, inner: nn.Module, slope: float, offset: float) -> None:
        super().__init__()
        self.inner = inner
        self.slope = nn.Parameter(torch.tensor(slope))
        self.offset = nn.Parameter(torch.tensor(offset))
        nn.init.zeros_(inner.out.weight)
        nn.init.zeros_(inner.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.slope * x[:, -1:] + self.offset


class OrdinalHead(nn.Module):
    """Log-probabilities of ordered classes from one score, `(B, D) -> (B, K)` (cumulative link, McCullagh 1980).

    `P(y > k) = σ(s - θ_k)` with ordered thresholds `θ_0 < θ_1 < ...`, so that
    `P(y = k) = σ(a) - σ(b) = σ(a) σ(-b) (1 - e^(b - a))` with `a = s - θ_(k-1)`, `b = s - θ_k`, which is computed in
    logs. Cross-entropy on these outputs is the ordinal likelihood, since they are normalised already.
    """

    def __init__(self, inner: nn.Module, classes: int) -> None:
        super().__init__()
        self.inner = inner
        self.first = nn.Parameter(torch.tensor(-(classes - 2) / 2.0))
        self.log_steps = nn.Parameter(torch.zeros(classes - 2))  # exp of it: θ_(k+1) - θ_k, always > 0

    def thresholds(self) -> Tensor:
        """`θ (K - 1,)`, strictly increasing."""
        return torch.cat([self.first.view(1), self.first + self.log_steps.exp().cumsum(0)])

    def forward(self, x: Tensor) -> Tensor:
        above = self.inner(x) - self.thresholds()  # (B, K - 1): logit of P(y > k)
        a, b = above[:, :-1], above[:, 1:]
        middle = F.logsigmoid(a) + F.logsigmoid(-b) + torch.log(-torch.expm1(b - a))
        return torch.cat([F.logsigmoid(-above[:, :1]), middle, F.logsigmoid(above[:, -1:])], dim=-1)  # (B, K)
