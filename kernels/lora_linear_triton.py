"""lora_linear in Triton, for layers that read the same x; plain products stay with cuBLAS. One layer is the simplest group.

One layer takes three launches forward and five backward without dropout, where products with beta = 1 read and write what a
kernel would. Several share the kernels: three take five forward and nine backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from peftlite.kernels.col_shrink_triton import col_shrink
from peftlite.kernels.dispatch import positional, saved_tensors, without_autocast
from peftlite.kernels.dropout import keep_probability
from peftlite.kernels.expand_triton import expand_
from peftlite.kernels.group_triton import alike, rows_side_by_side
from peftlite.kernels.low_rank import LoRAArguments, flatten, unflatten
from peftlite.kernels.pack_triton import pack_adapters, padded_rank
from peftlite.kernels.prepared_triton import prepare
from peftlite.kernels.row_shrink_triton import row_shrink

LARGE_RANK = 64  # above it, products with a factor are large enough to be best left to cuBLAS


def lora_linears_triton(x: Tensor, layers: Sequence[LoRAArguments], dropout: float) -> list[Tensor]:
    """`lora_linears` for `x` in the dtype of the computation; `dropout` is rounded to a multiple of 2⁻¹⁶."""
    rows = x.reshape(-1, x.shape[-1])
    seed = draw_seed(x.device) if dropout > 0 else None  # one for all, so that layers that run apart share the mask too
    ys: dict[int, Tensor] = {}
    if torch.compiler.is_compiling():
        for place, layer in enumerate(layers):
            *tensors, scale = layer
            packed = _pack_op(layer.lora_a.detach(), layer.lora_b.detach(), x.dtype)
            ys[place] = _forward_op(rows, *tensors, *packed, seed, scale, dropout)[0]
    else:
        for places in alike(layers):
            group = [layers[place] for place in places]
            a, bs, _ = prepare(group, x.dtype)
            flat = flatten([(*layer, b) for layer, b in zip(group, bs, strict=True)])
            ys.update(zip(places, _LoRA.apply(rows, a, seed, dropout, *flat), strict=False))
    return [ys[place].view(*x.shape[:-1], layer.weight.shape[0]) for place, layer in enumerate(layers)]


def draw_seed(device: torch.device) -> Tensor:
    """One int64 on `device`, from torch's generator there: a captured CUDA graph draws a new one in each replay."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device)


def low_rank_forward(
    x: Tensor, layers: Sequence[LoRAArguments], a: Tensor, bs: Sequence[Tensor], seed: Tensor | None, dropout: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """``y (M, out)`` of each layer, ``h = s x̃ Aᵀ (M, Σ RP)`` and the bits of the mask (empty without dropout).

    Args:
        x: ``(M, in)``.
        layers: that run together, see `group_triton.alike`.
        a: packed A of all of them, side by side ``(Σ RP, in)``.
        bs: packed B ``(out, RP)`` of each.
        seed: of the mask, with `dropout`.
        dropout: probability of dropping an element of x.
    """
    with without_autocast(x.device):
        ys = base_products(x, layers)
        h, mask = shrink_x(rows_side_by_side(x), a, layers[0].scale, seed, dropout)
        if len(layers) > 1 and len(a):
            expand_(ys, h, bs, [1.0] * len(layers), by_rank=False)
        elif len(a):
            ys[0].addmm_(h, bs[0].T)
        return ys, h, mask


def base_products(x: Tensor, layers: Sequence[Any]) -> list[Tensor]:
    """``x Wᵀ + b`` of each layer."""
    return [F.linear(x, own.weight.to(x.dtype), None if own.bias is None else own.bias.to(x.dtype)) for own in layers]


def shrink_x(x: Tensor, a: Tensor, scale: float, seed: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """``s x̃ Aᵀ (M, Σ RP)`` and the bits of the mask, drawn here (empty without dropout)."""
    rank = a.shape[0]
    if seed is None and (rank == 0 or rank > LARGE_RANK):
        h = x @ a.T
        return (h.mul_(scale) if scale != 1 else h), x.new_empty(0, dtype=torch.uint8)
    h, mask = row_shrink([x], [a], [scale / keep_probability(dropout)], by_rank=True, seed=seed, dropout=dropout)
    return h, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


def low_rank_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    layers: Sequence[Any],
    a: Tensor,
    bs: Sequence[Tensor],
    h: Tensor,
    mask: Tensor | None,
    dropout: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """The gradient of x, and those of each layer's bias, lora_a and lora_b, for the gradients ``dy (M, out)`` of the outputs.

    `needs` says which of x, bias, lora_a and lora_b have one; the others are as in `low_rank_forward`.
    """
    with without_autocast(dys[0].device):
        need_x, need_bias, need_a, need_b = needs
        dys = [rows_side_by_side(dy) for dy in dys]
        rank = bs[0].shape[1]
        u = shrink_gradients(dys, bs, layers[0].scale, dropout, None) if (need_x or need_a) and rank else None
        dx = None
        if need_x:
            dx = base_gradient(dys, layers)
            if u is not None and mask is None:
                dx.addmm_(u, a)
            elif u is not None:
                expand_([dx], u, [a], [1.0], by_rank=True, mask=mask)
        nothing: list[Any] = [None] * len(layers)
        dbiases, das, dbs = nothing, nothing, nothing
        by_products = len(layers) == 1 or not 0 < rank <= LARGE_RANK  # as few passes over dy as T2 would make
        if need_b and not by_products:
            dbs = [contiguous_like(layer.lora_b) for layer in layers]
            dbiases = [contiguous_like(layer.bias) for layer in layers] if need_bias else nothing
            col_shrink(dys, h, dbs, [1.0] * len(layers), biases=dbiases if need_bias else None)
        else:
            if need_b:
                dbs = factor_b_products(dys, h, [layer.lora_b for layer in layers])
            if need_bias:
                sums = [dy.sum(0, dtype=torch.float32) for dy in dys]
                dbiases = [total.to(layer.bias.dtype) for total, layer in zip(sums, layers, strict=True)]
        if need_a:
            assert x is not None
            assert u is not None
            das = factor_a_gradients(x, u, [layer.lora_a for layer in layers], mask, by_products)
        return dx, [list(grads) for grads in zip(dbiases, das, dbs, strict=True)]


def shrink_gradients(
    dys: Sequence[Tensor], bs: Sequence[Tensor], scale: float, dropout: float, gains: Sequence[Tensor] | None
) -> Tensor:
    """``u = s D B / keep`` of each layer, side by side ``(M, Σ RP)``, where D is dy, or ``g ⊙ dy`` with `gains`."""
    scale, rank = scale / keep_probability(dropout), bs[0].shape[1]
    if gains is None and rank > LARGE_RANK:
        u = dys[0].new_empty(len(dys[0]), len(bs) * rank)
        for part, dy, b in zip(u.split(rank, dim=1), dys, bs, strict=True):
            torch.mm(dy, b, out=part)
        return u.mul_(scale) if scale != 1 else u
    return row_shrink(dys, bs, [scale] * len(bs), by_rank=False, gains=gains)[0]


def base_gradient(dys: Sequence[Tensor], layers: Sequence[Any]) -> Tensor:
    """``Σ dy W (M, in)`` over the layers, added up inside the products."""
    dx = dys[0] @ layers[0].weight.to(dys[0].dtype)
    for dy, layer in zip(dys[1:], layers[1:], strict=True):
        dx.addmm_(dy, layer.weight.to(dy.dtype))
    return dx


def factor_a_gradients(
    x: Tensor, u: Tensor, lora_as: Sequence[Tensor], mask: Tensor | None, by_products: bool
) -> list[Tensor]:
    """``dA = uᵀ x̃ (r, in)`` of each layer, in the dtype of its A."""
    x = rows_side_by_side(x)
    if by_products and mask is None:
        parts = zip(u.tensor_split(len(lora_as), 1), lora_as, strict=True)
        return [wide_product(part[:, : len(lora_a)].T, x, lora_a.dtype) for part, lora_a in parts]
    grads = [contiguous_like(lora_a) for lora_a in lora_as]
    col_shrink([x], u, grads, [1.0] * len(grads), by_rank=True, mask=mask)
    return grads


def factor_b_products(ds: Sequence[Tensor], h: Tensor, lora_bs: Sequence[Tensor]) -> list[Tensor]:
    """``dB = Dᵀ h (out, r)`` of each layer, in the dtype of its B."""
    parts = zip(ds, h.tensor_split(len(ds), 1), lora_bs, strict=True)
    return [wide_product(d.T, part[:, : lora_b.shape[1]], lora_b.dtype) for d, part, lora_b in parts]


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left right`` in `dtype` from fp32 sums, which a product of 16-bit matrices would round to their own dtype."""
    if left.dtype == dtype:
        return left @ right
    if left.dtype == torch.float32:
        return (left @ right).to(dtype)
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32).to(dtype)
    return (left.float() @ right.float()).to(dtype)


class _LoRA(torch.autograd.Function):
    """Saves x, h, the packed factors and the mask in bits: nothing of the size M x out or out x in."""

    @staticmethod
    @positional
    def forward(x: Tensor, a: Tensor, seed: Tensor | None, dropout: float, *flat: Any) -> tuple[Tensor, ...]:
        layers = unflatten(flat, 6)
        bs = [b for *_, b in layers]
        ys, h, mask = low_rank_forward(x, [LoRAArguments(*layer[:5]) for layer in layers], a, bs, seed, dropout)
        return *ys, h, mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, a, _seed, ctx.dropout, *flat = inputs
        *ys, h, mask = output
        count = len(ys)
        ctx.mark_non_differentiable(h, mask)
        ctx.set_materialize_grads(False)
        ctx.count, ctx.scale = count, flat[4 * count]
        ctx.needs = [ctx.needs_input_grad[k] for k in (0, *range(4 + count, 4 + 4 * count, count))]  # alike for all layers
        # The factors themselves too, so that autograd notices when they change before the backward pass.
        ctx.save_for_backward(x if ctx.needs[2] else None, a, h, mask, *flat[: 4 * count], *flat[5 * count :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, a, h, mask, *flat = saved_tensors("lora_linear", ctx)
        count, layers = ctx.count, unflatten(flat, 5)
        used = [k for k in range(count) if dys[k] is not None]  # an output that the loss does not depend on has no gradient
        grads: list[list[Tensor | None]] = [[None] * 6 for _ in layers]
        dx = None
        if used:
            dx, found = low_rank_backward(
                [dys[k] for k in used],  # type: ignore[misc]
                x,
                [LoRAArguments._make([*layers[k][:4], ctx.scale]) for k in used],
                chosen(a, used, count, 0),
                [layers[k][4] for k in used],
                chosen(h, used, count, 1),
                mask if ctx.dropout > 0 else None,
                ctx.dropout,
                ctx.needs,
            )
            for k, own in zip(used, found, strict=True):
                grads[k][1:4] = [grad if need else None for grad, need in zip(own, ctx.needs[1:], strict=True)]
        return dx, None, None, None, *flatten(grads)  # type: ignore[arg-type]


def chosen(together: Tensor, used: Sequence[int], count: int, dim: int) -> Tensor:
    """The parts of some of `count` layers in what lies side by side; a copy only where some are left out."""
    if len(used) == count:
        return together
    parts = together.tensor_split(count, dim)
    return torch.cat([parts[k] for k in used], dim)


def _single_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (y,), h, mask = low_rank_forward(x, [LoRAArguments(weight, bias, lora_a, lora_b, scale)], a, [b], seed, dropout)
    return y, h, mask


def _single_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    a: Tensor,
    b: Tensor,
    h: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    needs: list[bool],
) -> list[Tensor]:
    layer = LoRAArguments(weight, bias, lora_a, lora_b, scale)
    dx, (adapter,) = low_rank_backward([dy], x, [layer], a, [b], h, mask, dropout, needs)
    return [grad for grad, need in zip((dx, *adapter), needs, strict=True) if need and grad is not None]


def _save_single(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, lora_a, lora_b, a, b, _seed, ctx.scale, ctx.dropout = inputs
    _, h, mask = output
    ctx.mark_non_differentiable(h, mask)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, bias, lora_a, lora_b, a, b, h, mask)


def _single_gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    need_x, _, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
    needs = [need_x, need_bias, need_a, need_b]
    *tensors, mask = saved_tensors("lora_linear", ctx)
    grads = iter(_backward_op(dy, *tensors, mask if ctx.dropout > 0 else None, ctx.scale, ctx.dropout, needs))
    dx, dbias, da, db = (next(grads) if need else None for need in needs)
    return dx, None, dbias, da, db, *(None,) * 5


def _pack(lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return pack_adapters(lora_a, lora_b, dtype, out=packed_like(lora_a, lora_b, dtype))


def packed_like(lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Empty tensors for what `pack_adapters` writes; an operation must not return what it was given."""
    rank = padded_rank(lora_a.shape[0])
    return lora_a.new_empty(rank, lora_a.shape[1], dtype=dtype), lora_b.new_empty(lora_b.shape[0], rank, dtype=dtype)


_pack_op = torch.library.custom_op("peftlite::pack_adapters", _pack, mutates_args=())
_pack_op.register_fake(packed_like)
_forward_op = torch.library.custom_op("peftlite::lora_linear_triton", _single_forward, mutates_args=())
_backward_op = torch.library.custom_op("peftlite::lora_linear_triton_backward", _single_backward, mutates_args=())
_forward_op.register_autograd(_single_gradients, setup_context=_save_single)


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, a: Tensor, *rest: Any) -> Any:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0]), empty_bits(x, rest[1])


@_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, *rest: Any
) -> list[Tensor]:
    like = (dy.new_empty(dy.shape[0], weight.shape[1]), bias, lora_a, lora_b)
    return [contiguous_like(t) for t, need in zip(like, rest[-1], strict=True) if need and t is not None]


def empty_bits(x: Tensor, seed: Tensor | None) -> Tensor:
    """A tensor like the mask that is drawn for `x`."""
    return x.new_empty(0 if seed is None else (x.shape[0], -(-x.shape[1] // 8)), dtype=torch.uint8)


def contiguous_like(tensor: Tensor) -> Tensor:
    """An empty contiguous tensor of the shape of `tensor`."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
