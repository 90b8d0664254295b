"""LoHa: Hyeon-Woo et al. 2021, arXiv:2108.06098."""

import math
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlite.adapter import AdapterLinear
from peftlite.kernels.dispatch import compute_dtype
from peftlite.kernels.lora_linear import lora_linear
from peftlite.options import check_dropout


@final
class LoHaLinear(AdapterLinear):
    """Compute ``y = x Wᵀ + b + s dropout(x) ((B₁ A₁) ⊙ (B₂ A₂))ᵀ``: the Hadamard product of two low-rank updates.

    ``A₁, A₂ (r, in)`` and ``B₁, B₂ (out, r)`` are `lora_a`, `lora_a2`, `lora_b`, `lora_b2`; the last is zero at birth.
    The product has a rank of up to r². Trained: ``2 r (in + out)`` parameters. ``s = alpha / rank``.

    It is LoRA of rank r² whose factors are products, ``B*[o, (p, q)] = B₁[o, p] B₂[o, q]`` and likewise A*, and is computed
    so where r² is at most ``min(in, out)``: in LoRA's time at rank r², and without a dense update. Above, the dense
    update is cheaper; it is made in each forward pass, and costs a second product of the base's size.

    Use it where an update must have a high rank at LoRA's price; rank 8 reaches 64. Updates are products of four values
    and learn slowly at first.

    We differ: A and B₁ are uniform in ``±1/√`` of their number of columns, as LoRA's A; the paper initialises for training
    from scratch, and LyCORIS (Yeh et al. 2023, arXiv:2309.14859), which made it an adapter, draws Gaussians.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r`` of each of the two updates.
        alpha: scaling numerator, by default the rank.
        rslora: ``s = alpha / √rank`` (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an element of the input of the adapter, in training mode.

    Source: Hyeon-Woo et al. 2021, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
    arXiv:2108.06098.

    Example:
        >>> layer = LoHaLinear(32, 32, rank=3)
        >>> _ = torch.nn.init.normal_(layer.lora_b2)
        >>> int(torch.linalg.matrix_rank((layer.effective_weight() - layer.weight).double(), atol=1e-4))
        9
    """

    method = "loha"

    def build(self, *, alpha: float | None = None, rslora: bool = False, dropout: float = 0.0) -> None:
        """Create both pairs."""
        self.dropout = check_dropout(dropout)
        self.create_factors(alpha, rslora)
        self.lora_a2 = nn.Parameter(self.draw_uniform(self.rank, self.in_features, bound=1 / math.sqrt(self.in_features)))
        self.lora_b2 = nn.Parameter(self.zeros(self.out_features, self.rank))
        self.lora_b = nn.Parameter(self.draw_uniform(self.out_features, self.rank, bound=1 / math.sqrt(self.rank)))

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        return {**self.low_rank_config(), "dropout": self.dropout}

    def effective_weight(self) -> Tensor:
        """``W + s (B₁ A₁) ⊙ (B₂ A₂)``, ``(out, in)``."""
        return self.base_weight() + self.scale * (self.lora_b @ self.lora_a) * (self.lora_b2 @ self.lora_a2)

    def products(self) -> tuple[Tensor, Tensor]:
        """``A* (r², in)`` and ``B* (out, r²)`` with ``B* A* = (B₁ A₁) ⊙ (B₂ A₂)``."""
        a = self.lora_a[:, None] * self.lora_a2
        b = self.lora_b[:, :, None] * self.lora_b2[:, None]
        return a.flatten(0, 1), b.flatten(1)

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """``A*`` and ``s B*``, of rank r²."""
        a, b = self.products()
        return a, self.scale * b

    def adapted_forward(self, x: Tensor) -> Tensor:
        """LoRA of rank r², or a second product with the dense update where that is cheaper."""
        dropout = self.dropout if self.training else 0.0
        if self.rank**2 <= min(self.in_features, self.out_features):
            return lora_linear(x, self.base_weight(), self.bias, *self.products(), self.scale, dropout=dropout)
        dtype = compute_dtype(x)
        update = self.scale * (self.lora_b @ self.lora_a) * (self.lora_b2 @ self.lora_a2)
        return self.base_forward(x) + F.linear(F.dropout(x.to(dtype), dropout), update.to(dtype))
