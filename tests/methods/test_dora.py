"""DoRA in every corner where a peer is wrong (Liu et al. 2024)."""

import copy
import math
import os
from typing import Any
from unittest import mock

import pytest
import torch
from budgets import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from nets import make_layer, perturb
from torch import Tensor, nn
from torch.nn import functional as F

from peftlite import DoRALinear, inject_adapters, merge_adapters, param_groups
from peftlite.kernels.dropout import draw_keep_mask, kept

DORA = ("dora", {})


def dora(x: Tensor, layer: DoRALinear, *, detach: bool) -> Tensor:
    """The paper's formula, dense and in the dtype of `x`, on tensors that autograd sees."""
    direction = layer.weight + layer.scale * layer.lora_b @ layer.lora_a
    norm = direction.norm(dim=1, keepdim=True)
    gain = layer.magnitude[:, None] / (norm.detach() if detach else norm)
    return x @ (gain * direction).T + (0 if layer.bias is None else layer.bias)


def gradients(y: Tensor, layer: DoRALinear, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed linear functional of y."""
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    own = layer.adapter_parameters()
    return dict(zip(["x", *own], torch.autograd.grad(y, [x, *own.values()], dy), strict=True))


def reference(layer: DoRALinear, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of the plain-torch implementation in the dtype of x."""
    with mock.patch.dict(os.environ, PEFTLITE_IMPL="reference"):
        y = layer(x)
    return {"y": y.detach(), **gradients(y, layer, x)}


def check(layer: DoRALinear, x: Tensor) -> None:
    """Compare output and gradients with the dense formula in fp64."""
    x = x.detach().requires_grad_()
    y = layer(x)
    actual, eager = {"y": y.detach(), **gradients(y, layer, x)}, reference(layer, x)
    exact, wide = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    y = dora(wide, exact, detach=not layer.norm_grad)
    for name, expected in {"y": y.detach(), **gradients(y, exact, wide)}.items():
        assert_within_budget(name, actual[name], eager[name], expected, x.dtype)


@pytest.mark.parametrize("norm_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_formula_of_the_paper_and_its_gradients(norm_grad: bool, dtype: torch.dtype, bias: bool) -> None:
    for in_features, out_features, rank in [(13, 13, 4), (7, 31, 7), (31, 7, 3)]:
        layer = make_layer(DORA, in_features, out_features, rank, bias=bias, dtype=dtype, norm_grad=norm_grad, alpha=5)
        perturb(layer)
        check(layer, torch.randn(9, in_features, generator=torch.Generator().manual_seed(0)).to(dtype))


def test_the_bias_stands_outside_the_scaling() -> None:
    layer = make_layer(DORA, 5, 3, 2)
    perturb(layer)
    assert torch.equal(layer(torch.zeros(1, 5))[0], layer.bias)
    weight = layer.effective_weight().detach()
    model = nn.Sequential(layer)
    merge_adapters(model)
    assert torch.equal(model[0].bias, layer.bias)
    assert torch.equal(model[0].weight, weight)


@given(
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    scale=st.floats(1e-3, 1e3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_magnitude_is_born_as_the_row_norm_in_fp32(sizes: tuple[int, int], scale: float, dtype: torch.dtype) -> None:
    linear = nn.Linear(*sizes).to(dtype)
    linear.weight.data *= scale / 100
    layer = DoRALinear.from_linear(linear, 1)
    oracle = linear.weight.detach().double().norm(dim=1)
    assert layer.magnitude.dtype == torch.float32
    assert_within_budget("magnitude", layer.magnitude, linear.weight.float().norm(dim=1), oracle, torch.float32)


def test_row_norms_of_the_merged_weight_are_the_magnitudes() -> None:
    """Invariant §2: the row norms of the merged weight are the magnitudes."""
    layer = make_layer(DORA, 31, 13, 4, dtype=torch.float64)
    perturb(layer)
    norms = layer.effective_weight().norm(dim=1)
    direction = layer.weight + layer.scale * layer.lora_b @ layer.lora_a
    eager = (layer.magnitude / direction.norm(dim=1))[:, None] * direction
    assert_within_budget("norms", norms, eager.norm(dim=1), layer.magnitude.detach().abs(), torch.float64)


def test_with_magnitude_equal_to_the_norm_it_is_lora() -> None:
    """Invariant §2: magnitudes set to the norms ≡ LoRA.
    Invariant §20.7: DoRA with the norms as magnitudes.
    """
    layer, lora = make_layer(DORA, 9, 7, 3), make_layer(("lora", {}), 9, 7, 3)
    perturb(layer)
    lora.load_state_dict({key: value for key, value in layer.state_dict().items() if key != "magnitude"})
    layer.magnitude.data = lora.effective_weight().detach().norm(dim=1)
    x = torch.randn(4, 9)
    oracle = copy.deepcopy(lora).double()(x.double()).detach()
    assert_within_budget("y", layer(x), dora(x, layer, detach=True), oracle, torch.float32)


def test_gradients_of_the_factors_are_those_of_lora_for_the_scaled_output_gradient() -> None:
    """Invariant §2: with a constant norm the gradient of A is LoRA's for the output gradient g ⊙ dy."""
    layer, lora = make_layer(DORA, 9, 7, 3), make_layer(("lora", {}), 9, 7, 3)
    perturb(layer)
    lora.load_state_dict({key: value for key, value in layer.state_dict().items() if key != "magnitude"})
    x, dy = torch.randn(5, 9), torch.randn(5, 7)

    def expected(plain: nn.Module, magnitude: Tensor) -> tuple[Tensor, ...]:
        gain = (magnitude / plain.effective_weight().norm(dim=1)).detach()
        y = plain(x.to(gain.dtype))
        return torch.autograd.grad(y, [plain.lora_a, plain.lora_b], gain * dy.to(gain.dtype))

    actual = torch.autograd.grad(layer(x), [layer.lora_a, layer.lora_b], dy)
    eager, oracle = expected(lora, layer.magnitude), expected(copy.deepcopy(lora).double(), layer.magnitude.double())
    for name, *values in zip(("lora_a", "lora_b"), actual, eager, oracle, strict=True):
        assert_within_budget(name, *values, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm_grad", [False, True])
def test_rows_of_zeros_never_give_nan(dtype: torch.dtype, norm_grad: bool) -> None:
    linear = nn.Linear(9, 6).to(dtype)
    linear.weight.data[::2] = 0
    layer = DoRALinear.from_linear(linear, 3, norm_grad=norm_grad)
    x = torch.randn(5, 9).to(dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    optimizer = torch.optim.AdamW(layer.adapter_parameters().values(), lr=1e-2, fused=True)
    for _ in range(20):
        layer(x).float().square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.adapter_parameters().values())
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(layer(x)).all()
        assert torch.isfinite(layer.effective_weight()).all()
    merge_adapters(model := nn.Sequential(layer))
    assert torch.isfinite(model[0].weight).all()


def test_zero_rows_with_trained_factors() -> None:
    layer = make_layer(DORA, 9, 6, 3)
    layer.weight.data[::2] = 0
    perturb(layer)
    check(layer, torch.randn(5, 9))


@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-6, -0.5, 1e-3, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_zero_and_negative_magnitudes_have_right_gradients(value: float, dtype: torch.dtype) -> None:
    layer = make_layer(DORA, 13, 8, 3, dtype=dtype)
    perturb(layer)
    layer.magnitude.data[1::2] = value
    check(layer, torch.randn(11, 13, generator=torch.Generator().manual_seed(2)).to(dtype))


def test_a_large_bias_costs_the_magnitude_no_more_than_the_rounding_of_the_output() -> None:
    layer = make_layer(DORA, 13, 8, 3)
    perturb(layer)
    layer.bias.mul_(1000)
    x = torch.randn(11, 13).requires_grad_()
    actual = gradients(layer(x), layer, x)["magnitude"]
    exact, wide = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    y = dora(wide, exact, detach=True)
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    terms = (dy * y).abs().sum(0) / exact.magnitude  # the output is kept, the product before the bias is not
    eager = reference(layer, x)["magnitude"]
    assert_within_budget("magnitude", actual, eager, gradients(y, exact, wide)["magnitude"], torch.float32, terms.detach())


@pytest.mark.parametrize("method", ["bfloat16", "half"])
def test_the_magnitude_stays_in_fp32(method: str) -> None:
    model = inject_adapters(nn.Sequential(nn.Linear(9, 7)), "0", 3, method="dora")
    perturb(model)
    before = model[0].magnitude.detach().clone()
    model(torch.randn(2, 9)).sum().backward()
    getattr(model, method)()
    layer = model[0]
    assert layer.lora_a.dtype == layer.weight.dtype == getattr(torch, method if method != "half" else "float16")
    assert layer.magnitude.dtype == layer.magnitude.grad.dtype == torch.float32
    assert torch.equal(layer.magnitude, before)
    model(torch.randn(2, 9).to(layer.weight.dtype)).float().sum().backward()
    assert layer.magnitude.grad.dtype == torch.float32
    model.to("cpu", torch.float64)
    assert layer.magnitude.dtype == torch.float64
    model.to(torch.bfloat16)
    assert layer.magnitude.dtype == torch.float32
    assert layer.double().float().magnitude.dtype == torch.float32


def test_small_updates_of_the_magnitude_are_not_lost_in_bf16() -> None:
    model = inject_adapters(nn.Sequential(nn.Linear(9, 7)), "0", 3, method="dora").bfloat16()
    before = model[0].magnitude.detach().clone()
    optimizer = torch.optim.SGD(param_groups(model, 1e-5))
    model(torch.ones(2, 9).bfloat16()).float().sum().backward()
    optimizer.step()
    assert (model[0].magnitude != before).all()


@pytest.mark.parametrize("options", [{}, {"norm_grad": True}, {"dropout": 0.3}, {"dropout": 0.3, "dropout_mode": "peft"}])
def test_no_stale_norm_after_fused_adamw(options: dict[str, Any]) -> None:
    layer = make_layer(DORA, 13, 8, 3, **options).train()
    optimizer = torch.optim.AdamW(layer.adapter_parameters().values(), lr=0.05, fused=True)
    x, target = torch.randn(32, 13), torch.randn(32, 8)
    for _ in range(20):
        F.mse_loss(layer(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    layer.lora_b.data += 0.1  # nor after a write that autograd does not see
    layer.eval()
    exact = copy.deepcopy(layer).double()
    oracle = F.linear(x.double(), exact.effective_weight(), exact.bias).detach()
    assert_within_budget("y", layer(x), F.linear(x, layer.effective_weight(), layer.bias), oracle, torch.float32)


def with_dropout(layer: DoRALinear, x: Tensor, keep: Tensor, mode: str) -> dict[str, Tensor]:
    """Output and gradients of the two formulas with the mask `keep`, in the dtype of x."""
    w, a, b = layer.weight, layer.lora_a, layer.lora_b
    x = x.detach().requires_grad_()
    dropped = x * keep / 0.625
    gain = layer.magnitude / (w + layer.scale * b @ a).norm(dim=1).detach()
    if mode == "peft":
        y = x @ w.T + (gain - 1) * (dropped @ w.T) + gain * layer.scale * (dropped @ a.T @ b.T)
    else:
        y = gain * (x @ w.T + layer.scale * (dropped @ a.T @ b.T))
    y = y if layer.bias is None else y + layer.bias
    return {"y": y.detach(), **gradients(y, layer, x)}


@pytest.mark.parametrize("mode", ["lowrank", "peft"])
@pytest.mark.parametrize("bias", [True, False])
def test_meaning_of_dropout(mode: str, bias: bool) -> None:
    layer = make_layer(DORA, 13, 8, 3, bias=bias, dropout=0.375, dropout_mode=mode).train()
    perturb(layer)
    x = torch.randn(6, 13).requires_grad_()
    torch.manual_seed(5)
    y = layer(x)
    actual = {"y": y.detach(), **gradients(y, layer, x)}
    torch.manual_seed(5)
    bits, _ = draw_keep_mask(x, 0.375)
    keep = kept(bits, x.shape, x.dtype)
    eager = with_dropout(layer, x, keep, mode)
    for name, oracle in with_dropout(copy.deepcopy(layer).double(), x.double(), keep, mode).items():
        assert_within_budget(name, actual[name], eager[name], oracle, torch.float32)


@pytest.mark.parametrize("following", [nn.ReLU(inplace=True), lambda y: y.mul_(2), lambda y: y.add_(1)])
def test_an_in_place_change_of_the_output_is_an_error_that_says_what_to_do(following: Any) -> None:
    layer = make_layer(DORA, 5, 3, 2)
    y = following(layer(torch.randn(4, 5)))
    with pytest.raises(RuntimeError, match=r"dora_linear: .* changed in place .*out-of-place form of that operation"):
        y.sum().backward()


def test_the_magnitude_moves_and_changes_the_function() -> None:
    layer, x = make_layer(DORA, 9, 7, 3), torch.randn(4, 9)
    layer(x).square().sum().backward()
    assert layer.magnitude.grad.abs().min() > 0
    assert not layer.lora_a.grad.any()  # B is zero
    assert layer.lora_b.grad.any()
    assert math.isclose(layer.scale, 1.0)
