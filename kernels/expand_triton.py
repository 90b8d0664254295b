"""T3, expand in place: ``Y ← φ(Y + s V Pᵀ)``, where φ is a gain and a bias, a bias, or a dropout mask of the low-rank part.

Forward, Y is the base layer's product, V is h and P is B; backward, Y is ``D W``, V is u and P is Aᵀ. Each element of Y is
read once, written once and rounded once.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from peftlite.kernels.configs import config, fitted
from peftlite.kernels.dropout_triton import kept, load_bits
from peftlite.kernels.group_triton import check_rows, four, pick
from peftlite.kernels.launch_triton import architecture, launch
from peftlite.kernels.numerics_triton import dot, input_precision, rounded


@triton.jit(do_not_specialize=["rows"])
def _expand_kernel(
    Y0, Y1, Y2, Y3,
    V,
    P0, P1, P2, P3,
    GAIN0, GAIN1, GAIN2, GAIN3,
    BIAS0, BIAS1, BIAS2, BIAS3,
    MASK,
    rows,
    columns0, columns1, columns2, columns3,
    widest,
    stride_y0, stride_y1, stride_y2, stride_y3,
    stride_v,
    stride_p0, stride_p1, stride_p2, stride_p3,
    stride_mask,
    scale0, scale1, scale2, scale3,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    BY_RANK: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_INSIDE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    group = tl.program_id(1)
    columns = pick(group, columns0, columns1, columns2, columns3, GROUP)
    tiles = tl.cdiv(widest, BLOCK_C)
    tile = tl.program_id(0)
    row = (tile // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tile % tiles) * BLOCK_C
    if first >= columns:  # a narrower member of the group
        return
    column = first + tl.arange(0, BLOCK_C)
    in_rows, in_columns = row < rows, column < columns
    inside = in_rows[:, None] & in_columns[None, :]
    row = row.to(tl.int64)

    Y = pick(group, Y0, Y1, Y2, Y3, GROUP)
    stride_y = pick(group, stride_y0, stride_y1, stride_y2, stride_y3, GROUP)
    here = Y + row[:, None] * stride_y + column[None, :]
    y = tl.load(here, mask=inside, other=0.0)

    P = pick(group, P0, P1, P2, P3, GROUP)
    stride_p = pick(group, stride_p0, stride_p1, stride_p2, stride_p3, GROUP)
    product = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in tl.range(0, RANK, BLOCK_R):
        rank = start + tl.arange(0, BLOCK_R)
        in_rank = rank < RANK
        v_here = V + row[:, None] * stride_v + (group * RANK + rank)[None, :]
        v = tl.load(v_here, mask=in_rows[:, None] & in_rank[None, :], other=0.0)
        if BY_RANK:
            p_here = P + rank[:, None].to(tl.int64) * stride_p + column[None, :]
        else:
            p_here = P + column[None, :].to(tl.int64) * stride_p + rank[:, None]
        p = tl.load(p_here, mask=in_rank[:, None] & in_columns[None, :], other=0.0)
        product = dot(v, p, product, PRECISION)
    if HAS_MASK:
        byte = first // 8 + tl.arange(0, BLOCK_C // 8)
        bits = load_bits(MASK, row, byte, stride_mask, rows, tl.cdiv(columns, 8))
        product = tl.where(kept(bits, BLOCK_M, BLOCK_C), product, 0.0)

    result = y.to(tl.float32) + pick(group, scale0, scale1, scale2, scale3, GROUP) * product
    if HAS_GAIN:
        gain = tl.load(pick(group, GAIN0, GAIN1, GAIN2, GAIN3, GROUP) + column, mask=in_columns, other=0.0)
        result = result * gain[None, :]
    if HAS_BIAS:
        bias = tl.load(pick(group, BIAS0, BIAS1, BIAS2, BIAS3, GROUP) + column, mask=in_columns, other=0.0).to(tl.float32)
        if BIAS_INSIDE:
            bias = (1.0 - gain) * bias
        result = result + bias[None, :]
    tl.store(here, rounded(result, Y0.dtype.element_ty), mask=inside)


def expand_(
    ys: Sequence[Tensor],
    v: Tensor,
    ps: Sequence[Tensor],
    scales: Sequence[float],
    *,
    by_rank: bool,
    gains: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor] | None = None,
    bias_inside: bool = False,
    mask: Tensor | None = None,
) -> None:
    """Compute ``Y ← g ⊙ (Y + s V Pᵀ) + b`` in place, or ``Y ← Y + s mask ⊙ (V Pᵀ)``, for one to four Y in one launch.

    Args:
        ys: group of `(M, C)`, changed in place; C may differ among them.
        v: `(M, RP)`, or `(M, group · RP)` with the columns of the first Y first.
        ps: group of `(C, RP)`, or of `(RP, C)` with `by_rank`; RP a multiple of 16.
        scales: s of each.
        by_rank: whether the rows of P belong to ranks (A) and not to columns of Y (B).
        gains: g of each, fp32 `(C,)`.
        biases: b of each, `(C,)`.
        bias_inside: Y has the bias already, so that ``g ⊙ (Y + s V Pᵀ) + (1 - g) ⊙ b`` is computed: where g is 1
            nothing changes. Needs `gains` and `biases`.
        mask: bits `(M, ceil(C / 8))` as `row_shrink` draws them, one for the whole group.

    Raises:
        ValueError: if shapes or strides do not fit.
    """
    rows, rank = ys[0].shape[0], ps[0].shape[0 if by_rank else 1]
    check_rows("expand_: y", ys, rows)
    check_rows("expand_: v", [v], rows)
    for y, p in zip(ys, ps, strict=True):
        check_rows("expand_: p", [p], rank if by_rank else y.shape[1])
        if p.shape != ((rank, y.shape[1]) if by_rank else (y.shape[1], rank)) or v.shape[1] != len(ys) * rank:
            raise ValueError(
                f"expand_: y of shape {tuple(y.shape)} and v of shape {tuple(v.shape)} for {len(ys)} y do not fit p of shape "
                f"{tuple(p.shape)} (by_rank={by_rank})."
            )
    if bias_inside and (gains is None or biases is None):
        raise ValueError("expand_: bias_inside takes the bias out again where the gain is not 1: give gains and biases.")
    widest = max(y.shape[1] for y in ys)
    tile = config("expand", arch=(arch := architecture(v.device)), dtype=v.dtype, rank=rank, columns=widest, rows=rows)
    tile = fitted(tile, ys, BLOCK_M=64, BLOCK_C=64)
    grid = (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(widest, tile["BLOCK_C"]), len(ys))
    launch(
        _expand_kernel,
        grid,
        *four(ys),
        v,
        *four(ps),
        *four(gains or ys),
        *four(biases or ys),
        ys[0] if mask is None else mask,
        rows,
        *four([y.shape[1] for y in ys]),
        widest,
        *four([y.stride(0) for y in ys]),
        v.stride(0),
        *four([p.stride(0) for p in ps]),
        0 if mask is None else mask.stride(0),
        *four(scales),
        GROUP=len(ys),
        RANK=rank,
        BY_RANK=by_rank,
        HAS_GAIN=gains is not None,
        HAS_BIAS=biases is not None,
        BIAS_INSIDE=bias_inside,
        HAS_MASK=mask is not None,
        PRECISION=input_precision(v.dtype, arch),
        **tile,
    )
