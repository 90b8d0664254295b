"""Tied-LoRA: every combination of flags, the presets, the counts, what it is equivalent to (Renduchintala et al. 2023)."""

import copy
import itertools
from typing import Any

import pytest
import torch
from budgets import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from nets import make_layer, net, perturb, refused
from torch import nn
from torch.nn import functional as F

from peftlite import TiedLoRALinear, adapters, inject_adapters
from peftlite.methods.tied_lora import FLAGS, PRESETS

TRAINED = [flags for flags in itertools.product([True, False], repeat=4) if any(flags)]
TIED = list(itertools.product([True, False], repeat=2))


class Stack(nn.Module):
    """Layers ``in -> out`` that all read the same input; their sum."""

    def __init__(self, count: int, in_features: int, out_features: int, **factory: Any) -> None:
        super().__init__()
        blocks = [nn.ModuleDict({"qkv": nn.Linear(in_features, out_features, **factory)}) for _ in range(count)]
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(layer["qkv"](x) for layer in self.layers)


def stack(count: int = 3, in_features: int = 6, out_features: int = 9, **options: Any) -> Stack:
    """An injected fp64 `Stack`, rank 2."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Stack(count, in_features, out_features).double()
    return inject_adapters(model, "qkv", 2, method="tied_lora", seed=0, **options)


def trained(model: nn.Module) -> int:
    """Trained parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def expected_count(flags: tuple[bool, ...], count: int, in_features: int, out_features: int, rank: int) -> int:
    """``τ_A r in (L if untied) + τ_B r out (L if untied) + L (τ_u r + τ_v out)``."""
    a, b, u, v, tie_a, tie_b = flags
    factor_a, factor_b = rank * in_features * (1 if tie_a else count), rank * out_features * (1 if tie_b else count)
    return a * factor_a + b * factor_b + count * (u * rank + v * out_features)


@pytest.mark.parametrize("trains", TRAINED, ids=lambda flags: "".join(n for n, f in zip("abuv", flags, strict=True) if f))
@pytest.mark.parametrize("ties", TIED, ids=lambda flags: "tie-" + "".join(n for n, f in zip("ab", flags, strict=True) if f))
def test_every_combination(trains: tuple[bool, ...], ties: tuple[bool, ...]) -> None:
    """Invariant §4: every combination of flags is born as the base; counts of every combination of flags."""
    flags = dict(zip(FLAGS, (*trains, *ties), strict=True))
    model, x = stack(**flags), torch.randn(5, 6, dtype=torch.float64)
    base = sum(F.linear(x, layer.weight, layer.bias) for layer in adapters(model).values())
    assert torch.equal(model(x), base)
    assert trained(model) == expected_count((*trains, *ties), 3, 6, 9, 2)
    model(x).square().sum().backward()  # a method that is born with no gradient would never leave its birth
    assert any(p.grad.any() for p in model.parameters() if p.requires_grad)
    perturb(model)
    for layer in adapters(model).values():
        u = layer.tied_u if trains[2] else torch.ones(2, dtype=torch.float64)
        v = layer.tied_v if trains[3] else torch.ones(9, dtype=torch.float64)
        expected = F.linear(x, layer.weight, layer.bias) + v * (((x @ layer.lora_a.T) * u) @ layer.lora_b.T)
        eager = F.linear(x, layer.effective_weight(), layer.bias)
        assert_within_budget("y", layer(x), eager, expected.detach(), torch.float64, x)
    first, second, _ = adapters(model).values()
    assert [first.lora_a is second.lora_a, first.lora_b is second.lora_b] == list(ties)


@given(
    preset=st.sampled_from(sorted(PRESETS)),
    count=st.integers(1, 4),
    in_features=st.integers(2, 9),
    out_features=st.integers(2, 9),
)
def test_counts_of_the_presets(preset: str, count: int, in_features: int, out_features: int) -> None:
    """Invariant §4: counts of every combination of flags."""
    model = stack(count, in_features, out_features, preset=preset)
    assert trained(model) == expected_count(PRESETS[preset], count, in_features, out_features, 2)


@pytest.mark.parametrize(
    ("preset", "count"), [("lora", 4_194_304), ("tl5", 131_072), ("tl6", 524_544), ("vera_like", 393_472)]
)
def test_published_counts(preset: str, count: int) -> None:
    """Invariant §21: LLaMA-2-7B, fused QKV, r = 8, LoRA, TL5, TL6 and u, v alone: 4,194,304, 131,072, 524,544 and 393,472."""
    model = inject_adapters(Stack(32, 4096, 12288, device="meta", bias=False), "qkv", 8, method="tied_lora", preset=preset)
    assert trained(model) == count


def test_tl5_with_one_layer_is_lora() -> None:
    """Invariant §4: TL5 of one layer ≡ LoRA.
    Invariant §20.7: Tied-LoRA TL5 of one layer.
    """
    model, x = stack(1, preset="tl5"), torch.randn(5, 6, dtype=torch.float64)
    plain = Stack(1, 6, 9).double()
    plain.load_state_dict({key: t for key, t in model.state_dict().items() if "factor" not in key})
    inject_adapters(plain, "qkv", 2)
    perturb(model)
    (tied,), (lora,) = adapters(model).values(), adapters(plain).values()
    with torch.no_grad():
        lora.lora_a.copy_(tied.lora_a)
        lora.lora_b.copy_(tied.lora_b)
    assert torch.equal(model(x), plain(x))
    for layer in (model, plain):
        layer(x).square().sum().backward()
    assert torch.equal(tied.lora_a.grad, lora.lora_a.grad)
    assert torch.equal(tied.lora_b.grad, lora.lora_b.grad)
    assert torch.equal(tied.effective_weight(), lora.effective_weight())


def test_the_lora_preset_is_lora_in_a_whole_model() -> None:
    """The preset ``"lora"`` shares nothing and draws what LoRA draws."""
    tied = inject_adapters(net(), "all-linear", 2, method="tied_lora", preset="lora", seed=3)
    plain = inject_adapters(net(), "all-linear", 2, seed=3)
    for name, layer in adapters(plain).items():
        assert torch.equal(adapters(tied)[name].lora_a, layer.lora_a)
    perturb(tied)
    with torch.no_grad():
        for name, layer in adapters(plain).items():
            layer.lora_a.copy_(adapters(tied)[name].lora_a)
            layer.lora_b.copy_(adapters(tied)[name].lora_b)
    x = torch.randn(4, 8)
    assert torch.equal(tied.eval()(x), plain.eval()(x))


def test_tl6_with_frozen_vectors_is_tl5() -> None:
    """Invariant §4: TL6 with frozen u = v = 1 ≡ TL5."""
    tl6, tl5 = stack(preset="tl6", train_u=False, train_v=False), stack(preset="tl5")
    assert [name for name, _ in tl6.named_parameters()] == [name for name, _ in tl5.named_parameters()]
    for model in (tl6, tl5):
        perturb(model)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(tl6(x), tl5(x))
    vectors = stack(preset="tl6")  # and with them at 1, as they are born
    vectors.load_state_dict({**vectors.state_dict(), **tl5.state_dict()})
    assert torch.equal(vectors(x), tl5(x))


def test_a_change_of_the_tied_factor_changes_all_layers() -> None:
    """Invariant §4: a change of the tied A changes all layers."""
    model, x = stack(), torch.randn(5, 6, dtype=torch.float64)
    perturb(model)
    before = {name: layer(x) for name, layer in adapters(model).items()}
    with torch.no_grad():
        model.layers[0]["qkv"].lora_a.add_(1.0)
    for name, layer in adapters(model).items():
        assert not torch.equal(layer(x), before[name])


@pytest.mark.parametrize(("scope", "a", "b"), [("type", 2, 2), ("qkv", 1, 2), ("shape", 1, 1)])
def test_scopes(scope: str, a: int, b: int) -> None:
    """The projections of ``scope="qkv"`` share A and keep a B each, as the rows of the fused B are."""
    model = inject_adapters(net(), ["query", "value"], 2, method="tied_lora", scope=scope)
    layers = adapters(model).values()
    assert len({id(layer.lora_a) for layer in layers}) == a
    assert len({id(layer.lora_b) for layer in layers}) == b


def test_untied_copies_draw_their_own_values() -> None:
    first, second, _ = adapters(stack(train_b=False, tie_a=False, tie_b=False)).values()
    assert not torch.equal(first.lora_a, second.lora_a)
    assert not torch.equal(first.lora_b, second.lora_b)
    assert torch.equal(first.lora_b, adapters(stack(train_b=False, tie_a=False, tie_b=False))["layers.0.qkv"].lora_b)


def test_to_lora_folds_both_vectors() -> None:
    layer = make_layer(("tied_lora", {}), 9, 7, 3, dtype=torch.float64, alpha=5)
    perturb(layer)
    a, b = layer.to_lora()
    expected = copy.deepcopy(layer).effective_weight().detach()
    assert_within_budget("weight", layer.weight + b @ a, expected, expected, torch.float64)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"preset": "tl1"}, r"preset must be one of 'lora', 'tl5', 'tl6', 'vera_like', got 'tl1'"),
        ({"train_u": 1}, r"train_u must be True or False, or None for the preset's, got 1"),
        ({f"train_{key}": False for key in "abuv"}, r"nothing would train: set one of train_a, train_b, train_u, train_v"),
        ({"scope": "layer"}, r"scope must be one of 'type', 'qkv', 'shape', got 'layer'"),
    ],
)
def test_wrong_options(options: dict[str, Any], match: str) -> None:
    with refused(model := net(), match):
        inject_adapters(model, "query", 2, method="tied_lora", **options)


def test_the_default_is_tl6() -> None:
    layer = TiedLoRALinear(4, 4, 2)
    assert set(layer.adapter_parameters()) == {"factor_a.lora_a", "factor_b.lora_b", "tied_u", "tied_v"}
    assert tuple(layer.flags.values()) == PRESETS["tl6"]
