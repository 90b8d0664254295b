"""VeRA: its formula, its bases from a seed, its counts and what it is equivalent to (Kopiczko et al. 2023)."""

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from nets import make_layer, net, perturb, refused
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from peftlite import (
    LoRALinear,
    TiedLoRALinear,
    VeRALinear,
    adapters,
    inject_adapters,
    load_adapters,
    param_groups,
    save_adapters,
)

VERA = ("vera", {})


@given(in_features=st.integers(1, 40), out_features=st.integers(1, 40), rank=st.integers(1, 60), seed=st.integers(-9, 9))
def test_formula_and_equivalence_to_lora(in_features: int, out_features: int, rank: int, seed: int) -> None:
    """Invariant §5: ≡ LoRA with A' = d ⊙ A and B' = b ⊙ B."""
    layer = make_layer(VERA, in_features, out_features, rank, dtype=torch.float64, basis_seed=seed)
    perturb(layer)
    d, b, a_random, b_random = (t.detach().numpy() for t in (layer.vera_d, layer.vera_b, layer.lora_a, layer.lora_b))
    x = torch.randn(3, in_features, dtype=torch.float64)
    low = (x.numpy() @ a_random.T * math.sqrt(2 / in_features)) * d
    update = (low @ b_random.T * math.sqrt(2 / rank)) * b
    expected = F.linear(x, layer.weight, layer.bias) + torch.from_numpy(update)
    assert_within_budget("y", layer(x), F.linear(x, layer.effective_weight(), layer.bias), expected, torch.float64, x)
    a, b_lora = layer.to_lora()
    assert (a.shape, b_lora.shape) == ((rank, in_features), (out_features, rank))
    rank_one = sum(b_lora[:, [k]] * a[[k]] for k in range(rank))
    parts = sum((b_lora[:, [k]] * a[[k]]).abs() for k in range(rank))
    expected = layer.weight + rank_one.detach()
    assert_within_budget("weight", layer.effective_weight(), layer.weight + b_lora @ a, expected, torch.float64, parts)


@pytest.mark.parametrize(("width", "layers", "rank", "count"), [(768, 12, 1024, 43_008), (1024, 24, 256, 61_440)])
def test_published_counts(width: int, layers: int, rank: int, count: int) -> None:
    """Invariant §5: count Σ (r + out).
    Invariant §21: VeRA, RoBERTa-base at r = 1024 and RoBERTa-large at r = 256: 43,008 and 61,440.
    """
    blocks = [nn.ModuleDict({key: nn.Linear(width, width, device="meta") for key in ("query", "value")}) for _ in range(layers)]
    model = inject_adapters(nn.ModuleList(blocks), ["query", "value"], rank, method="vera")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_only_the_vectors_train() -> None:
    """Invariant §5: only b and d are in the optimizer."""
    model = inject_adapters(net(), "all-linear", 5, method="vera", exclude="head.*")
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"vera_d", "vera_b"}
    listed = [p for group in param_groups(model, 1e-3) for p in group["params"]]
    assert sum(p.numel() for p in listed) == sum(5 + layer.out_features for layer in adapters(model).values())
    assert all(group["weight_decay"] == 0 for group in param_groups(model, 1e-3))
    layer, x, kept = make_layer(VERA, 64, 32, 4), torch.randn(128, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert not any(t.data_ptr() == x.data_ptr() for t in kept)


def test_at_the_first_step_only_b_has_a_gradient() -> None:
    """Invariant §5: born as the base."""
    layer = make_layer(VERA, 9, 7, 3, d_init=0.25)
    assert torch.equal(layer.vera_d.detach(), torch.full((3,), 0.25))
    x = torch.randn(5, 9)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer(x).square().sum().backward()
    assert layer.vera_b.grad.any()
    assert not layer.vera_d.grad.any()


@given(rows=st.integers(1, 300), more=st.integers(1, 300), rank=st.integers(1, 64), seed=st.integers(0, 99))
def test_a_prefix_of_a_basis_does_not_depend_on_its_length(rows: int, more: int, rank: int, seed: int) -> None:
    small, large = (VeRALinear(size, 2, rank, basis_seed=seed) for size in (rows, rows + more))
    assert torch.equal(small.basis_in.tensor, large.basis_in.tensor[:rows])
    assert torch.equal(small.lora_a, large.lora_a[:, :rows])


def test_bases_are_kaiming_uniform() -> None:
    layer = VeRALinear(300, 200, 100)
    for factor, fan_in in ((layer.lora_a, 300), (layer.lora_b, 100)):
        values = factor * math.sqrt(2 / fan_in)
        bound, count = math.sqrt(6 / fan_in), factor.numel()
        assert values.abs().max() <= bound * (1 + torch.finfo(torch.float32).eps)
        assert abs(values.mean().item()) < 5 * bound / math.sqrt(3 * count)  # five standard errors
        assert values.abs().mean().item() == pytest.approx(bound / 2, abs=5 * bound / math.sqrt(12 * count))
    assert layer.scale == pytest.approx(math.sqrt(2 / 300) * math.sqrt(2 / 100), rel=1e-15)
    square = VeRALinear(100, 100, 100)
    assert not torch.equal(square.lora_a.T, square.lora_b)


def test_the_same_seed_gives_the_same_bases_in_another_process() -> None:
    """Invariant §5: a seed gives the same A and B in every process."""
    code = (
        "import torch, peftlite; torch.manual_seed(5); layer = peftlite.VeRALinear(30, 20, 8, basis_seed=3); "
        "print(layer.lora_a.double().sum().item(), layer.lora_b.double().pow(3).sum().item())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    layer = VeRALinear(30, 20, 8, basis_seed=3)
    assert [float(v) for v in printed] == [layer.lora_a.double().sum().item(), layer.lora_b.double().pow(3).sum().item()]
    assert not torch.equal(VeRALinear(30, 20, 8, basis_seed=4).lora_a, layer.lora_a)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("change", ["double", "meta and back", "to_empty", "deepcopy", "load"])
def test_all_layers_alias_the_same_storage(change: str, saved: bool, tmp_path: Path) -> None:
    """Invariant §5: all layers alias one storage."""
    model = inject_adapters(net(), "all-linear", 3, method="vera", save_bases=saved)
    perturb(model)
    before = {name: layer.lora_a.clone() for name, layer in adapters(model).items()}
    state = copy.deepcopy(model.state_dict())
    if change == "load":
        save_adapters(model, tmp_path / "f")
        with safe_open(tmp_path / "f", "pt") as file:
            assert sum("basis" in key for key in file.keys()) == 2 * saved  # noqa: SIM118  (not a dict)
        model = load_adapters(net(), tmp_path / "f")
    elif change == "deepcopy":
        model = copy.deepcopy(model)
    elif change == "double":
        model.double()
    else:
        model = (model.to("meta") if "meta" in change else model).to_empty(device="cpu")
        model.load_state_dict(state)
    for name, layer in adapters(model).items():
        assert torch.equal(layer.lora_a, before[name].to(layer.lora_a.dtype))
        assert layer.lora_a.data_ptr() == model.encoder[0].query.lora_a.data_ptr()
        assert layer.lora_b.data_ptr() == model.encoder[0].query.lora_b.data_ptr()
    assert model.encoder[0].down.lora_a.shape == (3, 16)
    assert sum(t.numel() for t in model.buffers() if t.ndim == 2) == 2 * 3 * 16  # one pair, as long as the largest layer


def test_layers_of_different_ranks_have_bases_of_their_own() -> None:
    model = inject_adapters(net(), "query", 3, method="vera", rank_pattern={"1.query": 5})
    assert model.encoder[0].query.basis_in is not model.encoder[1].query.basis_in
    assert model.encoder[1].query.lora_a.shape == (5, 8)


def test_vera_like_is_vera() -> None:
    """Invariant §4: vera_like ≡ VeRA on the same A and B.
    Invariant §20.7: VeRA ≡ Tied-LoRA with A and B frozen.
    """
    vera = make_layer(VERA, 9, 7, 3, dtype=torch.float64)
    tied = make_layer(("tied_lora", {"preset": "vera_like"}), 9, 7, 3, dtype=torch.float64)
    assert isinstance(tied, TiedLoRALinear)
    perturb(vera)
    assert set(tied.adapter_parameters()) == {"tied_u", "tied_v"}
    with torch.no_grad():
        tied.lora_a.copy_(vera.lora_a)
        tied.lora_b.copy_(vera.lora_b)
        tied.tied_u.copy_(vera.vera_d)
        tied.tied_v.copy_(vera.vera_b)
    tied.scale = vera.scale
    x = torch.randn(4, 9, dtype=torch.float64)
    assert torch.equal(tied(x), vera(x))


def test_the_gradients_are_those_of_lora_through_the_products() -> None:
    layer, x = make_layer(VERA, 9, 7, 3, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    perturb(layer)
    lora = LoRALinear.from_linear(layer.to_linear(), 3, adapter_dtype=torch.float64)
    with torch.no_grad():
        lora.lora_a.copy_(layer.vera_d[:, None] * layer.lora_a)
        lora.lora_b.copy_(layer.scale * layer.vera_b[:, None] * layer.lora_b)
    for model in (layer, lora):
        model(x).square().sum().backward()
    expected_d = (lora.lora_a.grad * layer.lora_a).sum(1)
    expected_b = (lora.lora_b.grad * layer.scale * layer.lora_b).sum(1)
    bound = 2 * x.numel() * torch.finfo(torch.float64).eps  # sums of so many products, in another order
    assert (layer.vera_d.grad - expected_d).abs().max() <= bound * (lora.lora_a.grad * layer.lora_a).abs().sum(1).max()
    terms = (lora.lora_b.grad * layer.scale * layer.lora_b).abs().sum(1).max()
    assert (layer.vera_b.grad - expected_b).abs().max() <= bound * terms


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, r"rank must be a positive integer, got 0"),
        ({"rank": True}, r"rank must be a positive integer, got True"),
        ({"d_init": 0}, r"d_init must be a finite number other than 0, or d and b would never move, got 0"),
        ({"d_init": math.nan}, r"d_init must be a finite number other than 0"),
        ({"basis_seed": 1.5}, r"basis_seed must be an integer, got 1.5"),
    ],
)
def test_wrong_options(options: dict[str, Any], match: str) -> None:
    with refused(model := net(), match):
        inject_adapters(model, "query", method="vera", **{"rank": 2, **options})
