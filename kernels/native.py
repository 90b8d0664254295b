"""DoRA's passes over W, y and dy, and dropout's draws, on CPU: one pass in C where ATen needs several calls.

``native.c`` is compiled when the package is installed, where there is a C compiler. Without it, and for dtypes other than fp32
and bf16, ranks above 64, strided and packed tensors, the same is computed on ATen calls. ``PEFTLITE_NATIVE=0`` switches it off.
Results do not depend on the number of threads, and differ from those of the ATen calls by rounding alone.

The passes are operations of torch in a `NAMESPACE` of their own, so that profilers, meters and fake tensors see them as they
see ATen's.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from peftlite.kernels.dispatch import has_values

NAMESPACE = "peftlite_native"
MAX_RANK = 64  # beyond, a product with A costs less than as many multiplications for each element that is read
DTYPES = (torch.float32, torch.bfloat16)
COL_SHRINK_PAYS = {torch.float32: MAX_RANK, torch.bfloat16: 0}  # ranks up to which ATen's product takes longer
FUSED_PAYS = {torch.float32: MAX_RANK, torch.bfloat16: 8}  # the same within `gain_columns`, which reads dy anyway
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "u": ctypes.c_uint64, "f": ctypes.c_float}
_SIGNATURES = {  # what native.c declares: the result, and the arguments
    "updated": ("i", "pippfplllppi"),
    "expanded": ("i", "ppipfppflllli"),
    "columns": ("l", "ppifillllpippfpppfpppppi"),
    "masked": ("i", "piplipi"),
    "drawn": ("i", "pluui"),
}
_registry = torch.library.Library(NAMESPACE, "DEF")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled passes, or None where the package was built without them or they are switched off."""
    paths = (Path(__file__).with_name(f"_native{suffix}") for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.exists()), None)
    if path is None or os.environ.get("PEFTLITE_NATIVE") == "0":
        return None
    found = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, f"peftlite_{name}")
        function.restype, function.argtypes = _TYPES[result], [_TYPES[code] for code in arguments]
    return found


def instruction_set() -> str:
    """What the passes are compiled for here: ``"AVX-512"``, ``"AVX2"``, ``"plain C"``, or ``"none"`` where there are none."""
    found = library()
    return "none" if found is None else ("plain C", "AVX2", "AVX-512")[found.peftlite_instruction_set(2)]


def serves(rank: int, *tensors: Tensor) -> bool:
    """Whether the passes run over `tensors`, with factors of this `rank`."""
    return rank <= MAX_RANK and library() is not None and all(map(_is_served, tensors))


def col_shrink_pays(dy: Tensor, h: Tensor, *, fused: bool = False) -> bool:
    """Whether ``dyᵀ h`` takes less time than by ATen, from `col_shrink` or `fused` into `gain_columns`."""
    ranks = (FUSED_PAYS if fused else COL_SHRINK_PAYS).get(dy.dtype, 0)
    return dy.dtype == h.dtype and h.shape[1] <= ranks and h.stride(1) == 1 and serves(0, dy)


def _is_served(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, Parameter) or isinstance(tensor, FakeTensor)  # a packed weight is no memory to read
    return plain and tensor.device.type == "cpu" and tensor.dtype in DTYPES and tensor.is_contiguous()


def _call(name: str, *arguments: Any) -> int:
    """Run a pass; tensors go as addresses, so whoever calls holds them until it returns."""
    addresses = (argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
    result: int = getattr(library(), f"peftlite_{name}")(*addresses, torch.get_num_threads())
    if result < 0:
        raise MemoryError(f"native pass {name!r}: no memory for its factors.")
    return result


def _operation(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function with torch under `schema`; fake tensors run it as well, up to the call."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _registry.define(schema)
        name = schema.partition("(")[0]
        _registry.impl(name, function, "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=_registry)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register


def _parameter(tensor: Tensor | None) -> Tensor | None:
    """As the passes read parameters: fp32, element after element."""
    return None if tensor is None else tensor.float().contiguous()


@_operation("row_norm(Tensor weight, Tensor lora_a, Tensor lora_b, float scale) -> Tensor")
def row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``‖W + s B A‖_row``, ``(out,)``, fp32, for W ``(out, in)``, A ``(r, in)`` and B ``(out, r)``: one reading of W."""
    norm = weight.new_empty(weight.shape[0], dtype=torch.float32)
    _update(weight, lora_a, lora_b, scale, None, None, norm)
    return norm


@_operation("gained_weight(Tensor weight, Tensor lora_a, Tensor lora_b, float scale, Tensor gain) -> Tensor")
def gained_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, gain: Tensor) -> Tensor:
    """``g ⊙ (W + s B A)``, ``(out, in)``, fp32, for a gain ``g (out,)``."""
    whole = weight.new_empty(weight.shape, dtype=torch.float32)
    _update(weight, lora_a, lora_b, scale, _parameter(gain), whole, None)
    return whole


def _update(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, gain: Tensor | None, whole: Tensor | None, norm: Tensor | None
) -> None:
    if has_values(weight):
        a, b = _parameter(lora_a), _parameter(lora_b)
        half, rank = weight.dtype == torch.bfloat16, lora_a.shape[0]
        _call("updated", weight, half, a, b, scale, gain, *weight.shape, rank, whole, norm)


@_operation(
    "expand_columns(Tensor(a!) y, Tensor h, Tensor lora_b, float scale, Tensor gain, Tensor? bias, float limit) -> bool"
)
def expand_columns(
    y: Tensor, h: Tensor, lora_b: Tensor, scale: float, gain: Tensor, bias: Tensor | None, limit: float
) -> bool:
    """Compute ``g ⊙ (y + s h Bᵀ) + (1 - g) ⊙ b`` in place of y ``(M, out)``, rounded once; whether a ``|g|`` exceeds `limit`.

    h ``(M, r)`` may be some columns of a matrix that is wider.
    """
    if not has_values(y):
        return False
    (rows, out), (b, g, shift) = y.shape, map(_parameter, (lora_b, gain, bias))
    half = y.dtype == torch.bfloat16
    return _call("expanded", y, h, half, b, scale, g, shift, limit, rows, out, h.shape[1], h.stride(0)) > 0


@_operation("col_shrink(Tensor dy, Tensor h, float scale, bool transposed) -> Tensor")
def col_shrink(dy: Tensor, h: Tensor, scale: float, transposed: bool) -> Tensor:
    """``s dyᵀ h``, ``(out, r)``, or its transpose, fp32, for dy ``(M, out)`` and h ``(M, r)``.

    h may be some columns of a matrix that is wider.
    """
    (rows, out), rank = dy.shape, h.shape[1]
    result = dy.new_empty((rank, out) if transposed else (out, rank), dtype=torch.float32)
    if has_values(dy):
        half = dy.dtype == torch.bfloat16
        nothing = (0, None, None, 1.0, None, None, None, 0.0, None, None, None, None, None)
        _call("columns", dy, h, half, scale, transposed, rows, out, rank, h.stride(0), result, *nothing)
    return result


@_operation(
    "gain_columns(Tensor dy, Tensor y, Tensor? residual, float keep, Tensor gain, Tensor? bias, Tensor magnitude, "
    "float limit, bool scaled, Tensor? h, float scale) -> (Tensor, Tensor, Tensor, bool, Tensor)"
)
def gain_columns(
    dy: Tensor,
    y: Tensor,
    residual: Tensor | None,
    keep: float,
    gain: Tensor,
    bias: Tensor | None,
    magnitude: Tensor,
    limit: float,
    scaled: bool,
    h: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, bool, Tensor]:
    """Compute ``D = g ⊙ dy``, ``dm = Σ_i dy_i ⊙ (y_i - b) / m`` and ``s Dᵀ h`` in one pass, and say where dm lost its digits.

    Args:
        dy: ``(M, out)``.
        y: ``(M, out)``, ``g ⊙ inner + b``; with a residual the sum of which y was a part.
        residual: ``(M, out)`` or None: y is ``keep (y - residual)``, and zero where it was dropped.
        keep: the probability with which elements of y were kept.
        gain: ``g (out,)``.
        bias: ``b (out,)`` or None.
        magnitude: ``m (out,)``.
        limit: digits are lost where the mean of ``|y| + |sum|``, or ``|b|`` where there is no residual, exceeds this many
            times that of ``|y - b|``, and where dm is not finite.
        scaled: whether D is asked for; without it the first result is empty.
        h: ``(M, r)``, or None if ``s Dᵀ h`` is not asked for; the last result is empty then.
        scale: the factor ``s``.

    Returns:
        D in the dtype of dy; dm ``(out,)`` in fp32; where digits were lost ``(out,)`` bool, and whether they were anywhere;
        ``s Dᵀ h (out, r)`` in fp32, from a D that is not rounded.
    """
    rows, out = dy.shape
    rank, stride = (0, 0) if h is None else (h.shape[1], h.stride(0))
    inner_grad = torch.empty_like(dy) if scaled else dy.new_empty(0)
    dm, sizes, around = (dy.new_empty(out, dtype=torch.float32) for _ in range(3))
    shrunk = dy.new_empty((out, rank), dtype=torch.float32)
    lost = dy.new_empty(out, dtype=torch.bool)
    found = 0
    if has_values(dy):
        half, g, b, m = dy.dtype == torch.bfloat16, *map(_parameter, (gain, bias, magnitude))
        product = (dy, h, half, scale, False, rows, out, rank, stride, shrunk)
        target = inner_grad if scaled else None
        kind = 1 if residual is None else 2
        found = _call("columns", *product, kind, y, residual, keep, g, b, m, limit, target, dm, sizes, around, lost)
    return inner_grad, dm, lost, found > 0, shrunk


@_operation("mask(Tensor x, Tensor bits) -> Tensor")
def mask(x: Tensor, bits: Tensor) -> Tensor:
    """x where its bit is 1, and 0 elsewhere; `bits` as `draw_bits` gives them."""
    result = torch.empty_like(x)
    if has_values(x):
        _call("masked", x, x.dtype == torch.bfloat16, bits, x.numel(), False, result)
    return result


@_operation("add_masked(Tensor(a!) x, Tensor y, Tensor bits) -> ()")
def add_masked(x: Tensor, y: Tensor, bits: Tensor) -> None:
    """Add y to x, in place, where its bit is 1."""
    if has_values(x):
        _call("masked", y, x.dtype == torch.bfloat16, bits, x.numel(), True, x)


def draw_bits(like: Tensor, drops: int) -> Tensor:
    """Bits that are 0 with a probability of `drops` / 65536, one for each element of `like`, ``(ceil(elements / 8),)`` uint8.

    Bit k of byte j is for element ``8 j + k``. The numbers are those of SplitMix64 (Steele, Lea and Flood 2014), which are had
    in any order and by any number of threads, from a seed that torch's generator draws.
    """
    count = -(-like.numel() // 32)
    bits = like.new_empty(4 * count, dtype=torch.uint8)
    seed = like.new_empty((), dtype=torch.int64).random_(-(2**63), None)
    if has_values(like):
        _call("drawn", bits, count, seed.item() % 2**64, drops)
    return bits[: -(-like.numel() // 8)]
