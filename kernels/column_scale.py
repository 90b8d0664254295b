"""The passes over ``(M, out)`` tensors that a gain per column needs, each of them one fused ATen call.

They are those of batch normalisation with fixed statistics, ``(y - mean) / √var · weight + shift``, at a variance of 1: one
pass in each direction, which takes the gain in fp32 for y in 16 bits and sums in fp32. Written out with the elementwise
operations the same takes up to three times as long on CPU, and fp32 copies of the 16-bit tensors.
"""

import torch
from torch import Tensor


def scale_columns(y: Tensor, gain: Tensor, bias: Tensor | None) -> None:
    """Compute ``g ⊙ y + (1 - g) ⊙ b`` in place of `y`, rounded once.

    Args:
        y: ``(M, out)``.
        gain: ``g (out,)``, fp32 or fp64.
        bias: ``b (out,)`` or None for zero.
    """
    if y.dtype.itemsize == 2 and gain.dtype == torch.float32 and y.device.type == "cpu" and y.numel():
        one, nowhere = torch.ones_like(gain), gain.new_empty(0)
        centre = torch.zeros_like(gain) if bias is None else bias.to(gain.dtype)
        torch.ops.aten.native_batch_norm.out(
            y, gain, centre, centre, one, False, 0.0, 0.0, out=y, save_mean=nowhere, save_invstd=nowhere
        )
    elif bias is None:
        torch.mul(y, gain, out=y)
    else:
        torch.addcmul(torch.addcmul(bias, gain, bias, value=-1), y, gain, out=y)


def scale_columns_backward(
    dy: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None, *, scaled: bool = True
) -> tuple[Tensor, Tensor]:
    """Compute ``D = g ⊙ dy (M, out)``, in the dtype of `dy`, and ``Σ_i dy_i ⊙ (y_i - b)``, ``(out,)``, in that of `gain`.

    Args:
        dy: ``(M, out)``.
        y: ``(M, out)``, ``g ⊙ inner + b``.
        gain: ``g (out,)``, fp32 or fp64.
        bias: ``b (out,)`` or None.
        scaled: whether D is asked for; without it the first of the two is `dy` as it is, and the second costs less.
    """
    if not dy.numel():  # the fused kernel divides by the number of rows
        return torch.empty_like(dy), torch.zeros_like(gain)
    shift = torch.zeros_like(gain) if bias is None else bias.to(gain.dtype)
    wide = gain.dtype == torch.float64  # the fused kernel takes parameters of the same dtype, or fp32 for 16 bits
    inner_grad, total, _ = torch.ops.aten.native_batch_norm_backward(
        dy.to(gain.dtype) if wide else dy,
        y.to(gain.dtype) if wide else y,
        gain,
        shift,
        torch.ones_like(gain),
        None,
        None,
        False,
        0.0,
        [scaled, True, False],
    )
    return inner_grad.to(dy.dtype) if scaled else dy, total
