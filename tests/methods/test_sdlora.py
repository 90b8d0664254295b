"""SD-LoRA: tasks one after the other (Wu et al. 2025)."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import make_layer, net, perturb, refused
from torch import Tensor, nn
from torch.nn import functional as F

from peftlite import SDLoRALinear, adapters, convert_to_lora, inject_adapters, load_adapters, merge_adapters, save_adapters
from peftlite.methods.sdlora import end_task, reduced_rank, start_task

EPS = torch.finfo(torch.float64).eps
TARGETS = ["query", "up", "down"]


def adapted(**options: Any) -> nn.Module:
    """An fp64 net with SD-LoRA on its blocks, trained a little (perturbed)."""
    model = inject_adapters(net().double(), TARGETS, 3, method="sdlora", seed=1, **options).eval()
    perturb(model)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The effective weights, copied."""
    return {name: layer.effective_weight().detach().clone() for name, layer in adapters(model).items()}


def assert_same_function(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Effective weights are those of `before`, up to the rounding of a few products of numbers of their size."""
    for name, weight in weights(model).items():
        error = (weight - before[name]).abs().max().item()
        assert error <= 64 * EPS * before[name].abs().max().item(), name


def train(model: nn.Module, steps: int = 5, seed: int = 0) -> None:
    """A few steps of SGD on whatever trains."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 8, generator=generator, dtype=torch.float64)
    target = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"scope": "layer"},
    {"normaliser": "factors", "alpha": 5.0, "magnitude": 0.8},
    {"normaliser": "factors", "scope": "layer", "rslora": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tasks_begin_and_end_without_a_jump(options: dict[str, Any]) -> None:
    """Invariant §13: start_task leaves the function as it was; end_task leaves the function as it was."""
    model = adapted(**options)
    for task in range(1, 4):
        before = weights(model)
        ended = end_task(model)
        assert [found.name for found in ended] == list(adapters(model))
        assert all(found.kept and found.norm > 0 for found in ended)
        assert_same_function(model, before)
        before = weights(model)
        start_task(model, rank=max(1, 3 - task))
        for name, weight in weights(model).items():
            assert torch.equal(weight, before[name])
        scales = {layer.scale for layer in adapters(model).values()}
        assert scales == {options.get("alpha", 3) / (math.sqrt(3) if options.get("rslora") else 3)}
        perturb(model, seed=task)


def test_finished_directions_are_frozen() -> None:
    """Invariant §13: finished directions stay bit for bit."""
    model = adapted()
    end_task(model)
    start_task(model)
    stored = {key: t.clone() for key, t in model.state_dict().items() if "directions" in key or "coefficients" in key}
    before = weights(model)
    train(model)
    state = model.state_dict()
    assert stored
    assert all(torch.equal(state[key], t) for key, t in stored.items())
    assert all(not torch.equal(weight, before[name]) for name, weight in weights(model).items())
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_a", "lora_b", "magnitudes"}


@given(in_features=st.integers(1, 20), out_features=st.integers(1, 20), data=st.data())
def test_directions_have_norm_one(in_features: int, out_features: int, data: st.DataObject) -> None:
    """Invariant §13: ‖D_k‖_F = 1."""
    rank = data.draw(st.integers(1, min(in_features, out_features)))
    layer = make_layer(("sdlora", {"scope": "layer"}), in_features, out_features, rank, dtype=torch.float64, alpha=2.5)
    perturb(layer)
    before = layer.effective_weight() - layer.weight
    (ended,) = end_task(nn.Sequential(layer))
    assert abs((layer.directions_b @ layer.directions_a).norm().item() - 1) <= 8 * EPS * rank * max(in_features, out_features)
    assert layer.magnitudes.abs().item() == pytest.approx(before.norm().item(), rel=1e-12)
    assert ended.residual == 1


@pytest.mark.parametrize("scope", ["network", "layer"])
def test_every_magnitude_gets_its_gradient(scope: str) -> None:
    """Invariant §13: every magnitude has a gradient."""
    layer = make_layer(("sdlora", {"scope": scope}), 7, 5, 2, dtype=torch.float64)
    perturb(layer)
    model = nn.Sequential(layer)
    for task in (1, 2):
        end_task(model)
        start_task(model)
        perturb(model, seed=task)
    gradient = torch.randn(5, 7, dtype=torch.float64)
    (layer.effective_weight() * gradient).sum().backward()
    pairs = zip(layer.directions_a.split([2, 2]), layer.directions_b.split([2, 2], dim=1), strict=True)
    norms = [layer.coefficients[k, 2 * k].item() for k in range(2)]
    assert (norms == [1, 1]) == (scope == "layer")
    directions = [c * b @ a for c, (a, b) in zip(norms, pairs, strict=True)]
    directions.append(layer.scale * (layer.lora_b @ layer.lora_a).detach())
    expected = torch.stack([(direction * gradient).sum() for direction in directions])
    assert expected.abs().min() > 0
    torch.testing.assert_close(layer.magnitudes.grad, expected, rtol=64 * EPS, atol=64 * EPS)


def test_one_task_is_lora_with_a_trained_scale() -> None:
    """Invariant §13: one task ≡ LoRA with a trained scale.
    Invariant §20.7: SD-LoRA with one task.
    """
    plain = inject_adapters(net().double(), TARGETS, 3, alpha=6, seed=1).eval()
    model = inject_adapters(net().double(), TARGETS, 3, method="sdlora", alpha=6, seed=1).eval()
    perturb(plain)
    with torch.no_grad():
        for name, layer in adapters(plain).items():
            twin = adapters(model)[name]
            twin.lora_a.copy_(layer.lora_a)
            twin.lora_b.copy_(layer.lora_b)
    x = torch.randn(4, 8, dtype=torch.float64)
    assert torch.equal(model(x), plain(x))
    with torch.no_grad():
        for name, layer in adapters(model).items():
            layer.magnitudes.fill_(0.5)
            adapters(plain)[name].lora_b.mul_(0.5)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("scope", ["network", "layer"])
@pytest.mark.parametrize("normaliser", ["product", "factors"])
def test_a_direction_that_older_ones_span_is_dropped(normaliser: str, scope: str) -> None:
    """Invariant §13: a direction that older ones span leaves no residual and the function as it was."""
    layer = make_layer(("sdlora", {"normaliser": normaliser, "scope": scope}), 9, 7, 2, dtype=torch.float64, alpha=3.0)
    model = nn.Sequential(layer)
    perturb(layer)
    first = [t.detach().clone() for t in (layer.lora_a, layer.lora_b)]
    end_task(model)
    perturb(start_task(model), seed=2)
    second = [t.detach().clone() for t in (layer.lora_a, layer.lora_b)]
    end_task(model)
    start_task(model, rank=4)
    with torch.no_grad():
        layer.lora_a.copy_(torch.cat([first[0], second[0]]))
        layer.lora_b.copy_(torch.cat([0.7 * first[1], -1.3 * second[1]], dim=1))
        layer.magnitudes[2] = 0.4
    before = weights(model)
    columns = layer.directions_a.shape[0]
    (ended,) = end_task(model, tolerance=9e-4)
    assert ended.residual < 1e-13
    assert not ended.kept
    assert layer.finished == (2, 2, 0)
    assert layer.directions_a.shape[0] == columns
    for name, weight in weights(model).items():
        assert (weight - before[name]).abs().max().item() <= 1e3 * EPS * before[name].abs().max().item()
    perturb(start_task(model, rank=1), seed=9)  # and its magnitude goes on to act
    layer.effective_weight().square().sum().backward()
    assert layer.magnitudes.grad[2].abs().item() > 0


def test_a_direction_that_they_do_not_span_is_kept() -> None:
    model = adapted()
    end_task(model)
    perturb(start_task(model), seed=3)
    ended = end_task(model, tolerance=9e-4)
    layer = next(iter(adapters(model).values()))
    delta = [b @ a for a, b in zip(layer.directions_a.split(3), layer.directions_b.split(3, dim=1), strict=True)]
    cosine = (delta[0] * delta[1]).sum().item()
    assert ended[0].residual == pytest.approx(1 - cosine**2, rel=1e-9)
    assert all(found.kept for found in ended)


def test_rank_schedule() -> None:
    """Invariant §13: ranks fall by the published schedule."""
    assert [reduced_rank(task) for task in range(1, 10)] == [10, 10, 10, 8, 8, 8, 8, 6, 6]
    assert [reduced_rank(task, ranks=(5, 2), starts=(3,)) for task in (2, 3)] == [5, 2]
    with pytest.raises(ValueError, match="tasks count from 1"):
        reduced_rank(0)


def test_export_is_the_model() -> None:
    """Invariant §13: the export ≡ the model."""
    model = adapted(dropout=0.25)
    end_task(model)
    perturb(start_task(model, rank=1), seed=4)
    before, x = weights(model), torch.randn(4, 8, dtype=torch.float64)
    lora = convert_to_lora(copy.deepcopy(model))
    assert {layer.rank for layer in adapters(lora).values()} == {4}
    assert_same_function(lora, before)
    dense = copy.deepcopy(model)
    merge_adapters(dense)
    torch.testing.assert_close(dense(x), model(x), rtol=1e-12, atol=1e-12)
    end_task(model)
    assert_same_function(convert_to_lora(copy.deepcopy(model)), before)


@pytest.mark.parametrize("between", [False, True])
def test_saved_and_loaded_with_its_history(tmp_path: Any, between: bool) -> None:
    model = adapted()
    end_task(model)
    perturb(start_task(model, rank=2), seed=5)
    if between:
        end_task(model, tolerance=0.5)
    save_adapters(model, tmp_path / "f.safetensors")
    loaded = load_adapters(net().double(), tmp_path / "f.safetensors").eval()
    x = torch.randn(4, 8, dtype=torch.float64)
    assert torch.equal(loaded(x), model(x))
    if between:
        start_task(model, seed=7)
        start_task(loaded, seed=7)
        perturb(model)
        perturb(loaded)
        assert torch.equal(loaded(x), model(x))
    end_task(loaded)


def test_counts_of_a_vision_transformer() -> None:
    """Invariant §21: SD-LoRA, ViT-B/16, r = 10, per task: 368,640 + t."""
    blocks = (nn.ModuleDict({key: nn.Linear(768, 768, device="meta") for key in ("q", "v")}) for _ in range(12))
    model = inject_adapters(nn.ModuleList(blocks), ["q", "v"], 10, method="sdlora")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 368_640 + 1
    assert all(type(layer) is SDLoRALinear for layer in adapters(model).values())


def test_magnitudes_are_one_parameter_for_the_network_through_all_tasks(tmp_path: Any) -> None:
    model = adapted()
    end_task(model)
    perturb(start_task(model, rank=2), seed=3)
    save_adapters(model, tmp_path / "f.safetensors")
    for found in (model, copy.deepcopy(model), load_adapters(net().double(), tmp_path / "f.safetensors")):
        assert len({id(layer.magnitudes) for layer in adapters(found).values()}) == 1
        trained = sum(p.numel() for p in found.parameters() if p.requires_grad)
        assert trained == sum(2 * (m.in_features + m.out_features) for m in adapters(found).values()) + 2
    apart = adapted(scope="layer")
    assert len({id(layer.magnitudes) for layer in adapters(apart).values()}) == len(adapters(apart))


def test_new_pairs_depend_on_seed_task_and_name() -> None:
    def drawn(seed: int) -> list[Tensor]:
        model = adapted()
        end_task(model)
        start_task(model, seed=seed)
        return [layer.lora_a.detach() for layer in adapters(model).values()]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[3])


def test_errors() -> None:
    model = adapted()
    with refused(model, "start_task: a task is running; call end_task"):
        start_task(model)
    with refused(model, r"tolerance must be in \[0, 1\), got 2"):
        end_task(model, tolerance=2)
    fresh = inject_adapters(net(), "query", 2, method="sdlora")
    with refused(fresh, "lora_b is zero in every layer, so the task has no direction to keep"):
        end_task(fresh)
    end_task(model)
    with refused(model, r"end_task: no task is running, the last one has ended"):
        end_task(model)
    with refused(model, r"layer 'encoder.0.query': rank must be an integer from 1 to .* = 8"):
        start_task(model, rank=9)
    with refused(plain := net(), "Net has no layer of method 'sdlora'"):
        start_task(plain)
    for option, value in {"magnitude": 0.0, "normaliser": "max", "phase": "x", "scope": "x"}.items():
        with refused(plain, f"{option} must be"):
            inject_adapters(plain, "query", 2, method="sdlora", **{option: value})


def test_an_untrained_layer_keeps_no_direction() -> None:
    model = adapted()
    layer = adapters(model)["encoder.0.query"]
    with torch.no_grad():
        layer.lora_b.zero_()
    before = weights(model)
    ended = {found.name: found for found in end_task(model)}
    assert not ended["encoder.0.query"].kept
    assert layer.finished == (0,)
    assert_same_function(model, before)
    start_task(model)
    assert torch.isfinite(model(torch.randn(2, 8, dtype=torch.float64))).all()
