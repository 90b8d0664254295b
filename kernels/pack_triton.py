"""P0, pack the factors: A and B in the dtype of the computation, their rank padded with zeros to a multiple of 16.

Matrix units take ranks in steps of 16, and rows of 16 elements are what 128-bit loads want; padding here spares every other
kernel a mask. It replaces two casts per layer and forward pass.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftlite.kernels.configs import config
from peftlite.kernels.launch_triton import architecture, launch
from peftlite.kernels.numerics_triton import TL_DTYPES, rounded, widened
from peftlite.kernels.table_triton import Table

STEP = 16


def padded_rank(rank: int) -> int:
    """`rank` rounded up to a multiple of 16."""
    return -(-rank // STEP) * STEP


@triton.jit
def _pack_tile(lora_a, lora_b, packed_a, packed_b, rank, columns, rows, tile, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """One block of `BLOCK` elements, those of A first; nothing where `tile` is past the end of B."""
    a_count, b_count = columns.to(tl.int64) * RANK, rows.to(tl.int64) * RANK
    a_tiles = tl.cdiv(a_count, BLOCK)
    if tile < a_tiles:
        here = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        # Rows are appended, so that an element keeps its place.
        a = tl.load(lora_a + here, mask=here < columns.to(tl.int64) * rank, other=0.0)
        tl.store(packed_a + here, rounded(widened(a), packed_a.dtype.element_ty), mask=here < a_count)
    else:
        here = (tile - a_tiles) * BLOCK + tl.arange(0, BLOCK)
        row, column = here // RANK, here % RANK
        b = tl.load(lora_b + row * rank + column, mask=(here < b_count) & (column < rank), other=0.0)
        tl.store(packed_b + here, rounded(widened(b), packed_b.dtype.element_ty), mask=here < b_count)


@triton.jit
def _pack_kernel(lora_a, lora_b, packed_a, packed_b, rank, columns, rows, RANK: tl.constexpr, BLOCK: tl.constexpr):
    _pack_tile(lora_a, lora_b, packed_a, packed_b, rank, columns, rows, tl.program_id(0), RANK, BLOCK)


@triton.jit
def _pack_grouped_kernel(
    table,
    FIELDS: tl.constexpr,
    FACTOR: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = table + tl.program_id(1) * FIELDS
    lora_a = tl.load(entry + 0).to(tl.pointer_type(FACTOR))
    lora_b = tl.load(entry + 1).to(tl.pointer_type(FACTOR))
    packed_a = tl.load(entry + 2).to(tl.pointer_type(DTYPE))
    packed_b = tl.load(entry + 3).to(tl.pointer_type(DTYPE))
    columns = tl.load(entry + 5)
    if ALIGNED:
        lora_a, lora_b = tl.multiple_of(lora_a, 16), tl.multiple_of(lora_b, 16)
        packed_a, packed_b = tl.multiple_of(packed_a, 16), tl.multiple_of(packed_b, 16)
        columns = tl.multiple_of(columns, 16)
    rank, rows = tl.load(entry + 4), tl.load(entry + 6)
    _pack_tile(lora_a, lora_b, packed_a, packed_b, rank, columns, rows, tl.program_id(0), RANK, BLOCK)


def pack_adapters(
    lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `A (RP, in)` and `B (out, RP)` in `dtype`, where RP is the rank rounded up to a multiple of 16.

    Args:
        lora_a: ``(r, in)``, contiguous.
        lora_b: ``(out, r)``, contiguous.
        dtype: of the computation.
        out: contiguous tensors to write to; factors that are in that form already are not copied where there are none.
    """
    (rank, columns), rows = lora_a.shape, lora_b.shape[0]
    padded = padded_rank(rank)
    if out is None:
        if rank == padded and lora_a.dtype == lora_b.dtype == dtype:
            return lora_a, lora_b
        out = lora_a.new_empty(padded, columns, dtype=dtype), lora_b.new_empty(rows, padded, dtype=dtype)
    tile = config("pack", arch=architecture(lora_a.device), dtype=dtype, rank=padded, columns=columns, rows=rows)
    grid = (sum(triton.cdiv(count * padded, tile["BLOCK"]) for count in (columns, rows)),)
    launch(_pack_kernel, grid, lora_a, lora_b, *out, rank, columns, rows, RANK=padded, **tile)
    return out


def pack_grouped(tables: Sequence[Table]) -> None:
    """`pack_adapters` for all modules of each table, in one launch per table."""
    for table in tables:
        first = table.modules[0]
        dtype, rank = first.packed_a.dtype, first.packed_a.shape[0]
        arch = architecture(first.packed_a.device)
        tile = config("pack", arch=arch, dtype=dtype, rank=rank, columns=table.most_columns, rows=table.most_rows)
        tiles = max(
            sum(triton.cdiv(count * rank, tile["BLOCK"]) for count in (m.packed_a.shape[1], m.packed_b.shape[0]))
            for m in table.modules
        )
        launch(
            _pack_grouped_kernel,
            (tiles, len(table.modules)),
            table.pointers,
            FIELDS=table.pointers.shape[1],
            FACTOR=TL_DTYPES[first.lora_a.dtype],
            DTYPE=TL_DTYPES[dtype],
            ALIGNED=table.aligned,
            RANK=rank,
            **tile,
        )
