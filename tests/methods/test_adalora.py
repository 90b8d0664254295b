"""AdaLoRA: importance, budget, regulariser, and what is left after pruning (Zhang et al. 2023)."""

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from nets import make_layer, net, perturb, refused
from torch import Tensor, nn
from torch.nn import functional as F

from peftlite import (
    AdaLoRA,
    adapters,
    convert_to_lora,
    inject_adapters,
    load_adapters,
    merge_adapters,
    param_groups,
    save_adapters,
)

ADALORA = ("adalora", {})


def made(
    rank: int = 4, optimizer: Any = torch.optim.AdamW, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.Module, Any, AdaLoRA]:
    """A perturbed net, its optimizer, and the controller."""
    model = inject_adapters(net().to(dtype), ["query", "up"], rank, method="adalora", seed=0)
    perturb(model)
    steps = optimizer(param_groups(model.eval(), 0.02))
    defaults = {"total_steps": 20, "target_rank": 2, "initial_steps": 4, "final_steps": 6}
    return model, steps, AdaLoRA(model, steps, **{**defaults, **options})


def step(model: nn.Module, optimizer: Any, seed: int = 0) -> None:
    """One step of the user's loop."""
    generator = torch.Generator().manual_seed(seed)
    x, target = (torch.randn(8, size, generator=generator, dtype=torch.float64) for size in (8, 3))
    F.mse_loss(model(x), target).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_birth_and_count() -> None:
    """Invariant §6: born as the base.
    Invariant §21: AdaLoRA, 768 x 768, r = 12: 18,444.
    """
    layer = make_layer(ADALORA, 768, 768, 12)
    assert sum(p.numel() for p in layer.adapter_parameters().values()) == 18444
    assert not layer.lora_e.any()
    for factor in (layer.lora_a, layer.lora_b):
        count = factor.numel()
        assert abs(factor.mean().item()) < 5 * 0.02 / count**0.5
        assert abs(factor.square().mean().item() / 0.02**2 - 1) < 5 * (2 / count) ** 0.5


@given(sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)), alpha=st.sampled_from([None, 0.5, 16]), data=st.data())
def test_formula(sizes: tuple[int, int], alpha: float | None, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(sizes)))
    layer = make_layer(ADALORA, *sizes, rank, dtype=torch.float64, alpha=alpha)
    perturb(layer)
    p, e, q = (t.detach() for t in (layer.lora_b, layer.lora_e, layer.lora_a))
    expected = layer.weight + (alpha or rank) / (rank + 1e-5) * p @ torch.diag(e) @ q
    x = torch.randn(3, sizes[0], dtype=torch.float64)
    eager = F.linear(x, layer.effective_weight(), layer.bias)
    terms = F.linear(x.abs(), layer.weight.abs() + (p.abs() * e.abs()) @ q.abs(), layer.bias.abs())
    assert_within_budget("y", layer(x), eager, F.linear(x, expected, layer.bias), torch.float64, terms)


def test_with_equal_singular_values_it_is_lora() -> None:
    """Invariant §20.7: AdaLoRA with singular values of one."""
    layer, lora = make_layer(ADALORA, 9, 7, 3), make_layer(("lora", {}), 9, 7, 3)
    perturb(layer)
    with torch.no_grad():
        layer.lora_e.fill_(1)
        lora.lora_a.copy_(layer.lora_a)
        lora.lora_b.copy_(layer.lora_b)
    lora.scale = layer.scale
    x = torch.randn(5, 9)
    assert torch.equal(layer(x), lora(x))


@given(
    phases=st.tuples(st.integers(0, 30), st.integers(1, 60), st.integers(0, 30)),
    ranks=st.tuples(st.integers(1, 8), st.integers(1, 8)),
)
def test_budget(phases: tuple[int, int, int], ranks: tuple[int, int]) -> None:
    """Invariant §6: the budget falls from b_0 to b_T without a rise."""
    initial, _, final = phases
    model, total = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), sum(phases)
    inject_adapters(model, "all-linear", max(ranks), method="adalora")
    options: dict[str, Any] = {"total_steps": total, "target_rank": min(ranks), "initial_steps": initial, "final_steps": final}
    with AdaLoRA(model, torch.optim.SGD(param_groups(model, 0.1)), **options) as controller:
        budgets = [controller.budget(t) for t in range(total + 3)]
    assert budgets[: initial + 1] == [4 * max(ranks)] * (initial + 1)
    assert budgets[total - final :] == [4 * min(ranks)] * (final + 3)
    assert all(later <= earlier for earlier, later in itertools.pairwise(budgets))


def test_budget_by_hand() -> None:
    """Invariant §6: a value of the budget computed by hand."""
    controller = made()[2]
    assert (controller.first_budget, controller.last_budget) == (16, 8)
    assert [controller.budget(t) for t in (4, 6, 9, 13, 14)] == [16, 12, 9, 8, 8]  # 8 + 8·0.512 = 12.096


@pytest.mark.parametrize("scaled", [False, True])
def test_importance_against_a_scalar_reference(scaled: bool) -> None:
    """Invariant §6: averages of importance ≡ a scalar reference."""
    fused = functools.partial(torch.optim.AdamW, fused=True)
    model, optimizer, controller = made(optimizer=fused, orthogonality=0.0, beta1=0.7, beta2=0.9)
    mean: dict[str, Tensor] = {}
    spread: dict[str, Tensor] = {}
    named = {f"{n}.{k}": p for n, layer in adapters(model).items() for k, p in layer.adapter_parameters().items()}
    scale = 8.0 if scaled else 1.0
    for seed in range(3):
        if scaled:  # as GradScaler leaves them to a fused optimizer
            optimizer.grad_scale = torch.tensor(scale)
        x, target = torch.randn(8, 8).double(), torch.randn(8, 3).double()
        (scale * F.mse_loss(model(x), target)).backward()
        for name, p in named.items():
            for index, (w, g) in enumerate(zip(p.flatten().tolist(), p.grad.flatten().tolist(), strict=True)):
                key = f"{name}.{index}"
                now = abs(w * g) / scale
                mean[key] = 0.7 * mean.get(key, 0.0) + (1 - 0.7) * now
                spread[key] = 0.9 * spread.get(key, 0.0) + (1 - 0.9) * abs(now - mean[key])
        optimizer.step()
        optimizer.zero_grad()
        assert controller.step == seed + 1
    scores = controller.scores()
    for name, layer in adapters(model).items():
        def s(key: str, indices: range, name: str = name) -> float:
            return sum(mean[f"{name}.{key}.{i}"] * spread[f"{name}.{key}.{i}"] for i in indices) / len(indices)

        r, o, i = layer.rank, layer.out_features, layer.in_features
        for k in range(r):
            expected = s("lora_e", range(k, k + 1)) + s("lora_b", range(k, o * r, r)) + s("lora_a", range(k * i, k * i + i))
            rounding = 2 * (o + i + 3 * 8) * torch.finfo(torch.float64).eps  # two sums, and three steps of two means
            assert scores[name][k].item() == pytest.approx(expected, rel=rounding, abs=0)


@pytest.mark.parametrize("interval", [1, 3])
def test_what_survives(interval: int) -> None:
    """Invariant §6: each mask leaves at most b(t) singular values, exactly so many where scores differ."""
    model, optimizer, controller = made(interval=interval)
    fixed, came_back = None, False
    before = controller.ranks()
    for t in range(1, 23):
        step(model, optimizer, t)
        left = {name: layer.lora_e.detach() != 0 for name, layer in adapters(model).items()}
        count = sum(int(mask.sum()) for mask in left.values())
        if t <= 4:
            assert count == 16
        elif t >= 14 or t % interval == 0:
            assert count == controller.budget(t)
            scores = controller.scores()
            kept = torch.cat([scores[name][mask] for name, mask in left.items()])
            lost = torch.cat([scores[name][~mask] for name, mask in left.items()])
            assert kept.min() >= lost.max()
        else:
            came_back = came_back or any(controller.ranks()[n] > before[n] for n in before)
        if t >= 14:
            fixed = fixed or left
            assert all(torch.equal(fixed[name], mask) for name, mask in left.items())
        before = controller.ranks()
    assert came_back == (interval > 1)  # zeroed λ still get gradients, and move until the next choice
    assert sum(controller.ranks().values()) == 8
    assert len(set(controller.ranks().values())) > 1  # the budget did move between the layers


def test_equal_scores_still_leave_exactly_the_budget() -> None:
    model, optimizer, controller = made(initial_steps=0, orthogonality=0.0)
    model(torch.zeros(2, 8).double()).mul(0).sum().backward()  # every gradient 0, so every score 0
    optimizer.step()
    assert sum(controller.ranks().values()) == controller.budget(1) < 16
    assert controller.ranks()["encoder.0.query"] == 4  # ties go to the layer that comes first


@pytest.mark.parametrize("penalty", ["norm", "squared"])
def test_the_regulariser_joins_the_gradients(penalty: str) -> None:
    """Invariant §6: the regulariser is zero iff P and Q are orthonormal."""
    x, found = torch.randn(8, 8), []
    for dtype in (torch.float32, torch.float64):
        model, _, controller = made(dtype=dtype, penalty=penalty, orthogonality=0.3)
        model(x.to(dtype)).square().sum().backward()
        twin = copy.deepcopy(model)
        twin.zero_grad()
        controller.before_step()
        terms = []
        for layer in adapters(twin).values():
            for gram in (layer.lora_b.T @ layer.lora_b, layer.lora_a @ layer.lora_a.T):
                squares = (gram - torch.eye(layer.rank)).square().sum()
                terms.append(squares if penalty == "squared" else squares.sqrt())
        (twin(x.to(dtype)).square().sum() + 0.3 * sum(terms) / (1 if penalty == "squared" else len(terms))).backward()
        for which in (model, twin):
            found.append([p.grad for p in which.parameters() if p.grad is not None])
    for actual, eager, _, oracle in zip(*found, strict=True):
        assert_within_budget("gradient", actual, eager, oracle, torch.float32)
    assert controller.regulariser() > 0
    with torch.no_grad():
        for layer in controller.layers.values():
            layer.lora_a.copy_(torch.eye(layer.rank, layer.in_features))
            layer.lora_b.copy_(torch.eye(layer.out_features, layer.rank))
    assert controller.regulariser() == 0


def pruned() -> nn.Module:
    """A trained net one of whose layers has lost every triplet."""
    model, optimizer, controller = made(target_rank=1)
    for t in range(20):
        step(model, optimizer, t)
    controller.detach()
    with torch.no_grad():
        adapters(model)["encoder.0.query"].lora_e.zero_()
    return model


def test_dropping_what_was_pruned_keeps_the_function(tmp_path: Path) -> None:
    """Invariant §6: exported and reloaded with its ranks ≡ before; merged ≡ unmerged."""
    model, x = pruned(), torch.randn(5, 8).double()
    before = model(x).detach()
    exact = {n: layer.effective_weight().detach() for n, layer in adapters(model).items()}
    kept = {name: max(1, int(layer.lora_e.count_nonzero())) for name, layer in adapters(model).items()}
    lora = convert_to_lora(copy.deepcopy(model))
    assert {name: layer.rank for name, layer in adapters(lora).items()} == kept
    assert {name: layer.drop_pruned() for name, layer in adapters(model).items()} == kept
    assert kept["encoder.0.query"] == 1
    assert not adapters(model)["encoder.0.query"].lora_e.any()
    assert {layer.config()["initial_rank"] for layer in adapters(model).values()} == {4}
    save_adapters(model, tmp_path / "f")
    loaded = load_adapters(net().double(), tmp_path / "f").eval()
    assert torch.equal(loaded(x), model(x))
    for other in (model, lora):
        for name, layer in adapters(other).items():
            eager = layer.effective_weight().detach()
            assert_within_budget(name, eager, exact[name], exact[name], torch.float64)
    merge_adapters(loaded)
    oracle = copy.deepcopy(model)(x).detach()
    for y in (model(x), lora(x), loaded(x)):
        assert_within_budget("y", y, before, oracle, torch.float64, x)
    assert all(p.requires_grad for layer in adapters(model).values() for p in layer.adapter_parameters().values())


def test_it_learns_a_low_rank_target() -> None:
    torch.manual_seed(0)
    model = inject_adapters(nn.Sequential(nn.Linear(16, 16)), "0", 4, method="adalora", seed=0)
    target = copy.deepcopy(model[0]).to_linear()
    with torch.no_grad():
        goal = target.weight + torch.randn(16, 2) @ torch.randn(2, 16) / 8
    optimizer = torch.optim.AdamW(param_groups(model, 0.03, weight_decay=0.0))
    x, losses = torch.randn(64, 16), []
    with AdaLoRA(model, optimizer, total_steps=150, target_rank=2, orthogonality=0.01):
        for _ in range(150):
            loss = F.mse_loss(model(x), F.linear(x, goal, model[0].bias))
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert adapters(model)["0"].lora_e.count_nonzero() == 2


def test_a_batch_that_uses_some_layers_only_and_one_that_uses_none() -> None:
    model, optimizer, controller = made()
    model.encoder[0](torch.randn(4, 8).double()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert controller.scores()["encoder.0.up"].any()
    assert not controller.scores()["encoder.1.up"].any()
    with pytest.raises(RuntimeError, match=r"no adapter has a gradient at the optimizer's step.*zero_grad\(\) after it"):
        optimizer.step()


WRONG = [
    ({"total_steps": 0}, r"total_steps must be an integer of at least 1, got 0"),
    ({"target_rank": 5}, r"a budget of 20, more than the 16 triplets that there are; inject with a higher rank"),
    ({"initial_steps": 14}, r"initial_steps \+ final_steps = 14 \+ 6 leaves no step of total_steps = 20 to prune in"),
    ({"interval": 0}, r"interval must be an integer of at least 1, got 0"),
    ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
    ({"beta2": -0.1}, r"beta2 must be in \[0, 1\), got -0.1"),
    ({"orthogonality": -1.0}, r"orthogonality must not be negative, got -1.0"),
    ({"penalty": "l1"}, r"penalty must be one of 'norm', 'squared', got 'l1'"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_layer_options_and_states_of_other_layers() -> None:
    with refused(model := net(), r"initial_rank must be an integer of at least 1, got 0"):
        inject_adapters(model, "query", 2, method="adalora", initial_rank=0)
    state = made()[2].state_dict()
    model = inject_adapters(net().double(), "query", 4, method="adalora")
    options = {"total_steps": 20, "target_rank": 2, "initial_steps": 4, "final_steps": 6}
    controller = AdaLoRA(model, torch.optim.SGD(param_groups(model, 0.1)), **options)
    with pytest.raises(ValueError, match=r"AdaLoRA: the state is of other layers: 'encoder.0.up.lora_a'"):
        controller.load_state_dict(state)
