import itertools

import pytest
import torch
from hypothesis import given, settings
from oracles import NAMES, cases, make_case

from peftlite.kernels import lora_linear as module
from peftlite.kernels import low_rank
from peftlite.kernels.lora_linear import lora_linear

pytestmark = [
    pytest.mark.usefixtures("poisoned", "passes"),
    pytest.mark.parametrize("passes", ["small", "native"], indirect=True),
]
TRAINABLE = ("x", "bias", "lora_a", "lora_b")


def test_memory_is_poisoned():
    assert module.torch.empty(3).isnan().all()
    assert torch.ones(1).new_empty(2).isnan().all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=cases(dora=False))
def test_output_and_every_gradient_lie_within_the_budget(case):
    case.check()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("needs", [c for n in range(5) for c in itertools.combinations(TRAINABLE, n)], ids="-".join)
def test_every_choice_of_what_trains(needs, dropout):
    make_case(7, 5, 11, 3, needs=needs, options={"dropout": dropout}).check()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_with_any_stored_weight(stored):
    make_case(31, 29, 40, 4, stored=stored, compute=torch.bfloat16).check()


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias):
    case = make_case(3, 5, 4, 2, x=torch.float64, stored=torch.float64, adapter=torch.float64, bias=bias)
    trained = {name: t for name, t in case.tensors.items() if t is not None and t.requires_grad}

    def run(*leaves):
        tensors = case.tensors | dict(zip(trained, leaves, strict=True))
        torch.manual_seed(1)
        return lora_linear(*(tensors[name] for name in NAMES[:-1]), 0.5, dropout=0.3)

    assert torch.autograd.gradcheck(run, tuple(trained.values()))


def test_without_dropped_elements_training_equals_evaluation():
    tensors = make_case(5, 7, 3, 2).tensors
    arguments = [tensors[name] for name in NAMES[:-1]]
    assert torch.equal(lora_linear(*arguments, 0.5, dropout=1e-9), lora_linear(*arguments, 0.5))


def test_zero_factor_changes_no_bit_of_the_base_layer():
    tensors = make_case(31, 40, 29, 4).inputs()
    tensors["lora_b"] = torch.zeros(29, 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, weight, bias, *_ = cast = [tensors[name].to(dtype) for name in NAMES[:-1]]
        assert torch.equal(lora_linear(*cast, 0.5), torch.nn.functional.linear(x, weight, bias))


def test_a_vector_is_a_batch_of_one_row():
    tensors = make_case(1, 7, 3, 2).tensors
    x, *rest = (tensors[name] for name in NAMES[:-1])
    assert torch.equal(lora_linear(x[0], *rest, 0.5), lora_linear(x, *rest, 0.5)[0])


def test_the_output_may_be_changed_in_place():
    case = make_case(5, 7, 3, 2)
    grads = []
    for relu in (torch.relu, torch.relu_):
        leaves = case.inputs()
        relu(lora_linear(*(leaves[name] for name in NAMES[:-1]), 0.5)).sum().backward()
        grads.append([leaves[name].grad for name in TRAINABLE])
    for plain, in_place in zip(*grads, strict=True):
        assert torch.equal(plain, in_place)


def test_two_uses_of_one_layer_add_their_gradients():
    leaves = make_case(5, 4, 4, 2).inputs()
    arguments = [leaves[name] for name in NAMES[:-1]]
    (once,) = torch.autograd.grad(lora_linear(*arguments, 0.5).sum(), leaves["lora_a"])
    (twice,) = torch.autograd.grad((lora_linear(*arguments, 0.5) + lora_linear(*arguments, 0.5)).sum(), leaves["lora_a"])
    assert torch.equal(twice, 2 * once)


def test_torch_func_grad_equals_autograd():
    leaves = make_case(5, 4, 3, 2).inputs()
    x, weight, bias, a, b = (leaves[name] for name in NAMES[:-1])

    def loss(a):
        return lora_linear(x, weight, bias, a, b, 0.5).square().sum()

    assert torch.equal(torch.func.grad(loss)(a.detach()), torch.autograd.grad(loss(a), a)[0])


def test_second_derivatives_are_refused():
    leaves = make_case(5, 4, 3, 2).inputs()
    y = lora_linear(*(leaves[name] for name in NAMES[:-1]), 0.5)
    (grad,) = torch.autograd.grad(y.square().sum(), leaves["lora_a"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [79, 80, 300])
def test_many_rows_take_the_updated_weight_in_wide_dtypes_only(rows, x, bias, passes, monkeypatch):
    """And not where passes run natively."""
    formed = []
    updated = low_rank.updated_weight
    monkeypatch.setattr(low_rank, "updated_weight", lambda *arguments: formed.append(1) or updated(*arguments))
    case = make_case(rows, 40, 29, 4, x=x, bias=bias)  # from 80 rows on in the forward, from 58 on in the backward pass
    case.results("torch")
    native = passes == "native" and x == torch.float32
    assert len(formed) == (0 if x == torch.bfloat16 or native else 1 if rows < 80 else 2)
    case.check()
    formed.clear()
    make_case(rows, 40, 29, 4, x=x, options={"dropout": 0.3}).check()
    assert not formed  # under dropout the two branches read different inputs
