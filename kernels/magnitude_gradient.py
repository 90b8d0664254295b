"""The gradient of DoRA's magnitude from the layer's output, and where that has too few digits for it, on CPU and ATen calls."""

import math

import torch
from torch import Tensor

from peftlite.kernels import native, native_library
from peftlite.kernels.column_scale import scale_columns_backward
from peftlite.kernels.dispatch import has_values
from peftlite.kernels.summed_output import Summed

SMALL_GAIN = 1 / 16  # below it, g ⊙ inner may have underflowed in fp16
LARGE_BIAS = 4.0  # times the mean of |g ⊙ inner|: above it, y - b has lost the digits that dm needs
LARGE_SUM = 2.0**10  # times that mean: above it, a y that was had from a residual sum has lost them; fp32 keeps 14 bits more
SAMPLE = 16  # rows of y, at most, that these means are taken over


def is_readable(y: Tensor | Summed, dtype: torch.dtype) -> bool:
    """Whether the native passes can read y beside a gradient of this dtype."""
    tensors = (y,) if isinstance(y, Tensor) else (y.total, y.residual)
    return native_library.reads(*tensors) and all(tensor.dtype == dtype for tensor in tensors)


def native_magnitude_gradient(
    dy: Tensor,
    y: Tensor | Summed,
    bias: Tensor | None,
    magnitude: Tensor,
    norm: Tensor,
    lora_b: Tensor,
    scale: float,
    h: Tensor,
    h_start: int,
    u: Tensor | None,
    u_start: int,
    db: Tensor | None,
    *,
    scaled: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`magnitude_gradient` with all else that a backward pass reads of dy, in C: see `native.output_gradients`.

    Takes ``n (out,)`` in place of the gain; the other arguments are those of the two.
    """
    if isinstance(y, Summed):
        total, residual, keep, limit = *y, LARGE_SUM
    else:
        total, residual, keep, limit = y, None, 1.0, LARGE_BIAS
    dy = dy.contiguous()
    inner_grad = torch.empty_like(dy) if scaled else None
    dm, lost = torch.empty_like(norm), norm.new_empty(len(norm), dtype=torch.bool)
    low_rank = (lora_b, scale, h, h_start, u, u_start, db)
    found = native.output_gradients(dy, *low_rank, total, residual, keep, bias, magnitude, norm, limit, inner_grad, dm, lost)
    return dy if inner_grad is None else inner_grad, dm, lost.nonzero().squeeze(1) if found else None


def magnitude_gradient(
    dy: Tensor, y: Tensor | Summed, bias: Tensor | None, magnitude: Tensor, gain: Tensor, *, scaled: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute ``D = g ⊙ dy`` and ``dm = Σ_i dy_i ⊙ (y_i - b) / m``, and find the output features that lack digits for dm.

    Args:
        dy: ``(M, out)``.
        y: ``(M, out)``, ``g ⊙ inner + b``, or the sum that it went into.
        bias: ``b (out,)`` or None.
        magnitude: ``m (out,)``.
        gain: ``g (out,)``, fp32 or fp64.
        scaled: whether D is asked for; without it the first result is dy.

    Returns:
        D in the dtype of dy; dm in that of `gain`; and the output features whose dm is to be had from x instead, or None.
    """
    output = y.output() if isinstance(y, Summed) else y
    inner_grad, dm = scale_columns_backward(dy, output, gain, bias, scaled=scaled)
    dm /= magnitude
    lost = _lost_in_sum(output, y.total, bias) if isinstance(y, Summed) else _lost_columns(output, bias, gain, dm)
    return inner_grad, dm, lost


def _lost_columns(y: Tensor, bias: Tensor | None, gain: Tensor, dm: Tensor) -> Tensor | None:
    """The output features whose product ``g ⊙ inner`` cannot be had from y with enough digits, or None.

    They are those where m is zero, so that `dm` is not finite, those where the product may have underflowed in fp16, and
    those where the bias has swamped it.
    """
    lost = None
    if y.dtype == torch.float16 and exceeds(1 / gain, 1 / SMALL_GAIN):
        lost = gain.abs() < SMALL_GAIN
    if bias is None or not y.numel():
        if has_values(dm) and not math.isfinite(dm.sum().item()):
            lost = ~dm.isfinite() if lost is None else lost | ~dm.isfinite()
    else:
        sample = y[:: y.shape[0] // SAMPLE + 1]  # not a divisor, which would pick the first token of each sequence
        share = bias / (sample - bias).abs_().sum(0)  # where m is zero, y is b, and this is not finite
        limit = LARGE_BIAS / sample.shape[0]
        if exceeds(share, limit):
            swamped = ~(share.abs() <= limit) & ((bias != 0) | ~dm.isfinite())
            lost = swamped if lost is None else lost | swamped
    return None if lost is None else lost.nonzero().squeeze(1)


def _lost_in_sum(y: Tensor, total: Tensor, bias: Tensor | None) -> Tensor | None:
    """The same for a y that was had from the sum `total`: sum or bias are so large that few digits of the product are left."""
    every = y.shape[0] // SAMPLE + 1
    sample = y[::every]
    inner = (sample if bias is None else sample - bias).abs() * (sample != 0)  # where y was dropped it tells nothing
    share = (sample.abs() + total[::every].abs()).sum(0) / inner.sum(0)  # not finite where m is zero
    if not exceeds(share, LARGE_SUM):
        return None
    return (~(share <= LARGE_SUM)).nonzero().squeeze(1)


def exceeds(values: Tensor, limit: float) -> bool:
    """Whether a value is larger in size than `limit`, or is not a number; False where there are no values."""
    if not has_values(values):
        return False
    return not torch.equal(values.clamp(-limit, limit), values)
