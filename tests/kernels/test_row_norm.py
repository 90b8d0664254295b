import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import SIZES, assert_within_budget

from peftlite.kernels import row_norm as module
from peftlite.kernels.row_norm import BaseSquare, formed_norm, inverse_norm_gradients, row_norm

pytestmark = pytest.mark.usefixtures("poisoned", "passes")
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def draw(outer, inner, rank, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.randn(outer, inner).to(dtype), torch.randn(rank, inner), torch.randn(outer, rank)


def direct(weight, a, b, scale, dtype):
    return torch.linalg.vector_norm(weight.to(dtype) + scale * (b.to(dtype) @ a.to(dtype)), dim=1)


def check(weight, a, b, scale):
    eager, oracle = (direct(weight, a, b, scale, dtype) for dtype in (torch.float32, torch.float64))
    actual = row_norm(weight, a, b, scale)
    assert actual.dtype == torch.float32
    for row in range(len(actual)):  # row by row: a large norm must not hide the error of a small one
        # The digits that W and B A lose by cancelling are lost to the sum itself, whatever computes it.
        terms = torch.linalg.vector_norm(weight[row].double().abs() + abs(scale) * (b[row].abs() @ a.abs()).double())
        bound = torch.finfo(torch.float32).eps * terms
        assert (actual[row] - oracle[row]).abs() <= 2 * ((eager[row] - oracle[row]).abs() + bound)


def test_memory_is_poisoned():
    assert module.torch.empty(3).isnan().all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SIZES, SIZES, st.data(), st.sampled_from(NARROW), st.sampled_from([0.1, 1.0, -2.0]))
def test_equals_the_direct_norm(outer, inner, data, dtype, scale):
    """Invariant §2: the cheap row norm ≡ the direct one."""
    block = data.draw(st.sampled_from([0, 1, 64, 1 << 17]))
    rank = data.draw(st.integers(1, min(outer, inner)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CPU_BLOCK", block)
        check(*draw(outer, inner, rank, dtype, seed=data.draw(st.integers(0, 9))), scale)


@pytest.mark.parametrize("delta", [1.0, 1e-1, 1e-2, 1e-4, 0.0])
def test_rows_that_cancel_are_computed_directly(delta):
    weight, a, b = draw(29, 40, 4)
    weight[::2] = -0.5 * (b @ a)[::2] + delta * weight[::2]
    check(weight, a, b, 0.5)
    if delta == 1e-4:  # the expanded square has no digit left here, so the test above needs the second look
        square = weight.square().sum(1) + ((weight @ a.T) * b).sum(1) + 0.25 * ((b @ (a @ a.T)) * b).sum(1)
        lost = (square.clamp_min(0).sqrt() - direct(weight, a, b, 0.5, torch.float64)).abs()
        assert lost[0] > 0.1 * direct(weight, a, b, 0.5, torch.float64)[0]


def test_zero_rows_have_norm_zero():
    weight, a, b = draw(5, 7, 2)
    weight[1:3] = 0
    b[1:3] = 0
    assert row_norm(weight, a, b, 1.0)[1:3].tolist() == [0.0, 0.0]
    check(weight, a, b, 1.0)


def test_nan_in_the_weight_is_not_hidden():
    weight, a, b = draw(3, 4, 2)
    weight[1, 2] = torch.nan
    assert row_norm(weight, a, b, 1.0).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW])
def test_at_zero_b_the_norm_does_not_depend_on_a(dtype):
    weight, a, b = draw(29, 40, 4, dtype)
    other = draw(29, 40, 7, seed=1)[1]
    expected = row_norm(weight, a, torch.zeros_like(b), 1.0)
    assert torch.equal(row_norm(weight, 1e3 * other, torch.zeros(29, 7), 0.3), expected)


def test_weights_in_fp64_keep_their_digits():
    weight, a, b = (t.double() for t in draw(17, 13, 3))
    eager = direct(weight.float(), a.float(), b.float(), 0.5, torch.float32)
    oracle = direct(weight, a, b, 0.5, torch.float64)
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    assert_within_budget(row_norm(weight, a, b, 0.5), oracle + ratio * (eager - oracle), oracle, torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("block", [30, 1 << 17])
@pytest.mark.parametrize("dtype", [torch.float64, *NARROW])
def test_gradients_equal_autograd(dtype, block, monkeypatch):
    monkeypatch.setattr(module, "CPU_BLOCK", block)
    weight, a, b = draw(11, 13, 3, dtype)
    weight[4:6], b[4:6] = 0, 0  # at the floor of the norm, where the gradient is zero
    c = torch.randn(11)
    norm = row_norm(weight, a, b, 0.7).clamp_min_(1e-12)
    actual = inverse_norm_gradients(weight, a, b, 0.7, c.to(norm.dtype), norm, 1e-12)

    def autograd(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (a, b)]
        n = direct(weight, *leaves, 0.7, dtype).clamp_min(1e-12)
        return torch.autograd.grad((c.to(dtype) * (n.detach() / n)).sum(), leaves)

    for value, eager, oracle in zip(actual, autograd(torch.float32), autograd(torch.float64), strict=True):
        assert_within_budget(value, eager, oracle, torch.finfo(torch.float32).eps)
    assert not actual[1][4:6].any()


@pytest.mark.parametrize("passes", ["large", "small"], indirect=True)  # nothing is formed where the passes are native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_norm_of_a_formed_sum_has_the_bits_of_birth(dtype):
    weight, a, b = draw(29, 40, 4, dtype)
    assert torch.equal(formed_norm(weight.clone()), row_norm(weight, a, 0 * b, 1.0))


def test_a_layer_may_be_made_under_autocast():
    weight, a, b = draw(5, 7, 2)
    with torch.autocast("cpu", torch.bfloat16):
        actual = row_norm(weight, a, b, 0.5)
    assert torch.equal(actual, row_norm(weight, a, b, 0.5))


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW])
def test_a_kept_base_square_changes_no_bit_and_is_kept(dtype, monkeypatch):
    weight, a, b = draw(29, 40, 4, dtype)
    keeper, calls = BaseSquare(), []
    compute = module._base_square
    monkeypatch.setattr(module, "_base_square", lambda *arguments: calls.append(1) or compute(*arguments))
    for scale in (0.5, 0.5, 2.0):
        expected = row_norm(weight, a, b, scale)
        calls.clear()
        actual = row_norm(weight, a, b, scale, keeper)
        assert_within_budget(actual, expected.float(), expected.double(), torch.finfo(actual.dtype).eps)
        a.add_(0.1)
    assert not calls


WRITES = {
    "in place": lambda w: w.mul_(1.5),
    "through data": lambda w: w.data.__setitem__((3, 5), w[3, 5] + 0.01),
    "one element by one bit": lambda w: w.data.view(torch.int32)[3, 5:6].bitwise_xor_(1 << 12),
    "two elements swapped with a sign": lambda w: w.data[3].copy_(torch.cat([-w[3, 1:2], w[3, :1], w[3, 2:]])),
    "a row permuted, of the same norm": lambda w: w.data[3].copy_(w[3].flip(0)),
    "numpy": lambda w: w.detach().numpy().__imul__(2),
    "rows exchanged": lambda w: w.data.copy_(w.flip(0).clone()),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_written_weight_is_noticed_however_it_was_written(write):
    weight, a, b = draw(29, 40, 4)
    keeper = BaseSquare()
    row_norm(weight, a, b, 0.5, keeper)
    version = weight._version
    WRITES[write](weight)
    assert torch.equal(row_norm(weight, a, b, 0.5, keeper), row_norm(weight, a, b, 0.5, BaseSquare()))
    if write != "in place":
        assert weight._version == version  # nothing else could have told


def test_a_kept_base_square_follows_the_dtype_and_shape_of_the_weight():
    keeper = BaseSquare()
    for dtype, inner in ((torch.float32, 40), (torch.float64, 40), (torch.bfloat16, 40), (torch.float32, 13)):
        weight, a, b = draw(29, inner, 4, dtype)
        assert torch.equal(row_norm(weight, a, b, 0.5, keeper), row_norm(weight, a, b, 0.5, BaseSquare()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_16_bits_cost_a_share_of_eps_of_what_the_adapter_does(dtype, passes):
    weight, a, b = draw(29, 40, 4, dtype)
    b *= 0.1
    exact = row_norm(weight, a, b, 0.5)
    for keeper in (None, BaseSquare()):
        actual = row_norm(weight, a, b, 0.5, keeper, dtype)
        assert actual.dtype == torch.float32
        terms = 0.5 * (b.abs() * (weight.float().abs() @ a.abs().T)).sum(1) / exact
        assert ((actual - exact).abs() <= 2 * torch.finfo(dtype).eps * terms).all()
    assert torch.equal(actual, exact) == (passes != "large")  # for a large weight it is another path
    assert torch.equal(row_norm(weight, a, 0 * b, 0.5, None, dtype), row_norm(weight, a, 0 * b, 0.5))  # exact at birth
