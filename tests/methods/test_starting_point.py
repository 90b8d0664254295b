"""PiSSA and OLoRA: the update starts at a part of W, and W is never written (Meng et al. 2024; Büyükakyüz 2024), spec §19."""

import copy
from typing import Any

import pytest
import torch
from budgets import assert_within_budget
from nets import make_layer, net, perturb
from torch import Tensor, nn
from torch.nn import functional as F

from peftlite import METHODS, PiSSALinear, adapters, inject_adapters, remove_adapters

EPS = torch.finfo(torch.float64).eps
every_start = pytest.mark.parametrize("method", ["pissa", "olora"])


def layer_of(method: str, **options: Any) -> nn.Module:
    """A layer of 13 -> 31 features and rank 4 in fp64."""
    return make_layer((method, {}), 13, 31, 4, dtype=torch.float64, **options)


@pytest.mark.parametrize("alpha", [None, 10.0])
def test_pissa_starts_at_the_best_approximation(alpha: float | None) -> None:
    layer = layer_of("pissa", alpha=alpha)
    u, values, vt = torch.linalg.svd(layer.weight, full_matrices=False)
    best = (u[:, :4] * values[:4]) @ vt[:4]
    start = layer.scale * layer.lora_b @ layer.lora_a
    assert (start - best).abs().max() <= 31 * EPS * values[0]
    # Both factors carry the same share of every singular value.
    balance = layer.lora_a @ layer.lora_a.T - layer.lora_b.T @ layer.lora_b
    assert balance.abs().max() <= 31 * EPS * values[0]


def test_olora_starts_at_orthonormal_columns() -> None:
    layer = layer_of("olora")
    assert (layer.lora_b.T @ layer.lora_b - torch.eye(4)).abs().max() <= 31 * EPS
    start = layer.lora_b @ layer.lora_a
    assert (start[:, :4] - layer.weight[:, :4]).abs().max() <= 31 * EPS * torch.linalg.matrix_norm(layer.weight, 2)


def test_fast_svd_is_exact_for_a_matrix_of_low_rank_and_near_it_otherwise() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(40, 4, generator=generator) @ torch.randn(4, 50, generator=generator)
    noisy = low + 0.3 * torch.randn(40, 50, generator=generator)
    for weight in (low, noisy):
        linear = nn.Linear(50, 40)
        linear.weight.data = weight.double()
        exact = PiSSALinear.from_linear(copy.deepcopy(linear), 4)
        fast = PiSSALinear.from_linear(linear, 4, svd_iterations=4, generator=generator)
        best, found = exact.lora_b @ exact.lora_a, fast.lora_b @ fast.lora_a
        left_over = torch.linalg.matrix_norm(weight - best)
        rounding = 50 * EPS * torch.linalg.matrix_norm(weight)
        assert torch.linalg.matrix_norm(weight - found) <= (1 + 1 / 64) * left_over + rounding


@every_start
def test_gradients_are_those_of_the_rewritten_base(method: str) -> None:
    """The papers' form, LoRA on W - s B₀ A₀, has the same function and the same gradients."""
    layer = layer_of(method, alpha=6.0)
    linear = layer.to_linear()
    rewritten = nn.Linear(13, 31).double()
    with torch.no_grad():
        rewritten.weight.copy_(linear.weight - layer.scale * layer.start_b @ layer.start_a)
        rewritten.bias.copy_(linear.bias)
    lora = METHODS["lora"].from_linear(rewritten, 4, alpha=6.0)
    with torch.no_grad():
        lora.lora_a.copy_(layer.lora_a)
        lora.lora_b.copy_(layer.lora_b)
    for model in (layer, lora):
        perturb(model)
    x, size = torch.randn(7, 13, dtype=torch.float64), 0.0
    for model in (layer, lora):
        model(x).square().sum().backward()
        size = max(size, *(p.grad.abs().max().item() for p in model.adapter_parameters().values()))
    for key in ("lora_a", "lora_b"):
        ours, papers = getattr(layer, key).grad, getattr(lora, key).grad
        assert (ours - papers).abs().max() <= 2 * 7 * 31 * 13 * EPS * size  # sums of so many products, in another order


@every_start
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_base_is_untouched_and_birth_is_exact(method: str, dtype: torch.dtype) -> None:
    model, base = net().to(dtype).eval(), net().to(dtype).eval()
    x = torch.randn(5, 8).to(dtype)
    inject_adapters(model, "all-linear", 2, method=method, alpha=5.0)
    assert torch.equal(model(x), base(x))
    perturb(model)
    assert not torch.equal(model(x), base(x))
    remove_adapters(model)
    assert torch.equal(model(x), base(x))
    for key, value in model.state_dict().items():
        assert torch.equal(value, base.state_dict()[key])


@every_start
def test_to_lora_has_twice_the_rank(method: str) -> None:
    layer = layer_of(method)
    perturb(layer)
    a, b = layer.to_lora()
    assert a.shape == (8, 13)
    papers = layer.lora_b @ layer.lora_a - layer.start_b @ layer.start_a
    eager, terms = papers.detach(), (layer.lora_b @ layer.lora_a).detach()
    assert_within_budget("ΔW", b @ a, eager, eager, torch.float64, terms)


@every_start
def test_initial_values_need_no_generator_and_are_the_same_twice(method: str) -> None:
    def values(seed: int) -> list[Tensor]:
        model = inject_adapters(net(), "query", 2, method=method, seed=seed)
        return [t for layer in adapters(model).values() for t in layer.adapter_state().values()]

    assert all(torch.equal(first, second) for first, second in zip(values(0), values(1), strict=True))


@every_start
def test_weights_that_are_not_finite(method: str) -> None:
    linear = nn.Linear(4, 4)
    linear.weight.data[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"decomposes the base weight, and this one has values that are not finite; repair"):
        METHODS[method].from_linear(linear, 2)
    assert linear.weight.requires_grad


@pytest.mark.parametrize("iterations", [-1, True])
def test_svd_iterations_out_of_range(iterations: int) -> None:
    with pytest.raises(ValueError, match=r"svd_iterations must be None \(exact\) or a number from 0, got"):
        PiSSALinear(4, 4, 2, svd_iterations=iterations)


def test_dropout_acts_on_the_update_alone() -> None:
    layer = layer_of("pissa", dropout=0.5).train()
    x = torch.randn(9, 13, dtype=torch.float64)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))  # the update is zero
