"""T1 in the interpreter against fp64: dtypes, odd shapes, ranks, strides, gains, masks, groups."""

import pytest
import torch
from guarded import Guards, assert_rounded

from peftlite.kernels import row_shrink_triton
from peftlite.kernels.dropout_triton import keep_mask_reference
from peftlite.kernels.row_shrink_triton import row_shrink

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 8, 16), (7, 72, 16), (33, 100, 32), (75, 257, 48), (129, 100, 64)]  # rows, columns, padded rank


@pytest.fixture(autouse=True)
def guarded_outputs(monkeypatch):
    """Every tensor that the launch functions allocate holds NaN and stands between canaries."""
    guards = Guards()
    allocate = lambda *shape, dtype, device: guards.empty(*shape, dtype=dtype)  # noqa: E731
    monkeypatch.setattr(row_shrink_triton.torch, "empty", allocate)
    yield guards
    guards.check()


def factor(columns, ranks, padded, dtype, by_rank, guards):
    """A packed factor: `ranks` columns (or rows) of numbers, zeros up to `padded`."""
    p = torch.zeros(columns, padded)
    p[:, :ranks] = torch.randn(columns, ranks)
    return guards.copy((p.T if by_rank else p).contiguous().to(dtype))


def exact(x, p, scale, by_rank):
    return scale * (x.double() @ (p.double().T if by_rank else p.double()))


@pytest.mark.parametrize("by_rank", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_against_fp64(rows, columns, rank, dtype, by_rank, guarded_outputs):
    x = guarded_outputs.copy(torch.randn(rows, columns).to(dtype))
    p = factor(columns, rank - 5, rank, dtype, by_rank, guarded_outputs)
    h, mask = row_shrink([x], [p], [0.7], by_rank=by_rank)
    assert mask is None
    assert h.dtype == dtype
    assert (h[:, rank - 5 :] == 0).all()
    assert_rounded("h", h, exact(x, p, 0.7, by_rank))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ranks", "padded"), [(1, 16), (3, 16), (8, 16), (12, 16), (17, 32), (100, 112), (384, 384)])
def test_ranks(ranks, padded, dtype, guarded_outputs):
    x = torch.randn(7, 40).to(dtype)
    for by_rank in (True, False):
        p = factor(40, ranks, padded, dtype, by_rank, guarded_outputs)
        assert_rounded("h", row_shrink([x], [p], [2.0], by_rank=by_rank)[0], exact(x, p, 2.0, by_rank))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_alignment(dtype, guarded_outputs):
    wide = torch.randn(33, 150).to(dtype)
    p = factor(100, 16, 16, dtype, True, guarded_outputs)
    expected = row_shrink([wide[:, 3:103].contiguous()], [p], [1.0], by_rank=True)[0]
    assert_rounded("h", expected, exact(wide[:, 3:103], p, 1.0, True))
    for x in (wide[:, 3:103], guarded_outputs.copy(wide[:, 3:103].contiguous(), misaligned=True)):
        assert torch.equal(row_shrink([x], [p], [1.0], by_rank=True)[0], expected)
    repeated = wide[:1, 3:103].expand(5, 100)
    assert torch.equal(row_shrink([repeated], [p], [1.0], by_rank=True)[0], expected[:1].expand(5, 16))
    misaligned = guarded_outputs.copy(p, misaligned=True)
    assert torch.equal(row_shrink([wide[:, 3:103]], [misaligned], [1.0], by_rank=True)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gains_act_as_on_a_stored_product(dtype):
    dy, gain = torch.randn(33, 100).to(dtype), 1 + 0.3 * torch.randn(100)
    b = torch.randn(100, 16).to(dtype)
    scaled = (gain * dy.float()).to(dtype)
    expected = row_shrink([scaled], [b], [0.5], by_rank=False)[0]
    assert torch.equal(row_shrink([dy], [b], [0.5], by_rank=False, gains=[gain])[0], expected)
    assert_rounded("u", expected, exact(scaled, b, 0.5, False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(dtype):
    x, a = torch.randn(33, 40).to(dtype), torch.randn(16, 40).to(dtype)
    keep = keep_mask_reference(11, 33, 40, 0.3)
    h, _ = row_shrink([x], [a], [1 / 0.7], by_rank=True, seed=torch.tensor([11]), dropout=0.3)
    assert_rounded("h", h, exact(x * keep, a, 1 / 0.7, True))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_groups_equal_single_launches(size):
    columns = (100, 8, 72, 33)[:size]
    xs = [torch.randn(40, c).bfloat16() for c in columns]
    bs = [torch.randn(c, 32).bfloat16() for c in columns]
    gains, scales = [torch.rand(c) for c in columns], [0.5, 1.0, 2.0, 0.25][:size]
    together, _ = row_shrink(xs, bs, scales, by_rank=False, gains=gains)
    single = [row_shrink([x], [b], [s], by_rank=False, gains=[g])[0] for x, b, s, g in zip(xs, bs, scales, gains, strict=True)]
    assert torch.equal(together, torch.cat(single, dim=1))
    shared = [torch.randn(32, 100).bfloat16() for _ in range(size)]
    together, _ = row_shrink(xs[:1], [torch.cat(shared)], [1.0], by_rank=True)
    assert torch.equal(together, torch.cat([row_shrink(xs[:1], [a], [1.0], by_rank=True)[0] for a in shared], dim=1))


def test_repeated_launches_are_equal_and_nan_is_kept():
    x, a = torch.randn(33, 100), torch.randn(16, 100)
    first = row_shrink([x], [a], [1.0], by_rank=True)[0]
    assert torch.equal(row_shrink([x], [a], [1.0], by_rank=True)[0], first)
    x[5, 7] = torch.nan
    h = row_shrink([x], [a], [1.0], by_rank=True)[0]
    assert h[5].isnan().all()
    assert not h[[4, 6]].isnan().any()


def test_no_rows():
    x, a, seed = torch.randn(0, 9), torch.randn(16, 9), torch.tensor([1])
    h, mask = row_shrink([x], [a], [1.0], by_rank=True, seed=seed, dropout=0.1)
    assert h.shape == (0, 16)
    assert mask.shape == (0, 2)


def test_what_does_not_fit_is_said():
    x, a = torch.randn(5, 9), torch.randn(16, 9)
    with pytest.raises(ValueError, match=r"x of shape \(5, 9\) does not fit p of shape \(9, 16\) \(by_rank=True\)"):
        row_shrink([x], [a.T.contiguous()], [1.0], by_rank=True)
    with pytest.raises(ValueError, match=r"x must have 9 rows with stride\(-1\) = 1, got shape .* strides \(1, 9\)"):
        row_shrink([x.T], [a], [1.0], by_rank=True)
    with pytest.raises(ValueError, match="a dropout mask belongs to one x, got 2"):
        row_shrink([x, x], [a, a], [1.0, 1.0], by_rank=True, seed=torch.tensor([1]), dropout=0.1)
    with pytest.raises(ValueError, match="a group is of 1 to 4 matrices, got 5"):
        row_shrink([x] * 5, [a] * 5, [1.0] * 5, by_rank=True)
