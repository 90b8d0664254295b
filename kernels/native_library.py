"""The library of the native passes (`peftlite.kernels.native`): whether it is there, what it serves, how it is called.

``native.c`` is compiled when the package is installed, where there is a C compiler. ``PEFTLITE_NATIVE=0`` switches it off.
"""

import ctypes
import os
from collections.abc import Callable, Iterable
from functools import cache, wraps
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

NAMESPACE = "peftlite_native"
MAX_RANK = 64  # beyond, a product with A costs less than as many multiplications for each element that is read
DTYPES = (torch.float32, torch.bfloat16)
INSTRUCTION_SETS = ("plain C", "AVX2", "AVX-512", "AVX-512 with dot products of bf16")
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "u": ctypes.c_uint64, "f": ctypes.c_float}
_SIGNATURES = {  # what native.c declares: the result, and the arguments
    "row_norm": ("i", "pippflllpi"),
    "adapt_output": ("i", "pppipppflllllliipipippfifi"),
    "output_gradients": ("l", "pipflllpllpllpppfpippfpppi"),
    "input_gradients": ("i", "ppippppillppi"),
    "is_zero": ("i", "pli"),
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
    """What the passes are compiled for here: one of `INSTRUCTION_SETS`, or ``"none"`` where there are none."""
    found = library()
    return "none" if found is None else INSTRUCTION_SETS[found.peftlite_instruction_set(len(INSTRUCTION_SETS) - 1)]


@cache
def _shrink_pays(found: ctypes.CDLL | None, dtype: torch.dtype) -> int:
    """The rank up to which ATen's products with the factors take longer in this dtype; 0 where nothing is `found`."""
    if found is None or dtype not in DTYPES:
        return 0
    if dtype == torch.float32:
        return MAX_RANK
    return 32 if found.peftlite_instruction_set(3) == 3 else 8


def reads(*tensors: Tensor) -> bool:
    """Whether the passes run over the memory of `tensors`."""
    return _are_plain(tensors) and all(map(Tensor.is_contiguous, tensors)) and library() is not None


def serves(rank: int, *factors: Tensor) -> bool:
    """Whether the passes take `factors` of this `rank`, or magnitudes; of strided ones they are given copies."""
    return rank <= MAX_RANK and _are_plain(factors) and library() is not None


def shrink_pays(rows: Tensor, rank: int, *factors: Tensor) -> bool:
    """Whether the passes run over `rows` and products of them with `factors` of this `rank` in all, for less than ATen's."""
    return 0 < rank <= _shrink_pays(library(), rows.dtype) and reads(rows) and serves(rank, *factors)


@cache
def _multiplies(found: ctypes.CDLL | None) -> bool:
    """Whether products with W are quicker in C than in ATen."""
    return found is not None and bool(found.peftlite_multiplies())


def multiply_pays(rows: Tensor, weights: Iterable[Tensor]) -> bool:
    """Whether the passes multiply `rows` (x, dy) with `weights` ``(out, in)``, either way, for less than ATen does.

    Dot products take two elements at a time, so that both sizes must be even.
    """
    if rows.dtype != torch.bfloat16 or not _multiplies(library()):
        return False
    return not any(weight.shape[0] % 2 or weight.shape[1] % 2 for weight in weights)


def _are_plain(tensors: Iterable[Tensor]) -> bool:
    for tensor in tensors:
        kind = type(tensor)
        if not (kind is Tensor or kind is Parameter or isinstance(tensor, FakeTensor)):
            return False  # a packed weight is no memory to read
        if tensor.dtype not in DTYPES or tensor.device.type != "cpu":
            return False
    return True


def call(name: str, *arguments: Any) -> int:
    """Run a pass; whoever calls holds the tensors, whose addresses it gets, until it returns."""
    result: int = getattr(library(), f"peftlite_{name}")(*arguments, torch.get_num_threads())
    if result < 0:
        raise MemoryError(f"native pass {name!r}: no memory for its factors.")
    return result


def at(tensor: Tensor | None) -> int | None:
    """The address of a tensor's first element.

    Raises:
        ValueError: the tensor stands for memory that is elsewhere.
    """
    if tensor is None:
        return None
    first = tensor.data_ptr()
    if not first and tensor.numel():
        raise ValueError(f"a native pass was given a {type(tensor).__name__} without memory of its own; make it dense first.")
    return first


def operation(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function with torch under `schema`; fake tensors run it as well, up to the call."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _registry.define(schema)
        name = schema.partition("(")[0]
        _registry.impl(name, function, "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=_registry)
        registered = getattr(getattr(torch.ops, NAMESPACE), name).default

        @wraps(function)
        def run(*arguments: Any) -> Any:
            # Straight after a large product the dispatcher takes longer than many a pass, since its code has left the caches.
            return (registered if _is_watched() else function)(*arguments)

        return run

    return register


def _is_watched() -> bool:
    """Whether a mode of torch, a profiler or a transform of `torch.func` is to see the operations."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch.autograd.profiler._is_profiler_enabled
        or torch._C._functorch.maybe_current_level() is not None
    )
