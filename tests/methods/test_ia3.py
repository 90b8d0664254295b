"""(IA)³: learnt factors of the features (Liu et al. 2022), spec §19."""

import copy

import pytest
import torch
from budgets import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from nets import make_layer, perturb
from torch.nn import functional as F

from peftlite import IA3Linear


@given(in_features=st.integers(1, 20), out_features=st.integers(1, 20), side=st.sampled_from(["in", "out"]))
def test_formula(in_features: int, out_features: int, side: str) -> None:
    layer = make_layer(("ia3", {}), in_features, out_features, 1, side=side)
    perturb(layer)
    assert layer.factor.shape == ((out_features if side == "out" else in_features),)

    def formula(layer: IA3Linear, x: torch.Tensor) -> torch.Tensor:
        y = x @ layer.weight.T if side == "out" else (layer.factor * x) @ layer.weight.T
        return (layer.factor * y if side == "out" else y) + layer.bias

    x = torch.randn(3, in_features)
    oracle = formula(copy.deepcopy(layer).double(), x.double()).detach()
    assert_within_budget("y", layer(x), formula(layer, x), oracle, torch.float32, layer.bias.double())


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_factor_too_near_to_one_for_bf16_counts(side: str) -> None:
    layer = make_layer(("ia3", {}), 16, 16, 1, side=side, dtype=torch.bfloat16, bias=False)
    x = torch.randn(64, 16).bfloat16()
    before = layer(x)
    with torch.no_grad():
        layer.factor.fill_(1 + 3 * 2**-10)  # rounds to 1 in bf16, and moves every mantissa above 4 / 3
    assert layer.factor.dtype == torch.float32
    assert layer(x).dtype == torch.bfloat16
    assert not torch.equal(layer(x), before)


def test_bias_stays_outside() -> None:
    layer = make_layer(("ia3", {}), 4, 3, 1)
    with torch.no_grad():
        layer.factor.zero_()
    assert torch.equal(layer(torch.ones(2, 4)), layer.bias.expand(2, 3))
    assert torch.equal(F.linear(torch.ones(2, 4), layer.effective_weight(), layer.bias), layer.bias.expand(2, 3))


def test_unknown_side() -> None:
    with pytest.raises(ValueError, match=r"side must be 'out' or 'in', got 'left'"):
        IA3Linear(4, 4, 1, side="left")
