"""Residual sums: the plain sum and its gradients, without the output that DoRA would keep."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import peftlite
from peftlite import DoRALinear, LoRALinear, residual_sum
from peftlite.analysis.meters import flops, saved_for_backward
from peftlite.kernels.summed_output import Summed, SummedOutput

IN, OUT, P = 13, 7, 0.3


def make_layer(dtype=torch.float32, *, features=(IN, OUT), rank=3, seed=0, **options):
    torch.manual_seed(seed)
    layer = DoRALinear.from_linear(nn.Linear(*features, dtype=dtype), rank=rank, **options)
    with torch.no_grad():
        for parameter in layer.adapter_parameters().values():
            parameter += 0.2 * torch.randn_like(parameter)
    return layer


def plain(layer, x, residual, dropout=0.0):
    y = layer(x)
    return (F.dropout(y, dropout) if dropout else y) + residual


def grads(function, layer, shape=(3, 5), dropout=0.0, residual_scale=1.0, dtype=None):
    """The sum, and the gradients of x, the residual and the adapter behind a norm."""
    dtype = dtype or layer.weight.dtype
    torch.manual_seed(1)
    x = torch.randn(*shape, layer.in_features, dtype=dtype).requires_grad_()
    residual = (residual_scale * torch.randn(*shape, layer.out_features, dtype=dtype)).requires_grad_()
    weights = torch.randn(*shape, layer.out_features, dtype=dtype)
    torch.manual_seed(2)
    s = function(layer, x, residual, dropout)
    leaves = {"x": x, "residual": residual} | layer.adapter_parameters()
    loss = (F.layer_norm(s, (layer.out_features,)).pow(3) * weights).sum()
    return {"sum": s.detach()} | dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def assert_same(found, expected, tolerance):
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: off by {error:.2e}"


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (1,), (41,), (2, 1, 9)])
@pytest.mark.parametrize("norm_grad", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_every_gradient_in_fp64(dropout, shape, norm_grad, bias):
    layer = make_layer(torch.float64, norm_grad=norm_grad)
    layer.bias = layer.bias if bias else None
    found, expected = grads(residual_sum, layer, shape, dropout), grads(plain, layer, shape, dropout)
    assert torch.equal(found["sum"], expected["sum"])
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("layout", ["columns first", "expanded"])
def test_a_residual_of_another_layout(layout):
    layer, x = make_layer(torch.float64), torch.randn(4, 6, IN, dtype=torch.float64)
    if layout == "expanded":
        residual = torch.randn(1, 1, OUT, dtype=torch.float64).expand(4, 6, OUT)
    else:
        residual = torch.randn(OUT, 6, 4, dtype=torch.float64).permute(2, 1, 0)
    found, expected = (
        torch.autograd.grad(function(layer, x, residual).pow(3).sum(), layer.magnitude)[0] for function in (residual_sum, plain)
    )
    torch.testing.assert_close(found, expected)


def test_the_dropout_of_the_layer_goes_with_that_of_the_sum():
    for mode in ("lowrank", "peft"):
        layer = make_layer(torch.float64, dropout=P, dropout_mode=mode)
        assert_same(grads(residual_sum, layer, dropout=P), grads(plain, layer, dropout=P), 1e-12)


@pytest.mark.parametrize("dropout", [0.0, P, 0.8])
@pytest.mark.parametrize("bias", [True, False])
def test_columns_with_no_digits_left_are_computed_anew(dropout, bias):
    """Rows of W that are zero, magnitudes that are zero or tiny, a bias and a residual that swamp the product."""
    layer = make_layer(features=(32, 9))
    with torch.no_grad():
        layer.weight[0] = layer.lora_b[0] = layer.magnitude[0] = layer.magnitude[1] = layer.bias[1] = 0.0
        layer.magnitude[2], layer.magnitude[3] = 1e-30, 1e-4
        layer.bias[4] = 1e6
    layer.bias = layer.bias if bias else None
    x, dy = torch.randn(24, 32), torch.randn(24, 9)
    residual = torch.randn(24, 9) * torch.tensor([1.0] * 6 + [1e5, 1.0, 1e-3])
    torch.manual_seed(2)
    kept = F.dropout(torch.ones(24, 9), dropout)
    torch.manual_seed(2)  # for the same mask
    found = torch.autograd.grad(residual_sum(layer, x, residual, dropout), layer.magnitude, dy)[0]
    exact = layer.double()
    expected = torch.autograd.grad(exact(x.double()), exact.magnitude, (dy * kept).double())[0]
    assert ((found - expected).abs() <= 1e-4 * (dy * kept).abs().sum(0)).all(), (found, expected)  # the product is of size 1


def saved(function, layer, x, residual):
    """Bytes kept by the sum with what stands around it: a linear before, and a norm and a linear behind."""
    norm, after = nn.LayerNorm(layer.out_features), LoRALinear(layer.out_features, 4, rank=2)

    def run():
        s = function(layer, x, residual)
        return norm(s), after(residual)

    return saved_for_backward(run, exclude=[layer, norm, after]).bytes


def test_no_output_is_kept():
    layer = make_layer(features=(16, 24))
    x, residual = torch.randn(50, 16, requires_grad=True), torch.randn(50, 24, requires_grad=True)
    assert saved(plain, layer, x, residual) - saved(residual_sum, layer, x, residual) == 50 * 24 * 4


def test_no_product_is_added():
    layer = make_layer(features=(16, 24))
    x, residual = torch.randn(50, 16, requires_grad=True), torch.randn(50, 24, requires_grad=True)
    counts = [flops(lambda f=f: f(layer, x, residual).sum().backward()) for f in (plain, residual_sum)]
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("case", ["autocast", "bf16", "broadcast", "mixed", "disabled", "merged", "lora", "linear", "not kept"])
def test_elsewhere_it_is_the_plain_sum(case):
    layer = {"lora": LoRALinear(8, 8, rank=2), "linear": nn.Linear(8, 8)}.get(case) or make_layer(features=(8, 8))
    model = nn.ModuleDict({"dense": layer})
    if case == "bf16":
        model.bfloat16()
    if case == "not kept":
        layer.keep_output = False
    x = torch.randn(6, 8, dtype=layer.weight.dtype)
    residual = torch.randn((1, 8) if case == "broadcast" else (6, 8), dtype=torch.float64 if case == "mixed" else x.dtype)
    contexts = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "disabled": lambda: peftlite.disable_adapters(model),
        "merged": lambda: peftlite.merged(model.eval()),
    }
    before = dict(vars(layer))
    with contexts.get(case, nullcontext)():
        s, expected = residual_sum(layer, x, residual), layer(x) + residual
    assert torch.equal(s, expected)
    assert s.dtype == expected.dtype
    assert vars(layer).get("keep_output") is before.get("keep_output")
    assert s.grad_fn is None or "Sum" not in type(s.grad_fn).__name__


def test_it_is_taken_where_it_can_be():
    """The twin of the test above, which would pass if nothing were ever had from the sum."""
    layer = make_layer(features=(8, 8))
    assert "Sum" in type(residual_sum(layer, torch.randn(6, 8), torch.randn(6, 8)).grad_fn).__name__
    with torch.no_grad():
        assert residual_sum(layer, torch.randn(6, 8), torch.randn(6, 8)).grad_fn is None


def test_layers_that_run_together_keep_their_outputs():
    model = nn.ModuleDict({"query": nn.Linear(8, 8), "key": nn.Linear(8, 8)})
    peftlite.inject_adapters(model, "all-linear", 2, method="dora", fuse=[("query", "key")], seed=0)
    x = torch.randn(6, 8, requires_grad=True)
    found = []
    for function in (residual_sum, plain):
        s = function(model["query"], x, x.sin()) * model["key"](x)
        found.append(torch.autograd.grad(s.sum(), [x, *(m.magnitude for m in model.values())]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_an_output_that_is_read_on_another_way_too():
    """A hook that hands the output out gives it a gradient that does not come through the sum, alone or beside it."""
    layer = make_layer(torch.float64)
    x, residual = torch.randn(5, IN, dtype=torch.float64), torch.randn(5, OUT, dtype=torch.float64)
    for weight in (0.0, 1.0):
        found = []
        for function in (residual_sum, plain):
            outputs = []
            handle = layer.register_forward_hook(lambda module, inputs, y, outputs=outputs: outputs.append(y))
            s = function(layer, x, residual)
            handle.remove()
            loss = outputs[0].pow(2).sum() + (weight * s.pow(3).sum() if weight else 0)
            found.append(torch.autograd.grad(loss, list(layer.adapter_parameters().values())))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_twice_backward_and_checkpoints():
    layer = make_layer(torch.float64)
    x, residual = torch.randn(5, IN, dtype=torch.float64, requires_grad=True), torch.randn(5, OUT, dtype=torch.float64)
    loss = residual_sum(layer, x, residual).pow(3).sum()
    first = torch.autograd.grad(loss, layer.magnitude, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, layer.magnitude)[0])
    for reentrant in (False, True):
        layer.zero_grad()
        checkpoint(residual_sum, layer, x, residual, use_reentrant=reentrant).pow(3).sum().backward()
        torch.testing.assert_close(layer.magnitude.grad, first)


def test_an_offer_is_for_its_own_thread():
    """Two threads may train one model; neither takes the other's outputs for its own."""
    layer, x = make_layer(torch.float64), torch.randn(5, IN, dtype=torch.float64)
    expected = torch.autograd.grad(layer(x).pow(2).sum(), layer.magnitude)[0]
    with ThreadPoolExecutor(1) as other:
        layer.keep_output = other.submit(SummedOutput).result()
    found = layer(x)
    assert not layer.keep_output.accepted
    layer.keep_output.hand_over(Summed(torch.zeros(5, OUT), torch.zeros(5, OUT), 1.0))
    assert torch.equal(torch.autograd.grad(found.pow(2).sum(), layer.magnitude)[0], expected)


def test_a_sum_that_is_changed_in_place_says_so():
    layer = make_layer()
    s = residual_sum(layer, torch.randn(5, IN), torch.randn(5, OUT))
    with pytest.raises(RuntimeError, match=r"residual_sum: a tensor .* changed in place .* Use the out-of-place form"):
        s.relu_().sum().backward()


def test_after_an_error_the_layer_is_as_before():
    layer = make_layer()
    with pytest.raises(ValueError, match="last dimension of x must be in_features"):
        residual_sum(layer, torch.randn(5, IN + 1), torch.randn(5, OUT))
    assert layer.keep_output is True
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.5"):
        residual_sum(layer, torch.randn(5, IN), torch.randn(5, OUT), 1.5)


def test_compiled_code_is_the_plain_sum():
    layer = make_layer()
    x, residual = torch.randn(5, IN), torch.randn(5, OUT)
    compiled = torch.compile(residual_sum, fullgraph=True, backend="aot_eager")
    gradient = torch.autograd.grad(compiled(layer, x, residual).pow(3).sum(), layer.magnitude)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(plain(layer, x, residual).pow(3).sum(), layer.magnitude)[0])


def test_an_estimate_sees_what_is_spared():
    class Block(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.dense, self.norm, self.function = make_layer(features=(64, 64)), nn.LayerNorm(64), function

        def forward(self, x):
            return self.norm(self.function(self.dense, x, x))

    x = torch.randn(500, 64)
    kept, spared = (peftlite.estimate_memory(Block(function), x).saved for function in (plain, residual_sum))
    assert kept - spared == 500 * 64 * 4
