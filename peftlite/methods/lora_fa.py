"""LoRA-FA: Zhang et al. 2023, arXiv:2308.03303."""

from typing import Any, final

import torch
from torch import Tensor

from peftlite.adapter import AdapterLinear
from peftlite.kernels.lora_linear import lora_linear
from peftlite.options import check_dropout


@final
class LoRAFALinear(AdapterLinear):
    """Compute ``y = x Wᵀ + b + s (dropout(x) Aᵀ) Bᵀ`` with A frozen: LoRA that keeps no input for its backward pass.

    ``A (r, in)`` is the buffer `lora_a`, drawn once; ``B (out, r)``, zero at birth, is `lora_b` and the only parameter.
    Trained: ``r out`` parameters per layer. Forward and backward cost what LoRA's do, less the gradient of A, for which
    LoRA keeps the input ``(M, in)``; LoRA-FA keeps ``x Aᵀ (M, r)`` alone.

    Use it where activations and not parameters fill the memory: long sequences, large batches.

    We draw A as our LoRA does, uniformly from ``±1/√in``, where the paper says Gaussian. Hugging Face PEFT's optimizer
    for it multiplies the gradient of B by ``s⁻² (A Aᵀ)⁻¹``. With `orthogonal` the rows of A are born orthogonal and of
    length ``1/s``, which makes this factor the identity: the same effect with any optimizer.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r``.
        alpha: scaling numerator, by default the rank (``s = alpha / rank = 1``).
        rslora: ``s = alpha / √rank`` (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an element of the input of the low-rank path, in training mode; its mask
            ``(M, in)``, one byte per element, is kept.
        orthogonal: let ``A Aᵀ = s⁻² I``.

    Source: Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
    arXiv:2308.03303.

    Example:
        >>> layer = LoRAFALinear(16, 32, rank=4)
        >>> sorted(layer.adapter_parameters()), sorted(layer.adapter_state())
        (['lora_b'], ['lora_a', 'lora_b'])
    """

    method = "lora_fa"

    def build(
        self, *, alpha: float | None = None, rslora: bool = False, dropout: float = 0.0, orthogonal: bool = False
    ) -> None:
        """Create A as a buffer, and B."""
        self.dropout, self.orthogonal = check_dropout(dropout), orthogonal
        self.create_factors(alpha, rslora)
        a = self.lora_a.detach()
        del self.lora_a
        if orthogonal:
            q, r = torch.linalg.qr(a.T.to(torch.promote_types(a.dtype, torch.float32)))
            a = ((q * torch.diagonal(r).sign()).T / self.scale).to(a.dtype).contiguous()
        self.register_buffer("lora_a", a)

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        return {**self.low_rank_config(), "dropout": self.dropout, "orthogonal": self.orthogonal}

    def effective_weight(self) -> Tensor:
        """``W + s B A``, ``(out, in)``."""
        return self.base_weight() + self.scale * (self.lora_b @ self.lora_a)

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """A and ``s B``."""
        return self.lora_a.clone(), self.scale * self.lora_b

    def adapted_forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b + s (x̃ Aᵀ) Bᵀ``; the operation keeps x only where A has a gradient, and here it has none."""
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.base_weight(), self.bias, self.lora_a, self.lora_b, self.scale, dropout=dropout)
