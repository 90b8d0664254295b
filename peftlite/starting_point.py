"""StartingPointLinear: what PiSSA and OLoRA share, a low-rank update that is counted from where it starts."""

from typing import Any

import torch
from torch import Tensor, nn

from peftlite.adapter import AdapterLinear
from peftlite.kernels.lora_linear import lora_linear
from peftlite.options import check_dropout


class StartingPointLinear(AdapterLinear):
    """Compute ``y = x Wᵀ + b + s (dropout(x) (B A - B₀ A₀)ᵀ)``: LoRA whose factors are born as ``A₀, B₀``, taken out of W.

    The papers write ``W - s B₀ A₀`` into the base. Here the base is never written: the starting point is a pair of
    buffers, ``start_a (r, in)`` and ``start_b (out, r)``, and is subtracted in the forward pass as

        B A - B₀ A₀ = (B - B₀) A + B₀ (A - A₀) = [B - B₀, B₀] [A; A - A₀],

    whose second form is exactly zero at birth. The gradients of A and B are the papers'. It costs LoRA's time at twice
    the rank, and `remove_adapters` gives the base back bit for bit.

    A method's `build` computes the starting point and hands it to `start_at`.
    """

    start_a: Tensor
    start_b: Tensor

    def start_at(self, a: Tensor, b: Tensor, dropout: float) -> None:
        """Create `lora_a`, `lora_b` and the starting point from ``a (r, in)`` and ``b (out, r)``; the scale is set."""
        self.dropout = check_dropout(dropout)
        for name, start in (("a", a), ("b", b)):
            start = start.to(self._adapter_dtype).contiguous()
            setattr(self, f"lora_{name}", nn.Parameter(start.clone()))
            self.register_buffer(f"start_{name}", start)

    def dense_base(self) -> Tensor:
        """The base weight for a decomposition, in fp32 at least.

        Raises:
            ValueError: if it is not finite.
        """
        weight = self.base_weight().detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(
                f"{type(self).__name__} decomposes the base weight, and this one has values that are not finite; repair the "
                "checkpoint, or use a method that does not look at the weight, such as 'lora'."
            )
        return weight

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        return {**self.low_rank_config(), "dropout": self.dropout}

    def factors(self) -> tuple[Tensor, Tensor]:
        """``[A; A - A₀] (2 r, in)`` and ``[B - B₀, B₀] (out, 2 r)``."""
        a = torch.cat([self.lora_a, self.lora_a - self.start_a])
        return a, torch.cat([self.lora_b - self.start_b, self.start_b], 1)

    def effective_weight(self) -> Tensor:
        """``W + s (B A - B₀ A₀)``, ``(out, in)``."""
        a, b = self.factors()
        return self.base_weight() + self.scale * (b @ a)

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """``[A; A - A₀]`` and ``s [B - B₀, B₀]``, of rank 2 r."""
        a, b = self.factors()
        return a, self.scale * b

    def adapted_forward(self, x: Tensor) -> Tensor:
        """LoRA of rank 2 r."""
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.base_weight(), self.bias, *self.factors(), self.scale, dropout=dropout)
