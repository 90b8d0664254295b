"""dora_linear in Triton: three launches forward and seven backward, besides what is prepared once per step.

Forward: the base product, T1 for ``h``, T3 for gain and bias in place. Backward: T2 reads dY and y once for dB, dm, db and
``D = g ⊙ dY``; T1 makes ``u``; the base product and T3 make dx; T2 makes dA. The host never waits for the device.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from peftlite.kernels.col_shrink_triton import Magnitudes, col_shrink
from peftlite.kernels.dispatch import saved_tensors, without_autocast
from peftlite.kernels.expand_triton import expand_
from peftlite.kernels.lora_linear_triton import (
    LARGE_RANK,
    contiguous_like,
    draw_seed,
    empty_bits,
    packed_like,
    rows_side_by_side,
    shrink_gradient,
    shrink_x,
    wide_product,
)
from peftlite.kernels.pack_triton import pack_adapters
from peftlite.kernels.prepared_triton import prepared
from peftlite.kernels.row_norm import inverse_norm_gradients
from peftlite.kernels.row_norm_triton import EPS, row_norm_gain


def dora_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scale: float,
    dropout: float,
    norm_grad: bool,
) -> Tensor:
    """`dora_linear` for `x` in the dtype of the computation; `dropout` is rounded to a multiple of 2⁻¹⁶."""
    rows = x.reshape(-1, x.shape[-1])
    seed = draw_seed(x.device) if dropout > 0 else None
    values = (weight, lora_a.detach(), lora_b.detach(), magnitude.detach())
    if torch.compiler.is_compiling():
        a, b, gains = _prepare_op(*values, scale, x.dtype)
        run: Any = _forward_op
    else:
        found = prepared(lora_a, scale, x.dtype)
        a, b, gains = found if found and found[2] is not None else _prepare(*values, scale, x.dtype, fresh=False)
        run = _DoRA.apply
    y, *_ = run(rows, weight, bias, lora_a, lora_b, magnitude, a, b, gains, seed, scale, dropout, norm_grad)
    return y.view(*x.shape[:-1], weight.shape[0])


def _prepare(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scale: float,
    dtype: torch.dtype,
    fresh: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed A and B, and ``(g, n) (2, out)``; new tensors all of them if `fresh`."""
    a, b = pack_adapters(lora_a, lora_b, dtype, out=packed_like(lora_a, lora_b, dtype) if fresh else None)
    return a, b, row_norm_gain(rows_side_by_side(weight.detach()), a, b, magnitude, scale)


def dora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    a: Tensor,
    b: Tensor,
    gains: Tensor,
    seed: Tensor | None,
    scale: float,
    dropout: float,
    norm_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y (M, out)``, ``h = s x̃ Aᵀ (M, RP)`` and the bits of the mask (empty without dropout).

    The base product includes the bias, and ``g ⊙ (inner + b) + (1 - g) ⊙ b`` is computed: where g is 1 the very bits of the
    base layer come out.
    """
    with without_autocast(x.device):
        dtype = x.dtype
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        h, mask = shrink_x(rows_side_by_side(x), a, scale, seed, dropout)
        biases = None if bias is None else [bias]
        expand_([y], h, [b], [1.0], by_rank=False, gains=[gains[0]], biases=biases, bias_inside=bias is not None)
        return y, h, mask


def dora_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    a: Tensor,
    b: Tensor,
    gains: Tensor,
    y: Tensor | None,
    h: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    norm_grad: bool,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of `dora_forward` that `needs` asks for, in the order x, bias, lora_a, lora_b, magnitude."""
    with without_autocast(dy.device):
        need_x, need_bias, need_a, need_b, need_m = needs
        dy, gain, norm = rows_side_by_side(dy), gains[0], gains[1]
        x = None if x is None else rows_side_by_side(x)
        large = h.shape[1] > LARGE_RANK
        through_norm = norm_grad and (need_a or need_b)
        db = contiguous_like(lora_b) if need_b and not large else None
        inner_grad = contiguous_like(dy) if need_x or (large and (need_a or need_b)) else None  # D = g ⊙ dY
        dm = torch.empty_like(norm) if through_norm else contiguous_like(magnitude) if need_m else None
        dbias = None if bias is None or not need_bias else contiguous_like(bias)
        if not (db is None and inner_grad is None and dm is None and dbias is None):
            col_shrink(
                [dy],
                None if db is None else h,
                [] if db is None else [db],
                [] if db is None else [1.0],
                gains=[gain],
                scaled=None if inner_grad is None else [inner_grad],
                magnitudes=None if dm is None else _magnitudes(dm, x, weight, bias, b, norm, y, h),
                biases=None if dbias is None else [dbias],
            )
        dx = da = None
        if need_x or need_a:
            d, factor = (dy, gain) if inner_grad is None else (inner_grad, None)
            u = shrink_gradient(d, b, scale, dropout, factor)
        if need_x:
            assert inner_grad is not None
            dx = inner_grad @ weight.to(dy.dtype)
            expand_([dx], u, [a], [1.0], by_rank=True, mask=mask)
        if need_a:
            assert x is not None
            if large and mask is None:
                da = wide_product(u[:, : lora_a.shape[0]].T, x, lora_a.dtype)
            else:
                da = contiguous_like(lora_a)
                col_shrink([x], u, [da], [1.0], by_rank=True, mask=mask)
        if need_b and large:
            assert inner_grad is not None
            db = wide_product(inner_grad.T, h[:, : lora_b.shape[1]], lora_b.dtype)
        if through_norm:
            assert dm is not None
            more_a, more_b = inverse_norm_gradients(weight, lora_a, lora_b, scale, dm * magnitude, norm, EPS)
            da, db = None if da is None else da + more_a, None if db is None else db + more_b
            dm = dm.to(magnitude.dtype)
        found = (dx, dbias, da, db, dm)
        return [grad for grad, need in zip(found, needs, strict=True) if need and grad is not None]


def _magnitudes(
    dm: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    b: Tensor,
    norm: Tensor,
    y: Tensor | None,
    h: Tensor,
) -> Magnitudes:
    assert x is not None
    assert y is not None
    biases = None if bias is None else [bias]
    return Magnitudes([y], biases, [norm], [dm], x, h, [weight.contiguous()], [b], [1.0])


# See lora_linear on what computing the signature costs.
dora_forward.__signature__ = inspect.signature(dora_forward)  # type: ignore[attr-defined]


class _DoRA(torch.autograd.Function):
    """Saves x, h, gains, packed factors, the mask in bits and the output y, whose storage its consumer usually saves too."""

    forward = staticmethod(dora_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, lora_a, lora_b, magnitude, a, b, gains, _seed, ctx.scale, ctx.dropout, ctx.norm_grad = inputs
        y, h, mask = output
        ctx.mark_non_differentiable(h, mask)
        ctx.set_materialize_grads(False)
        need_a, need_b, need_m = ctx.needs_input_grad[3:6]
        need_y = need_m or (ctx.norm_grad and (need_a or need_b))
        kept = (x if need_a or need_y else None, weight, bias, lora_a, lora_b, magnitude, a, b, gains)
        ctx.save_for_backward(*kept, y if need_y else None, h, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dora_backward, dy)


def _gradients(ctx: Any, run: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    *tensors, mask = saved_tensors("dora_linear", ctx)
    need_x, _, need_bias, need_a, need_b, need_m, *_ = ctx.needs_input_grad
    needs = [need_x, need_bias, need_a, need_b, need_m]
    options = (mask if ctx.dropout > 0 else None, ctx.scale, ctx.dropout, ctx.norm_grad, needs)
    grads = iter(run(dy, *tensors, *options))
    dx, dbias, da, db, dm = (next(grads) if need else None for need in needs)
    return dx, None, dbias, da, db, dm, *(None,) * 7


_prepare_op = torch.library.custom_op("peftlite::prepare_dora", _prepare, mutates_args=())
_forward_op = torch.library.custom_op("peftlite::dora_linear_triton", dora_forward, mutates_args=())
_backward_op = torch.library.custom_op("peftlite::dora_linear_triton_backward", dora_backward, mutates_args=())
_forward_op.register_autograd(lambda ctx, dy, *_: _gradients(ctx, _backward_op, dy), setup_context=_DoRA.setup_context)


@_prepare_op.register_fake
def _(weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, scale: float, dtype: torch.dtype, *_: Any) -> Any:
    return *packed_like(lora_a, lora_b, dtype), weight.new_empty(2, weight.shape[0], dtype=torch.float32)


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    a, seed = rest[4], rest[7]
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0]), empty_bits(x, seed)


@_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *rest: Any,
) -> list[Tensor]:
    like = (dy.new_empty(dy.shape[0], weight.shape[1]), bias, lora_a, lora_b, magnitude)
    return [contiguous_like(t) for t, need in zip(like, rest[-1], strict=True) if need and t is not None]
