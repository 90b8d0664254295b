"""LISA: what trains, what moves, what the optimizer holds (Pan et al. 2024)."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import net, refused
from torch import nn
from torch.nn import functional as F

from peftlite import LISA, adapters, inject_adapters, load_adapters, param_groups, save_adapters


def tower(layers: int = 6) -> nn.Sequential:
    """Embedding, layers, head."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(layers))
    return nn.Sequential(nn.Linear(4, 5), nn.Sequential(*blocks), nn.Linear(5, 2))


def made(optimizer: Any = torch.optim.AdamW, **options: Any) -> Any:
    """A tower, its optimizer, and the controller."""
    model = tower()
    steps = optimizer(model.parameters(), lr=0.01)
    return model, steps, LISA(model, steps, "1", **{"active": 2, "period": 3, **options})


def step(model: nn.Module, optimizer: Any, seed: int) -> None:
    """One step of the user's loop."""
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator)
    F.mse_loss(model(x), target).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_what_trains_moves_and_has_moments() -> None:
    """Invariant §8: exactly γ layers train, beside embedding and head; frozen layers stay bit for bit; every layer is drawn in
    the end; the active set changes at multiples of K only; the optimizer holds states of what trains and of nothing else;
    every drawn layer moves in one step.
    """
    model, optimizer, controller = made()
    blocks, outside = list(model[1]), [*model[0].parameters(), *model[2].parameters()]
    seen: Counter[int] = Counter()
    sets = []
    for number in range(60):
        chosen = controller.chosen
        assert chosen == controller.chosen_at(number)
        sets.append(tuple(chosen))
        seen.update(chosen)
        assert len(set(chosen)) == 2
        active = [p for index in chosen for p in blocks[index].parameters()]
        assert {p for p in model.parameters() if p.requires_grad} == {*active, *outside}
        before = {p: p.detach().clone() for p in model.parameters()}
        step(model, optimizer, number)
        for p, value in before.items():
            assert torch.equal(p, value) == (p not in {*active, *outside})
        now = [p for index in controller.chosen for p in blocks[index].parameters()]
        held = {p for p, state in optimizer.state.items() if state}
        assert held <= {*now, *outside}
        if number % 3 < 2:
            assert held == {*active, *outside}
    changes = [number for number in range(1, 60) if sets[number] != sets[number - 1]]
    assert changes
    assert all(number % 3 == 0 for number in changes)
    assert set(seen) == set(range(6))


def test_moments_of_a_layer_that_stays_are_kept_and_of_one_that_returns_are_new() -> None:
    model, optimizer, controller = made(period=1)
    last: set[int] = set()
    stayed = returned = False
    counts: Counter[int] = Counter()
    for number in range(40):
        chosen = set(controller.chosen)
        step(model, optimizer, number)
        counts = Counter({index: counts[index] + 1 if index in last else 1 for index in chosen})
        for index in chosen & set(controller.chosen):
            for p in model[1][index].parameters():
                assert optimizer.state[p]["step"] == counts[index]
        stayed = stayed or any(count > 1 for count in counts.values())
        returned = returned or bool(chosen - last and number > 10)
        last = chosen & set(controller.chosen)
    assert stayed
    assert returned


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_with_all_layers_it_is_full_fine_tuning(optimizer: Any) -> None:
    """Invariant §8: γ = N ≡ full fine-tuning, bit for bit."""
    model, steps, _ = made(optimizer, active=6)
    plain = tower()
    other = optimizer(plain.parameters(), lr=0.01)
    for number in range(8):
        step(model, steps, number)
        step(plain, other, number)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_schedule() -> None:
    """Invariant §8: a seed gives one schedule."""
    first, second, other = (made(seed=seed)[2] for seed in (4, 4, 5))
    torch.manual_seed(3)
    draws = [[controller.chosen_at(step) for step in range(0, 3000, 3)] for controller in (first, second, other)]
    assert draws[0] == draws[1] != draws[2]
    counts = Counter(index for chosen in draws[0] for index in chosen)
    for index in range(6):  # five standard errors of a share of 1/3 among 1000 draws
        assert abs(counts[index] / 1000 - 1 / 3) < 5 * math.sqrt(1 / 3 * 2 / 3 / 1000)
    weighted = made(active=1, layer_weights=[0, 1, 3, 0, 0, 0])[2]
    counts = Counter(weighted.chosen_at(step)[0] for step in range(0, 6000, 3))
    assert set(counts) == {1, 2}
    assert abs(counts[2] / 2000 - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 2000)


def test_release_lets_all_train_again_and_what_was_frozen_before_stays_frozen() -> None:
    model = tower()
    model[0].requires_grad_(False)
    model[1][2][0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = [p.requires_grad for p in model.parameters()]
    with LISA(model, optimizer, list(model[1]), active=1, period=1):
        for number in range(8):
            step(model, optimizer, number)
            assert not model[0].weight.requires_grad
            assert not model[1][2][0].bias.requires_grad
    assert [p.requires_grad for p in model.parameters()] == before


def test_all_layers_can_be_saved_in_the_middle(tmp_path: Path) -> None:
    model, optimizer, controller = made(period=1)
    for number in range(7):
        step(model, optimizer, number)
    flags, held = [p.requires_grad for p in model.parameters()], set(optimizer.state)
    with controller.all_training():
        save_adapters(model, tmp_path / "f")
    assert [p.requires_grad for p in model.parameters()] == flags
    assert set(optimizer.state) == held
    loaded = load_adapters(tower().requires_grad_(False), tmp_path / "f")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_adapters_can_be_sampled_too() -> None:
    model = inject_adapters(net(), "all-linear", 2, trainable="head")
    optimizer = torch.optim.AdamW(param_groups(model, 0.01))
    controller = LISA(model, optimizer, "encoder", active=1, period=1)
    training = {name for name, layer in adapters(model).items() if layer.lora_a.requires_grad}
    assert {name.split(".")[1] for name in training} == {str(controller.chosen[0])}
    assert not any(layer.weight.requires_grad for layer in adapters(model).values())


def frozen_first() -> nn.Module:
    model = tower()
    model[1][3].requires_grad_(False)
    return model


def shared() -> nn.Module:
    model = tower()
    model[1][4][0].weight = model[1][1][0].weight
    return model


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (tower, {"active": 7}, r"active = 7 is more than the 6 layers that there are"),
    (tower, {"active": 0}, r"active must be an integer of at least 1, got 0"),
    (tower, {"period": 0}, r"period must be an integer of at least 1, got 0"),
    (tower, {"layer_weights": [1.0]}, r"layer_weights must be 6 numbers, one for each layer, .* got \[1.0\]"),
    (tower, {"layer_weights": [1, 0, 0, 0, 0, 0]}, r"at least active = 2 of them above 0"),
    (tower, {"layer_weights": [1, 1, 1, 1, 1, math.inf]}, r"layer_weights must be 6 numbers"),
    (tower, {"layers": "2"}, r"layers '2' is no nn.ModuleList or nn.Sequential of Sequential; there are: 1, 1.0,"),
    (tower, {"layers": "blocks"}, r"layers 'blocks' is no nn.ModuleList or nn.Sequential of Sequential"),
    (tower, {"layers": []}, r"layers is empty; give the layers to draw from"),
    (frozen_first, {}, r"layer 3 \(Sequential\) has no parameter that trains; let all layers train before the optimizer"),
    (shared, {}, r"'1.1.0.weight' belongs to the layers 1 and 4; a shared parameter cannot be frozen in one of them"),
    (tower, {"layers": [nn.Linear(2, 2), nn.Linear(2, 2)]}, r"layer 0 \(Linear\) is no part of Sequential"),
]


@pytest.mark.parametrize(("make", "options", "message"), WRONG)
def test_options_out_of_range(make: Any, options: dict[str, Any], message: str) -> None:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    with refused(model, message):
        LISA(model, optimizer, **{"layers": "1", **options})
