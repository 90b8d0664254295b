"""LoHa and LoKr: products of low-rank matrices (Hyeon-Woo et al. 2021; Yeh et al. 2023), spec §19."""

import copy

import numpy as np
import pytest
import torch
from budgets import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from nets import make_layer, perturb
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from peftlite import LoHaLinear, LoKrLinear

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 5)).filter(lambda s: s[2] <= min(s[:2]))


def update_of(layer: nn.Module) -> np.ndarray:
    """ΔW from the definition, in numpy."""
    value = {name: p.detach().double().numpy() for name, p in layer.adapter_parameters().items()}
    first = value["lora_b"] @ value["lora_a"]
    if isinstance(layer, LoHaLinear):
        return layer.scale * first * (value["lora_b2"] @ value["lora_a2"])
    return layer.scale * np.kron(value["core"], first)


@pytest.mark.parametrize("method", ["loha", "lokr"])
@given(shape=SHAPES)
def test_formula(method: str, shape: tuple[int, int, int]) -> None:
    layer = make_layer((method, {}), *shape, alpha=3)
    perturb(layer)
    x = torch.randn(4, shape[0])

    def dense(layer: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight, layer.bias) + x @ torch.from_numpy(update_of(layer)).to(x.dtype).T

    oracle = dense(copy.deepcopy(layer).double(), x.double()).detach()
    terms = F.linear(x.double().abs(), layer.weight.double().abs())
    assert_within_budget("y", layer(x), dense(layer, x), oracle, torch.float32, terms)


def test_loha_reaches_the_square_of_its_rank() -> None:
    layer = make_layer(("loha", {}), 40, 30, 4, dtype=torch.float64)
    perturb(layer)
    a, b = layer.to_lora()
    assert (a.shape[0], int(torch.linalg.matrix_rank(b @ a))) == (16, 16)


def test_lokr_reaches_many_times_its_rank() -> None:
    layer = make_layer(("lokr", {}), 48, 30, 2, dtype=torch.float64)  # 6 x 8 and 5 x 6
    perturb(layer)
    a, b = layer.to_lora()
    assert tuple(layer.core.shape) == (5, 6)
    assert (a.shape[0], int(torch.linalg.matrix_rank(b @ a))) == (10, 10)


@pytest.mark.parametrize(("in_features", "out_features"), [(48, 30), (30, 48)])
def test_lokr_exports_from_either_side(in_features: int, out_features: int) -> None:
    layer = make_layer(("lokr", {}), in_features, out_features, 2, dtype=torch.float64)
    perturb(layer)
    a, b = layer.to_lora()
    expected = torch.from_numpy(update_of(layer))
    assert_within_budget("ΔW", b @ a, expected, expected, torch.float64)


def test_only_the_factor_that_is_zero_has_a_gradient_at_first() -> None:
    for method, zero in (("loha", "lora_b2"), ("lokr", "core")):
        layer = make_layer((method, {}), 12, 8, 2)
        layer(torch.randn(5, 12)).square().sum().backward()
        assert {name for name, p in layer.adapter_parameters().items() if p.grad.any()} == {zero}
        assert not getattr(layer, zero).any()


def test_lokr_costs_hardly_more_than_lora() -> None:
    def flops(layer: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(32, 768))
        return counter.get_total_flops()

    base, extra = 2 * 32 * 768 * 768, 2 * 32 * 8 * (768 + 24 * 24 + 768)
    assert flops(LoKrLinear(768, 768, 8)) == base + extra


@pytest.mark.parametrize(("rank", "dense"), [(4, False), (5, True)])
def test_loha_makes_a_dense_update_where_its_rank_would_exceed_the_layer(rank: int, dense: bool) -> None:
    layer = make_layer(("loha", {}), 20, 20, rank)
    perturb(layer)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(torch.randn(5, 20))
    others = [t for t in saved if t.untyped_storage().data_ptr() != layer.weight.untyped_storage().data_ptr()]
    assert ((20, 20) in {tuple(t.shape) for t in others}) == dense
