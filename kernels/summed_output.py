"""The output of a linear, had again in the backward pass from the residual sum that it went into.

A linear that reads its output y in the backward pass keeps ``M x out`` elements for it. Where ``s = dropout(y) + residual``
comes next, what follows keeps s and residual (a norm the one, the next linear the other), and ``y = (1 - p) (s - residual)``
wherever the gradient of y is not zero.
"""

from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftlite.kernels.dispatch import positional, saved_tensors


class Summed(NamedTuple):
    """What the backward pass of the sum found: sum and residual ``(M, out)``, and the probability with which y was kept."""

    total: Tensor
    residual: Tensor
    keep: float

    def output(self) -> Tensor:
        """``y (M, out)``, zero where it was dropped."""
        y = self.total - self.residual
        return y if self.keep == 1 else y.mul_(self.keep)


class SummedOutput:
    """An offer to a linear: keep no output, the sum will hand it over."""

    def __init__(self) -> None:
        self.accepted = False
        self._summed: Summed | None = None
        self._thread = get_ident()

    def accept(self) -> bool:
        """Called by the forward pass of the linear; False on a thread that has come upon the offer of another one."""
        if self._thread != get_ident():
            return False
        self.accepted = True
        return True

    def hand_over(self, summed: Summed) -> None:
        """Called by the backward pass of the sum, which comes before that of the linear."""
        self._summed = summed

    def take(self) -> Summed | None:
        """What was handed over, once; None if the gradient came to the linear on another way than through the sum."""
        summed, self._summed = self._summed, None
        return summed


def add_residual(y: Tensor, residual: Tensor, keep: float, offer: SummedOutput) -> Tensor:
    """``y + residual``, for y ``(..., out)`` with elements dropped and the others divided by `keep`; honours the `offer`."""
    return _Sum.apply(y, residual, keep, offer)


class _Sum(torch.autograd.Function):
    """Saves the sum and the residual: nothing of its own where what comes next saves them too."""

    @staticmethod
    @positional
    def forward(y: Tensor, residual: Tensor, keep: float, offer: SummedOutput) -> Tensor:
        return y + residual

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, residual, ctx.keep, ctx.offer = inputs
        ctx.save_for_backward(output, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, residual = saved_tensors("residual_sum", ctx)
        width = total.shape[-1]
        ctx.offer.hand_over(Summed(total.reshape(-1, width), residual.reshape(-1, width), ctx.keep))
        return grad, grad, None, None
