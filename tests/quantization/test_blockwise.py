"""Codes and blocks: the published levels, errors and bits, and storage equal to that of bitsandbytes."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from peftlite.quantization.blockwise import CHUNK, Format, Parts, dequantize, dequantize_at, part_shapes, quantize
from peftlite.quantization.levels import levels

FORMATS = [Format(code, 64, scale_code) for code in ("nf4", "int8") for scale_code in (None, "dynamic", "fp8_e4m3")]
PLAIN, DOUBLE, FP8 = FORMATS[:3]
RECORDED = (  # by bitsandbytes 0.50.2, see the last test
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d"
    "18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18f2"
)
every_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.code}-{form.scale_code}")


def dense(parts: Parts, form: Format, like: Tensor) -> Tensor:
    return dequantize(parts, form, 0, like.numel(), torch.float32).view(like.shape)


def round_trip(w: Tensor, form: Format) -> Tensor:
    return dense(quantize(w, form), form, w)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(form: Format) -> float:
    w = normal(1024, 1024)
    return ((round_trip(w, form) - w).norm() / w.norm()).item()


def test_the_levels_are_the_published_construction() -> None:
    """Invariant §7: the codebook is the published list and its construction."""
    offset = 0.9677083
    up = norm.ppf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    down = -norm.ppf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    built = torch.tensor(sorted([*up, *down, 0.0]))
    assert (levels("nf4") - built / built.max()).abs().max() < 1e-6
    assert levels("nf4").tolist()[:3] == torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367]).tolist()


@pytest.mark.parametrize(("code", "count"), [("nf4", 16), ("int8", 255), ("dynamic", 256), ("fp8_e4m3", 253)])
def test_every_table_ascends_from_about_minus_one_to_one_through_zero(code: str, count: int) -> None:
    table = levels(code)
    assert table.shape == (count,)
    assert (table.diff() > 0).all()
    assert table[-1] == 1
    assert 0 in table
    assert -1 <= table[0] < -0.99
    assert table.dtype == torch.float32


def test_eight_bit_floats_are_those_of_torch() -> None:
    x = normal(1000).clamp(-1, 1)
    nearest = levels("fp8_e4m3")[(levels("fp8_e4m3")[:, None] - x).abs().argmin(0)]
    assert torch.allclose(nearest * 448, (x * 448).to(torch.float8_e4m3fn).float(), rtol=0, atol=0)


@every_format
def test_levels_times_a_scale_come_back_exactly(form: Format) -> None:
    """Invariant §7: a level times a scale is quantised without error."""
    table = levels(form.code)
    index = torch.randint(len(table), (40, 64), generator=torch.Generator().manual_seed(0))
    index[:, 0] = len(table) - 1  # each block reaches its scale
    w = table[index] * normal(40, 1).abs()
    again = round_trip(w, Format(form.code, 64, None))
    assert torch.equal(again, w)
    once = round_trip(normal(77, 13), form)
    codes, *_ = quantize(once, form)
    assert torch.equal(codes, quantize(normal(77, 13), form)[0])  # the indices stay; scales may round again


@given(rows=st.integers(0, 9), columns=st.integers(1, 150), seed=st.integers(0, 99), power=st.integers(-30, 30))
def test_the_error_is_at_most_half_the_widest_gap(rows: int, columns: int, seed: int, power: int) -> None:
    """Invariant §7: the error of a number is at most 0.152 of its block's scale."""
    w = normal(rows, columns, seed=seed) * 2.0**power
    back = round_trip(w, PLAIN)
    assert back.shape == w.shape
    scales = quantize(w, PLAIN)[1].repeat_interleave(64)[: w.numel()].view(w.shape)
    gap = levels("nf4").diff().max().item() / 2
    assert gap == pytest.approx(0.152, abs=1e-3)
    rounding = 4 * torch.finfo(torch.float32).eps
    assert ((back - w).abs() <= scales * (gap + rounding)).all()
    nearest = (levels("nf4") * scales[..., None] - w[..., None]).abs().amin(-1)
    assert ((back - w).abs() <= nearest + scales * rounding).all()


def test_relative_error_of_normal_weights() -> None:
    """Invariant §7: relative error of N(0, 1) in blocks of 64 is 0.092 ± 0.002, int4's 0.108."""
    assert relative_error(PLAIN) == pytest.approx(0.092, abs=0.002)
    w = normal(1024, 1024)
    blocks = w.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    symmetric = (blocks / scale * 7).round() / 7 * scale  # 15 levels k / 7
    assert ((symmetric - blocks).norm() / w.norm()).item() == pytest.approx(0.108, abs=0.002)
    assert relative_error(Format("int8", 64, None)) < 0.007


@pytest.mark.parametrize("form", [DOUBLE, FP8], ids=["dynamic", "fp8"])
def test_double_quantisation_hardly_adds_to_the_error(form: Format) -> None:
    """Invariant §7: double quantisation changes that error by less than 1 %."""
    assert relative_error(form) == pytest.approx(relative_error(PLAIN), rel=0.01)
    w = normal(1024, 1024)
    exact = quantize(w, PLAIN)[1]
    codes, scales, offset = quantize(w, form)[1:]
    stored = levels(form.scale_code)[codes.int()] * scales.repeat_interleave(256) + offset
    assert ((stored - exact).norm() / exact.norm()).item() < 0.005


def test_bits_per_number() -> None:
    """Invariant §7: 4.127 bits per parameter with double quantisation.
    Invariant §21: NF4 without and with double quantisation: 4.5 and 4.127 bits per parameter.
    """
    assert (PLAIN.bits, DOUBLE.bits, Format("int8", 64, None).bits) == (4.5, 4.126953125, 8.5)
    w = normal(256, 512)
    for form in FORMATS:
        held = sum(part.nbytes for part in quantize(w, form))
        offset = 0 if form.scale_code is None else 4
        assert 8 * (held - offset) == form.bits * w.numel()


@every_format
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (1, 64), (3, 5), (7, 31), (67, 13), (1, 65), (64, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_odd_sizes(form: Format, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Invariant §7: shapes come back for odd sizes and short last blocks."""
    w = normal(*shape).to(dtype)
    parts = quantize(w.t().contiguous().t(), form)  # flattened row by row all the same
    assert [tuple(p.shape) for p in parts] == list(part_shapes(w.numel(), form))
    whole = dense(parts, form, w)
    assert torch.equal(whole, round_trip(w.float(), form))
    assert torch.isfinite(whole).all()
    flat = whole.flatten()
    for start, stop in [(0, 0), (0, 1), (min(1, flat.numel()), min(3, flat.numel())), (flat.numel() // 3, flat.numel())]:
        if stop <= flat.numel():
            assert torch.equal(dequantize(parts, form, start, stop, torch.float32), flat[start:stop])
    if flat.numel():
        places = torch.randint(flat.numel(), (4, 9), generator=torch.Generator().manual_seed(1))
        assert torch.equal(dequantize_at(parts, form, places, torch.float32), flat[places])
    assert torch.equal(dequantize(parts, form, 0, flat.numel(), torch.bfloat16), flat.bfloat16())


@every_format
def test_more_than_one_chunk(form: Format) -> None:
    w = normal(CHUNK + 1000)
    parts = quantize(w, form)
    whole = dense(parts, form, w)
    for start, stop in [(CHUNK - 5, CHUNK + 5), (17, w.numel())]:
        assert torch.equal(dequantize(parts, form, start, stop, torch.float32), whole[start:stop])
    if form.scale_code is None:  # blocks know nothing of one another
        assert torch.equal(whole[CHUNK:], round_trip(w[CHUNK:], form))


@every_format
def test_zeros_stay_zeros(form: Format) -> None:
    """Invariant §7: a block of zeros stays zero."""
    assert torch.equal(round_trip(torch.zeros(3, 100), form), torch.zeros(3, 100))
    w = normal(2, 64)
    w[0] = 0
    assert torch.equal(round_trip(w, form)[0], torch.zeros(64))


def test_the_first_of_two_numbers_lies_in_the_high_half() -> None:
    w = (levels("nf4") * 3.0).repeat(4)  # one block: the indices 0 to 15, four times
    codes, scales = quantize(w, PLAIN)
    assert bytes(codes.tolist()).hex() == "0123456789abcdef" * 4
    assert scales.tolist() == [3.0]
    assert bytes(quantize(w[:3], PLAIN)[0].tolist()).hex() == "0127"  # c = |−3|; an odd end holds the index of 0


def test_half_way_it_is_the_lower_level() -> None:
    table = levels("int8")
    middle = (table[130] + table[131]) / 2
    codes, _ = quantize(torch.tensor([1.0, middle.item()]), Format("int8", 64, None))
    assert codes.tolist() == [254, 130]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"code": "nf3"}, "code must be 'nf4' or 'int8', got 'nf3'"),
        ({"scale_code": "fp8"}, "scale_code must be 'dynamic', 'fp8_e4m3' or None .scales in fp32., got 'fp8'"),
        ({"block": 63}, "block must be an even number of elements, at least 2, got 63"),
        ({"block": 0}, "block must be an even number"),
        ({"scale_block": 1.5}, "scale_block must be an even number of elements, at least 2, got 1.5"),
    ],
)
def test_formats_that_there_are_not(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Format(**options)


@pytest.mark.parametrize("block", [32, 128, 6])
def test_other_block_sizes(block: int) -> None:
    form = Format("nf4", block, "dynamic", 10)
    w = normal(31, 29)
    assert ((round_trip(w, form) - w).norm() / w.norm()).item() < 0.12
    assert math.isclose(form.bits, 4 + (8 + 3.2) / block)


def test_storage_is_that_of_bitsandbytes() -> None:
    """Invariant §7: indices are those of bitsandbytes."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        functional = pytest.importorskip("bitsandbytes.functional")
        assert torch.equal(functional.create_dynamic_map(), levels("dynamic"))
        for shape in [(128, 768), (7, 31), (1, 1), (64, 65)]:
            w = normal(*shape)
            theirs, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
            codes, scales = quantize(w, PLAIN)
            assert torch.equal(theirs.flatten(), codes)
            assert torch.equal(state.absmax, scales)
            assert torch.equal(functional.dequantize_4bit(theirs, state), round_trip(w, PLAIN))
            _, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
            _, scale_codes, scale_scales, offset = quantize(w, DOUBLE)
            assert torch.equal(state.state2.absmax, scale_scales)
            assert torch.equal(state.offset, offset)
            assert torch.equal(state.state2.code, levels("dynamic"))
            # Their CPU kernel rounds to the second nearest level once in a few hundred; ours is never the farther one.
            second = scale_scales.repeat_interleave(256)[: scales.numel()].double()
            ours, other = (
                (levels("dynamic")[c.flatten().int()] * second - (scales - offset)).abs() for c in (scale_codes, state.absmax)
            )
            assert (ours <= other + 1e-7 * second).all()
            assert (ours != other).sum() <= 0.02 * scales.numel()


def test_storage_recorded_from_bitsandbytes() -> None:
    """Invariant §7: indices are those of bitsandbytes.

    What bitsandbytes 0.50.2 made of the same numbers on a CPU.
    """
    w = ((torch.arange(130) * 37) % 101 - 50) / 64
    codes, scales = quantize(w, PLAIN)
    assert bytes(codes.tolist()).hex() == RECORDED
    assert scales.tolist() == [0.78125, 0.78125, 0.625]
