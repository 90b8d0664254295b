"""T2's second part: add up the partial sums of ``col_shrink_triton.py`` in a fixed order and write the gradients.

The gradient of DoRA's magnitude is ``dm = (1 / m) Σ dY ⊙ (Y - b)``, from the layer's output. Where Y holds too few digits of
``g ⊙ inner`` (see ``kernels/README.md``), inner is computed again here, for the columns concerned: the kernel sees it
itself, the host never waits for an answer, and elsewhere the loops are skipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftlite.kernels.configs import config
from peftlite.kernels.group_triton import four, pick
from peftlite.kernels.launch_triton import launch
from peftlite.kernels.numerics_triton import dot, input_precision, rounded

SMALL_GAIN = tl.constexpr(1 / 16)  # below it, g ⊙ inner may have underflowed, and m may be 0
LARGE_BIAS = tl.constexpr(4.0)  # times the mean of |g ⊙ inner|: above it, y - b has lost the digits that dm needs
FLOOR = tl.constexpr(1e-12)  # of the norm


@dataclass(frozen=True)
class Magnitudes:
    """What the gradients of a group's magnitudes are computed from; every list has an entry per module.

    Attributes:
        ys: outputs `(M, C)`.
        biases: b `(C,)` of each, or None.
        norms: n `(C,)`, fp32.
        grads: where dm `(C,)` goes.
        x: the input `(M, K)` that the modules share.
        h: `(M, group · RP)`, as the forward pass left it.
        weights: W `(C, K)`, contiguous.
        packed_b: B `(C, RP)`, contiguous, in the dtype of x.
        scales: s of each, in front of ``h Bᵀ``.
    """

    ys: Sequence[Tensor]
    biases: Sequence[Tensor] | None
    norms: Sequence[Tensor]
    grads: Sequence[Tensor]
    x: Tensor
    h: Tensor
    weights: Sequence[Tensor]
    packed_b: Sequence[Tensor]
    scales: Sequence[float]


@triton.jit
def _total(here, stride, splits, mask, BLOCK: tl.constexpr):
    """The sum over the splits of a vector of partial sums, in their order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(here, mask=mask, other=0.0)
        here += stride
    return total


@triton.jit
def _store_factor(
    PARTS,
    OUT,
    column,
    in_columns,
    columns,
    rank,
    ranks,
    split_stride,
    column_stride,
    splits,
    factor,
    BY_RANK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add up a tile of Q over the splits, in their order, and store `factor` times it."""
    inside = in_columns[:, None] & (rank < ranks)[None, :]
    here = PARTS + column[:, None].to(tl.int64) * column_stride + rank[None, :]
    total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for _ in range(splits):
        total += tl.load(here, mask=inside, other=0.0)
        here += split_stride
    if BY_RANK:
        there = OUT + rank[None, :].to(tl.int64) * columns + column[:, None]
    else:
        there = OUT + column[:, None].to(tl.int64) * ranks + rank[None, :]
    tl.store(there, rounded(factor * total, OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def _finish_factors_kernel(
    PARTS,
    OUT0, OUT1, OUT2, OUT3,
    splits,
    columns0, columns1, columns2, columns3,
    ranks0, ranks1, ranks2, ranks3,
    group_stride,
    split_stride,
    column_stride,
    scale0, scale1, scale2, scale3,
    GROUP: tl.constexpr,
    BY_RANK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    group = tl.program_id(2)
    columns = pick(group, columns0, columns1, columns2, columns3, GROUP)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    _store_factor(
        PARTS + group.to(tl.int64) * group_stride,
        pick(group, OUT0, OUT1, OUT2, OUT3, GROUP),
        column,
        column < columns,
        columns,
        tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R),
        pick(group, ranks0, ranks1, ranks2, ranks3, GROUP),
        split_stride,
        column_stride,
        splits,
        pick(group, scale0, scale1, scale2, scale3, GROUP),
        BY_RANK,
        BLOCK_C,
        BLOCK_R,
    )


@triton.jit
def _again(
    X,
    W,
    H,
    B,
    DY,
    column,
    in_columns,
    rows,
    inner_columns,
    stride_x,
    stride_h,
    stride_dy,
    scale,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``Σ_i dY ⊙ (x Wᵀ + s h Bᵀ)`` of some columns, with the product computed again."""
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rows, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M).to(tl.int64)
        in_rows = row < rows
        low = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for k0 in range(0, RANK, 16):
            k = k0 + tl.arange(0, 16)
            h = tl.load(H + row[:, None] * stride_h + k[None, :], mask=in_rows[:, None], other=0.0)
            b = tl.load(B + column[None, :].to(tl.int64) * RANK + k[:, None], mask=in_columns[None, :], other=0.0)
            low = dot(h, b, low, PRECISION)
        inner = scale * low
        for k0 in range(0, inner_columns, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            in_k = k < inner_columns
            x = tl.load(X + row[:, None] * stride_x + k[None, :], mask=in_rows[:, None] & in_k[None, :], other=0.0)
            w_here = W + column[None, :].to(tl.int64) * inner_columns + k[:, None]
            w = tl.load(w_here, mask=in_k[:, None] & in_columns[None, :], other=0.0).to(tl.float32)
            inner = dot(x, rounded(w, X.dtype.element_ty), inner, PRECISION)
        dy_here = DY + row[:, None] * stride_dy + column[None, :]
        dy = tl.load(dy_here, mask=in_rows[:, None] & in_columns[None, :], other=0.0).to(tl.float32)
        total += tl.sum(dy * inner, axis=0)
    return total


@triton.jit(do_not_specialize=["rows", "splits"])
def _finish_columns_kernel(
    PARTS,
    SUMS,
    OUT0, OUT1, OUT2, OUT3,
    DM0, DM1, DM2, DM3,
    DB0, DB1, DB2, DB3,
    GAIN0, GAIN1, GAIN2, GAIN3,
    NORM0, NORM1, NORM2, NORM3,
    BIAS0, BIAS1, BIAS2, BIAS3,
    W0, W1, W2, W3,
    B0, B1, B2, B3,
    DY0, DY1, DY2, DY3,
    X,
    H,
    rows,
    splits,
    widest,
    columns0, columns1, columns2, columns3,
    ranks0, ranks1, ranks2, ranks3,
    inner_columns,
    stride_x,
    stride_h,
    stride_dy0, stride_dy1, stride_dy2, stride_dy3,
    scale0, scale1, scale2, scale3,
    low_scale0, low_scale1, low_scale2, low_scale3,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BY_RANK: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUM_X: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    group = tl.program_id(2)
    columns = pick(group, columns0, columns1, columns2, columns3, GROUP)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_columns = column < columns
    if HAS_GAIN:
        gain = tl.load(pick(group, GAIN0, GAIN1, GAIN2, GAIN3, GROUP) + column, mask=in_columns, other=0.0)
    if RANK:
        factor = pick(group, scale0, scale1, scale2, scale3, GROUP)
        if HAS_GAIN:
            factor = (factor * gain)[:, None]
        _store_factor(
            PARTS + group.to(tl.int64) * splits * widest * RANK,
            pick(group, OUT0, OUT1, OUT2, OUT3, GROUP),
            column,
            in_columns,
            columns,
            tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R),
            pick(group, ranks0, ranks1, ranks2, ranks3, GROUP),
            widest * RANK,
            RANK,
            splits,
            factor,
            BY_RANK,
            BLOCK_C,
            BLOCK_R,
        )
    if tl.program_id(1) > 0:
        return
    sums = SUMS + group.to(tl.int64) * splits * 3 * widest + column
    if SUM_X:
        DB = pick(group, DB0, DB1, DB2, DB3, GROUP)
        total = _total(sums + widest, 3 * widest, splits, in_columns, BLOCK_C)
        tl.store(DB + column, rounded(total, DB0.dtype.element_ty), mask=in_columns)
    if HAS_Y:
        norm = tl.load(pick(group, NORM0, NORM1, NORM2, NORM3, GROUP) + column, mask=in_columns, other=1.0)
        norm = tl.maximum(norm, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        dm = tl.div_rn(_total(sums, 3 * widest, splits, in_columns, BLOCK_C), gain * norm)
        lost = tl.abs(gain) < SMALL_GAIN
        if HAS_BIAS:
            bias = tl.load(pick(group, BIAS0, BIAS1, BIAS2, BIAS3, GROUP) + column, mask=in_columns, other=0.0).to(tl.float32)
            size = _total(sums + 2 * widest, 3 * widest, splits, in_columns, BLOCK_C)
            lost = lost | (tl.abs(bias) * rows > size * LARGE_BIAS)
        lost = lost & in_columns
        if tl.max(lost.to(tl.int32), axis=0) > 0:
            again = _again(
                X,
                pick(group, W0, W1, W2, W3, GROUP),
                H + group * LOW_RANK,
                pick(group, B0, B1, B2, B3, GROUP),
                pick(group, DY0, DY1, DY2, DY3, GROUP),
                column,
                in_columns,
                rows,
                inner_columns,
                stride_x,
                stride_h,
                pick(group, stride_dy0, stride_dy1, stride_dy2, stride_dy3, GROUP),
                pick(group, low_scale0, low_scale1, low_scale2, low_scale3, GROUP),
                LOW_RANK,
                PRECISION,
                BLOCK_M,
                BLOCK_C,
                BLOCK_K,
            )
            dm = tl.where(lost, tl.div_rn(again, norm), dm)
        DM = pick(group, DM0, DM1, DM2, DM3, GROUP)
        tl.store(DM + column, rounded(dm, DM0.dtype.element_ty), mask=in_columns)


def finish_factors(parts: Tensor, factors: Sequence[Tensor], scales: Sequence[float], *, by_rank: bool, arch: str) -> None:
    """Write ``s Σ parts`` to each of `factors`; `parts` is `(X, splits, C, RP)`, X one for all factors or one each."""
    group, splits, widest, rank = parts.shape
    shared = len(factors) // group
    columns = [f.shape[1 if by_rank else 0] for f in factors]
    tile = _tile("col_finish_factors", parts, rank // shared, arch)
    launch(
        _finish_factors_kernel,
        (triton.cdiv(max(columns), tile["BLOCK_C"]), triton.cdiv(rank // shared, tile["BLOCK_R"]), len(factors)),
        parts,
        *four(factors),
        splits,
        *four(columns),
        *four([f.shape[0 if by_rank else 1] for f in factors]),
        splits * widest * rank if shared == 1 else rank // shared,
        widest * rank,
        rank,
        *four(scales),
        GROUP=len(factors),
        BY_RANK=by_rank,
        **tile,
    )


def finish_columns(
    xs: Sequence[Tensor],
    parts: Tensor,
    sums: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    gains: Sequence[Tensor] | None,
    magnitudes: Magnitudes | None,
    biases: Sequence[Tensor] | None,
    *,
    by_rank: bool,
    arch: str,
) -> None:
    """Write ``s g ⊙ Σ parts`` to each of `factors`, one per X, and what comes of `sums` to `magnitudes` and `biases`.

    `parts` is `(X, splits, C, RP)`; `sums` is `(X, splits, 3, C)`: of ``dY ⊙ (Y - b)``, ``dY`` and ``|Y - b|``.
    """
    group, splits, widest, rank = parts.shape
    columns = [x.shape[1] for x in xs]
    like, unused = xs[0], [sums]
    m = magnitudes
    tile = _tile("col_finish", parts, rank, arch)
    launch(
        _finish_columns_kernel,
        (triton.cdiv(widest, tile["BLOCK_C"]), max(1, triton.cdiv(rank, tile["BLOCK_R"])), group),
        parts if rank else sums,
        sums,
        *four(factors if rank else unused),
        *four(m.grads if m else unused),
        *four(biases or unused),
        *four(gains or unused),
        *four(m.norms if m else unused),
        *four(m.biases if m and m.biases else unused),
        *four(m.weights if m else unused),
        *four(m.packed_b if m else unused),
        *four(xs),
        m.x if m else like,
        m.h if m else like,
        like.shape[0],
        splits,
        widest,
        *four(columns),
        *four([f.shape[0 if by_rank else 1] for f in factors] if rank else [0]),
        m.x.shape[1] if m else 0,
        m.x.stride(0) if m else 0,
        m.h.stride(0) if m else 0,
        *four([x.stride(0) for x in xs]),
        *four(scales if rank else [0.0]),
        *four(m.scales if m else [0.0]),
        GROUP=group,
        RANK=rank,
        LOW_RANK=m.packed_b[0].shape[1] if m else 0,
        BY_RANK=by_rank,
        HAS_GAIN=gains is not None,
        HAS_Y=m is not None,
        HAS_BIAS=m is not None and m.biases is not None,
        SUM_X=biases is not None,
        PRECISION=input_precision(like.dtype, arch),
        **tile,
    )


def _tile(kernel: str, parts: Tensor, rank: int, arch: str) -> dict[str, int]:
    splits, widest = parts.shape[1:3]
    return config(kernel, arch=arch, dtype=torch.float32, rank=rank, columns=widest, rows=splits)
