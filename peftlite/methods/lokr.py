"""LoKr: Yeh et al. 2023, arXiv:2309.14859."""

import math
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlite.adapter import AdapterLinear
from peftlite.kernels.dispatch import compute_dtype
from peftlite.options import check_dropout


@final
class LoKrLinear(AdapterLinear):
    """Compute ``y = x Wᵀ + b + s dropout(x) (C ⊗ (B A))ᵀ``: the Kronecker product of a small matrix and a low-rank one.

    ``out = o₁ o₂`` and ``in = i₁ i₂`` are cut near their square roots, the smaller factor first: ``C (o₁, i₁)`` is `core`,
    zero at birth, ``A (r, i₂)`` is `lora_a`, ``B (o₂, r)`` is `lora_b`. The update has a rank of up to ``min(o₁, i₁) r``.
    Trained: ``o₁ i₁ + r (o₂ + i₂)`` parameters, for 768 x 768 at r = 8 no more than 1,088. ``s = alpha / rank``.

    It is computed a factor at a time, without a dense update, in ``2 (in r + i₁ o₁ r + out r)`` operations per row: hardly
    more than LoRA's. `to_lora` writes it as LoRA of rank ``min(o₁, i₁) r``, with ``C ⊗ A`` and ``I ⊗ B``, or ``I ⊗ A`` and
    ``C ⊗ B``.

    Use it where the adapter must be small and its rank high. Sizes that are prime have no factors: there C is one row or
    column, and nothing is saved.

    We differ from LyCORIS, the authors' code: B A stays a product at every rank, where LyCORIS takes a full matrix as soon
    as that has fewer parameters; choose a rank below ``min(o₂, i₂)``. The factors are always the ones nearest to the square
    root. A and B are uniform in ``±1/√`` of their number of columns.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r``.
        alpha: scaling numerator, by default the rank.
        rslora: ``s = alpha / √rank`` (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an element of the input of the adapter, in training mode.

    Source: Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
    arXiv:2309.14859.

    Example:
        >>> layer = LoKrLinear(768, 3072, rank=8)
        >>> {name: tuple(p.shape) for name, p in layer.adapter_parameters().items()}
        {'lora_a': (8, 32), 'lora_b': (64, 8), 'core': (48, 24)}
    """

    method = "lokr"

    def build(self, *, alpha: float | None = None, rslora: bool = False, dropout: float = 0.0) -> None:
        """Create A, B and C."""
        self.dropout = check_dropout(dropout)
        self.set_scale(alpha, rslora)
        o1, i1 = divisor_below_root(self.out_features), divisor_below_root(self.in_features)
        o2, i2 = self.out_features // o1, self.in_features // i1
        self.lora_a = nn.Parameter(self.draw_uniform(self.rank, i2, bound=1 / math.sqrt(i2)))
        self.lora_b = nn.Parameter(self.draw_uniform(o2, self.rank, bound=1 / math.sqrt(self.rank)))
        self.core = nn.Parameter(self.zeros(o1, i1))

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        return {**self.low_rank_config(), "dropout": self.dropout}

    def effective_weight(self) -> Tensor:
        """``W + s C ⊗ (B A)``, ``(out, in)``."""
        return self.base_weight() + self.scale * torch.kron(self.core, self.lora_b @ self.lora_a)

    def products(self) -> tuple[Tensor, Tensor]:
        """Factors ``(R, in)`` and ``(out, R)`` of ``C ⊗ (B A)``, with ``R = min(o₁, i₁) r``."""
        eye = torch.eye(min(self.core.shape), dtype=self.core.dtype, device=self.core.device)
        if self.core.shape[0] <= self.core.shape[1]:
            return torch.kron(self.core, self.lora_a), torch.kron(eye, self.lora_b)
        return torch.kron(eye, self.lora_a), torch.kron(self.core, self.lora_b)

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """The factors of `products`, the scale in the second."""
        a, b = self.products()
        return a, self.scale * b

    def adapted_forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b + s (C ⊗ B A) x̃``, a factor at a time: x̃ seen as ``(..., i₁, i₂)``, then A, then C, then B."""
        dtype = compute_dtype(x)
        a, b, core = (factor.to(dtype) for factor in (self.lora_a, self.lora_b, self.core))
        dropped = F.dropout(x.to(dtype), self.dropout, self.training)
        h = F.linear(dropped.unflatten(-1, (core.shape[1], a.shape[1])), a)  # (..., i₁, r)
        h = F.linear(h.mT, core).mT  # (..., o₁, r)
        return self.base_forward(x) + self.scale * F.linear(h, b).flatten(-2)


def divisor_below_root(size: int) -> int:
    """The largest divisor of `size` that is at most its square root.

    Example:
        >>> divisor_below_root(768), divisor_below_root(64), divisor_below_root(13)
        (24, 8, 1)
    """
    return next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
