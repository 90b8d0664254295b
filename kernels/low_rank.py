"""The passes of ``y = x Wᵀ + b + s (x̃ Aᵀ) Bᵀ`` on ATen calls, for several layers that read the same x.

One layer is the simplest case. Derivations and measured choices are in ``kernels/README.md``.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from peftlite.kernels import native, native_library
from peftlite.kernels.dispatch import without_autocast
from peftlite.kernels.dropout import add_dropped, drop

Term = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # of a gradient of x: a layer's dy, W, and m and n or None
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
UPDATE_PAYS = 2  # rows for each feature that W is read along: from here on W + s B A is cheaper than the low-rank branch


class LoRAArguments(NamedTuple):
    """What a low-rank layer reads besides x."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float


class OutputGradient(NamedTuple):
    """What the gradient of a layer's output comes to inside its gain, and what has been had of it on the way.

    Attributes:
        dy: ``(M, out)``.
        db: the gradient of lora_b, or None if it is still to be computed from `dy`.
        has_u: whether ``u = s dy B / keep`` is written.
        magnitude: m ``(out,)`` where `dy` still lacks the gain ``m / n``, which the product with W then gives it; it must be
            one that runs in C.
        norm: n ``(out,)``, with a magnitude.
    """

    dy: Tensor
    db: Tensor | None = None
    has_u: bool = False
    magnitude: Tensor | None = None
    norm: Tensor | None = None


class Native(NamedTuple):
    """What runs in C of the passes over x and dy."""

    shrinks: bool  # products with the factors
    multiplies: bool  # products with W, where the others do
    adapts: bool = False  # DoRA's norm, and what its gain needs of y and dy


def low_rank_forward(
    x: Tensor, layers: Sequence[LoRAArguments], mask: Tensor | None, keep: float, runs: Native
) -> tuple[list[Tensor], Tensor]:
    """``y (M, out)`` of each layer and ``h (M, Σ r)`` for x ``(M, in)``; no other M x out tensor is made.

    ``h = (x ⊙ mask) Aᵀ``, side by side: the ``1 / keep`` of dropout joins the scale, which spares passes over x. `mask` is
    that of `draw_keep_mask`, `runs` that of `native_products`.
    """
    with without_autocast(x.device):
        ys = []
        if runs.shrinks:
            h = x.new_empty(len(x), sum(layer.lora_a.shape[0] for layer in layers))
            for layer, start in zip(layers, first_columns(layers), strict=True):
                y, unfinished = begun_output(x, layer, runs)
                base = (readable(layer.weight, x.dtype), readable(layer.bias, x.dtype)) if unfinished else ()
                low_rank = (mask, layer.lora_a, layer.lora_b, layer.scale / keep)
                native.adapt_output(y, x, h, start, *low_rank, True, unfinished, *base)
                ys.append(y)
            return ys, h
        h = shrunk_input(x, layers, mask)
        for layer, part in zip(layers, by_rank(h, layers, 1), strict=True):
            if mask is None and update_pays(x, x.shape[1]):
                bias = None if layer.bias is None else layer.bias.to(x.dtype)
                ys.append(F.linear(x, updated_weight(layer, x.dtype), bias))
            else:
                ys.append(base_output(x, layer).addmm_(part, layer.lora_b.to(x.dtype).T, alpha=layer.scale / keep))
        return ys, h


def base_output(x: Tensor, layer: LoRAArguments) -> Tensor:
    """``x Wᵀ + b``, in the dtype of x."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def begun_output(x: Tensor, layer: LoRAArguments, runs: Native) -> tuple[Tensor, bool]:
    """``x Wᵀ + b``, or memory for it and that it is still to be multiplied in C.

    Where B is zero ATen multiplies, so that a layer at birth has the very bits of its base.
    """
    if runs.multiplies and not native.is_zero(layer.lora_b):
        return x.new_empty(x.shape[0], layer.weight.shape[0]), True
    return base_output(x, layer), False


def readable(tensor: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    """A weight or bias as C can read it: as it is, or a dense copy in `dtype`."""
    if tensor is None or native_library.reads(tensor):
        return tensor
    return tensor.to(dtype).clone(memory_format=torch.contiguous_format)


def shrunk_input(x: Tensor, layers: Sequence[LoRAArguments], mask: Tensor | None) -> Tensor:
    """``h = (x ⊙ mask) Aᵀ`` of each layer, side by side, ``(M, Σ r)``."""
    dropped = x if mask is None else drop(x, mask)
    return F.linear(dropped, _stacked([layer.lora_a for layer in layers], x.dtype))


def native_products(rows: Tensor, layers: Sequence[LoRAArguments]) -> Native:
    """Which products of `rows` (x), and of gradients in its dtype, with W and the factors run in C."""
    factors = [factor for layer in layers for factor in (layer.lora_a, layer.lora_b)]
    shrinks = native_library.shrink_pays(rows, sum(layer.lora_a.shape[0] for layer in layers), *factors)
    return Native(shrinks, shrinks and native_library.multiply_pays(rows, [layer.weight for layer in layers]))


class Needs(NamedTuple):
    """Which gradients of a layer's factors are asked for."""

    lora_a: bool
    lora_b: bool


def low_rank_backward(
    output_gradient: Callable[[int, Tensor | None, int], OutputGradient],
    x: Tensor | None,
    layers: Sequence[LoRAArguments],
    h: Tensor,
    hs: Sequence[int],
    mask: Tensor | None,
    keep: float,
    runs: Native,
    need_x: bool,
    needs: Sequence[Needs],
    updated: Sequence[Callable[[], Tensor]] | None = None,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """The gradient of x, and of each layer's lora_a and lora_b, for the gradients ``dy (M, out)`` of the outputs.

    Args:
        output_gradient: of a layer, by its index: asked for when all that reads the last one is done. It may write columns
            from the third argument on of ``u (M, Σ r)``, the second, unless that is None.
        x: ``(M, in)``, read for the gradients of lora_a only.
        layers: as in the forward pass.
        h: ``(M, Σ r)``, from the forward pass.
        hs: the first column in h of each layer.
        mask: as in the forward pass.
        keep: as in the forward pass.
        runs: as in the forward pass.
        need_x: whether the gradient of x is asked for.
        needs: which others are.
        updated: form the ``W + s B A`` of each layer; without them that is done where it is cheaper than the low-rank branch.
    """
    dtype = h.dtype
    with without_autocast(h.device):
        outs = sum(layer.weight.shape[0] for layer in layers)
        if need_x and updated is None and mask is None and not runs.shrinks and update_pays(h, outs):
            updated = [functools.partial(updated_weight, layer, dtype) for layer in layers]
        dx: Tensor | None = None
        u: Tensor | None = None  # s dy B / keep, side by side
        if (need_x and updated is None) or any(need.lora_a for need in needs):
            u = h.new_empty(len(h), sum(layer.lora_a.shape[0] for layer in layers))
        dbs: list[Tensor | None] = []
        terms: list[Term] = []  # where dx is multiplied in C
        for k, (layer, need, start) in enumerate(zip(layers, needs, first_columns(layers), strict=True)):
            dy, db, has_u, magnitude, norm = output_gradient(k, u, start)
            need_b, unwritten = need.lora_b and db is None, None if has_u else u
            if need_b or unwritten is not None:
                found = _output_gradients(dy, layer, keep, h, hs[k], unwritten, start, need_b, runs.shrinks)
                db = found if need_b else db
            if need_x and runs.multiplies:
                terms.append((dy.contiguous(), readable(layer.weight, dtype), magnitude, norm))
            elif need_x:
                weight = layer.weight.to(dtype) if updated is None else updated[k]()
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            dbs.append(None if db is None or not need.lora_b else db.to(layer.lora_b.dtype))
            del dy  # its memory may become that of the next
        dx = h.new_empty(len(h), layers[0].weight.shape[1]) if terms else dx
        das: Sequence[Tensor | None] = [None] * len(layers)
        if u is not None:
            read = x if any(need.lora_a for need in needs) else None
            to_add = dx if updated is None else None
            da = _input_gradients(to_add, read, mask, u, [layer.lora_a for layer in layers], runs.shrinks, terms)
            das = das if da is None else by_rank(da, layers, 0)
        pairs = zip(das, dbs, layers, needs, strict=True)
        return dx, [
            (da.to(layer.lora_a.dtype) if da is not None and need.lora_a else None, db) for da, db, layer, need in pairs
        ]


def _output_gradients(
    dy: Tensor,
    layer: LoRAArguments,
    keep: float,
    h: Tensor,
    h_start: int,
    u: Tensor | None,
    u_start: int,
    need_b: bool,
    natively: bool,
) -> Tensor | None:
    """Write ``s dy B / keep`` into columns `u_start` .. of u, unless it is None; ``s dyᵀ h / keep (out, r)`` if needed."""
    rank, scale = layer.lora_b.shape[1], layer.scale / keep
    db = None
    if natively:
        db = h.new_empty(layer.lora_b.shape, dtype=torch.float32) if need_b else None
        native.output_gradients(dy.contiguous(), layer.lora_b, scale, h, h_start, u, u_start, db)
        return db
    if u is not None:
        b = _scaled(layer, keep, h.dtype)
        # In fp32 a B that lies transposed takes a third of the time on CPU where the rank is small.
        torch.mm(dy, b.T.contiguous().T if h.dtype.itemsize >= 4 else b, out=u.narrow(1, u_start, rank))
    if need_b:  # in most shapes cheaper on CPU than dyᵀ h
        inner = h.narrow(1, h_start, rank).T.contiguous()
        db = torch.empty_like(layer.lora_b, memory_format=torch.contiguous_format).copy_((inner @ dy).T)
        if scale != 1:
            db.mul_(scale)
    return db


def _input_gradients(
    dx: Tensor | None,
    x: Tensor | None,
    mask: Tensor | None,
    u: Tensor,
    lora_as: Sequence[Tensor],
    natively: bool,
    terms: Sequence[Term],
) -> Tensor | None:
    """Add ``(u A) ⊙ mask`` to dx if there is one, or with `terms` compute it; ``uᵀ (x ⊙ mask) (Σ r, in)`` unless x is None."""
    if natively:
        x = None if x is None else x.contiguous()
        da = None if x is None else u.new_empty(u.shape[1], x.shape[1], dtype=torch.float32)
        native.input_gradients(dx, x, mask, u, lora_as, da, *(zip(*terms, strict=True) if terms else ((),) * 4))
        return da
    if dx is not None and mask is None:
        dx.addmm_(u, _stacked(lora_as, u.dtype))
    elif dx is not None and mask is not None:
        add_dropped(dx, u @ _stacked(lora_as, u.dtype), mask)
    if x is None:
        return None
    # On CPU a product with few rows is up to twice as fast where their elements lie side by side.
    return u.T.contiguous() @ (x if mask is None else drop(x, mask))


def update_pays(rows: Tensor, features: int) -> bool:
    """Whether products with ``W + s B A``, formed for one pass, cost less than ATen's pass over the other operand's result.

    In 16 bits never: an update below half a unit in the last place of W would vanish.
    """
    return rows.device.type == "cpu" and rows.dtype.itemsize >= 4 and rows.shape[0] >= UPDATE_PAYS * features


def updated_weight(layer: LoRAArguments, dtype: torch.dtype) -> Tensor:
    """``W + s B A`` in `dtype`."""
    return torch.addmm(layer.weight.to(dtype), layer.lora_b.to(dtype), layer.lora_a.to(dtype), alpha=layer.scale)


def _scaled(layer: LoRAArguments, keep: float, dtype: torch.dtype) -> Tensor:
    """``s B / keep`` in `dtype`, rounded once."""
    if layer.scale == keep:
        return layer.lora_b.to(dtype)
    wide = torch.promote_types(layer.lora_b.dtype, dtype)
    return (layer.lora_b.to(wide) * (layer.scale / keep)).to(dtype)


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if len(factors) == 1:
        return factors[0].to(dtype)
    return torch.cat([factor.to(dtype) for factor in factors])


def first_columns(layers: Sequence[Any]) -> list[int]:
    """Where the columns of each layer begin in a matrix that holds the ranks of all of them side by side."""
    return list(itertools.accumulate((layer.lora_a.shape[0] for layer in layers[:-1]), initial=0))


def by_rank(tensor: Tensor, layers: Sequence[Any], dim: int) -> Sequence[Tensor]:
    """The parts of a `tensor` whose `dim` holds the ranks of all layers side by side, one for each layer."""
    return [tensor] if len(layers) == 1 else tensor.split_with_sizes([layer.lora_a.shape[0] for layer in layers], dim)


def flatten(layers: Sequence[tuple[Any, ...]]) -> list[Any]:
    """All weights, then all biases, and so on: the arguments of several layers as an autograd function takes them."""
    return [value for values in zip(*layers, strict=True) for value in values]


def unflatten(flat: Sequence[Any], fields: int) -> list[tuple[Any, ...]]:
    """The reverse of `flatten`, for arguments of so many `fields`."""
    count = len(flat) // fields
    if count == 1:
        return [tuple(flat)]
    return list(zip(*(flat[start : start + count] for start in range(0, len(flat), count)), strict=True))
