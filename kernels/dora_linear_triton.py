"""dora_linear in Triton, for layers that read the same x: 3 launches forward and 7 backward, for three layers 5 and 9.

What is prepared once per step comes on top. Forward: the base product of each layer, T1 for ``h``, T3 for gain and bias in
place. Backward: T2 reads dY and y once for dB, dm, db and ``D = g ⊙ dY``; T1 makes ``u``; the base products and T3 make dx;
T2 makes dA. One layer is the simplest group. The host never waits for the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftlite.kernels.col_shrink_triton import Magnitudes, col_shrink
from peftlite.kernels.dispatch import positional, saved_tensors, without_autocast
from peftlite.kernels.expand_triton import expand_
from peftlite.kernels.group_triton import alike, rows_side_by_side
from peftlite.kernels.lora_linear_triton import (
    LARGE_RANK,
    base_gradient,
    base_products,
    chosen,
    contiguous_like,
    draw_seed,
    empty_bits,
    factor_a_gradients,
    factor_b_products,
    packed_like,
    shrink_gradients,
    shrink_x,
)
from peftlite.kernels.low_rank import flatten, unflatten
from peftlite.kernels.pack_triton import pack_adapters
from peftlite.kernels.prepared_triton import prepare
from peftlite.kernels.row_norm import inverse_norm_gradients
from peftlite.kernels.row_norm_triton import EPS, row_norm_gain
from peftlite.kernels.weight_decomposed import DoRAArguments


def dora_linears_triton(
    x: Tensor, layers: Sequence[DoRAArguments], dropout: float, norm_grad: bool, keep_output: bool
) -> list[Tensor]:
    """`dora_linears` for `x` in the dtype of the computation; `dropout` is rounded to a multiple of 2⁻¹⁶."""
    rows = x.reshape(-1, x.shape[-1])
    seed = draw_seed(x.device) if dropout > 0 else None  # one for all, so that layers that run apart share the mask too
    ys: dict[int, Tensor] = {}
    if torch.compiler.is_compiling():
        for place, layer in enumerate(layers):
            *tensors, scale = layer
            factors = (layer.lora_a.detach(), layer.lora_b.detach(), layer.magnitude.detach())
            packed = _prepare_op(layer.weight, *factors, scale, x.dtype)
            ys[place] = _forward_op(rows, *tensors, *packed, seed, scale, dropout, norm_grad, keep_output)[0]
    else:
        for places in alike(layers):
            group = [layers[place] for place in places]
            a, bs, gains = prepare(group, x.dtype)
            flat = flatten([(*layer, b, gain) for layer, b, gain in zip(group, bs, gains, strict=True)])
            ys.update(zip(places, _DoRA.apply(rows, a, seed, dropout, norm_grad, keep_output, *flat), strict=False))
    return [ys[place].view(*x.shape[:-1], layer.weight.shape[0]) for place, layer in enumerate(layers)]


def dora_forward(
    x: Tensor,
    layers: Sequence[DoRAArguments],
    a: Tensor,
    bs: Sequence[Tensor],
    gains: Sequence[Tensor],
    seed: Tensor | None,
    dropout: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """``y (M, out)`` of each layer, ``h = s x̃ Aᵀ (M, Σ RP)`` and the bits of the mask (empty without dropout).

    The base product includes the bias, and ``g ⊙ (inner + b) + (1 - g) ⊙ b`` is computed: where g is 1 the very bits of the
    base layer come out. `gains` holds g and n ``(2, out)`` of each layer, the rest is as in `low_rank_forward`.
    """
    with without_autocast(x.device):
        ys = base_products(x, layers)
        h, mask = shrink_x(rows_side_by_side(x), a, layers[0].scale, seed, dropout)
        _finish_outputs(ys, h, layers, bs, gains)
        return ys, h, mask


def _finish_outputs(
    ys: Sequence[Tensor], h: Tensor, layers: Sequence[DoRAArguments], bs: Sequence[Tensor], gains: Sequence[Tensor]
) -> None:
    """Make the outputs of the base products `ys`, in place."""
    biases = _biases(layers)
    ones, gs = [1.0] * len(layers), [gain[0] for gain in gains]
    expand_(ys, h, bs, ones, by_rank=False, gains=gs, biases=biases, bias_inside=biases is not None)


def dora_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    layers: Sequence[DoRAArguments],
    a: Tensor,
    bs: Sequence[Tensor],
    gains: Sequence[Tensor],
    ys: Sequence[Tensor | None],
    h: Tensor,
    mask: Tensor | None,
    dropout: float,
    norm_grad: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """The gradient of x, and those of each layer's bias, lora_a, lora_b and magnitude, for the gradients ``dy (M, out)``.

    `needs` says which of x, bias, lora_a, lora_b and magnitude have one; the others are as in `dora_forward`. Outputs `ys` that
    are needed and None are formed anew.
    """
    with without_autocast(dys[0].device):
        need_x, need_bias, need_a, need_b, need_m = needs
        nothing: list[Any] = [None] * len(layers)
        dys, gs, norms = [rows_side_by_side(dy) for dy in dys], [gain[0] for gain in gains], [gain[1] for gain in gains]
        large = bs[0].shape[1] > LARGE_RANK
        through_norm = norm_grad and (need_a or need_b)
        das = nothing
        dbs = [contiguous_like(layer.lora_b) for layer in layers] if need_b and not large else nothing
        keep_ds = need_x or (large and (need_a or need_b))
        ds = [contiguous_like(dy) for dy in dys] if keep_ds else nothing  # D = g ⊙ dY
        dms = [torch.empty_like(norm) for norm in norms] if through_norm else nothing
        if need_m and not through_norm:
            dms = [contiguous_like(layer.magnitude) for layer in layers]
        if dms is not nothing and ys[0] is None:
            assert x is not None
            ys = base_products(x, layers)
            _finish_outputs(ys, h, layers, bs, gains)
        biases = _biases(layers) if need_bias else None
        dbiases = [contiguous_like(bias) for bias in biases] if biases else nothing
        if any(outputs is not nothing for outputs in (dbs, ds, dms, dbiases)):
            some = dbs is not nothing
            col_shrink(
                dys,
                h if some else None,
                dbs if some else [],
                [1.0] * len(dbs) if some else [],
                gains=gs,
                scaled=None if ds is nothing else ds,
                magnitudes=None if dms is nothing else _magnitudes(dms, x, layers, bs, norms, ys, h),
                biases=None if dbiases is nothing else dbiases,
            )
        dx = None
        if need_x or need_a:
            u = shrink_gradients(ds if keep_ds else dys, bs, layers[0].scale, dropout, None if keep_ds else gs)
        if need_x:
            dx = base_gradient(ds, layers)
            expand_([dx], u, [a], [1.0], by_rank=True, mask=mask)
        if need_a:
            assert x is not None
            das = factor_a_gradients(x, u, [layer.lora_a for layer in layers], mask, large)
        if need_b and large:
            dbs = factor_b_products(ds, h, [layer.lora_b for layer in layers])
        grads: list[list[Tensor | None]] = []
        for dbias, da, db, dm, layer, norm in zip(dbiases, das, dbs, dms, layers, norms, strict=True):
            if through_norm:
                factors = (layer.weight, layer.lora_a, layer.lora_b, layer.scale)
                more_a, more_b = inverse_norm_gradients(*factors, dm * layer.magnitude, norm, EPS)
                da, db = None if da is None else da + more_a, None if db is None else db + more_b
                dm = dm.to(layer.magnitude.dtype)
            grads.append([dbias, da, db, dm])
        return dx, grads


def _biases(layers: Sequence[DoRAArguments]) -> list[Tensor] | None:
    """Those of all layers, or None where they have none."""
    return [layer.bias for layer in layers if layer.bias is not None] or None


def _magnitudes(
    dms: Sequence[Tensor],
    x: Tensor | None,
    layers: Sequence[DoRAArguments],
    bs: Sequence[Tensor],
    norms: Sequence[Tensor],
    ys: Sequence[Tensor | None],
    h: Tensor,
) -> Magnitudes:
    assert x is not None
    outputs = [y for y in ys if y is not None]
    weights = [layer.weight.contiguous() for layer in layers]
    return Magnitudes(outputs, _biases(layers), norms, dms, rows_side_by_side(x), h, weights, bs, [1.0] * len(layers))


class _DoRA(torch.autograd.Function):
    """Saves x, h, gains, packed factors, the mask in bits and the output y, whose storage its consumer usually saves too."""

    @staticmethod
    @positional
    def forward(
        x: Tensor, a: Tensor, seed: Tensor | None, dropout: float, norm_grad: bool, keep_output: bool, *flat: Any
    ) -> tuple[Tensor, ...]:
        fields = unflatten(flat, 8)
        layers, bs, gains = [DoRAArguments(*layer[:6]) for layer in fields], [f[6] for f in fields], [f[7] for f in fields]
        ys, h, mask = dora_forward(x, layers, a, bs, gains, seed, dropout)
        return *ys, h, mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, a, _seed, ctx.dropout, ctx.norm_grad, keep_output, *flat = inputs
        *ys, h, mask = output
        count = len(ys)
        ctx.mark_non_differentiable(h, mask)
        ctx.set_materialize_grads(False)
        ctx.count, ctx.scale = count, flat[5 * count]
        # alike for all layers
        ctx.needs = [ctx.needs_input_grad[k] for k in (0, *range(6 + count, 6 + 5 * count, count))]
        need_x, need_y = _saves(ctx.needs[2:], ctx.norm_grad)
        kept = ys if need_y and keep_output else [None] * count
        ctx.save_for_backward(x if need_x else None, a, h, mask, *flat[: 5 * count], *flat[6 * count :], *kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, a, h, mask, *flat = saved_tensors("dora_linear", ctx)
        count, fields = ctx.count, unflatten(flat, 8)
        used = [k for k in range(count) if dys[k] is not None]  # an output that the loss does not depend on has no gradient
        grads: list[list[Tensor | None]] = [[None] * 8 for _ in fields]
        dx = None
        if used:
            bs, gains, ys = ([fields[k][field] for k in used] for field in (5, 6, 7))
            dx, found = dora_backward(
                [dys[k] for k in used],  # type: ignore[misc]
                x,
                [DoRAArguments._make([*fields[k][:5], ctx.scale]) for k in used],
                chosen(a, used, count, 0),
                bs,
                gains,
                ys,
                chosen(h, used, count, 1),
                mask if ctx.dropout > 0 else None,
                ctx.dropout,
                ctx.norm_grad,
                ctx.needs,
            )
            for k, own in zip(used, found, strict=True):
                grads[k][1:5] = [grad if need else None for grad, need in zip(own, ctx.needs[1:], strict=True)]
        return dx, None, None, None, None, None, *flatten(grads)  # type: ignore[arg-type]


def _saves(need: Sequence[bool], norm_grad: bool) -> tuple[bool, bool]:
    """Whether the backward pass reads x, and y, where `need` says which of lora_a, lora_b and magnitude have a gradient."""
    need_a, need_b, need_m = need
    need_y = need_m or (norm_grad and (need_a or need_b))
    return need_a or need_y, need_y


def _prepare(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed A and B, and ``(g, n) (2, out)``; new tensors all of them."""
    a, b = pack_adapters(lora_a, lora_b, dtype, out=packed_like(lora_a, lora_b, dtype))
    return a, b, row_norm_gain(rows_side_by_side(weight.detach()), a, b, magnitude, scale)


def _single_forward(
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
    keep_output: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    layer = DoRAArguments(weight, bias, lora_a, lora_b, magnitude, scale)
    (y,), h, mask = dora_forward(x, [layer], a, [b], [gains], seed, dropout)
    return y, h, mask


def _single_backward(
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
    layer = DoRAArguments(weight, bias, lora_a, lora_b, magnitude, scale)
    dx, (adapter,) = dora_backward([dy], x, [layer], a, [b], [gains], [y], h, mask, dropout, norm_grad, needs)
    return [grad for grad, need in zip((dx, *adapter), needs, strict=True) if need and grad is not None]


def _save_single(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, *tensors, _seed, ctx.scale, ctx.dropout, ctx.norm_grad, keep_output = inputs
    y, h, mask = output
    ctx.mark_non_differentiable(h, mask)
    ctx.set_materialize_grads(False)
    need_x, need_y = _saves(ctx.needs_input_grad[3:6], ctx.norm_grad)
    ctx.save_for_backward(x if need_x else None, *tensors, y if need_y and keep_output else None, h, mask)


def _single_gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 14
    *tensors, mask = saved_tensors("dora_linear", ctx)
    need_x, _, need_bias, need_a, need_b, need_m, *_ = ctx.needs_input_grad
    needs = [need_x, need_bias, need_a, need_b, need_m]
    options = (mask if ctx.dropout > 0 else None, ctx.scale, ctx.dropout, ctx.norm_grad, needs)
    grads = iter(_backward_op(dy, *tensors, *options))
    dx, dbias, da, db, dm = (next(grads) if need else None for need in needs)
    return dx, None, dbias, da, db, dm, *(None,) * 8


_prepare_op = torch.library.custom_op("peftlite::prepare_dora", _prepare, mutates_args=())
_forward_op = torch.library.custom_op("peftlite::dora_linear_triton", _single_forward, mutates_args=())
_backward_op = torch.library.custom_op("peftlite::dora_linear_triton_backward", _single_backward, mutates_args=())
_forward_op.register_autograd(_single_gradients, setup_context=_save_single)


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
