"""T0 against fp64: norm and gain, for all dtypes and ranks, alone and in groups."""

import pytest
import torch
from guarded import Guards, assert_summed

from peftlite.kernels import row_norm_triton
from peftlite.kernels.launch_triton import observing
from peftlite.kernels.pack_triton import pack_adapters
from peftlite.kernels.row_norm_triton import EPS, row_norm_gain, row_norm_gain_grouped
from peftlite.kernels.table_triton import Module, tables

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 8, 1), (7, 72, 3), (33, 100, 8), (75, 257, 12), (8, 257, 16), (129, 100, 17), (33, 72, 64), (20, 24, 100)]


@pytest.fixture
def guards(monkeypatch):
    """What the launch function allocates has margins, and holds NaN."""
    guards = Guards()

    class Guarded:
        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def empty(*shape, dtype, device):
            return guards.empty(*shape, dtype=dtype)

    monkeypatch.setattr(row_norm_triton, "torch", Guarded())
    yield guards
    guards.check()


def inputs(guards, rows, columns, rank, stored, dtype, misaligned=False):
    weight = guards.copy((torch.randn(rows, columns) / columns**0.5).to(stored), misaligned)
    factors = torch.randn(rank, columns) / columns**0.5, torch.randn(rows, rank) / rank**0.5
    return (weight, *(guards.copy(t) for t in pack_adapters(*factors, dtype)), guards.copy(1 + 0.3 * torch.randn(rows)))


def check(out, weight, a, b, magnitude, scale):
    exact = torch.linalg.vector_norm(weight.double() + scale * b.double() @ a.double(), dim=1)
    # W + s B A is itself a sum of rank + 1 terms, whose rounding each square inherits.
    terms = weight.shape[1] + 2 * a.shape[0]
    assert_summed("n", out[1], exact, terms)
    assert_summed("g", out[0], magnitude.double() / exact, terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_norm_and_gain(guards, rows, columns, rank, stored, dtype):
    tensors = inputs(guards, rows, columns, rank, stored, dtype, misaligned=rank == 12)
    check(row_norm_gain(*tensors, 0.7), *tensors, 0.7)


def test_ranks_beyond_one_block(guards):
    tensors = inputs(guards, 20, 40, 384, torch.bfloat16, torch.bfloat16)
    check(row_norm_gain(*tensors, 0.25), *tensors, 0.25)


def test_rows_apart_in_memory(guards):
    weight, *rest = inputs(guards, 20, 40, 8, torch.float32, torch.float32)
    apart = torch.full((20, 50), torch.nan)[:, 5:45].copy_(weight)
    assert torch.equal(row_norm_gain(apart, *rest, 1.0), row_norm_gain(weight, *rest, 1.0))


def test_without_a_magnitude_only_the_norm_is_written(guards):
    weight, a, b, magnitude = inputs(guards, 33, 72, 8, torch.float32, torch.float32)
    out = row_norm_gain(weight, a, b, None, 1.0)
    assert torch.equal(out[1], row_norm_gain(weight, a, b, magnitude, 1.0)[1])
    assert out[0].isnan().all()


def test_a_magnitude_born_as_the_norm_gives_a_gain_of_exactly_one(guards):
    weight, a, b, _ = inputs(guards, 33, 257, 8, torch.bfloat16, torch.bfloat16)
    norm = row_norm_gain(weight, a, torch.zeros_like(b), None, 1.0)[1]
    for dtype in DTYPES:  # what is multiplied with zeros does not matter, its dtype included
        gain = row_norm_gain(weight, a.to(dtype), torch.zeros_like(b, dtype=dtype), norm, 3.0)[0]
        assert torch.equal(gain, torch.ones(33))


def test_rows_that_cancel_keep_their_digits(guards):
    """The expanded square would have none left: W is -s B A but for a thousandth."""
    _, a, b, magnitude = inputs(guards, 33, 72, 16, torch.float32, torch.float32)
    weight = -(1 - 1e-3) * (b @ a)
    exact = torch.linalg.vector_norm(weight.double() + b.double() @ a.double(), dim=1)
    size = torch.linalg.vector_norm(weight.double(), dim=1)
    assert_summed("n", row_norm_gain(weight, a, b, magnitude, 1.0)[1], exact, 72, size)


def test_zeros_nans_and_infinities(guards):
    weight, a, b, magnitude = inputs(guards, 5, 40, 4, torch.float32, torch.float32)
    b.zero_()
    weight[0], magnitude[1], weight[2, 7], weight[3, 7] = 0, 0, torch.nan, torch.inf
    gain, norm = row_norm_gain(weight, a, b, magnitude, 1.0)
    assert norm[0] == torch.tensor(EPS)
    assert gain[0] == magnitude[0] / torch.tensor(EPS)
    assert gain[1] == 0
    assert gain[2].isnan()
    assert norm[2].isnan()
    assert (gain[3], norm[3]) == (0, torch.inf)
    assert torch.isfinite(gain[4])


def test_the_same_bits_every_time_and_in_a_group(guards):
    modules, alone = [], []
    half, full = torch.bfloat16, torch.float32
    cases = [(33, 72, 3, half), (129, 256, 16, half), (7, 257, 12, full), (64, 128, 5, half)]
    for rows, columns, rank, stored in cases:
        weight, a, b, magnitude = inputs(guards, rows, columns, rank, stored, torch.bfloat16)
        alone.append(row_norm_gain(weight, a, b, magnitude, 0.5))
        assert torch.equal(row_norm_gain(weight, a, b, magnitude, 0.5), alone[-1])
        out = guards.empty(2, rows)
        modules.append(Module(torch.empty(rank, columns), torch.empty(rows, rank), a, b, 0.5, weight, magnitude, out))
    made, launches = tables(modules), []
    with observing(launches.append):
        row_norm_gain_grouped(made)
    assert len(launches) == len(made) == 3
    for module, expected in zip(modules, alone, strict=True):
        assert torch.equal(module.out, expected)
