"""T2 in the interpreter against fp64: gradients of both factors, D, sums of columns, columns whose dm is computed again."""

import pytest
import torch
from guarded import Guards, assert_rounded, assert_summed, draw_mask

from peftlite.kernels import col_shrink_triton
from peftlite.kernels.col_finish_triton import Magnitudes
from peftlite.kernels.col_shrink_triton import col_shrink
from peftlite.kernels.dropout_triton import keep_mask_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 8, 16), (7, 72, 16), (33, 100, 32), (129, 100, 64), (75, 257, 48)]  # rows, columns, padded rank


@pytest.fixture(autouse=True)
def guarded_buffers(monkeypatch):
    """The partial sums hold NaN until they are written, and stand between canaries."""
    guards = Guards()
    allocate = lambda *shape, dtype, device: guards.empty(*shape, dtype=dtype)  # noqa: E731
    monkeypatch.setattr(col_shrink_triton.torch, "empty", allocate)
    yield guards
    guards.check()


def check_factor(q, x, v, factor, by_rank):
    """`q` against ``factor ⊙ xᵀ v``; `v` has as many columns as `q` has ranks."""
    exact, sizes = (factor * (a.double().T @ b.double()) for a, b in ((x, v), (x.abs(), v.abs())))
    if by_rank:
        exact, sizes = exact.T, sizes.T
    if q.dtype == torch.float32:
        assert_summed("Q", q, exact, x.shape[0], sizes)
    else:
        assert_rounded("Q", q, exact)


@pytest.mark.parametrize("by_rank", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_factors_against_fp64(rows, columns, rank, dtype, by_rank, guarded_buffers):
    x = guarded_buffers.copy(torch.randn(rows, columns).to(dtype))
    v = guarded_buffers.copy(torch.randn(rows, rank).to(dtype))
    ranks = rank - 5
    q = guarded_buffers.empty(*((ranks, columns) if by_rank else (columns, ranks)))
    col_shrink([x], v, [q], [0.7], by_rank=by_rank)
    check_factor(q, x, v[:, :ranks], 0.7, by_rank)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 3, 12, 17, 100, 384])
def test_ranks_and_master_dtypes(ranks, dtype, guarded_buffers):
    x, v = torch.randn(40, 24).to(dtype), torch.randn(40, -(-ranks // 16) * 16).to(dtype)
    for master, by_rank in ((torch.float32, True), (dtype, False)):
        q = guarded_buffers.empty(*((ranks, 24) if by_rank else (24, ranks)), dtype=master)
        col_shrink([x], v, [q], [0.5], by_rank=by_rank)
        check_factor(q, x, v[:, :ranks], 0.5, by_rank)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_strides_and_alignment(dtype, guarded_buffers):
    wide, keep = torch.randn(75, 150).to(dtype), keep_mask_reference(9, 75, 100, 0.3)
    u, mask = torch.randn(75, 48).to(dtype), draw_mask(torch.tensor([9]), 75, 100, 0.3)
    results = []
    for x in (wide[:, 3:103], guarded_buffers.copy(wide[:, 3:103].contiguous(), misaligned=True)):
        q = guarded_buffers.empty(16, 100)
        col_shrink([x], u[:, 16:32], [q], [0.7], by_rank=True, mask=mask)
        check_factor(q, x * keep, u[:, 16:32], 0.7, True)
        results.append(q)
    assert torch.equal(*results)


class Columns:
    """One DoRA layer's inputs of the pass over dY, with the results in fp64."""

    def __init__(self, rows, columns, rank, dtype, guards, bias=True):
        self.x, self.w = torch.randn(rows, 40).to(dtype), (torch.randn(columns, 40) / 40**0.5).to(dtype)
        self.h, self.b = torch.randn(rows, rank).to(dtype), (torch.randn(columns, rank) / 8).to(dtype)
        self.norm, self.gain = 0.5 + torch.rand(columns), 1 + 0.3 * torch.randn(columns).clamp(-2, 2)
        self.bias = torch.randn(columns).to(dtype) / 4 if bias else None
        self.dy, self.guards, self.scale = torch.randn(rows, columns).to(dtype), guards, 0.6
        self.refresh()

    def refresh(self):
        """The output from what the fields hold now, and fresh buffers for the results."""
        self.inner = self.x.double() @ self.w.double().T + self.scale * (self.h.double() @ self.b.double().T)
        y = self.gain.double() * self.inner + (0.0 if self.bias is None else self.bias.double())
        self.y = self.guards.copy(y.to(self.dy.dtype))
        columns, empty = self.dy.shape[1], self.guards.empty
        self.db_out, self.dm, self.db = empty(columns, self.h.shape[1] - 4), empty(columns), empty(columns)
        self.d = empty(*self.dy.shape, dtype=self.dy.dtype)

    def magnitudes(self):
        biases = None if self.bias is None else [self.bias]
        return Magnitudes([self.y], biases, [self.norm], [self.dm], self.x, self.h, [self.w], [self.b], [self.scale])

    def run(self):
        outputs = {"scaled": [self.d], "magnitudes": self.magnitudes(), "biases": [self.db]}
        col_shrink([self.dy], self.h, [self.db_out], [self.scale], gains=[self.gain], **outputs)

    def check(self, again=()):
        """Everything against fp64; dm of the columns `again` from inner, of the others from the output."""
        dy, gain, rows = self.dy.double(), self.gain.double(), self.dy.shape[0]
        assert_rounded("D", self.d, gain * dy)
        assert_summed("db", self.db, dy.sum(0), rows, dy.abs().sum(0))
        check_factor(self.db_out, self.dy, self.h[:, :-4], self.scale * gain[:, None], False)
        shifted = self.y.double() - (0.0 if self.bias is None else self.bias.double())
        terms = dy * shifted / (gain * self.norm.double())
        terms[:, list(again)] = (dy * self.inner / self.norm.double())[:, list(again)]
        assert_summed("dm", self.dm, terms.sum(0), rows, terms.abs().sum(0))


@pytest.mark.parametrize(("dtype", "bias"), [*((dtype, True) for dtype in DTYPES), (DTYPES[-1], False)])
@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES[1:])
def test_the_pass_of_dora(rows, columns, rank, dtype, bias, guarded_buffers):
    case = Columns(rows, columns, rank, dtype, guarded_buffers, bias)
    if bias:  # none that is lost; those have a test of their own
        case.bias = (case.bias.double().sign() * (case.inner * case.gain.double()).abs().mean(0) / 2).to(dtype)
        case.refresh()
    case.run()
    case.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_that_the_output_has_lost(dtype, guarded_buffers):
    case = Columns(75, 100, 16, dtype, guarded_buffers)
    case.bias[:] = 0.0
    case.gain[[2, 40]] = torch.tensor([0.0, 1e-8])  # the product vanishes, or has no digits left in fp16
    case.bias[99] = 5000.0  # swamps the product
    case.refresh()
    case.run()
    case.check(again=(2, 40, 99))


@pytest.mark.parametrize("rank", [0, 80])
def test_sums_without_factors_and_with_two_tiles_of_ranks(rank, guarded_buffers):
    case = Columns(75, 72, 80, torch.bfloat16, guarded_buffers)
    case.bias[:] = 0.1
    case.refresh()
    if rank:
        case.run()
    else:  # large ranks leave the product to cuBLAS
        outputs = {"scaled": [case.d], "magnitudes": case.magnitudes(), "biases": [case.db]}
        col_shrink([case.dy], None, [], [], gains=[case.gain], **outputs)
        case.db_out = case.scale * case.gain[:, None] * (case.dy.float().T @ case.h[:, :-4].float())
    case.check()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_groups_equal_single_launches(size, guarded_buffers):
    dtype, widths = torch.bfloat16, (100, 8, 72, 33)[:size]
    cases = [Columns(75, width, 16, dtype, guarded_buffers) for width in widths]
    shared = cases[0].x
    cases[1].gain[3] = 0.01  # computed again in the group too
    for case in cases:
        case.x = shared
        case.refresh()
        case.run()
    expected = [(c.d, c.db, c.db_out, c.dm) for c in cases]
    for case in cases:
        case.refresh()
    together = Magnitudes(
        *([getattr(c, name) for c in cases] for name in ("y", "bias", "norm", "dm")),
        shared,
        h := torch.cat([c.h for c in cases], dim=1),
        *([getattr(c, name) for c in cases] for name in ("w", "b", "scale")),
    )
    outputs = {"scaled": [c.d for c in cases], "magnitudes": together, "biases": [c.db for c in cases]}
    factors, scales = [c.db_out for c in cases], [c.scale for c in cases]
    col_shrink([c.dy for c in cases], h, factors, scales, gains=[c.gain for c in cases], **outputs)
    for case, results in zip(cases, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip((case.d, case.db, case.db_out, case.dm), results, strict=True))


def test_modules_that_share_x_have_their_own_gradients(guarded_buffers):
    x, u, ranks = torch.randn(75, 100).bfloat16(), torch.randn(75, 48).bfloat16(), (8, 16, 3)
    factors = [guarded_buffers.empty(r, 100) for r in ranks]
    col_shrink([x], u, factors, [0.5, 1.0, 2.0], by_rank=True)
    for i, (factor, scale) in enumerate(zip(factors, (0.5, 1.0, 2.0), strict=True)):
        check_factor(factor, x, u[:, 16 * i : 16 * i + ranks[i]], scale, True)


def test_pairs_of_x_and_v(guarded_buffers):
    xs, v = [torch.randn(40, 100).half(), torch.randn(40, 33).half()], torch.randn(40, 32).half()
    factors = [guarded_buffers.empty(100, 8), guarded_buffers.empty(33, 16)]
    col_shrink(xs, v, factors, [0.5, 2.0])
    check_factor(factors[0], xs[0], v[:, :8], 0.5, False)
    check_factor(factors[1], xs[1], v[:, 16:], 2.0, False)


def test_repeated_passes_are_equal_and_nan_is_kept(guarded_buffers):
    case = Columns(129, 100, 16, torch.float32, guarded_buffers)
    case.run()
    first = (case.d, case.db, case.db_out, case.dm)
    case.refresh()
    case.run()
    assert all(torch.equal(a, b) for a, b in zip((case.d, case.db, case.db_out, case.dm), first, strict=True))
    case.dy[100, 7] = torch.nan
    case.run()
    for result in (case.db, case.dm, case.db_out[:, 0], case.d[100]):
        assert result[7].isnan()
        assert not result[[6, 8]].isnan().any()


def test_no_rows_give_zeros(guarded_buffers):
    case = Columns(0, 33, 16, torch.float32, guarded_buffers)
    case.run()
    assert not any(t.any() for t in (case.db, case.db_out, case.dm))


def test_what_does_not_fit_is_said():
    x, v, q = torch.randn(5, 9), torch.randn(5, 16), torch.empty(9, 4, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"factors of shapes \[\(9, 4\)\] \(by_rank=True\) do not fit 1 x of \[9\] columns"):
        col_shrink([x], v, [q], [1.0], by_rank=True)
    with pytest.raises(ValueError, match="1 factors were asked for without v"):
        col_shrink([x], None, [q], [1.0])
    with pytest.raises(ValueError, match="a dropout mask belongs to the low-rank part of one x"):
        col_shrink([x], v, [q], [1.0], mask=torch.zeros(5, 2, dtype=torch.uint8), biases=[q[:, 0]])
    with pytest.raises(ValueError, match="computed with the gains; give gains"):
        col_shrink([x], v, [q], [1.0], scaled=[x])
    with pytest.raises(ValueError, match=r"D must be contiguous and of shape \(5, 9\), got \(9, 5\)"):
        col_shrink([x], v, [q], [1.0], gains=[q[:, 0]], scaled=[x.T])
