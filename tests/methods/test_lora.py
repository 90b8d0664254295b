"""LoRA: its formula, its birth, its gradients at the first step (Hu et al. 2021)."""

import copy
import math
import os
from unittest import mock

import pytest
import torch
from budgets import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from nets import make_layer, perturb

from peftlite import LoRALinear
from peftlite.kernels.dropout import draw_keep_mask, kept

LORA = ("lora", {})


@given(in_features=st.integers(1, 40), out_features=st.integers(1, 40), rslora=st.booleans(), data=st.data())
def test_formula_and_scale(in_features: int, out_features: int, rslora: bool, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(in_features, out_features)))
    alpha = data.draw(st.one_of(st.none(), st.integers(1, 64), st.floats(0.01, 64)))
    layer = make_layer(LORA, in_features, out_features, rank, dtype=torch.float64, alpha=alpha, rslora=rslora)
    perturb(layer)
    assert layer.scale == (alpha or rank) / (math.sqrt(rank) if rslora else rank)
    w, a, b = layer.weight.numpy(), layer.lora_a.detach().numpy(), layer.lora_b.detach().numpy()
    x = torch.randn(3, in_features, dtype=torch.float64)
    expected = torch.from_numpy(x.numpy() @ (w + layer.scale * b @ a).T + layer.bias.numpy())
    with mock.patch.dict(os.environ, PEFTLITE_IMPL="reference"):
        eager = layer(x)
    assert_within_budget("y", layer(x), eager, expected, torch.float64)


def test_born_with_b_zero_and_a_uniform() -> None:
    layer = LoRALinear(400, 300, 64, generator=torch.Generator().manual_seed(0))
    assert not layer.lora_b.any()
    bound = 1 / math.sqrt(400)
    assert layer.lora_a.abs().max() <= bound
    mean, count = layer.lora_a.mean().item(), layer.lora_a.numel()
    assert abs(mean) < 5 * bound / math.sqrt(3 * count)  # five standard errors
    assert layer.lora_a.abs().mean().item() == pytest.approx(bound / 2, abs=5 * bound / math.sqrt(12 * count))


def test_at_the_first_step_only_b_has_a_gradient() -> None:
    """Invariant §1: at the first step the gradient of A is zero and that of B is not."""
    layer = make_layer(LORA, 9, 7, 3)
    layer(torch.randn(5, 9)).square().sum().backward()
    assert not layer.lora_a.grad.any()
    assert layer.lora_b.grad.any()


def test_rslora_is_lora_with_alpha_times_root_rank() -> None:
    """Invariant §1: rsLoRA of (α, r) ≡ LoRA of (α √r, r)."""
    scaled, plain = make_layer(LORA, 9, 7, 4, alpha=3, rslora=True), make_layer(LORA, 9, 7, 4, alpha=6)
    perturb(scaled)
    plain.load_state_dict(scaled.state_dict())
    x = torch.randn(5, 9)
    assert torch.equal(scaled(x), plain(x))


def test_dropout_acts_on_the_low_rank_path_only() -> None:
    layer = make_layer(LORA, 9, 7, 3, dropout=0.5).train()
    x = torch.randn(64, 9)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))  # B is zero
    perturb(layer)
    torch.manual_seed(4)
    y = layer(x)
    torch.manual_seed(4)
    bits, _ = draw_keep_mask(x, 0.5)
    mask = kept(bits, x.shape, x.dtype)
    eager, oracle = (
        torch.nn.functional.linear(x, m.weight, m.bias) + m.scale * ((x * mask / 0.5) @ m.lora_a.T) @ m.lora_b.T
        for m, x in ((layer, x), (copy.deepcopy(layer).double(), x.double()))
    )
    assert_within_budget("y", y, eager, oracle.detach(), torch.float32)


def test_adapts_one_feature_to_one() -> None:
    layer = make_layer(LORA, 1, 1, 1, bias=False)
    perturb(layer)
    expected = layer.weight + layer.lora_b * layer.lora_a
    assert layer(torch.ones(1)).shape == (1,)
    assert_within_budget("y", layer(torch.ones(1, 1)), expected, expected.detach().double(), torch.float32)
