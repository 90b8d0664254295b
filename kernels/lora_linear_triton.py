"""lora_linear in Triton: the shrinks, the dropout and the masked expansion are kernels, plain products stay with cuBLAS.

Three launches forward and five backward without dropout, where beta = 1 products read and write what a kernel would.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from peftlite.kernels.col_shrink_triton import col_shrink
from peftlite.kernels.dispatch import saved_tensors, without_autocast
from peftlite.kernels.dropout_triton import keep_probability
from peftlite.kernels.expand_triton import expand_
from peftlite.kernels.pack_triton import pack_adapters, padded_rank
from peftlite.kernels.prepared_triton import prepared
from peftlite.kernels.row_shrink_triton import row_shrink

LARGE_RANK = 64  # above it, products with a factor are large enough to be best left to cuBLAS


def lora_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout: float,
) -> Tensor:
    """`lora_linear` for `x` in the dtype of the computation; `dropout` is rounded to a multiple of 2⁻¹⁶."""
    rows = x.reshape(-1, x.shape[-1])
    seed = draw_seed(x.device) if dropout > 0 else None
    if torch.compiler.is_compiling():
        a, b = _pack_op(lora_a.detach(), lora_b.detach(), x.dtype)
        y, *_ = _forward_op(rows, weight, bias, lora_a, lora_b, a, b, seed, scale, dropout)
    else:
        found = prepared(lora_a, scale, x.dtype)
        a, b = found[:2] if found else pack_adapters(lora_a.detach(), lora_b.detach(), x.dtype)
        y, *_ = _LoRA.apply(rows, weight, bias, lora_a, lora_b, a, b, seed, scale, dropout)
    return y.view(*x.shape[:-1], weight.shape[0])


def draw_seed(device: torch.device) -> Tensor:
    """One int64 on `device`, from torch's generator there: a captured CUDA graph draws a new one in each replay."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device)


def rows_side_by_side(x: Tensor) -> Tensor:
    """`x`, copied only where neighbouring columns are not neighbours in memory."""
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # empty tensors too, which `contiguous` leaves as they are


def low_rank_forward(
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
    """``y (M, out)``, ``h = s x̃ Aᵀ (M, RP)`` and the bits of the mask (empty without dropout), from packed factors."""
    with without_autocast(x.device):
        dtype = x.dtype
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        h, mask = shrink_x(rows_side_by_side(x), a, scale, seed, dropout)
        return (y.addmm_(h, b.T) if h.shape[1] else y), h, mask


def shrink_x(x: Tensor, a: Tensor, scale: float, seed: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """``s x̃ Aᵀ (M, RP)`` and the bits of the mask, drawn here (empty without dropout)."""
    rank = a.shape[0]
    if seed is None and (rank == 0 or rank > LARGE_RANK):
        h = x @ a.T
        return (h.mul_(scale) if scale != 1 else h), x.new_empty(0, dtype=torch.uint8)
    h, mask = row_shrink([x], [a], [scale / keep_probability(dropout)], by_rank=True, seed=seed, dropout=dropout)
    return h, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


def low_rank_backward(
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
    """The gradients of `low_rank_forward` that `needs` asks for, in the order x, bias, lora_a, lora_b."""
    with without_autocast(dy.device):
        need_x, need_bias, need_a, need_b = needs
        dy = rows_side_by_side(dy)
        grads = []
        u = shrink_gradient(dy, b, scale, dropout, None) if (need_x or need_a) and b.shape[1] else None
        if need_x:
            grads.append(expanded(dy @ weight.to(dy.dtype), u, a, mask))
        if need_bias:
            assert bias is not None
            grads.append(dy.sum(0, dtype=torch.float32).to(bias.dtype))
        if need_a:
            assert x is not None
            assert u is not None
            grads.append(factor_a_gradient(rows_side_by_side(x), u, lora_a, mask))
        if need_b:
            grads.append(wide_product(dy.T, h[:, : lora_b.shape[1]], lora_b.dtype))
        return grads


def shrink_gradient(dy: Tensor, b: Tensor, scale: float, dropout: float, gain: Tensor | None) -> Tensor:
    """``u = s D B / keep (M, RP)``, where D is `dy`, or ``g ⊙ dy`` with a `gain`."""
    scale = scale / keep_probability(dropout)
    if gain is None and b.shape[1] > LARGE_RANK:
        u = dy @ b
        return u.mul_(scale) if scale != 1 else u
    return row_shrink([dy], [b], [scale], by_rank=False, gains=None if gain is None else [gain])[0]


def expanded(dx: Tensor, u: Tensor | None, a: Tensor, mask: Tensor | None) -> Tensor:
    """``dx + mask ⊙ (u A)``, in place."""
    if u is None:
        return dx
    if mask is None:
        return dx.addmm_(u, a)
    expand_([dx], u, [a], [1.0], by_rank=True, mask=mask)
    return dx


def factor_a_gradient(x: Tensor, u: Tensor, lora_a: Tensor, mask: Tensor | None) -> Tensor:
    """``dA = uᵀ x̃ (r, in)``, in the dtype of `lora_a`."""
    if mask is None:
        return wide_product(u[:, : lora_a.shape[0]].T, x, lora_a.dtype)
    grad = torch.empty_like(lora_a, memory_format=torch.contiguous_format)
    col_shrink([x], u, [grad], [1.0], by_rank=True, mask=mask)
    return grad


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left right`` in `dtype` from fp32 sums, which a product of 16-bit matrices would round to their own dtype."""
    if left.dtype == dtype:
        return left @ right
    if left.dtype == torch.float32:
        return (left @ right).to(dtype)
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32).to(dtype)
    return (left.float() @ right.float()).to(dtype)


# See lora_linear on what computing the signature costs.
low_rank_forward.__signature__ = inspect.signature(low_rank_forward)  # type: ignore[attr-defined]


class _LoRA(torch.autograd.Function):
    """Saves x, h, the packed factors and the mask in bits: nothing of the size M x out or out x in."""

    forward = staticmethod(low_rank_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, lora_a, lora_b, a, b, _seed, ctx.scale, ctx.dropout = inputs
        _, h, mask = output
        ctx.mark_non_differentiable(h, mask)
        ctx.set_materialize_grads(False)
        # The factors themselves too, so that autograd notices when they change before the backward pass.
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, bias, lora_a, lora_b, a, b, h, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, low_rank_backward, dy)


def _gradients(ctx: Any, run: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    need_x, _, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
    needs = [need_x, need_bias, need_a, need_b]
    *tensors, mask = saved_tensors("lora_linear", ctx)
    grads = iter(run(dy, *tensors, mask if ctx.dropout > 0 else None, ctx.scale, ctx.dropout, needs))
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
_forward_op = torch.library.custom_op("peftlite::lora_linear_triton", low_rank_forward, mutates_args=())
_backward_op = torch.library.custom_op("peftlite::lora_linear_triton_backward", low_rank_backward, mutates_args=())
_forward_op.register_autograd(lambda ctx, dy, *_: _gradients(ctx, _backward_op, dy), setup_context=_LoRA.setup_context)


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
