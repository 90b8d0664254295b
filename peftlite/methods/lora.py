"""LoRA: Hu et al. 2021, arXiv:2106.09685."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import Self

from peftlite.adapter import AdapterLinear
from peftlite.kernels.lora_linear import lora_linears
from peftlite.kernels.low_rank import LoRAArguments
from peftlite.options import check_dropout


@final
class LoRALinear(AdapterLinear):
    """Compute ``y = x Wᵀ + b + s (dropout(x) Aᵀ) Bᵀ``: a frozen layer plus a trainable update ``s B A`` of rank r.

    ``A (r, in)`` is `lora_a`, ``B (out, r)`` is `lora_b`, ``s = alpha / rank`` is `scale`. B is zero at birth, so that an
    injected model computes bit for bit what it computed before. Trained: ``r (in + out)`` parameters.

    The paper draws A from a Gaussian; we follow its code and draw it uniformly from ``±1/√in``.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r``.
        alpha: scaling numerator, by default the rank (``s = 1``).
        rslora: ``s = alpha / √rank`` (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an element of the input of the low-rank path, in training mode.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.

    Example:
        >>> layer = LoRALinear(16, 32, rank=4)
        >>> layer(torch.zeros(2, 16)).shape
        torch.Size([2, 32])
        >>> sorted(layer.adapter_parameters())
        ['lora_a', 'lora_b']
    """

    method = "lora"

    def build(self, *, alpha: float | None = None, rslora: bool = False, dropout: float = 0.0) -> None:
        """Create A and B."""
        self.dropout = check_dropout(dropout)
        self.create_factors(alpha, rslora)

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        return {**self.low_rank_config(), "dropout": self.dropout}

    def effective_weight(self) -> Tensor:
        """``W + s B A``, ``(out, in)``."""
        return self.base_weight() + self.scale * (self.lora_b @ self.lora_a)

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """A and ``s B``."""
        return self.lora_a.detach().clone(), self.scale * self.lora_b

    def adapted_forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b + s (x̃ Aᵀ) Bᵀ`` without the dense update."""
        return self.fused_forward([self], x)[0]

    @classmethod
    def fused_forward(cls, layers: Sequence[Self], x: Tensor) -> list[Tensor]:
        """The same for several layers that read one x."""
        dropout = layers[0].dropout if layers[0].training else 0.0
        return lora_linears(x, [layer._arguments() for layer in layers], dropout=dropout)

    def _arguments(self) -> LoRAArguments:
        return LoRAArguments(self.base_weight(), self.bias, self.lora_a, self.lora_b, self.scale)
