"""T1, shrink along rows: ``H = s f(X) P``, an `(M, C)` matrix times an `(C, r)` one, with f a gain of columns or dropout.

``h = x̃ Aᵀ`` forward; backward ``u = s D B``, or the same from dY with ``f(dY) = g ⊙ dY``, rounded as D is. X is read once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftlite.kernels.configs import config, fitted
from peftlite.kernels.dropout import drop_threshold
from peftlite.kernels.dropout_triton import draw_bits, kept, load_bits
from peftlite.kernels.group_triton import check_rows, four, pick
from peftlite.kernels.launch_triton import architecture, launch
from peftlite.kernels.numerics_triton import dot, input_precision, rounded


@triton.jit(do_not_specialize=["rows", "threshold"])
def _row_shrink_kernel(
    X0, X1, X2, X3,
    P0, P1, P2, P3,
    GAIN0, GAIN1, GAIN2, GAIN3,
    H,
    MASK,
    SEED,
    rows,
    columns0, columns1, columns2, columns3,
    stride_x0, stride_x1, stride_x2, stride_x3,
    stride_p0, stride_p1, stride_p2, stride_p3,
    stride_h,
    stride_mask,
    scale0, scale1, scale2, scale3,
    threshold,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    BY_RANK: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DRAW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    group = tl.program_id(2)
    columns = pick(group, columns0, columns1, columns2, columns3, GROUP)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows, in_rank = row < rows, rank < RANK
    X = pick(group, X0, X1, X2, X3, GROUP)
    P = pick(group, P0, P1, P2, P3, GROUP)
    GAIN = pick(group, GAIN0, GAIN1, GAIN2, GAIN3, GROUP)
    stride_x = pick(group, stride_x0, stride_x1, stride_x2, stride_x3, GROUP)
    stride_p = pick(group, stride_p0, stride_p1, stride_p2, stride_p3, GROUP)
    if DRAW:
        seed = tl.load(SEED)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in tl.range(0, columns, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        in_columns = column < columns
        x = tl.load(X + row[:, None] * stride_x + column[None, :], mask=in_rows[:, None] & in_columns[None, :], other=0.0)
        if BY_RANK:
            p_here = P + rank[None, :].to(tl.int64) * stride_p + column[:, None]
        else:
            p_here = P + column[:, None].to(tl.int64) * stride_p + rank[None, :]
        p = tl.load(p_here, mask=in_columns[:, None] & in_rank[None, :], other=0.0)
        if HAS_GAIN:
            gain = tl.load(GAIN + column, mask=in_columns, other=0.0)
            x = rounded(x.to(tl.float32) * gain[None, :], X0.dtype.element_ty)
        if HAS_MASK or DRAW:
            byte = start // 8 + tl.arange(0, BLOCK_C // 8)
            count = tl.cdiv(columns, 8)
            if DRAW:
                bits = draw_bits(seed, row, byte, threshold)
                mine = in_rows[:, None] & (byte < count)[None, :] & (tl.program_id(1) == 0)
                tl.store(MASK + row[:, None] * stride_mask + byte[None, :], bits.to(tl.uint8), mask=mine)
            else:
                bits = load_bits(MASK, row, byte, stride_mask, rows, count)
            x = tl.where(kept(bits, BLOCK_M, BLOCK_C), x, tl.zeros((BLOCK_M, BLOCK_C), X0.dtype.element_ty))
        h = dot(x, p, h, PRECISION)
    h = pick(group, scale0, scale1, scale2, scale3, GROUP) * h
    here = H + row[:, None] * stride_h + (group * RANK + rank)[None, :]
    tl.store(here, rounded(h, H.dtype.element_ty), mask=in_rows[:, None] & in_rank[None, :])


def row_shrink(
    xs: Sequence[Tensor],
    ps: Sequence[Tensor],
    scales: Sequence[float],
    *,
    by_rank: bool,
    gains: Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``H = s f(X) P`` for one to four pairs (X, P) in one launch, side by side in one matrix.

    Modules that share X concatenate their P instead, which reads X once. An element dropped or kept is the same for every
    rank, and kept ones are not divided by the probability of being kept: that belongs into `scales`.

    Args:
        xs: group of `(M, C)`; C may differ among them.
        ps: group of `(C, RP)`, or of `(RP, C)` with `by_rank`, in the dtype of `xs`; RP a multiple of 16.
        scales: s of each.
        by_rank: whether the rows of P belong to ranks (A) and not to columns of X (B).
        gains: g of each, fp32 `(C,)`: ``f(X) = g ⊙ X`` rounded to the dtype of X.
        mask: bits `(M, ceil(C / 8))`: ``f(X) = mask ⊙ X``; the group must then be of one.
        seed: one int64 on the device: the mask is drawn here, and returned.
        dropout: probability of dropping an element, with `seed`.

    Returns:
        H `(M, group · RP)` in the dtype of X, and the mask that was given or drawn, or None.

    Raises:
        ValueError: if shapes, strides or options do not fit.
    """
    rows, rank = xs[0].shape[0], ps[0].shape[0 if by_rank else 1]
    check_rows("row_shrink: x", xs, rows)
    for x, p in zip(xs, ps, strict=True):
        check_rows("row_shrink: p", [p], rank if by_rank else x.shape[1])
        if p.shape != ((rank, x.shape[1]) if by_rank else (x.shape[1], rank)):
            raise ValueError(
                f"row_shrink: x of shape {tuple(x.shape)} does not fit p of shape {tuple(p.shape)} (by_rank={by_rank})."
            )
    if (mask is not None or seed is not None) and len(xs) > 1:
        raise ValueError(f"row_shrink: a dropout mask belongs to one x, got {len(xs)}; concatenate the factors of shared x.")
    x, widest = xs[0], max(x.shape[1] for x in xs)
    if seed is not None:
        mask = torch.empty(rows, triton.cdiv(x.shape[1], 8), dtype=torch.uint8, device=x.device)
    h = torch.empty(rows, len(xs) * rank, dtype=x.dtype, device=x.device)
    tile = config("row_shrink", arch=(arch := architecture(x.device)), dtype=x.dtype, rank=rank, columns=widest, rows=rows)
    tile = fitted(tile, xs, BLOCK_C=32, BLOCK_R=32)
    launch(
        _row_shrink_kernel,
        (triton.cdiv(rows, tile["BLOCK_M"]), triton.cdiv(rank, tile["BLOCK_R"]), len(xs)),
        *four(xs),
        *four(ps),
        *four(gains or xs),
        h,
        h if mask is None else mask,
        h if seed is None else seed,
        rows,
        *four([x.shape[1] for x in xs]),
        *four([x.stride(0) for x in xs]),
        *four([p.stride(0) for p in ps]),
        h.stride(0),
        0 if mask is None else mask.stride(0),
        *four(scales),
        drop_threshold(dropout),
        GROUP=len(xs),
        RANK=rank,
        BY_RANK=by_rank,
        HAS_GAIN=gains is not None,
        HAS_MASK=mask is not None and seed is None,
        DRAW=seed is not None,
        PRECISION=input_precision(x.dtype, arch),
        **tile,
    )
    return h, mask
