"""T2, shrink along columns: ``Q = f(X)ᵀ V``, an `(M, C)` matrix transposed times an `(M, r)` one, with what else X is read for.

``dB = s g ⊙ dYᵀ h`` and ``dA = s uᵀ x̃``. For DoRA the pass over dY also reads Y, adds up the columns' ``dY ⊙ (Y - b)`` (for the
magnitude) and ``dY`` (for the bias), and writes ``D = g ⊙ dY``. Rows are split among programs; their partial sums go to
memory and are added in a fixed order by ``col_finish_triton.py``.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftlite.kernels.col_finish_triton import Magnitudes, finish_columns, finish_factors
from peftlite.kernels.configs import config, fitted
from peftlite.kernels.dropout_triton import kept, load_bits
from peftlite.kernels.group_triton import check_rows, four, pick
from peftlite.kernels.launch_triton import architecture, launch
from peftlite.kernels.numerics_triton import dot, input_precision, rounded


@triton.jit(do_not_specialize=["rows", "rows_per_split"])
def _col_shrink_kernel(
    X0, X1, X2, X3,
    Y0, Y1, Y2, Y3,
    BIAS0, BIAS1, BIAS2, BIAS3,
    GAIN0, GAIN1, GAIN2, GAIN3,
    D0, D1, D2, D3,
    V,
    MASK,
    PARTS,
    SUMS,
    rows,
    rows_per_split,
    columns0, columns1, columns2, columns3,
    widest,
    stride_x0, stride_x1, stride_x2, stride_x3,
    stride_y0, stride_y1, stride_y2, stride_y3,
    stride_v,
    stride_mask,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUM_X: tl.constexpr,
    STORE_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rank_tiles: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R if RANK else 1
    group = tl.program_id(2) // rank_tiles
    rank_tile = tl.program_id(2) % rank_tiles
    split, splits = tl.program_id(1), tl.num_programs(1)
    columns = pick(group, columns0, columns1, columns2, columns3, GROUP)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_columns = column < columns
    leads = in_columns
    if rank_tiles > 1:  # one tile of ranks does what must be done once
        leads = in_columns & (rank_tile == 0)
    X = pick(group, X0, X1, X2, X3, GROUP)
    stride_x = pick(group, stride_x0, stride_x1, stride_x2, stride_x3, GROUP)
    if RANK:
        rank = rank_tile * BLOCK_R + tl.arange(0, BLOCK_R)
        in_rank = rank < RANK
        product = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    # Sums stay matrices until the end: a reduction in every step costs registers, and spills.
    if HAS_Y:
        Y = pick(group, Y0, Y1, Y2, Y3, GROUP)
        stride_y = pick(group, stride_y0, stride_y1, stride_y2, stride_y3, GROUP)
        sum_xy = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        if HAS_BIAS:
            bias = tl.load(pick(group, BIAS0, BIAS1, BIAS2, BIAS3, GROUP) + column, mask=leads, other=0.0).to(tl.float32)
            sum_y = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if SUM_X:
        sum_x = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if STORE_D:
        D = pick(group, D0, D1, D2, D3, GROUP)
        gain = tl.load(pick(group, GAIN0, GAIN1, GAIN2, GAIN3, GROUP) + column, mask=leads, other=0.0)

    first = split.to(tl.int64) * rows_per_split
    for start in tl.range(first, tl.minimum(first + rows_per_split, rows), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        in_rows = row < rows
        x = tl.load(X + row[:, None] * stride_x + column[None, :], mask=in_rows[:, None] & in_columns[None, :], other=0.0)
        if HAS_Y or SUM_X or STORE_D:
            once = in_rows[:, None] & leads[None, :]
            wide = x.to(tl.float32)
            if HAS_Y:
                y = tl.load(Y + row[:, None] * stride_y + column[None, :], mask=once, other=0.0).to(tl.float32)
                if HAS_BIAS:
                    y = tl.where(in_rows[:, None], y - bias[None, :], 0.0)
                    sum_y += tl.abs(y)
                sum_xy += wide * y
            if SUM_X:
                sum_x += wide
            if STORE_D:
                d = rounded(wide * gain[None, :], D0.dtype.element_ty)
                tl.store(D + row[:, None] * columns + column[None, :], d, mask=once)
        if RANK:
            v_here = V + row[:, None] * stride_v + (group * RANK + rank)[None, :]
            v = tl.load(v_here, mask=in_rows[:, None] & in_rank[None, :], other=0.0)
            if HAS_MASK:
                byte = tl.program_id(0) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
                bits = load_bits(MASK, row, byte, stride_mask, rows, tl.cdiv(columns, 8))
                x = tl.where(kept(bits, BLOCK_M, BLOCK_C), x, tl.zeros((BLOCK_M, BLOCK_C), X0.dtype.element_ty))
            elif X0.dtype.element_ty == tl.float32:
                # Through registers: the copy straight to where a transposed operand stands is made of 4-byte pieces.
                x = tl.where(in_columns[None, :], x, 0.0)
            product = dot(tl.trans(x), v, product, PRECISION)

    place = group * splits + split
    if RANK:
        here = PARTS + (place * widest + column)[:, None].to(tl.int64) * RANK + rank[None, :]
        tl.store(here, product, mask=in_columns[:, None] & in_rank[None, :])
    sums = SUMS + place.to(tl.int64) * 3 * widest + column
    if HAS_Y:
        tl.store(sums, tl.sum(sum_xy, axis=0), mask=leads)
        if HAS_BIAS:
            tl.store(sums + 2 * widest, tl.sum(sum_y, axis=0), mask=leads)
    if SUM_X:
        tl.store(sums + widest, tl.sum(sum_x, axis=0), mask=leads)


def col_shrink(
    xs: Sequence[Tensor],
    v: Tensor | None,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    *,
    by_rank: bool = False,
    gains: Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    scaled: Sequence[Tensor] | None = None,
    magnitudes: Magnitudes | None = None,
    biases: Sequence[Tensor] | None = None,
) -> None:
    """Compute ``Q = s g ⊙ f(X)ᵀ V`` for one to four X in one pass over each, and from the same pass what is asked for besides.

    Args:
        xs: group of `(M, C)`, dY or x; C may differ among them.
        v: `(M, group · RP)`, h or u, with the columns of the first X first; RP a multiple of 16. None: no product.
        factors: the gradients Q to write, `(C, r)`, or `(r, C)` with `by_rank`; none without `v`. With a single X several are
            allowed: those of modules that share it, each with its RP columns of `v`.
        scales: s of each of `factors`.
        by_rank: whether the rows of Q belong to ranks (dA) and not to columns of X (dB).
        gains: g of each X, fp32 `(C,)`.
        mask: bits `(M, ceil(C / 8))`: ``f(X) = mask ⊙ X``, for a single X; not with `scaled`, `magnitudes` or `biases`.
        scaled: outputs for ``D = g ⊙ X``, contiguous and like X.
        magnitudes: what the gradients of magnitudes are computed from, and written to.
        biases: outputs `(C,)` for the sums of the columns of X.

    Raises:
        ValueError: if shapes, strides or options do not fit.
    """
    rows, widest = xs[0].shape[0], max(x.shape[1] for x in xs)
    rank = 0 if v is None else v.shape[1] // len(xs)
    _check(xs, v, factors, by_rank, gains, mask, scaled, magnitudes, biases)
    like = xs[0]
    arch = architecture(like.device)
    tile = config("col_shrink", arch=arch, dtype=like.dtype, rank=rank, columns=widest, rows=rows)
    tile = dict(fitted(tile, xs, BLOCK_R=32))
    blocks = triton.cdiv(rows, tile["BLOCK_M"])
    per_split = triton.cdiv(blocks, tile.pop("SPLITS"))
    splits = triton.cdiv(blocks, per_split) if rows else 1
    parts = torch.empty(len(xs), splits, widest, rank, dtype=torch.float32, device=like.device)
    sums = torch.empty(len(xs), splits, 3, widest, dtype=torch.float32, device=like.device)
    ys = xs if magnitudes is None else magnitudes.ys
    offsets = xs if magnitudes is None or magnitudes.biases is None else magnitudes.biases
    launch(
        _col_shrink_kernel,
        (triton.cdiv(widest, tile["BLOCK_C"]), splits, len(xs) * max(1, triton.cdiv(rank, tile["BLOCK_R"]))),
        *four(xs),
        *four(ys),
        *four(offsets),
        *four(gains or xs),
        *four(scaled or xs),
        like if v is None else v,
        like if mask is None else mask,
        parts if rank else sums,
        sums,
        rows,
        per_split * tile["BLOCK_M"],
        *four([x.shape[1] for x in xs]),
        widest,
        *four([x.stride(0) for x in xs]),
        *four([y.stride(0) for y in ys]),
        0 if v is None else v.stride(0),
        0 if mask is None else mask.stride(0),
        GROUP=len(xs),
        RANK=rank,
        HAS_Y=magnitudes is not None,
        HAS_BIAS=magnitudes is not None and magnitudes.biases is not None,
        SUM_X=biases is not None,
        STORE_D=scaled is not None,
        HAS_MASK=mask is not None,
        PRECISION=input_precision(like.dtype, arch),
        **tile,
    )
    if magnitudes is None and biases is None and gains is None:
        finish_factors(parts, factors, scales, by_rank=by_rank, arch=arch)
    else:
        finish_columns(xs, parts, sums, factors, scales, gains, magnitudes, biases, by_rank=by_rank, arch=arch)


def _check(
    xs: Sequence[Tensor],
    v: Tensor | None,
    factors: Sequence[Tensor],
    by_rank: bool,
    gains: Sequence[Tensor] | None,
    mask: Tensor | None,
    scaled: Sequence[Tensor] | None,
    magnitudes: Magnitudes | None,
    biases: Sequence[Tensor] | None,
) -> None:
    rows, group = xs[0].shape[0], len(xs)
    check_rows("col_shrink: x", xs, rows)
    if v is not None:
        check_rows("col_shrink: v", [v], rows)
        shared = len(factors) // group
        columns = [f.shape[1 if by_rank else 0] for f in factors]
        expected = [x.shape[1] for x in xs] * shared
        apart = magnitudes is not None or biases is not None or gains is not None or group > 1
        if columns != expected or not shared or (shared > 1 and apart) or v.shape[1] % len(factors):
            raise ValueError(
                f"col_shrink: factors of shapes {[tuple(f.shape) for f in factors]} (by_rank={by_rank}) "
                f"do not fit {group} x of {[x.shape[1] for x in xs]} columns and v of shape "
                f"{tuple(v.shape)}; give one factor per x, or several for a single x without gains, magnitudes and biases."
            )
    elif factors:
        raise ValueError(f"col_shrink: {len(factors)} factors were asked for without v; give v, or no factors.")
    if mask is not None and (group > 1 or scaled or magnitudes or biases):
        raise ValueError("col_shrink: a dropout mask belongs to the low-rank part of one x; give it no other outputs.")
    if (scaled is not None or magnitudes is not None) and gains is None:
        raise ValueError("col_shrink: D and the gradients of magnitudes are computed with the gains; give gains.")
    for x, d in zip(xs, scaled or (), strict=bool(scaled)):
        if d.shape != x.shape or not d.is_contiguous():
            raise ValueError(f"col_shrink: D must be contiguous and of shape {tuple(x.shape)}, got {tuple(d.shape)}.")
    if magnitudes is not None:
        check_rows("col_shrink: y", magnitudes.ys, rows)
        for tensor in (*magnitudes.weights, *magnitudes.packed_b):
            if not tensor.is_contiguous():
                raise ValueError(f"col_shrink: W and B must be contiguous, got strides {tensor.stride()}; call .contiguous().")
