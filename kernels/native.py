"""What LoRA, DoRA and dropout do beside their products with W, on CPU: passes in C (``native.c``) for many calls of ATen.

For dtypes other than fp32 and bf16, ranks above 64, strided and packed tensors, and where nothing is compiled
(`peftlite.kernels.native_library`), the same is computed on ATen calls. Results do not depend on the number of threads, and
differ from those of the ATen calls by rounding alone.

The passes are operations of torch in a namespace of their own, so that profilers, meters and fake tensors see them as they
see ATen's.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from peftlite.kernels.dispatch import has_values
from peftlite.kernels.native_library import at, call, operation


def _parameter(tensor: Tensor) -> Tensor:
    """As the passes read factors and magnitudes: fp32, element after element."""
    return tensor if tensor.dtype == torch.float32 and tensor.is_contiguous() else tensor.float().contiguous()


def is_zero(factor: Tensor) -> bool:
    """Whether a factor is zero, as B is at birth."""
    return has_values(factor) and call("is_zero", at(values := _parameter(factor)), values.numel()) > 0


@operation("row_norm(Tensor weight, Tensor lora_a, Tensor lora_b, float scale) -> Tensor")
def row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``‖W + s B A‖_row``, ``(out,)``, fp32, for W ``(out, in)``, A ``(r, in)`` and B ``(out, r)``: one reading of W."""
    norm = weight.new_empty(weight.shape[0], dtype=torch.float32)
    if has_values(weight):
        a, b = _parameter(lora_a), _parameter(lora_b)
        call("row_norm", at(weight), _is_half(weight), at(a), at(b), scale, *weight.shape, a.shape[0], at(norm))
    return norm


@operation(
    "adapt_output(Tensor(a!) y, Tensor x, Tensor(b!) h, int start, Tensor? mask, Tensor lora_a, Tensor lora_b, float scale, "
    "bool shrinks=True, bool multiplies=False, Tensor? weight=None, Tensor? bias=None, Tensor? magnitude=None, "
    "Tensor(c!)? norm=None, float limit=0., float? norm_scale=None) -> bool"
)
def adapt_output(
    y: Tensor,
    x: Tensor,
    h: Tensor,
    start: int,
    mask: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    shrinks: bool = True,
    multiplies: bool = False,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    limit: float = 0.0,
    norm_scale: float | None = None,
) -> bool:
    """Turn ``y = x Wᵀ + b`` into LoRA's ``y + s h Bᵀ`` or, with a magnitude, DoRA's ``g ⊙ (y + s h Bᵀ) + (1 - g) ⊙ b``.

    Args:
        y: ``(M, out)``, changed in place, rounded once.
        x: ``(M, in)``.
        h: ``(M, Σ r)``, of which columns `start` .. are this layer's: written if it `shrinks`, read otherwise.
        start: see `h`.
        mask: bits of dropout for x, or None.
        lora_a: ``A (r, in)``.
        lora_b: ``B (out, r)``.
        scale: the factor s.
        shrinks: compute ``h = (x ⊙ mask) Aᵀ`` too.
        multiplies: compute ``x Wᵀ + b`` too, whatever y holds, where `native_library.multiply_pays`; nothing but the result is
            rounded.
        weight: ``W (out, in)``, to multiply or for the norm.
        bias: ``b (out,)`` or None. A gain leaves it as it is.
        magnitude: ``m (out,)``, for a gain ``g = m / n``; None for LoRA.
        norm: ``n (out,)`` in fp32, with a magnitude.
        limit: see below.
        norm_scale: compute ``n = max(‖W + s B A‖_row, EPS)`` too, whatever `norm` holds, with this factor s: the one without
            dropout.

    Returns:
        Whether a ``|g|`` exceeds `limit` where the bias was inside y.
    """
    if not has_values(y):
        return False
    a, b, m = _parameter(lora_a), _parameter(lora_b), None if magnitude is None else _parameter(magnitude)
    (rows, features), (out, rank) = x.shape, b.shape
    sizes = (rows, features, out, rank, start, h.shape[1])
    low_rank = (at(y), at(x), at(h), _is_half(y), at(mask), at(a), at(b), scale, *sizes, shrinks)
    base = (multiplies, at(weight), _is_half(weight), at(bias), _is_half(bias))
    return call("adapt_output", *low_rank, *base, at(m), at(norm), limit, norm_scale is not None, norm_scale or 0.0) > 0


@operation(
    "output_gradients(Tensor dy, Tensor lora_b, float scale, Tensor? h, int h_start, Tensor(a!)? u, int u_start, "
    "Tensor(b!)? db, Tensor? y=None, Tensor? residual=None, float keep=1., Tensor? bias=None, Tensor? magnitude=None, "
    "Tensor? norm=None, float limit=0., Tensor(c!)? scaled=None, Tensor(d!)? dm=None, Tensor(e!)? lost=None) -> int"
)
def output_gradients(
    dy: Tensor,
    lora_b: Tensor,
    scale: float,
    h: Tensor | None,
    h_start: int,
    u: Tensor | None,
    u_start: int,
    db: Tensor | None,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    keep: float = 1.0,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    limit: float = 0.0,
    scaled: Tensor | None = None,
    dm: Tensor | None = None,
    lost: Tensor | None = None,
) -> int:
    """What a backward pass reads of dy before the product with W, into those of u, db, `scaled` and dm that are not None.

    ``u = s D B`` and ``db = s Dᵀ h``. D is dy, or with a magnitude ``g ⊙ dy``, ``g = m / n``, which is not rounded for the
    two; then ``dm = Σ_i dy_i ⊙ (y_i - b) / m`` as well.

    Args:
        dy: ``(M, out)``.
        lora_b: ``B (out, r)``.
        scale: the factor s.
        h: ``(M, Σ r)``, of which columns `h_start` .. are this layer's, for db.
        h_start: see `h`.
        u: ``(M, Σ r)``, of which columns `u_start` .. are this layer's.
        u_start: see `u`.
        db: ``(out, r)`` in fp32.
        y: ``(M, out)``, ``g ⊙ inner + b``; with a residual the sum of which it was a part.
        residual: ``(M, out)`` or None: y is ``keep (y - residual)``, and zero where it was dropped.
        keep: the probability with which elements of y were kept.
        bias: ``b (out,)`` or None.
        magnitude: ``m (out,)``, or None for LoRA.
        norm: ``n (out,)`` in fp32.
        limit: digits are lost where the mean of ``|y| + |sum|``, or ``|b|`` where there is no residual, exceeds this many
            times that of ``|y - b|``, and where dm is not finite.
        scaled: for D ``(M, out)``.
        dm: ``(out,)`` in fp32; asked for with a magnitude.
        lost: ``(out,)`` bool: where dm lost its digits.

    Returns:
        In how many places it did.
    """
    if not has_values(dy):
        return 0
    rows, out = dy.shape
    b, m = _parameter(lora_b), None if magnitude is None else _parameter(magnitude)
    read = (at(dy), _is_half(dy), at(b), scale, rows, out, b.shape[1], at(h), h_start, 0 if h is None else h.shape[1])
    low_rank = (at(u), u_start, 0 if u is None else u.shape[1], at(db))
    gain = (at(y), at(residual), keep, at(bias), _is_half(bias), at(m), at(norm), limit, at(scaled), at(dm), at(lost))
    return call("output_gradients", *read, *low_rank, *gain)


class _Term(ctypes.Structure):
    """`Term` of native.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "magnitude", "norm")),
        ("inner", ctypes.c_int64),
        ("bf16", ctypes.c_int),
    )


@operation(
    "input_gradients(Tensor(a!)? dx, Tensor? x, Tensor? mask, Tensor u, Tensor[] lora_as, Tensor(b!)? da, Tensor[] dys, "
    "Tensor[] weights, Tensor?[] magnitudes, Tensor?[] norms) -> ()"
)
def input_gradients(
    dx: Tensor | None,
    x: Tensor | None,
    mask: Tensor | None,
    u: Tensor,
    lora_as: Sequence[Tensor],
    da: Tensor | None,
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    magnitudes: Sequence[Tensor | None],
    norms: Sequence[Tensor | None],
) -> None:
    """What a backward pass has left to do behind ``dx = Σ D W``: ``dx += (u A) ⊙ mask`` and ``da = uᵀ (x ⊙ mask)``.

    Args:
        dx: ``(M, in)``, changed in place, or None.
        x: ``(M, in)``, read for da.
        mask: bits of dropout for x, or None.
        u: ``(M, Σ r)``.
        lora_as: A ``(r, in)`` of each layer.
        da: ``(Σ r, in)`` in fp32, or None.
        dys: dy ``(M, out)`` of each layer, to compute ``Σ dy W`` too, whatever dx holds, where `native_library.multiply_pays`;
            nothing but the result is rounded. Empty like the next three where dx is given.
        weights: W ``(out, in)`` of each layer, then.
        magnitudes: m ``(out,)`` of each layer, then, or None: ``g ⊙ W``, rounded, takes the place of W, ``g = m / n``.
        norms: n ``(out,)`` of each layer in fp32, where there is a magnitude.
    """
    if not has_values(u):
        return
    matrices = [_parameter(a) for a in lora_as]
    gains = [None if m is None else _parameter(m) for m in magnitudes]
    addresses = (ctypes.c_void_p * len(matrices))(*(a.data_ptr() for a in matrices))
    ranks = (ctypes.c_int64 * len(matrices))(*(len(a) for a in matrices))
    terms = (_Term * len(dys))()
    for k, (dy, weight, m, norm) in enumerate(zip(dys, weights, gains, norms, strict=True)):
        terms[k] = _Term(at(dy), at(weight), at(m), at(norm), len(weight), _is_half(weight))
    sizes = (len(matrices), u.shape[0], matrices[0].shape[1])
    low_rank = (at(dx), at(x), _is_half(u), at(mask), at(u), addresses, ranks, *sizes, at(da))
    call("input_gradients", *low_rank, terms if dys else None)


def _is_half(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.bfloat16


@operation("mask(Tensor x, Tensor bits) -> Tensor")
def mask(x: Tensor, bits: Tensor) -> Tensor:
    """x where its bit is 1, and 0 elsewhere; `bits` as `draw_bits` gives them."""
    result = torch.empty_like(x)
    if has_values(x):
        call("masked", at(x), _is_half(x), at(bits), x.numel(), False, at(result))
    return result


@operation("add_masked(Tensor(a!) x, Tensor y, Tensor bits) -> ()")
def add_masked(x: Tensor, y: Tensor, bits: Tensor) -> None:
    """Add y to x, in place, where its bit is 1."""
    if has_values(x):
        call("masked", at(y), _is_half(x), at(bits), x.numel(), True, at(x))


def draw_bits(like: Tensor, drops: int) -> Tensor:
    """Bits that are 0 with a probability of `drops` / 65536, one for each element of `like`, ``(ceil(elements / 8),)`` uint8.

    Bit k of byte j is for element ``8 j + k``. The numbers are those of SplitMix64 (Steele, Lea and Flood 2014), which are had
    in any order and by any number of threads, from a seed that torch's generator draws.
    """
    count = -(-like.numel() // 32)
    bits = like.new_empty(4 * count, dtype=torch.uint8)
    seed = like.new_empty((), dtype=torch.int64).random_(-(2**63), None)
    if has_values(like):
        call("drawn", at(bits), count, seed.item() % 2**64, drops)
    return bits[: -(-like.numel() // 8)]
