import itertools
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import NAMES, cases, make_case

from peftlite.kernels import dora_linear as module
from peftlite.kernels import weight_decomposed
from peftlite.kernels.dora_linear import dora_linear
from peftlite.kernels.magnitude_gradient import _lost_columns
from peftlite.kernels.row_norm import row_norm

pytestmark = pytest.mark.usefixtures("poisoned", "passes")
TRAINABLE = ("x", "bias", "lora_a", "lora_b", "magnitude")
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def test_memory_is_poisoned():
    assert module.torch.empty_like(torch.ones(3)).isnan().all()


@contextmanager
def never_formed():
    """As for a W that is too large for the cache: ``g ⊙ (W + s B A)`` is not formed, the branches run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_decomposed, "_can_be_formed", lambda *_: False)
        yield


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=cases(dora=True), branches=st.booleans())
def test_output_and_every_gradient_lie_within_the_budget(case, branches):
    with never_formed() if branches else nullcontext():
        case.check()


@pytest.mark.parametrize("norm_grad", [False, True])
@pytest.mark.parametrize("needs", [c for n in range(6) for c in itertools.combinations(TRAINABLE, n)], ids="-".join)
def test_every_choice_of_what_trains(needs, norm_grad):
    for dropout in (0.0, 0.4):
        make_case(7, 5, 11, 3, dora=True, needs=needs, options={"dropout": dropout, "norm_grad": norm_grad}).check()
    with never_formed():
        make_case(7, 5, 11, 3, dora=True, needs=needs, options={"norm_grad": norm_grad}).check()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "in_cache", "forward", "backward"),
    [
        (7, 1 << 20, True, False),
        (30, 1 << 20, True, True),
        (30, 100, False, True),
        (79, 100, False, True),
        (80, 100, True, True),
    ],
)
def test_where_the_whole_weight_is_formed(rows, in_cache, forward, backward, bias, passes, monkeypatch):
    """Forward where W is small or the rows are twice its features; backward where the rows spare more than W costs; natively
    never.
    """
    formed = []
    for name in ("_formed", "_gained"):
        form = getattr(weight_decomposed, name)
        monkeypatch.setattr(weight_decomposed, name, lambda *a, name=name, form=form: formed.append(name) or form(*a))
    monkeypatch.setattr(weight_decomposed, "IN_CACHE", in_cache)
    case = make_case(rows, 40, 29, 4, dora=True, x=torch.float32, bias=bias)
    case.results("torch")
    assert formed == (["_formed"] * forward + ["_gained"] * backward) * (passes != "native")
    case.check()


@pytest.mark.parametrize(
    ("x", "stored", "dropout"),
    [
        (torch.bfloat16, torch.bfloat16, 0.0),
        (torch.float16, torch.float32, 0.0),
        (torch.float32, torch.bfloat16, 0.0),
        (torch.float32, torch.float32, 0.3),
    ],
)
def test_where_it_never_is(x, stored, dropout, monkeypatch):
    """An update would vanish in 16 bits, and under dropout W and A read different inputs."""
    monkeypatch.setattr(weight_decomposed, "_formed", lambda *_: pytest.fail("formed forward"))
    monkeypatch.setattr(weight_decomposed, "_gained", lambda *_: pytest.fail("formed backward"))
    make_case(300, 40, 29, 4, dora=True, x=x, stored=stored, options={"dropout": dropout}).check()


@pytest.mark.parametrize("mode", ["lowrank", "peft"])
@pytest.mark.parametrize("stored", NARROW)
def test_autocast_with_any_stored_weight(stored, mode):
    options = {"dropout": 0.2, "dropout_mode": mode}
    make_case(31, 29, 40, 4, dora=True, stored=stored, compute=torch.bfloat16, options=options).check()


@pytest.mark.parametrize("x", NARROW)
def test_more_than_one_block_of_rows(x, monkeypatch):
    monkeypatch.setattr("peftlite.kernels.row_norm.CPU_BLOCK", 100)
    for bias in (True, False):
        make_case(31, 29, 40, 4, dora=True, x=x, stored=torch.bfloat16, bias=bias).check()


@pytest.mark.parametrize("mode", ["lowrank", "peft"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_the_exact_gradient(bias, mode):
    f64 = torch.float64
    case = make_case(3, 5, 4, 2, dora=True, x=f64, stored=f64, adapter=f64, bias=bias)
    trained = {name: t for name, t in case.tensors.items() if t is not None and t.requires_grad}

    def run(*leaves):
        tensors = case.tensors | dict(zip(trained, leaves, strict=True))
        torch.manual_seed(1)
        arguments = [tensors[name] for name in NAMES]
        return dora_linear(*arguments, 0.5, dropout=0.3, dropout_mode=mode, norm_grad=True)

    assert torch.autograd.gradcheck(run, tuple(trained.values()))


@pytest.mark.parametrize("bias", [0.0, 3.0, 1e2, 1e4])
@pytest.mark.parametrize("gain", [0.0, 1e-6, -0.03, 0.5, -1.0, 30.0, 1e3])
@pytest.mark.parametrize("x", [torch.float64, *NARROW])
def test_extreme_gain_and_bias(x, gain, bias):
    """Where the bias has pushed the digits of the product out of y, or the gain has, the gradients are right all the same."""
    wide = torch.promote_types(x, torch.float32)
    case = make_case(31, 13, 17, 3, dora=True, x=x, stored=wide, adapter=wide, options={"norm_grad": True})
    with torch.no_grad():
        case.tensors["magnitude"][::3] *= gain
        case.tensors["bias"][::2] = bias
        if x == torch.float16:
            case.tensors["bias"].clamp_(max=1e3)  # fp16 ends at 65504
    case.check()
    if x == wide:
        with never_formed():
            case.check()


@pytest.mark.parametrize(("sequences", "length"), [(32, 20), (16, 25), (8, 64), (1, 512)])
def test_rows_at_one_place_of_each_sequence_do_not_stand_for_all(sequences, length):
    """The first token is the same everywhere, and may give a feature nothing but its bias."""
    inner = torch.randn(sequences, length, 6)
    inner[:, 0] *= 1e-3
    bias = torch.ones(6)
    assert _lost_columns((inner + bias).flatten(0, 1), bias, torch.ones(6), torch.ones(6)) is None
    assert _lost_columns((0.01 * inner + bias).flatten(0, 1), bias, torch.ones(6), torch.ones(6)).tolist() == list(range(6))


@pytest.mark.parametrize("rows", [5, 0])
def test_zero_rows_of_the_weight_stay_finite(rows):
    case = make_case(rows, 7, 6, 2, dora=True, options={"norm_grad": True})
    with torch.no_grad():
        for name in ("weight", "lora_b", "magnitude"):
            case.tensors[name][:2] = 0
    for form in (nullcontext, never_formed):
        with form():
            case.check()
            assert all(value.isfinite().all() for value in case.results("torch").values())


@pytest.mark.parametrize("x", NARROW)
@pytest.mark.parametrize("stored", NARROW)
@pytest.mark.parametrize("transposed", [False, True])
def test_no_bit_changes_at_birth(x, stored, transposed):
    tensors = make_case(31, 400, 29, 4, dora=True, x=x, stored=stored).inputs()
    with torch.no_grad():
        tensors["weight"][3] = 0
        tensors["lora_b"].zero_()
    if transposed:
        tensors["weight"] = tensors["weight"].T.contiguous().T
    tensors["magnitude"] = row_norm(tensors["weight"], tensors["lora_a"], tensors["lora_b"], 0.5)
    expected = torch.nn.functional.linear(tensors["x"], tensors["weight"].to(x), tensors["bias"].to(x))
    for form in (nullcontext, never_formed):
        with form():
            assert torch.equal(dora_linear(*(tensors[name] for name in NAMES), 0.5), expected)


def test_a_consumer_that_writes_into_the_output_is_told():
    leaves = make_case(5, 7, 3, 2, dora=True).inputs()
    y = torch.relu_(dora_linear(*(leaves[name] for name in NAMES), 0.5))
    with pytest.raises(RuntimeError, match=r"dora_linear: a tensor .* changed in place .* Use the out-of-place form"):
        y.sum().backward()


def test_an_output_that_is_not_kept_may_be_changed_in_place():
    grads = []
    for keep, relu in ((True, torch.relu), (False, torch.relu_)):
        leaves = make_case(5, 7, 3, 2, dora=True).inputs()
        relu(dora_linear(*(leaves[name] for name in NAMES), 0.5, keep_output=keep)).sum().backward()
        grads.append([leaves[name].grad for name in TRAINABLE])
    for kept, formed_anew in zip(*grads, strict=True):
        torch.testing.assert_close(formed_anew, kept)


def test_with_a_frozen_magnitude_the_output_may_be_changed_in_place():
    leaves = make_case(5, 7, 3, 2, dora=True, needs=("x", "lora_a", "lora_b")).inputs()
    torch.relu_(dora_linear(*(leaves[name] for name in NAMES), 0.5)).sum().backward()
    assert leaves["lora_b"].grad.isfinite().all()


def test_torch_func_grad_equals_autograd():
    leaves = make_case(5, 4, 3, 2, dora=True).inputs()
    x, weight, bias, a, b, magnitude = (leaves[name] for name in NAMES)

    def loss(magnitude):
        return dora_linear(x, weight, bias, a, b, magnitude, 0.5).square().sum()

    actual = torch.func.grad(loss)(magnitude.detach())
    assert torch.equal(actual, torch.autograd.grad(loss(magnitude), magnitude)[0])


def test_second_derivatives_are_refused():
    leaves = make_case(5, 4, 3, 2, dora=True).inputs()
    y = dora_linear(*(leaves[name] for name in NAMES), 0.5)
    (grad,) = torch.autograd.grad(y.square().sum(), leaves["magnitude"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
