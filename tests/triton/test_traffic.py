"""Bytes that the kernels move in the interpreter equal the formulas of their docstrings, to the byte."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.traffic import StrayAccessError, Transfer, traffic
from peftlite.kernels.col_finish_triton import Magnitudes
from peftlite.kernels.col_shrink_triton import col_shrink
from peftlite.kernels.configs import config
from peftlite.kernels.expand_triton import expand_
from peftlite.kernels.row_norm_triton import row_norm_gain
from peftlite.kernels.row_shrink_triton import row_shrink

# Sizes off the tiles' borders, whose products with one another are all different.
ROWS, IN, OUT, RANK = 75, 100, 136, 16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])


def tile(kernel: str, dtype: torch.dtype, columns: int, rank: int = RANK) -> dict[str, int]:
    return config(kernel, arch="interpreter", dtype=dtype, rank=rank, columns=columns, rows=ROWS)


def one(transfers: list[Transfer], kernel: str) -> Transfer:
    (found,) = [transfer for transfer in transfers if transfer.call == kernel]
    return found


@triton.jit
def _copy_kernel(SOURCE, TARGET, count, BLOCK: tl.constexpr, REACH: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(SOURCE)
    value = tl.load(SOURCE + place, mask=place < count + REACH, other=0.0)
    tl.store(TARGET + place, value + 0 * first, mask=place < count)


def test_the_meter_counts_lanes_by_tensor():
    source, target = torch.randn(30), torch.empty(30)
    (transfer,) = traffic(lambda: _copy_kernel[(2,)](source, target, 30, BLOCK=16, REACH=0))
    assert transfer.call == "_copy_kernel"
    read, written = transfer.named("SOURCE"), transfer.named("TARGET")
    assert (read.read, read.written, read.revisits, read.covered) == (4 * (30 + 2), 0, 3, 1.0)
    assert (written.read, written.written, written.covered) == (0, 4 * 30, 0.0)


def test_the_meter_sees_strided_tensors_for_what_they_are():
    buffer = torch.randn(40)
    with pytest.raises(Exception, match="_copy_kernel loads from 8 addresses outside of its tensors SOURCE, TARGET"):
        traffic(lambda: _copy_kernel[(2,)](buffer[:20:2], torch.empty(20), 20, BLOCK=16, REACH=0))


def test_the_meter_refuses_what_lies_past_the_end():
    assert issubclass(StrayAccessError, AssertionError)
    source, target = torch.randn(40)[:20], torch.empty(20)
    with pytest.raises(Exception, match=r"_copy_kernel loads from 4 addresses outside of its tensors.*correct its mask"):
        traffic(lambda: _copy_kernel[(2,)](source, target, 20, BLOCK=16, REACH=4))
    assert not traffic(lambda: torch.empty(3)), "afterwards the interpreter is as it was"


def make(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


@DTYPES
def test_row_norm_reads_w_once(dtype):
    w, a, b = make(OUT, IN, dtype=dtype), make(RANK, IN, dtype=dtype), make(OUT, RANK, dtype=dtype)
    t0 = one(traffic(lambda: row_norm_gain(w, a, b, torch.rand(OUT), 1.0)), "_row_norm_kernel")
    weight = t0.named("weight")
    assert (weight.read, weight.revisits, weight.covered) == (w.nbytes, 1, 1.0)
    assert t0.named("parts").written == 4 * config(
        "row_norm", arch="interpreter", dtype=dtype, rank=RANK, columns=IN, rows=OUT
    )["SPLIT"] * OUT


@DTYPES
@pytest.mark.parametrize("masked", [False, True])
def test_row_shrink_reads_x_once(dtype, masked):
    x, a = make(ROWS, IN, dtype=dtype), make(RANK, IN, dtype=dtype)
    mask = torch.full((ROWS, triton.cdiv(IN, 8)), 255, dtype=torch.uint8) if masked else None
    t1 = one(traffic(lambda: row_shrink([x], [a], [1.0], by_rank=True, mask=mask)), "_row_shrink_kernel")
    row_tiles = triton.cdiv(ROWS, tile("row_shrink", dtype, IN)["BLOCK_M"])
    assert (t1.named("X0").read, t1.named("X0").revisits, t1.named("X0").covered) == (x.nbytes, 1, 1.0)
    assert t1.named("P0").read == row_tiles * a.nbytes
    assert t1.named("H").written == ROWS * RANK * x.element_size()
    if masked:
        assert t1.named("MASK").read == mask.nbytes
    assert sum(access.read + access.written for access in t1.accesses) == (
        x.nbytes + row_tiles * a.nbytes + ROWS * RANK * x.element_size() + (mask.nbytes if masked else 0)
    )


@DTYPES
def test_expand_reads_and_writes_y_once(dtype):
    y, h, b = make(ROWS, OUT, dtype=dtype), make(ROWS, RANK, dtype=dtype), make(OUT, RANK, dtype=dtype)
    gain, bias = torch.rand(OUT), make(OUT, dtype=dtype)
    transfers = traffic(lambda: expand_([y], h, [b], [2.0], by_rank=False, gains=[gain], biases=[bias]))
    t3 = one(transfers, "_expand_kernel")
    use = tile("expand", dtype, OUT)
    row_tiles, column_tiles = triton.cdiv(ROWS, use["BLOCK_M"]), triton.cdiv(OUT, use["BLOCK_C"])
    assert (t3.named("Y0").read, t3.named("Y0").written, t3.named("Y0").revisits) == (y.nbytes, y.nbytes, 1)
    assert (t3.named("V").read, t3.named("P0").read) == (column_tiles * h.nbytes, row_tiles * b.nbytes)
    assert (t3.named("GAIN0").read, t3.named("BIAS0").read) == (row_tiles * gain.nbytes, row_tiles * bias.nbytes)
    assert sum(access.read + access.written for access in t3.accesses) == (
        2 * y.nbytes + column_tiles * h.nbytes + row_tiles * (b.nbytes + gain.nbytes + bias.nbytes)
    )


@DTYPES
def test_column_shrink_of_dora_makes_three_passes(dtype):
    """dY and Y are read once and D is written once; nothing else is of their size."""
    dy, y, d = make(ROWS, OUT, dtype=dtype), make(ROWS, OUT, dtype=dtype), torch.empty(ROWS, OUT, dtype=dtype)
    x, h = make(ROWS, IN, dtype=dtype), make(ROWS, RANK, dtype=dtype)
    w, b, bias = make(OUT, IN, dtype=dtype), make(OUT, RANK, dtype=dtype), torch.zeros(OUT).to(dtype)
    gain, norm, db, dm = torch.rand(OUT) + 0.5, torch.rand(OUT) + 0.5, torch.empty(OUT), torch.empty(OUT)
    magnitudes = Magnitudes(
        ys=[y], biases=[bias], norms=[norm], grads=[dm], x=x, h=h, weights=[w], packed_b=[b], scales=[1.0]
    )
    factor = torch.empty(OUT, RANK)
    options = {"gains": [gain], "scaled": [d], "magnitudes": magnitudes, "biases": [db]}
    transfers = traffic(lambda: col_shrink([dy], h, [factor], [1.0], **options))
    t2, finish = one(transfers, "_col_shrink_kernel"), one(transfers, "_finish_columns_kernel")
    use = tile("col_shrink", dtype, OUT)
    column_tiles, blocks = triton.cdiv(OUT, use["BLOCK_C"]), triton.cdiv(ROWS, use["BLOCK_M"])
    splits = triton.cdiv(blocks, triton.cdiv(blocks, use["SPLITS"]))
    for name in ("X0", "Y0"):
        assert (t2.named(name).read, t2.named(name).revisits, t2.named(name).covered) == (dy.nbytes, 1, 1.0)
    assert t2.named("D0").written == d.nbytes
    partial_products, partial_sums = 4 * splits * OUT * RANK, 4 * splits * 3 * OUT
    assert t2.named("V").read == column_tiles * h.nbytes
    assert (t2.named("PARTS").written, t2.named("SUMS").written) == (partial_products, partial_sums)
    assert (t2.named("BIAS0").read, t2.named("GAIN0").read) == (splits * bias.nbytes, splits * gain.nbytes)
    moved = sum(access.read + access.written for access in t2.accesses)
    assert moved == (
        3 * dy.nbytes + column_tiles * h.nbytes + partial_products + partial_sums + splits * (bias.nbytes + gain.nbytes)
    )
    assert (finish.named("PARTS").read, finish.named("PARTS").revisits) == (partial_products, 1)
    assert finish.named("OUT0").written == factor.nbytes
    lost = [finish.named(name).read for name in ("X", "W0", "H", "DY0")]
    assert lost == [0, 0, 0, 0], "no column of this test has lost its digits"


@DTYPES
def test_column_shrink_of_lora_makes_one_pass(dtype):
    dy, h, factor = make(ROWS, OUT, dtype=dtype), make(ROWS, RANK, dtype=dtype), torch.empty(OUT, RANK)
    t2 = one(traffic(lambda: col_shrink([dy], h, [factor], [1.0])), "_col_shrink_kernel")
    assert (t2.named("X0").read, t2.named("X0").revisits, t2.named("X0").covered) == (dy.nbytes, 1, 1.0)
    assert not [access for access in t2.accesses if access.numel == dy.numel() and access.written]
