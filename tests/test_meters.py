"""The meters on computations whose figures can be counted by hand."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite import quantize_base
from peftlite.analysis.meters import Saved, Transient, count_operations, flops, saved_for_backward, transient_bytes


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.zeros(a.shape[0], b.shape[1]).addmm_(a, b)

    @staticmethod
    def backward(ctx, gradient):
        a, b = ctx.saved_tensors
        return gradient @ b.T, a.T @ gradient


@torch.library.custom_op("peftlite_benchmark_tests::product", mutates_args=())
def product(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) * 1.0


def _product_backward(ctx, gradient):
    a, b = ctx.saved_tensors
    return product(gradient, b.T.contiguous()), product(a.T.contiguous(), gradient)


product.register_autograd(_product_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@pytest.fixture
def factors() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 5, requires_grad=True), torch.randn(5, 6, requires_grad=True)


@pytest.mark.parametrize(
    "multiply",
    [
        pytest.param(lambda a, b: a @ b, id="matmul"),
        pytest.param(lambda a, b: torch.zeros(4, 6).addmm_(a, b), id="addmm_"),
        pytest.param(lambda a, b: torch.addmm(torch.zeros(6), a, b), id="addmm"),
        pytest.param(lambda a, b: torch.mm(a, b, out=torch.empty(4, 6)), id="out"),
        pytest.param(lambda a, b: torch.stack([a @ column for column in b.T]), id="mv"),
        pytest.param(lambda a, b: torch.stack([row.dot(column) for row in a for column in b.T]), id="dot"),
        pytest.param(lambda a, b: torch.zeros(1, 4, 6).baddbmm_(a[None], b[None]), id="baddbmm_"),
        pytest.param(F.linear, id="linear"),
        pytest.param(product, id="custom operation"),
    ],
)
def test_a_product_is_two_flops_per_multiplication(multiply, factors):
    a, b = (factor.detach() for factor in factors)
    assert flops(lambda: multiply(a, b.T if multiply is F.linear else b)) == 2 * 4 * 5 * 6


@pytest.mark.parametrize("multiply", [torch.matmul, Product.apply, product])
def test_flops_of_the_backward_are_seen_inside_functions_and_custom_operations(multiply, factors):
    assert flops(lambda: multiply(*factors).sum().backward()) == 3 * 2 * 4 * 5 * 6


def test_flops_of_attention_on_the_cpu():
    q = torch.randn(2, 3, 8, 4, requires_grad=True)
    forward = 2 * 2 * (2 * 3 * 8 * 8 * 4)  # scores, then values
    assert flops(lambda: F.scaled_dot_product_attention(q, q, q)) == forward
    assert flops(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) == forward + 5 * forward // 2


def test_a_product_without_a_formula_is_an_error_not_a_zero():
    a, b = torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 32, dtype=torch.int8)
    with pytest.raises(NotImplementedError, match=r"calls aten\._int_mm, for which no formula is known"):
        flops(lambda: torch._int_mm(a, b))


def test_operations_are_counted_without_views_and_inside_custom_operations(factors):
    a, b = (factor.detach() for factor in factors)
    assert count_operations(lambda: (a.T.detach()[:2] + 1).exp()) == {"aten.add": 1, "aten.exp": 1}
    assert count_operations(lambda: product(a, b)) == {"aten.mm": 1, "aten.mul": 1}


def test_saved_bytes_of_relu_after_linear():
    layer, x = nn.Linear(5, 6), torch.randn(4, 5)

    def run():
        return torch.relu(layer(x))

    # The linear keeps its input for dW, relu its output; the weight is not needed, as x needs no gradient.
    assert saved_for_backward(run) == Saved(4 * (4 * 5 + 4 * 6), 2)
    assert saved_for_backward(run, exclude=[layer, x]) == Saved(4 * 4 * 6, 1)
    x.requires_grad_()
    assert saved_for_backward(run) == Saved(4 * (4 * 5 + 4 * 6 + 6 * 5), 3)
    assert saved_for_backward(run, exclude=[layer]) == Saved(4 * (4 * 5 + 4 * 6), 2)


def test_a_packed_matrix_counts_with_what_holds_it():
    model = quantize_base(nn.Sequential(nn.Linear(64, 32)), "0")
    x = torch.randn(4, 64, requires_grad=True)

    def run():
        return model(x)

    assert saved_for_backward(run) == Saved(model[0].weight.nbytes, 4)  # codes, scales, their scales, and their offset
    assert saved_for_backward(run, exclude=[model]) == Saved(0, 0)


def test_transient_bytes_of_a_packed_matrix_are_those_of_what_it_makes_dense():
    model = quantize_base(nn.Sequential(nn.Linear(64, 32)), "0")
    x = torch.randn(4, 64)
    model(x)  # the table of levels is made once
    figures = transient_bytes(lambda: model(x))
    assert figures.kept == 4 * 4 * 32  # the output: the dense matrix is gone
    assert figures.peak >= figures.kept + 4 * 32 * 64


def test_a_storage_saved_by_producer_and_consumer_counts_once():
    x, weight = torch.randn(4, 5, requires_grad=True), torch.randn(7, 6, requires_grad=True)

    def run(between):
        hidden = x.exp()  # keeps its output
        return between(hidden) @ torch.ones(5, 6, requires_grad=True) @ weight.T  # keeps its inputs

    separate = saved_for_backward(lambda: run(torch.Tensor.clone), exclude=[x, weight])
    shared = saved_for_backward(lambda: run(lambda hidden: hidden), exclude=[x, weight])
    view = saved_for_backward(lambda: run(lambda hidden: hidden.view(20)[:].view(4, 5)), exclude=[x, weight])
    assert shared == view == Saved(separate.bytes - 4 * 4 * 5, separate.storages - 1)


def test_a_view_keeps_its_whole_storage():
    whole = torch.randn(100, 10)
    assert saved_for_backward(lambda: whole[:1] * torch.ones(10, requires_grad=True)) == Saved(4 * 100 * 10, 1)


def test_saved_storages_that_are_freed_within_the_forward_still_count_apart():
    x = torch.randn(1000, requires_grad=True)

    def run():
        for _ in range(3):  # each graph dies before the next is built, and the allocator gives its memory out again
            x.exp()

    assert saved_for_backward(run, exclude=[x]) == Saved(3 * 4000, 3)


def test_transient_bytes_follow_births_and_deaths():
    x = torch.randn(100)  # 400 bytes each

    def run():
        a = x + 1  # 1 alive
        b = a * 2  # 2
        c = b * 2  # 3: the peak
        del a, b  # 1
        return c[10:] + 1, x[3:]  # 2 with 90 of 100 elements in the second; c dies on return; x is not ours

    assert transient_bytes(run) == Transient(3 * 400, 360)


def test_transient_bytes_ignore_views_and_in_place_writes_of_what_was_there():
    x = torch.zeros(100)
    assert transient_bytes(lambda: x.view(10, 10).T.add_(1)) == Transient(0, 0)


def test_transient_bytes_include_what_the_graph_keeps():
    x = torch.randn(100, requires_grad=True)
    assert transient_bytes(lambda: x.exp().sum()) == Transient(404, 404)  # exp keeps its output; a scalar of 4 bytes
    assert transient_bytes(lambda: (x + 1).sum()) == Transient(404, 4)


def test_transient_bytes_follow_growth_in_place():
    def run():
        a = torch.empty(10)
        a.resize_(100)
        return torch.add(torch.ones(50), 1, out=a.resize_(0))

    assert transient_bytes(run) == Transient(600, 400)  # a storage never shrinks


def test_transient_bytes_see_inside_custom_operations(factors):
    a, b = (factor.detach() for factor in factors)
    assert transient_bytes(lambda: product(a, b)) == Transient(2 * 96, 96)


def test_storages_may_outlive_the_meter():
    kept = []
    assert transient_bytes(lambda: kept.append(torch.ones(10))) == Transient(40, 40)
    kept.clear()
    gc.collect()
    assert transient_bytes(lambda: torch.ones(5)) == Transient(20, 20)
