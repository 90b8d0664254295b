"""The passes in C against fp64, by every instruction set that this machine has."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from peftlite.kernels import native

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(native.library() is None, reason="built without the native passes: no C compiler when it was installed"),
]
EPS = torch.finfo(torch.float32).eps
SIZES = st.sampled_from([1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 47, 64, 70, 97])
DTYPES = st.sampled_from(native.DTYPES)
SCALES = st.sampled_from([0.7, -2.0, 1.0])


@pytest.fixture(params=[0, 1, 2], ids=["plain", "avx2", "avx512"], autouse=True)
def instruction_set(request):
    """Every set in turn, as far as the machine has it."""
    choose = native.library().peftlite_instruction_set
    if choose(request.param) != request.param:
        choose(2)
        pytest.skip(f"this processor lacks instruction set {request.param}")
    yield request.param
    choose(2)


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Small matrices are shared out among threads as well: among more than the machine has."""
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def assert_close(actual, oracle, terms, rounded=torch.float32, *, steps=4):
    """Within so many roundings of the `terms` in fp32, and one of the result to its dtype."""
    assert torch.isfinite(actual).all()
    allowed = steps * EPS * terms + torch.finfo(rounded).eps / 2 * oracle.abs() * (rounded != torch.float32)
    assert ((actual.double() - oracle).abs() <= allowed).all()


@settings(deadline=None)
@given(SIZES, SIZES, st.sampled_from([1, 3, 8, 64]), DTYPES, SCALES)
def test_row_norm_and_gained_weight(out, inner, rank, dtype, scale):
    w, a, b, gain = draw(out, inner, dtype=dtype), draw(rank, inner), draw(out, rank, seed=1), draw(out, seed=2)
    whole = w.double() + scale * b.double() @ a.double()
    terms = w.double().abs() + abs(scale) * b.double().abs() @ a.double().abs()
    with torch.no_grad():
        norm, formed = native.row_norm(w, a, b, scale), native.gained_weight(w, a, b, scale, gain)
    assert_close(norm, whole.norm(dim=1), terms.norm(dim=1))
    assert_close(formed, gain.double()[:, None] * whole, gain.double().abs()[:, None] * terms)


@settings(deadline=None)
@given(SIZES, SIZES, st.sampled_from([1, 3, 8, 64]), DTYPES, st.booleans(), SCALES)
def test_expand_columns(rows, out, rank, dtype, bias, scale):
    """In place, between canaries, from some columns of a wider h."""
    memory = draw(rows * out + 32, dtype=dtype)
    y = memory[16:-16].view(rows, out)
    before, kept = memory.clone(), y.double()
    h = draw(rows, rank + 5, dtype=dtype, seed=1)[:, 2 : 2 + rank]
    lora_b, gain, b = draw(out, rank, seed=2), draw(out, seed=3), draw(out, seed=4) if bias else None
    assert native.expand_columns(y, h, lora_b, scale, gain, b, 1.5) == bool((gain.abs() > 1.5).any())
    g, shift = gain.double(), torch.zeros(out).double() if b is None else b.double()
    low = h.double() @ lora_b.double().T
    terms = g.abs() * (kept.abs() + abs(scale) * h.double().abs() @ lora_b.double().abs().T) + (1 + g.abs()) * shift.abs()
    assert_close(y, g * (kept + scale * low) + (1 - g) * shift, terms, dtype)
    assert torch.equal(memory[:16], before[:16])
    assert torch.equal(memory[-16:], before[-16:])


@settings(deadline=None)
@given(
    st.sampled_from([1, 3, 4, 5, 63, 64, 65, 131]),
    SIZES,
    DTYPES,
    st.booleans(),
    st.sampled_from([None, 1.0, 0.75]),
    st.booleans(),
    st.sampled_from([0, 1, 3, 8, 64]),
)
def test_gain_columns(rows, out, dtype, bias, keep, scaled, rank):
    dy, gain, magnitude = draw(rows, out, dtype=dtype), draw(out, seed=3), 1 + draw(out, seed=4).abs()
    b = draw(out, seed=5) if bias else None
    shift = torch.zeros(out).double() if b is None else b.double()
    y = draw(rows, out, dtype=dtype, seed=6)
    h = draw(rows, rank + 3, dtype=dtype, seed=9)[:, 1 : 1 + rank] if rank else None
    if keep is None:
        output, sizes, limit = y.double(), shift.abs() * rows, 4.0
        found = native.gain_columns(dy, y, None, 1.0, gain, b, magnitude, limit, scaled, h, 0.5)
        residual = torch.zeros(rows, out)
    else:
        residual = draw(rows, out, dtype=dtype, seed=7)
        residual = torch.where(draw(rows, out, seed=8) < -0.5, y, residual)  # dropped there
        dy[residual == y] = 0
        output, limit = keep * (y.double() - residual.double()), 8.0
        sizes = (output.abs() + y.double().abs()).sum(0)
        found = native.gain_columns(dy, y, residual, keep, gain, b, magnitude, limit, scaled, h, 0.5)
    inner_grad, dm, lost, any_lost, db = found
    inner = output - shift
    terms = dy.double().abs() * (y.double().abs() + residual.double().abs() + shift.abs())
    assert_close(dm, (dy.double() * inner).sum(0) / magnitude.double(), terms.sum(0) / magnitude.double(), steps=8)
    if h is None:
        assert db.numel() == 0
    else:
        product = 0.5 * (gain.double() * dy.double()).T @ h.double()
        terms = 0.5 * (gain.double() * dy.double()).abs().T @ h.double().abs()
        assert_close(db, product, terms, steps=8)
    if scaled:
        assert torch.equal(inner_grad, (gain * dy.float()).to(dtype))
    else:
        assert inner_grad.numel() == 0
    counted = inner.abs() if keep is None else inner.abs() * (output != 0)
    share = sizes / counted.sum(0)
    near = (share / limit - 1).abs() < 1e-4  # fp32 may say either there
    assert ((lost == (~(share <= limit) & ((sizes > 0) | share.isnan() & (keep is not None)))) | near).all()
    assert any_lost == bool(lost.any())


@settings(deadline=None)
@given(st.sampled_from([0, 1, 3, 4, 5, 63, 64, 65, 131]), SIZES, st.sampled_from([1, 3, 8, 64]), DTYPES, st.booleans(), SCALES)
def test_col_shrink(rows, out, rank, dtype, transposed, scale):
    dy, h = draw(rows, out, dtype=dtype), draw(rows, rank + 2, dtype=dtype, seed=1)[:, 1 : 1 + rank]
    found = native.col_shrink(dy, h, scale, transposed)
    assert found.is_contiguous()
    oracle, terms = (abs_(dy.double()).T @ abs_(h.double()) for abs_ in (torch.clone, torch.abs))
    found = found.T if transposed else found
    assert_close(found, scale * oracle, abs(scale) * terms, steps=8)


def test_where_digits_are_lost():
    """A magnitude of zero, a bias that swamps the product, and nothing else."""
    y, dy = torch.ones(5, 4), torch.ones(5, 4)
    bias = torch.tensor([0.0, 0.5, 0.99, 0.0])
    found = native.gain_columns(dy, y, None, 1.0, torch.ones(4), bias, torch.tensor([1.0, 1.0, 1.0, 0.0]), 4.0, True, None, 1.0)
    assert found[2].tolist() == [False, False, True, True]
    assert found[3] is True
    assert found[1].tolist()[:2] == [5.0, 2.5]


def test_many_rows_cost_no_digits():
    """Sums of sums: one sum over 2^16 rows of fp32 would be off by thousands of roundings."""
    rows = 1 << 16
    dy, y = torch.rand(rows, 5), torch.rand(rows, 5)
    dm = native.gain_columns(dy, y, None, 1.0, torch.ones(5), None, torch.ones(5), 4.0, False, None, 1.0)[1]
    exact = (dy.double() * y.double()).sum(0)
    assert ((dm - exact).abs() <= 64 * EPS * exact).all()


def test_rounding_to_bf16_is_that_of_torch():
    """Ties, numbers that overflow, subnormal ones, infinities and NaN."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    dy = bits.view(torch.bfloat16).view(64, -1)
    for factor in (1.0, 1 / 3, 1.0 + 2.0**-9, 1.5, 2.0**100, 2.0**-130):
        gain = torch.full((dy.shape[1],), factor)
        found = native.gain_columns(dy, dy, None, 1.0, gain, None, torch.ones_like(gain), 4.0, True, None, 1.0)[0]
        expected = (gain * dy.float()).to(torch.bfloat16)
        same = (found.view(torch.int16) == expected.view(torch.int16)) | found.isnan() & expected.isnan()
        assert same.all(), factor


def test_not_a_number_stays_one():
    w, a, b = draw(5, 40), draw(3, 40), draw(5, 3)
    w[1, 37] = math.nan
    assert native.row_norm(w, a, b, 1.0).isnan().tolist() == [False, True, False, False, False]


def test_results_do_not_depend_on_the_number_of_threads():
    w, a, b, gain = draw(301, 257), draw(8, 257), draw(301, 8), draw(301)
    dy, y, h = draw(257, 301), draw(257, 301), draw(257, 8)

    def all_passes():
        out = y.clone()
        native.expand_columns(out, h, b, 2.0, gain, gain, 2.0)
        columns = native.gain_columns(dy, y, None, 1.0, gain, gain, gain, 4.0, True, h, 2.0)
        torch.manual_seed(0)
        mask = native.draw_bits(torch.empty(1 << 18), 1000)
        return [native.row_norm(w, a, b, 2.0), native.gained_weight(w, a, b, 2.0, gain), out, *columns[:3], columns[4], mask]

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
    w, a, b, gain, y, h = draw(7, 5), draw(2, 5), draw(7, 2), draw(7), draw(3, 7), draw(3, 2)
    checks = ("test_schema", "test_faketensor")
    for operation, arguments in (
        (native.row_norm, (w, a, b, 0.5)),
        (native.gained_weight, (w, a, b, 0.5, gain)),
        (native.expand_columns, (y, h, b, 0.5, gain, None, 2.0)),
        (native.gain_columns, (y, y.clone(), None, 1.0, gain, gain, gain, 4.0, True, h, 2.0)),
        (native.col_shrink, (y, h, 0.5, True)),
        (native.mask, (y, torch.full((3,), 77, dtype=torch.uint8))),
        (native.add_masked, (y, y.clone(), torch.full((3,), 77, dtype=torch.uint8))),
    ):
        with torch.no_grad():
            torch.library.opcheck(operation, arguments, test_utils=checks)


def test_what_is_served():
    w = torch.ones(3, 4)
    assert native.serves(64, w, w.bfloat16(), torch.nn.Parameter(w))
    for reason in (w.T, w.double(), w.half(), w.to("meta"), w[:, ::2]):
        assert not native.serves(8, w, reason)
    assert not native.serves(65, w)
    with FakeTensorMode() as mode:
        assert native.serves(8, mode.from_tensor(w))
