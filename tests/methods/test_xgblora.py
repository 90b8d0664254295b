"""XGBLoRA: boosting rounds (Zhang et al. 2024)."""

import copy
from typing import Any

import pytest
import torch
from nets import net, perturb
from torch import Tensor, nn
from torch.nn import functional as F

from peftlite import adapters, convert_to_lora, inject_adapters, load_adapters, merge_adapters, param_groups, save_adapters
from peftlite.methods.xgblora import XGBLoRA, numbered_block

EPS = torch.finfo(torch.float64).eps
TARGETS = ["query", "value", "up"]


class Run:
    """An fp64 net, its optimizer, its controller, and a batch per step."""

    def __init__(self, method: str = "xgblora", optimizer: str = "adamw", **options: Any) -> None:
        self.model = inject_adapters(net().double(), TARGETS, 1, method=method, seed=3, trainable="head.2", alpha=2)
        groups, fused = param_groups(self.model, lr=0.05), optimizer == "fused"
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, momentum=0.9) if optimizer == "sgd" else torch.optim.AdamW(groups, fused=fused)
        )
        self.boosting = XGBLoRA(self.model, self.optimizer, **options) if options else None
        self.steps = 0

    def step(self, count: int = 1) -> None:
        """Take `count` steps; the data are a function of the step."""
        for _ in range(count):
            generator = torch.Generator().manual_seed(self.steps)
            x = torch.randn(12, 8, generator=generator, dtype=torch.float64)
            target = torch.randn(12, 3, generator=generator, dtype=torch.float64)
            F.mse_loss(self.model(x), target).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1

    def weights(self) -> dict[str, Tensor]:
        """Effective weights, copied."""
        return {name: layer.effective_weight().detach().clone() for name, layer in adapters(self.model).items()}


def test_the_function_does_not_change_between_rounds() -> None:
    """Invariant §12: the function does not change between rounds."""
    run = Run()
    for count in range(1, 11):  # from the ninth on there are more boosters than min(in, out) = 8, and they are compressed
        perturb(run.model, seed=count)
        before = run.weights()
        for layer in adapters(run.model).values():
            layer.keep_booster(1.0, None, torch.Generator().manual_seed(count))
            assert not layer.lora_b.any()
        for name, weight in run.weights().items():
            assert (weight - before[name]).abs().max().item() <= 64 * EPS * before[name].abs().max().item()


def test_a_round_ends_within_the_optimizers_step() -> None:
    run = Run()
    run.step(2)
    seen: dict[str, Tensor] = {}
    handle = run.optimizer.register_step_post_hook(lambda *_: seen.update(run.weights()))  # before the controller's
    with XGBLoRA(run.model, run.optimizer, steps_per_round=1):
        run.step()
    handle.remove()
    for name, weight in run.weights().items():
        assert (weight - seen[name]).abs().max().item() <= 64 * EPS * seen[name].abs().max().item()
        assert not adapters(run.model)[name].lora_b.any()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "fused"])
def test_one_round_is_lora_of_rank_one(optimizer: str) -> None:
    """Invariant §12: one round over all layers ≡ LoRA of rank 1.
    Invariant §20.7: XGBLoRA in one round.
    """
    run = Run(optimizer=optimizer, steps_per_round=4, rounds=1, layers_per_round=2)
    plain = Run("lora", optimizer)
    run.step(6)
    plain.step(6)
    for key, value in plain.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[key], value), key


def test_export_is_the_merged_model_and_its_rank_is_bounded() -> None:
    """Invariant §12: the concatenated export ≡ the merged model; the rank of ΔW is at most r times the rounds."""
    run = Run(steps_per_round=2, rounds=3)
    run.step(6)
    model, x = run.model.eval(), torch.randn(4, 8, dtype=torch.float64)
    merged, lora = copy.deepcopy(model), convert_to_lora(copy.deepcopy(model))
    merge_adapters(merged)
    for name, layer in adapters(lora).items():
        assert layer.rank == 3
        assert torch.linalg.matrix_rank(layer.effective_weight() - layer.weight) == 3
        expected = merged.get_submodule(name).weight
        assert (layer.effective_weight() - expected).abs().max().item() <= 64 * EPS * expected.abs().max().item()
    torch.testing.assert_close(lora(x), model(x), rtol=1e-12, atol=1e-12)
    counts = run.boosting.parameter_counts()
    assert counts["round"] == sum(p.numel() for m in adapters(model).values() for p in m.adapter_parameters().values())
    assert counts["accumulated"] == 3 * counts["round"]


def test_layers_that_are_not_chosen_stay_bit_for_bit() -> None:
    """Invariant §12: layers that are not chosen stay bit for bit."""
    run = Run(steps_per_round=2, layers_per_round=1)
    chosen_ever = set()
    for _ in range(6):
        chosen = set(run.boosting.chosen())
        assert {numbered_block(name) for name in chosen} in ({"encoder.0"}, {"encoder.1"})
        assert len(chosen) == 3
        chosen_ever |= chosen
        before = {key: t.clone() for key, t in run.model.state_dict().items()}
        run.step()  # the first step of a round: nothing is kept yet
        for name, layer in adapters(run.model).items():
            same = [torch.equal(t, before[f"{name}.{key}"]) for key, t in layer.adapter_state().items()]
            assert all(same) == (name not in chosen), name
            assert all(p.requires_grad == (name in chosen) for p in layer.adapter_parameters().values())
        run.step()
    assert chosen_ever == set(adapters(run.model))
    ranks = {name: layer.boosters_a.shape[0] for name, layer in adapters(run.model).items()}
    assert sum(ranks.values()) == 6 * 3
    run.boosting.detach()
    assert all(p.requires_grad for layer in adapters(run.model).values() for p in layer.adapter_parameters().values())
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks


def test_the_schedule_depends_on_seed_and_step_alone() -> None:
    """Invariant §12: the schedule of layers depends on its seed.
    Invariant §20: what is drawn depends on seed and step alone, in every process.
    """

    def schedule(seed: int, draw: bool) -> list[list[str]]:
        run, found = Run(steps_per_round=1, layers_per_round=1, seed=seed), []
        for _ in range(12):
            found.append(run.boosting.chosen())
            if draw:
                torch.randn(3)
            run.step()
        return found

    assert schedule(1, False) == schedule(1, True)
    assert schedule(1, False) != schedule(2, False)


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_resumed_in_the_middle(tmp_path: Any, stop: int) -> None:
    options = {"steps_per_round": 2, "layers_per_round": 1, "seed": 5}
    whole, first, second = Run(**options), Run(**options), Run(**options)
    whole.step(9)
    first.step(stop)
    torch.save([first.model.state_dict(), first.optimizer.state_dict(), first.boosting.state_dict()], tmp_path / "state")
    model, optimizer, boosting = torch.load(tmp_path / "state", weights_only=False)
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    second.boosting.load_state_dict(boosting)
    second.steps = stop
    second.step(9 - stop)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], value), key


def test_moments_of_the_old_booster_are_forgotten() -> None:
    run = Run(steps_per_round=3)
    run.step(2)
    factors = [p for layer in adapters(run.model).values() for p in layer.adapter_parameters().values()]
    assert all(p in run.optimizer.state for p in factors)
    run.step()
    assert not any(p in run.optimizer.state for p in factors)
    assert run.model.head[2].weight in run.optimizer.state
    run.step()
    assert all(run.optimizer.state[p]["step"] == 1 for p in factors)


def test_shrinkage_keeps_a_share_of_each_booster() -> None:
    run = Run(steps_per_round=2, rounds=2, shrinkage=0.25)
    run.step(1)
    plain = Run()
    plain.step(2)
    run.step(1)
    for name, layer in adapters(run.model).items():
        whole = adapters(plain.model)[name].effective_weight() - layer.weight
        share = layer.boosters_b @ layer.boosters_a
        assert (share - 0.25 * whole).abs().max().item() <= 64 * EPS * layer.weight.abs().max().item()
    run.step(1)
    last = {name: layer.lora_b.detach().clone() for name, layer in adapters(run.model).items()}
    run.boosting.detach()
    assert all(layer.boosters_a.shape[0] == 1 for layer in adapters(run.model).values())
    with XGBLoRA(run.model, run.optimizer, steps_per_round=1, rounds=1, shrinkage=0.25):
        run.step(1)
    assert all(layer.lora_b.abs().max() < last[name].abs().max() for name, layer in adapters(run.model).items())


def test_boosters_are_compressed_when_they_outgrow_their_rank() -> None:
    run = Run(steps_per_round=1)
    run.step(12)  # more than min(in, out) = 8 boosters: compressed, and exactly so
    layer = adapters(run.model)["encoder.0.query"]
    assert layer.boosters_a.shape == (8, 8)
    a, b = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    layer.boosters_a, layer.boosters_b = a, b
    perturb(layer)
    exact = b @ a + layer.scale * (layer.lora_b @ layer.lora_a).detach()
    layer.keep_booster(1.0, None, torch.Generator().manual_seed(0))
    assert (layer.boosters_b @ layer.boosters_a - exact).abs().max().item() <= 64 * EPS * exact.abs().max().item()
    layer.keep_booster(1.0, 3, torch.Generator().manual_seed(0))
    best = torch.linalg.svdvals(exact)[3:].norm().item()
    assert (layer.boosters_b @ layer.boosters_a - exact).norm().item() == pytest.approx(best, rel=1e-9)


def test_saved_and_loaded_with_its_boosters(tmp_path: Any) -> None:
    run = Run(steps_per_round=2)
    run.step(5)
    save_adapters(run.model, tmp_path / "f.safetensors")
    loaded = load_adapters(net().double(), tmp_path / "f.safetensors")
    for name, layer in adapters(loaded).items():
        assert layer.boosters_a.shape == (2, 8)
        assert torch.equal(layer.effective_weight(), run.weights()[name])


def test_accumulated_and_skipped_steps_count_as_the_optimizer_does() -> None:
    run = Run(steps_per_round=2)
    x = torch.randn(4, 8, dtype=torch.float64)
    for batch in range(4):
        run.model(x).sum().backward()
        if batch % 2:
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert (run.boosting.step, run.boosting.round) == (2, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(run.model(x * float("inf")).nan_to_num().sum() * float("inf")).backward()
    scaler.step(run.optimizer)
    scaler.update()
    assert run.boosting.step == 2


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"XGBLoRA is for layers of method 'xgblora', and Net has none"):
        Run("lora", steps_per_round=1)
    with pytest.raises(ValueError, match=r"layers_per_round is 3, but the adapted layers lie in 2 blocks \(encoder.0, "):
        Run(steps_per_round=1, layers_per_round=3)
    with pytest.raises(ValueError, match=r"steps_per_round must be an integer of at least 1, got 0"):
        Run(steps_per_round=0)
    with pytest.raises(ValueError, match=r"shrinkage must be in \(0, 1\], got 1.5"):
        Run(steps_per_round=1, shrinkage=1.5)
    run = Run(steps_per_round=1)
    state = run.boosting.state_dict()
    with pytest.raises(ValueError, match=r"saved with steps_per_round=1, and this one has steps_per_round=2"):
        Run(steps_per_round=2).boosting.load_state_dict(state)
    with pytest.raises(ValueError, match=r"boosted_rank must be an integer of at least 0, got -1"):
        inject_adapters(nn.Sequential(nn.Linear(2, 2)), "0", 1, method="xgblora", boosted_rank=-1)
