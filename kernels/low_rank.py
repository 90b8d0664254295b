"""The passes of ``y = x Wᵀ + b + s (x̃ Aᵀ) Bᵀ`` on ATen calls, for several layers that read the same x.

One layer is the simplest case. Derivations and measured choices are in ``kernels/README.md``.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftlite.kernels import native
from peftlite.kernels.dispatch import without_autocast
from peftlite.kernels.dropout import add_dropped, drop

UPDATE_PAYS = 2  # rows for each feature that W is read along: from here on W + s B A is cheaper than the low-rank branch


class LoRAArguments(NamedTuple):
    """What a low-rank layer reads besides x."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float


def low_rank_forward(
    x: Tensor, layers: Sequence[LoRAArguments], mask: Tensor | None, keep: float
) -> tuple[list[Tensor], Tensor]:
    """``y (M, out)`` of each layer and ``h (M, Σ r)`` for x ``(M, in)``; no other M x out tensor is made.

    ``h = (x ⊙ mask) Aᵀ``, side by side: the ``1 / keep`` of dropout joins the scale, which spares passes over x. `mask` is
    that of `draw_keep_mask`.
    """
    with without_autocast(x.device):
        dtype = x.dtype
        h = shrunk_input(x, layers, mask)
        ys = []
        for layer, part in zip(layers, by_rank(h, layers, 1), strict=True):
            bias = None if layer.bias is None else layer.bias.to(dtype)
            if mask is None and update_pays(x, x.shape[1]):
                ys.append(F.linear(x, updated_weight(layer, dtype), bias))
            else:
                y = F.linear(x, layer.weight.to(dtype), bias)
                ys.append(y.addmm_(part, layer.lora_b.to(dtype).T, alpha=layer.scale / keep))
        return ys, h


def shrunk_input(x: Tensor, layers: Sequence[LoRAArguments], mask: Tensor | None) -> Tensor:
    """``h = (x ⊙ mask) Aᵀ`` of each layer, side by side, ``(M, Σ r)``."""
    dropped = x if mask is None else drop(x, mask)
    return F.linear(dropped, _stacked([layer.lora_a for layer in layers], x.dtype))


class Needs(NamedTuple):
    """Which gradients of a layer's factors are asked for."""

    lora_a: bool
    lora_b: bool


def low_rank_backward(
    dys: Iterable[tuple[Tensor, Tensor | None]],
    x: Tensor | None,
    layers: Sequence[LoRAArguments],
    hs: Sequence[Tensor],
    mask: Tensor | None,
    keep: float,
    need_x: bool,
    needs: Sequence[Needs],
    updated: Sequence[Callable[[], Tensor]] | None = None,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """The gradient of x, and of each layer's lora_a and lora_b, for the gradients ``dy (M, out)`` of the outputs.

    Args:
        dys: of each layer, taken one at a time: the next is asked for when all that reads the last is done. Beside it the
            gradient of lora_b, where it has been had on the way.
        x: ``(M, in)``, read for the gradients of lora_a only.
        layers: as in the forward pass.
        hs: ``(M, r)`` of each layer, from the forward pass.
        mask: as in the forward pass.
        keep: as in the forward pass.
        need_x: whether the gradient of x is asked for.
        needs: which others are.
        updated: form the ``W + s B A`` of each layer; without them that is done where it is cheaper than the low-rank branch.
    """
    rows, dtype = len(hs[0]), hs[0].dtype
    with without_autocast(hs[0].device):
        if need_x and updated is None and mask is None and update_pays(hs[0], sum(layer.weight.shape[0] for layer in layers)):
            updated = [functools.partial(updated_weight, layer, dtype) for layer in layers]
        dx: Tensor | None = None
        u: Tensor | None = None  # s dy B / keep, side by side
        if need_x or any(need.lora_a for need in needs):
            u = hs[0].new_empty(rows, sum(layer.lora_a.shape[0] for layer in layers))
            us = by_rank(u, layers, 1)
        dbs: list[Tensor | None] = []
        left = iter(dys)
        for k, (layer, h, need) in enumerate(zip(layers, hs, needs, strict=True)):
            dy, db = next(left)
            if u is not None:
                b = _scaled(layer, keep, dtype)
                # In fp32 a B that lies transposed takes a third of the time on CPU where the rank is small.
                torch.mm(dy, b.T.contiguous().T if dtype.itemsize >= 4 else b, out=us[k])
            if need_x:
                weight = layer.weight.to(dtype) if updated is None else updated[k]()
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            if need.lora_b and db is None and native.col_shrink_pays(dy, h):
                db = native.col_shrink(dy, h, layer.scale / keep, False)
            elif need.lora_b and db is None:  # in most shapes cheaper on CPU than dyᵀ h
                db = torch.empty_like(layer.lora_b, memory_format=torch.contiguous_format).copy_((h.T.contiguous() @ dy).T)
                if layer.scale != keep:
                    db.mul_(layer.scale / keep)
            dbs.append(None if db is None or not need.lora_b else db.to(layer.lora_b.dtype))
            del dy  # its memory may become that of the next
        das: Sequence[Tensor | None] = [None] * len(layers)
        if u is not None:
            if dx is not None and updated is None:
                a = _stacked([layer.lora_a for layer in layers], dtype)
                dx = dx.addmm_(u, a) if mask is None else add_dropped(dx, u @ a, mask)
            if any(need.lora_a for need in needs):
                assert x is not None
                dropped = x if mask is None else drop(x, mask)
                if native.col_shrink_pays(dropped, u):
                    da = native.col_shrink(dropped, u, 1.0, True)
                else:  # on CPU a product with few rows is up to twice as fast where their elements lie side by side
                    da = u.T.contiguous() @ dropped
                das = by_rank(da, layers, 0)
        pairs = zip(das, dbs, layers, needs, strict=True)
        return dx, [
            (da.to(layer.lora_a.dtype) if da is not None and need.lora_a else None, db) for da, db, layer, need in pairs
        ]


def update_pays(rows: Tensor, features: int) -> bool:
    """Whether products with ``W + s B A``, formed for one pass, cost less than a pass over the other operand's result.

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
