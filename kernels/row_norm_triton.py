"""T0, the norm and the gain: ``n = ‖W + s B A‖_row``, ``g = m / n``, from one read of W in the dtype in which it is stored.

Tiles of ``W + s B A`` exist in registers only; they are squared there and added up, so that nothing cancels. Columns are cut
into `SPLIT` interleaved slices whose sums are added in a fixed order, by the program itself in the grouped form and by a
second kernel otherwise: the same bits either way.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftlite.kernels.launch_triton import architecture, launch
from peftlite.kernels.numerics_triton import TL_DTYPES, dot, input_precision, widened
from peftlite.kernels.table_triton import Table, norm_tile

EPS = 1e-12  # as in dora_linear
# of the second kernel, which adds the slices up
FINISH = {"BLOCK": 512, "num_warps": 4, "num_stages": 1}


@triton.jit
def _sum_of_squares(
    weight,
    a,
    b,
    row,
    piece,
    rows,
    columns,
    stride_w,
    scale,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """``Σ_k (W + s B A)²_jk`` over the columns of slice `piece`, for the rows `row (BLOCK_N,)`."""
    in_rows = row < rows
    w_row = weight + row[:, None].to(tl.int64) * stride_w
    b_row = b + row[:, None].to(tl.int64) * RANK
    ranks = tl.arange(0, BLOCK_R)
    if RANK <= BLOCK_R:
        b_once = tl.load(b_row + ranks[None, :], mask=in_rows[:, None] & (ranks < RANK)[None, :], other=0.0)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in tl.range(piece * BLOCK_K, columns, BLOCK_K * SPLIT):
        column = first + tl.arange(0, BLOCK_K)
        in_columns = column < columns
        w = tl.load(w_row + column[None, :], mask=in_rows[:, None] & in_columns[None, :], other=0.0)
        update = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if RANK <= BLOCK_R:
            a_here = a + ranks[:, None].to(tl.int64) * columns + column[None, :]
            a_tile = tl.load(a_here, mask=(ranks < RANK)[:, None] & in_columns[None, :], other=0.0)
            update = dot(b_once, a_tile, update, PRECISION)
        else:  # a loop, not unrolled: unrolled, large ranks spill
            for start in tl.range(0, RANK, BLOCK_R):
                rank = start + ranks
                in_rank = rank < RANK
                b_tile = tl.load(b_row + rank[None, :], mask=in_rows[:, None] & in_rank[None, :], other=0.0)
                a_here = a + rank[:, None].to(tl.int64) * columns + column[None, :]
                a_tile = tl.load(a_here, mask=in_rank[:, None] & in_columns[None, :], other=0.0)
                update = dot(b_tile, a_tile, update, PRECISION)
        direction = widened(w) + scale * update
        total += tl.sum(direction * direction, axis=1)
    return total


@triton.jit
def _store_gain(square, magnitude, out, row, rows, HAS_GAIN: tl.constexpr, EPSILON: tl.constexpr):
    """Norm, and with `HAS_GAIN` gain, from the sum of squares: rows 1 and 0 of `out`."""
    in_rows = row < rows
    norm = tl.maximum(tl.sqrt_rn(square), EPSILON, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + rows + row, norm, mask=in_rows)
    if HAS_GAIN:
        m = widened(tl.load(magnitude + row, mask=in_rows, other=1.0))
        tl.store(out + row, tl.div_rn(m, norm), mask=in_rows)


@triton.jit
def _row_norm_kernel(
    weight,
    a,
    b,
    magnitude,
    parts,
    out,
    rows,
    columns,
    stride_w,
    scale,
    HAS_GAIN: tl.constexpr,
    EPSILON: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row, piece = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    square = _sum_of_squares(
        weight, a, b, row, piece, rows, columns, stride_w, scale, RANK, PRECISION, BLOCK_N, BLOCK_K, BLOCK_R, SPLIT
    )
    if SPLIT == 1:
        _store_gain(square, magnitude, out, row, rows, HAS_GAIN, EPSILON)
    else:
        tl.store(parts + piece.to(tl.int64) * rows + row, square, mask=row < rows)


@triton.jit
def _row_norm_finish_kernel(
    parts, magnitude, out, rows, HAS_GAIN: tl.constexpr, EPSILON: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    square = tl.zeros((BLOCK,), tl.float32)
    for piece in tl.range(0, SPLIT):
        square += tl.load(parts + piece * rows + row, mask=row < rows, other=0.0)
    _store_gain(square, magnitude, out, row, rows, HAS_GAIN, EPSILON)


@triton.jit
def _row_norm_grouped_kernel(
    table,
    scales,
    FIELDS: tl.constexpr,
    WEIGHT: tl.constexpr,
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    EPSILON: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
):
    entry = table + tl.program_id(1) * FIELDS
    rows = tl.load(entry + 6).to(tl.int32)
    first = tl.program_id(0) * BLOCK_N
    if first >= rows:  # a smaller module of the group
        return
    a = tl.load(entry + 2).to(tl.pointer_type(DTYPE))
    b = tl.load(entry + 3).to(tl.pointer_type(DTYPE))
    weight = tl.load(entry + 7).to(tl.pointer_type(WEIGHT))
    columns, stride_w = tl.load(entry + 5).to(tl.int32), tl.load(entry + 8)
    if ALIGNED:
        a, b, weight = tl.multiple_of(a, 16), tl.multiple_of(b, 16), tl.multiple_of(weight, 16)
        columns, stride_w = tl.multiple_of(columns, 16), tl.multiple_of(stride_w, 16)
    scale = tl.load(scales + tl.program_id(1))
    row = first + tl.arange(0, BLOCK_N)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for piece in tl.range(0, SPLIT):
        square += _sum_of_squares(
            weight, a, b, row, piece, rows, columns, stride_w, scale, RANK, PRECISION, BLOCK_N, BLOCK_K, BLOCK_R, SPLIT
        )
    magnitude = tl.load(entry + 9).to(tl.pointer_type(MAGNITUDE))
    out = tl.load(entry + 10).to(tl.pointer_type(tl.float32))
    _store_gain(square, magnitude, out, row, rows, True, EPSILON)


def row_norm_gain(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None, scale: float) -> Tensor:
    """Compute `(2, out)` in fp32: ``g = m / n`` and ``n = max(‖W + s B A‖_row, 1e-12)``.

    Args:
        weight: ``(out, in)``, contiguous in its rows; read once.
        a: ``(RP, in)``, as `pack_adapters` makes it.
        b: ``(out, RP)``, likewise.
        magnitude: ``(out,)``, or None: then g is not written.
        scale: the factor ``s``.
    """
    rows, columns = weight.shape
    arch, rank = architecture(weight.device), a.shape[0]
    out = torch.empty(2, rows, dtype=torch.float32, device=weight.device)
    tile = norm_tile(weight, rank)
    split = tile["SPLIT"]
    parts = out if split == 1 else torch.empty(split, rows, dtype=torch.float32, device=weight.device)
    gained = out if magnitude is None else magnitude
    flags: dict[str, Any] = {"HAS_GAIN": magnitude is not None, "EPSILON": EPS}
    launch(
        _row_norm_kernel,
        (triton.cdiv(rows, tile["BLOCK_N"]), split),
        weight,
        a,
        b,
        gained,
        parts,
        out,
        rows,
        columns,
        weight.stride(0),
        scale,
        **flags,
        RANK=rank,
        PRECISION=input_precision(a.dtype, arch),
        **tile,
    )
    if split > 1:
        grid = (triton.cdiv(rows, FINISH["BLOCK"]),)
        launch(_row_norm_finish_kernel, grid, parts, gained, out, rows, **flags, SPLIT=split, **FINISH)
    return out


def row_norm_gain_grouped(tables: Sequence[Table]) -> None:
    """`row_norm_gain` for all modules of each table, in one launch per table and with the same bits."""
    for table in tables:
        first = table.modules[0]
        assert first.weight is not None
        assert first.magnitude is not None
        dtype, tile = first.packed_a.dtype, first.tile()
        launch(
            _row_norm_grouped_kernel,
            (triton.cdiv(table.most_rows, tile["BLOCK_N"]), len(table.modules)),
            table.pointers,
            table.scales,
            FIELDS=table.pointers.shape[1],
            WEIGHT=TL_DTYPES[first.weight.dtype],
            DTYPE=TL_DTYPES[dtype],
            MAGNITUDE=TL_DTYPES[first.magnitude.dtype],
            ALIGNED=table.aligned,
            EPSILON=EPS,
            RANK=first.packed_a.shape[0],
            PRECISION=input_precision(dtype, architecture(first.weight.device)),
            **tile,
        )
