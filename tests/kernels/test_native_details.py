"""Of the passes in C: single bits, lost digits, threads, and how torch sees them, by every instruction set of this machine."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import EPS, WIDEST, draw, draw_mask
from torch._subclasses.fake_tensor import FakeTensorMode

from peftlite.kernels import native, native_library

pytestmark = pytest.mark.usefixtures("poisoned", "instruction_set", "three_threads")
DTYPES = st.sampled_from(native_library.DTYPES)


def gain_columns(dy, y, gain, bias, magnitude):
    """D, dm and where dm lost its digits, for a y that is read."""
    scaled, dm, lost = torch.empty_like(dy), torch.empty(dy.shape[1]), torch.empty(dy.shape[1], dtype=torch.bool)
    low_rank = (dy, torch.zeros(dy.shape[1], 1), 1.0, None, 0, None, 0, None)
    found = native.output_gradients(*low_rank, y, None, 1.0, bias, magnitude, magnitude / gain, 4.0, scaled, dm, lost)
    assert found == lost.sum()
    return scaled, dm, lost


def test_where_digits_are_lost():
    """A magnitude of zero, a bias that swamps the product, and nothing else."""
    y, dy = torch.ones(5, 4), torch.ones(5, 4)
    bias, magnitude = torch.tensor([0.0, 0.5, 0.99, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    _, dm, lost = gain_columns(dy, y, torch.ones(4), bias, magnitude)
    assert lost.tolist() == [False, False, True, True]
    assert dm.tolist()[:2] == [5.0, 2.5]


def test_many_rows_cost_no_digits():
    """Sums of sums: one sum over 2^16 rows of fp32 would be off by thousands of roundings."""
    rows = 1 << 16
    dy, y = torch.rand(rows, 5), torch.rand(rows, 5)
    dm = gain_columns(dy, y, torch.ones(5), None, torch.ones(5))[1]
    exact = (dy.double() * y.double()).sum(0)
    assert ((dm - exact).abs() <= 64 * EPS * exact).all()


def test_rounding_to_bf16_is_that_of_torch(instruction_set):
    """Ties, numbers that overflow, subnormal ones, infinities and NaN; dot products of bf16 make zeros of subnormal numbers."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    dy = bits.view(torch.bfloat16).view(64, -1)
    for factor in (1.0, 1 / 3, 1.0 + 2.0**-9, 1.5, 2.0**100, 2.0**-126):
        gain = torch.full((dy.shape[1],), factor)
        found = gain_columns(dy, dy, gain, None, gain)[0]  # so that the norm is 1
        product = gain * dy.float()
        if instruction_set == WIDEST:
            product = torch.where(product.abs() < torch.finfo(torch.bfloat16).tiny, 0 * product, product)
        expected = product.to(torch.bfloat16)
        same = (found.view(torch.int16) == expected.view(torch.int16)) | found.isnan() & expected.isnan()
        assert same.all(), factor


def test_not_a_number_stays_one():
    w, a, b = draw(5, 40), draw(3, 40), draw(5, 3)
    w[1, 37] = math.nan
    assert native.row_norm(w, a, b, 1.0).isnan().tolist() == [False, True, False, False, False]


def test_results_do_not_depend_on_the_number_of_threads():
    w, a, b, vector = draw(301, 257), draw(8, 257), draw(301, 8), draw(301)
    mask = draw_mask(257, 257)[0]

    def all_passes():
        results = []
        for dtype in native_library.DTYPES:
            x, dy, y, h = (draw(257, size, dtype=dtype, seed=size) for size in (257, 301, 302, 8))
            y, dx, scaled = y[:, :301].contiguous(), x.clone(), torch.empty_like(dy)
            norm, dm, lost, u = vector.clone(), torch.empty(301), torch.empty(301, dtype=torch.bool), h.clone()
            db, da = torch.empty_like(b), torch.empty_like(a)
            native.adapt_output(y, x, h, 0, mask, a, b, 2.0, True, False, w, vector, vector, norm, 2.0, 2.0)
            gained = (y, None, 1.0, vector, vector, norm, 4.0, scaled, dm, lost)
            native.output_gradients(dy, b, 2.0, h, 0, u, 0, db, *gained)
            native.input_gradients(dx, x, mask, u, [a], da, [], [], [], [])
            results += [y, h, norm, u, db, scaled, dm, dx, da]
        torch.manual_seed(0)
        return [*results, native.row_norm(w, a, b, 2.0), native.draw_bits(torch.empty(1 << 18), 1000)]

    torch.set_num_threads(1)
    alone = all_passes()
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for one, other in zip(alone, all_passes(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("elements", [0, 1, 8, 31, 32, 33, 1000])
def test_bits_are_those_of_splitmix64(elements):
    drops, rounds = 20000, 2**64 - 1
    torch.manual_seed(3)
    mask = native.draw_bits(torch.empty(elements), drops)
    assert mask.shape == (-(-elements // 8),)
    torch.manual_seed(3)
    seed = torch.empty((), dtype=torch.int64).random_(-(2**63), None).item()
    expected = []
    for number in range(-(-elements // 4)):
        z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & rounds
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & rounds
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & rounds
        z ^= z >> 31
        expected += [(z >> (16 * k) & 0xFFFF) >= drops for k in range(4)]
    found = [bool(byte >> bit & 1) for byte in mask.tolist() for bit in range(8)]
    assert found[:elements] == expected[:elements]


@settings(deadline=None)
@given(st.sampled_from([0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 1000]), DTYPES)
def test_masks_are_applied_bit_by_bit(elements, dtype):
    torch.manual_seed(elements)
    bits = native.draw_bits(torch.empty(elements), 30000)
    stays = torch.tensor([byte >> bit & 1 for byte in bits.tolist() for bit in range(8)][:elements], dtype=torch.bool)
    x, y = draw(elements, dtype=dtype), draw(elements + 16, dtype=dtype, seed=1)
    x[::3] = math.inf
    dropped, summed = native.mask(x, bits), y.clone()
    native.add_masked(summed[8:-8], x, bits)
    assert torch.equal(dropped, torch.where(stays, x, 0))
    assert torch.equal(summed[8:-8], torch.where(stays, x + y[8:-8], y[8:-8]))
    assert torch.equal(summed[:8], y[:8])
    assert torch.equal(summed[-8:], y[-8:])


def test_operations_are_registered_soundly():
    w, a, b, vector, y, x, h = draw(7, 5), draw(2, 5), draw(7, 2), draw(7), draw(3, 7), draw(3, 5), draw(3, 2)
    bits, lost = torch.full((3,), 77, dtype=torch.uint8), torch.zeros(7, dtype=torch.bool)
    gained = (y.clone(), y.clone(), 0.5, vector, vector.clone(), vector.clone(), 4.0, y.clone(), vector.clone(), lost)
    checks = ("test_schema", "test_faketensor")
    for operation, arguments in (
        ("row_norm", (w, a, b, 0.5)),
        ("adapt_output", (y, x, h, 0, bits, a, b, 0.5)),
        ("adapt_output", (y, x, h, 0, bits, a, b, 0.5, False, False, w, vector, vector.clone(), vector.clone(), 2.0, 0.5)),
        ("output_gradients", (y, b, 2.0, h, 0, h.clone(), 0, b.clone())),
        ("output_gradients", (y, b, 2.0, h, 0, h.clone(), 0, b.clone(), *gained)),
        ("input_gradients", (x, x.clone(), bits, h, [a], a.clone(), [], [], [], [])),
        ("mask", (y, bits)),
        ("add_masked", (y, y.clone(), bits)),
    ):
        with torch.no_grad():
            torch.library.opcheck(getattr(torch.ops.peftlite_native, operation).default, arguments, test_utils=checks)


def test_what_is_served():
    w = torch.ones(3, 4)
    assert native_library.serves(64, w.T, w.bfloat16(), torch.nn.Parameter(w))
    assert native_library.reads(w, w.bfloat16(), torch.nn.Parameter(w))
    for reason in (w.double(), w.half(), w.to("meta")):
        assert not native_library.serves(8, w, reason)
        assert not native_library.reads(w, reason)
    assert not native_library.serves(65, w)
    for strided in (w.T, w[:, ::2]):
        assert not native_library.reads(w, strided)
        assert not native_library.shrink_pays(strided, 8, w)
    assert native_library.shrink_pays(w, 8, w.T)
    assert not native_library.shrink_pays(w, 0, w)
    with FakeTensorMode() as mode:
        assert native_library.serves(8, mode.from_tensor(w))
