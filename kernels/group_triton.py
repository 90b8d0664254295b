"""Several matrices in one launch: up to four of each argument, picked by the program's index.

Modules that read the same input (query, key and value) run together. Their pointers are ordinary arguments, not a table in
memory: a table would have to be copied to the device, which a captured CUDA graph forbids. Which layers run together is
decided here too.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftlite.kernels.pack_triton import padded_rank


@triton.jit
def pick(index, a, b, c, d, GROUP: tl.constexpr):
    """Argument number `index` of the first `GROUP`, with the alignment that is known of all of them."""
    if GROUP > 1:
        a = tl.where(index == 1, b, a)
    if GROUP > 2:
        a = tl.where(index == 2, c, a)
    if GROUP > 3:
        a = tl.where(index == 3, d, a)
    return a


LARGEST_GROUP = 4

T = TypeVar("T")


def four(items: Sequence[T]) -> tuple[T, ...]:
    """One to four `items`, filled up to four with the first, which `pick` then never takes.

    Raises:
        ValueError: for none, or for more than four.
    """
    if not 1 <= len(items) <= LARGEST_GROUP:
        raise ValueError(f"a group is of 1 to {LARGEST_GROUP} matrices, got {len(items)}; launch larger groups in parts.")
    return (*items, *[items[0]] * (LARGEST_GROUP - len(items)))


def alike(layers: Sequence[tuple[Any, ...]]) -> list[list[int]]:
    """The places of layers that can run together, up to four each, for the arguments of layers that read the same input.

    Together run those with the same padded rank, scale, dtypes and choice of what trains, with a bias all of them or none:
    kernels are compiled for these. The others run apart, and their shares of the input's gradient are added up by autograd.
    """
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for place, layer in enumerate(layers):
        kind = [(value.dtype, value.requires_grad) if isinstance(value, Tensor) else value for value in layer]
        kinds.setdefault((padded_rank(len(layer.lora_a)), *kind), []).append(place)  # type: ignore[attr-defined]
    return [places[k : k + LARGEST_GROUP] for places in kinds.values() for k in range(0, len(places), LARGEST_GROUP)]


def rows_side_by_side(x: Tensor) -> Tensor:
    """`x`, copied only where neighbouring columns are not neighbours in memory."""
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # empty tensors too, which `contiguous` leaves as they are


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Contiguous matrices of one shape on top of each other; copied only where they do not follow each other in memory."""
    first = parts[0]
    if len(parts) == 1:
        return first
    storage, start, size = first.untyped_storage()._cdata, first.storage_offset(), first.numel()
    follow = all(
        part.untyped_storage()._cdata == storage and part.storage_offset() == start + k * size
        for k, part in enumerate(parts)
    )
    if follow:
        return first.as_strided((len(parts) * first.shape[0], first.shape[1]), (first.shape[1], 1))
    return torch.cat(list(parts))


def check_rows(name: str, tensors: Sequence[Tensor], rows: int) -> None:
    """Raise a `ValueError` unless each of `tensors` is a matrix of `rows` rows whose columns lie side by side in memory."""
    for tensor in tensors:
        if tensor.ndim != 2 or tensor.shape[0] != rows or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
            raise ValueError(
                f"{name} must have {rows} rows with stride(-1) = 1, got shape {tuple(tensor.shape)} and strides "
                f"{tensor.stride()}; call .contiguous() before."
            )
