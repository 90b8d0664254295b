"""The passes of ``y = g ⊙ (x Wᵀ + s (x̃ Aᵀ) Bᵀ) + b``, ``g = m / n``, on ATen calls, for several layers that read the same x.

One layer is the simplest case. Derivations and measured choices are in ``kernels/README.md``.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftlite.kernels import native, native_library
from peftlite.kernels.column_scale import scale_columns, scale_columns_backward
from peftlite.kernels.dispatch import without_autocast
from peftlite.kernels.lora_linear import lora_linear_reference
from peftlite.kernels.low_rank import (
    LoRAArguments,
    Native,
    Needs,
    OutputGradient,
    begun_output,
    by_rank,
    first_columns,
    low_rank_backward,
    low_rank_forward,
    native_products,
    readable,
    shrunk_input,
    update_pays,
    updated_weight,
)
from peftlite.kernels.magnitude_gradient import exceeds, is_readable, magnitude_gradient, native_magnitude_gradient
from peftlite.kernels.row_norm import BaseSquare, formed_norm, inverse_norm_gradients, row_norm
from peftlite.kernels.summed_output import Summed

EPS = 1e-12  # a row of zeros has norm 0: g is m / EPS there, and m is 0 at birth
LARGE_GAIN = 2.0  # above it, the bias inside g y would lose digits of y
IN_CACHE = 1 << 20  # elements of W: up to here what is formed of W is still in cache when the product reads it


class DoRAArguments(NamedTuple):
    """What a weight-decomposed layer reads besides x."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor
    scale: float

    @property
    def low_rank(self) -> LoRAArguments:
        """The layer inside the gain."""
        return LoRAArguments(self.weight, self.bias, self.lora_a, self.lora_b, self.scale)


class DoRANeeds(NamedTuple):
    """Which gradients of a layer's adapter are asked for."""

    lora_a: bool
    lora_b: bool
    magnitude: bool


def dora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scale: float,
    mask: Tensor | None = None,
    keep: float = 1.0,
    norm_grad: bool = False,
) -> Tensor:
    """`dora_linear` in plain torch, for `x` of any shape and a drawn `mask`: the oracle of the tests."""
    with without_autocast(x.device):
        inner = lora_linear_reference(x, weight, None, lora_a, lora_b, scale, mask, keep)
        norm = torch.linalg.vector_norm(weight + scale * (lora_b @ lora_a), dim=1).clamp_min(EPS)
        y = magnitude / (norm if norm_grad else norm.detach()) * inner
        return (y if bias is None else y + bias).to(x.dtype)


def weight_decomposed_forward(
    x: Tensor,
    layers: Sequence[DoRAArguments],
    mask: Tensor | None,
    keep: float,
    runs: Native,
    base_squares: Sequence[BaseSquare | None],
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """``y (M, out)`` of each layer, ``h = x̃ Aᵀ (M, Σ r)`` and the norms ``n (out,)``; no other M x out tensor is made."""
    with without_autocast(x.device):
        if runs.adapts:
            return _native_forward(x, layers, mask, keep, runs)
        if _can_be_formed(x, layers, mask) and all(
            layer.weight.numel() <= IN_CACHE or update_pays(x, x.shape[1]) for layer in layers
        ):
            h = shrunk_input(x, [layer.low_rank for layer in layers], mask)
            formed = [_formed(x, layer) for layer in layers]
            return [y for y, _ in formed], h, [norm for _, norm in formed]
        ys, h = low_rank_forward(x, [layer.low_rank for layer in layers], mask, keep, runs)
        hs = by_rank(h, layers, 1)
        norms = []
        for layer, y, part, base_square in zip(layers, ys, hs, base_squares, strict=True):
            weight, bias, lora_a, lora_b, magnitude, scale = layer
            # After the product, which has brought W into the cache; the other way round both would wait for memory.
            norm = row_norm(weight, lora_a, lora_b, scale, base_square, x.dtype).clamp_min_(EPS)
            gain = magnitude.to(norm.dtype) / norm
            # g ⊙ inner + b as g ⊙ (inner + b) + (1 - g) b, one pass over y: where g is 1 nothing changes, so that the
            # layer gives the very bits of the base layer, whose product adds the bias before it rounds.
            scale_columns(y, gain, bias)
            if bias is not None and exceeds(gain, LARGE_GAIN):
                _replace_large(y, gain, x, layer, part, keep)
            norms.append(norm)
        return ys, h, norms


def weight_decomposed_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    layers: Sequence[DoRAArguments],
    ys: Sequence[Tensor | Summed | None],
    h: Tensor,
    hs: Sequence[int],
    norms: Sequence[Tensor],
    mask: Tensor | None,
    keep: float,
    runs: Native,
    norm_grad: bool,
    need_x: bool,
    needs: Sequence[DoRANeeds],
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None, Tensor | None]]]:
    """The gradient of x, and of each layer's lora_a, lora_b and magnitude, for the gradients ``dy (M, out)``.

    x and y are read for the gradient of the magnitude, and with `norm_grad` for those of the factors; x for that of lora_a. A
    y that is None is formed anew, up to gain and bias. Columns ``hs[k]`` .. of `h` are those of layer k. `runs` is what
    `native_passes` says.
    """
    with without_autocast(dys[0].device):
        formed = need_x and not runs.adapts and _can_be_formed(dys[0], layers, mask)
        formed = formed and all(_forming_pays(len(dys[0]), layer) for layer in layers)
        inside, updated = [layer.low_rank for layer in layers], None
        dms: list[Tensor | None] = [None] * len(layers)

        @functools.cache
        def gain(k: int) -> Tensor:
            return layers[k].magnitude.to(norms[k].dtype) / norms[k]

        def inner_gradient(k: int, u: Tensor | None, start: int) -> OutputGradient:
            dy, y, layer, need = dys[k], ys[k], layers[k], needs[k]
            if not (need.magnitude or (norm_grad and (need.lora_a or need.lora_b))):
                return OutputGradient(dy if formed else (dy * gain(k)).to(dy.dtype))
            assert x is not None
            rank = layer.lora_a.shape[0]
            if y is None:
                inner = _inner_columns(slice(None), x, layer, h.narrow(1, hs[k], rank), keep)
                inner_grad, total = scale_columns_backward(dy, inner, gain(k), None, scaled=not formed)
                dms[k] = total / norms[k]
                return OutputGradient(inner_grad)
            if runs.adapts and is_readable(y, dy.dtype):
                db = dy.new_empty(layer.lora_b.shape, dtype=torch.float32) if runs.shrinks and need.lora_b else None
                low_rank = (layer.lora_b, layer.scale / keep, h, hs[k], u if runs.shrinks else None, start, db)
                scaled = not runs.shrinks or (need_x and not runs.multiplies)
                inner_grad, dm, lost = native_magnitude_gradient(
                    dy, y, layer.bias, layer.magnitude, norms[k], *low_rank, scaled=scaled
                )
                has_u = runs.shrinks
                lacks = (layer.magnitude, norms[k]) if runs.multiplies else ()
            else:
                inner_grad, dm, lost = magnitude_gradient(dy, y, layer.bias, layer.magnitude, gain(k), scaled=not formed)
                db, has_u, lacks = None, False, ()
            if lost is not None:
                inner = _inner_columns(lost, x, layer, h.narrow(1, hs[k], rank), keep)
                dm[lost] = (inner.to(dm.dtype) * dy[:, lost]).sum(0) / norms[k][lost]
            dms[k] = dm
            return OutputGradient(inner_grad, db, has_u, *lacks)

        factors = [Needs(need.lora_a, need.lora_b) for need in needs]
        if formed:  # the gain goes to B and to W + s B A, and not to dy
            updated = [functools.partial(_gained, layer, gain(k)) for k, layer in enumerate(layers)]
            inside = [of._replace(lora_b=gain(k)[:, None] * of.lora_b) for k, of in enumerate(inside)]
        dx, pairs = low_rank_backward(inner_gradient, x, inside, h, hs, mask, keep, runs, need_x, factors, updated)
        grads: list[tuple[Tensor | None, Tensor | None, Tensor | None]] = []
        for k, ((da, db), total, layer, need) in enumerate(zip(pairs, dms, layers, needs, strict=True)):
            if formed and db is not None:
                db = (gain(k)[:, None] * db).to(layer.lora_b.dtype)
            if norm_grad and total is not None:
                extra_a, extra_b = inverse_norm_gradients(
                    layer.weight, layer.lora_a, layer.lora_b, layer.scale, total * layer.magnitude, norms[k], EPS
                )
                da = None if da is None else da + extra_a
                db = None if db is None else db + extra_b
            grads.append((da, db, total.to(layer.magnitude.dtype) if total is not None and need.magnitude else None))
        return dx, grads


def _native_forward(
    x: Tensor, layers: Sequence[DoRAArguments], mask: Tensor | None, keep: float, runs: Native
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """`weight_decomposed_forward` with one native pass over W, and one behind each product or in it."""
    inside = [layer.low_rank for layer in layers]
    h = x.new_empty(len(x), sum(len(a) for _, _, a, *_ in layers)) if runs.shrinks else shrunk_input(x, inside, mask)
    ys, norms = [], []
    for layer, of, start in zip(layers, inside, first_columns(inside), strict=True):
        weight, bias, lora_a, lora_b, magnitude, scale = layer
        y, unfinished = begun_output(x, of, runs)
        reads = native_library.reads(weight)  # not where it is packed
        norm = y.new_empty(len(weight), dtype=torch.float32) if reads else row_norm(weight, lora_a, lora_b, scale)
        large = native.adapt_output(
            *(y, x, h, start, mask, lora_a, lora_b, scale / keep, runs.shrinks, unfinished),
            *(readable(weight, x.dtype) if reads or unfinished else None, bias, magnitude, norm, LARGE_GAIN),
            scale if reads else None,
        )
        if large and bias is not None:
            _replace_large(y, magnitude / norm, x, layer, h.narrow(1, start, len(lora_a)), keep)
        ys.append(y)
        norms.append(norm)
    return ys, h, norms


def _can_be_formed(rows: Tensor, layers: Sequence[DoRAArguments], mask: Tensor | None) -> bool:
    """Whether ``g ⊙ (W + s B A)`` may stand for the branches: not in 16 bits, where small updates would vanish.

    W is contiguous, so that the norms are summed as `row_norm` does, and are those of birth to the bit.
    """
    if mask is not None or rows.dtype.itemsize < 4 or rows.device.type != "cpu":
        return False
    return all(
        layer.weight.is_contiguous() and layer.weight.dtype == layer.magnitude.dtype == rows.dtype for layer in layers
    )


def _forming_pays(rows: int, layer: DoRAArguments) -> bool:
    """Whether forming ``g ⊙ (W + s B A)`` in the backward pass costs less than what it spares: D, and a pass over dx."""
    out, features = layer.weight.shape
    return rows * (3 * out + 2 * features) >= 4 * out * features


def native_passes(rows: Tensor, layers: Sequence[DoRAArguments]) -> Native:
    """What runs in C of the passes over `rows` (x), and over gradients in its dtype."""
    products = native_products(rows, [layer.low_rank for layer in layers])
    return products._replace(adapts=all(_adapts(rows, layer) for layer in layers))


def _adapts(rows: Tensor, layer: DoRAArguments) -> bool:
    """Whether the norm of W and passes over tensors with the dtype of `rows` run in C."""
    weight, bias, lora_a, lora_b, magnitude, _ = layer
    if rows.dtype not in native_library.DTYPES or weight.dtype == torch.float64 or not weight.is_contiguous():
        return False
    return native_library.serves(len(lora_a), lora_a, lora_b, magnitude) and (bias is None or native_library.reads(bias))


def _gained(layer: DoRAArguments, gain: Tensor) -> Tensor:
    """``g ⊙ (W + s B A)``, in the dtype of W."""
    return updated_weight(layer.low_rank, layer.weight.dtype).mul_(gain[:, None])


def _formed(x: Tensor, layer: DoRAArguments) -> tuple[Tensor, Tensor]:
    """``y = x (g ⊙ (W + s B A))ᵀ + b`` and the norms n."""
    whole = updated_weight(layer.low_rank, x.dtype)
    norm = formed_norm(whole).clamp_min_(EPS)
    whole.mul_((layer.magnitude / norm)[:, None])
    return F.linear(x, whole, None if layer.bias is None else layer.bias.to(x.dtype)), norm


def _replace_large(y: Tensor, gain: Tensor, x: Tensor, layer: DoRAArguments, h: Tensor, keep: float) -> None:
    """Compute the columns of y whose gain is large again, as ``g ⊙ inner + b``."""
    assert layer.bias is not None
    large = (gain.abs() > LARGE_GAIN).nonzero().squeeze(1)
    inner = _inner_columns(large, x, layer, h, keep)
    y[:, large] = torch.addcmul(layer.bias[large].to(gain.dtype), inner, gain[large]).to(y.dtype)


def _inner_columns(columns: Tensor | slice, x: Tensor, layer: DoRAArguments, h: Tensor, keep: float) -> Tensor:
    """``inner (M, len(columns))`` of some output features or all, from x and h and not from y."""
    weight, lora_b = layer.weight[columns].to(x.dtype), layer.lora_b[columns].to(x.dtype)
    return F.linear(x, weight).addmm_(h, lora_b.T, alpha=layer.scale / keep)
