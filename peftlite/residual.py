"""Residual sums behind adapted layers, which spare DoRA the memory of its outputs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlite.kernels.dispatch import compute_dtype
from peftlite.kernels.summed_output import SummedOutput, add_residual
from peftlite.methods import DoRALinear
from peftlite.options import check_dropout


def residual_sum(layer: nn.Module, x: Tensor, residual: Tensor, dropout: float = 0.0) -> Tensor:
    """Compute ``dropout(layer(x)) + residual`` as a transformer's blocks end, for any layer, and save memory if it is DoRA.

    DoRA needs its output y for the gradient of the magnitude. Attention and activations keep theirs anyway; a sum keeps none,
    so that y would be there for DoRA alone. Behind this function DoRA keeps none either: its backward pass forms
    ``y = (1 - p) (sum - residual)`` from what the next norm (the sum) and the next linear (the residual) keep. That takes one
    pass over y, and costs the digits by which the sum is larger than y; output features with too few left are computed anew
    from x. So that there are enough it is done in fp32 and fp64 only, and in eager code on ATen calls; otherwise, and for
    every other layer, this is the plain sum.

    Args:
        layer: a linear, adapted or not: x ``(..., in)`` to ``(..., out)``.
        x: ``(..., in)``.
        residual: ``(..., out)``.
        dropout: probability ``p`` of dropping an element of ``layer(x)``; pass 0 in evaluation.

    Returns:
        ``(..., out)``.

    Raises:
        ValueError: if `dropout` is no probability.

    Example:
        >>> layer = DoRALinear(16, 32, rank=4)
        >>> x, residual = torch.randn(2, 16), torch.randn(2, 32)
        >>> torch.equal(residual_sum(layer, x, residual), layer(x) + residual)
        True
    """
    check_dropout(dropout)
    offer = None
    if isinstance(layer, DoRALinear) and layer.keep_output is True and _can_be_had(layer, x, residual):
        layer.keep_output = offer = SummedOutput()
        try:
            y = layer(x)
        finally:
            layer.keep_output = True
    else:
        y = layer(x)
    y = F.dropout(y, dropout) if dropout else y
    return y + residual if offer is None or not offer.accepted else add_residual(y, residual, 1 - dropout, offer)


def _can_be_had(layer: DoRALinear, x: Tensor, residual: Tensor) -> bool:
    """Whether y can be had from the sum with its digits; compiled code keeps what it finds best."""
    exact = residual.dtype == compute_dtype(x) and residual.dtype.itemsize >= 4
    same = residual.shape == (*x.shape[:-1], layer.out_features)
    return exact and same and not torch.compiler.is_compiling()
