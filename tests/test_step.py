"""benchmark_step: what a training step costs, candidate by candidate."""

import copy
from typing import Any

import pytest
import torch
from nets import net, snapshot
from torch import Tensor, nn

from peftlite import METHODS
from peftlite.analysis import StepReport, benchmark_step
from peftlite.analysis.step import PHASES


def toy() -> nn.Module:
    """A few wide layers, the parameters of which outweigh the activations."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))


@pytest.fixture(scope="module")
def report() -> StepReport:
    """All candidates there are, on the toy."""
    names = ["frozen", "full", *METHODS]
    return benchmark_step(toy(), torch.randn(8, 64), candidates=names, rank=2, top=1, rounds=2, warmup=1)


def test_lora_needs_less_memory_than_full_fine_tuning(report: StepReport) -> None:
    """Invariant §16: LoRA takes less memory than full fine-tuning."""
    full, lora, frozen = report["full"], report["lora"], report["frozen"]
    assert frozen.peak_mib < lora.peak_mib < full.peak_mib
    assert frozen.resident_mib < lora.resident_mib < full.resident_mib


def test_memory_is_counted_to_the_byte(report: StepReport) -> None:
    weights = 4 * (64 * 64 + 64)
    expected = {
        "frozen": weights,
        "full": weights + 2 * weights + 8,  # two moments, and a step counter for each of eight parameters
        "lora": weights + 3 * (4 * 2 * 128) + 8,
    }
    assert {name: report[name].resident_mib * 2**20 / 4 for name in expected} == expected
    for name, cost in {name: report[name] for name in ("full", "lora")}.items():
        assert cost.peak_mib - cost.resident_mib > 4 * cost.trained / 2**20, name  # the gradients are alive at once


def test_operations_and_parameters_are_those_of_the_candidate(report: StepReport) -> None:
    assert list(report["lora"].operations) == list(PHASES)
    assert report["full"].operations["forward"] < report["lora"].operations["forward"]
    assert report["frozen"].operations["backward"] == report["frozen"].operations["optimizer"] == 0
    assert report["full"].operations["backward"] >= 4
    assert (report["frozen"].trained, report["full"].trained) == (0, 4 * (64 * 64 + 64))
    assert report["lora"].trained == 4 * 2 * 128


def test_adapters_in_the_last_layer_spare_the_backward_pass_below(report: StepReport) -> None:
    last, every = report["lora, top 1"], report["lora"]
    assert last.trained * 4 == every.trained
    assert last.operations["backward"] * 2 < every.operations["backward"]
    assert last.peak_mib < every.peak_mib


def test_times_are_those_of_the_phases(report: StepReport) -> None:
    for cost in report.costs:
        assert cost.step == sum(cost.milliseconds.values())
        assert all((cost.milliseconds[phase] > 0) == (phase == "forward" or cost.name != "frozen") for phase in PHASES)
    lines = str(report).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["frozen", "full", *METHODS, "lora, top 1"]
    assert len({len(line) for line in lines}) == 1
    assert report.device == "cpu"


def test_the_model_and_the_random_state_are_left_alone() -> None:
    model = net()
    model.head.append(nn.Dropout(0.5))
    x = torch.randn(4, 8)
    before, values, state = snapshot(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    benchmark_step(model, x, candidates=["full", "lora"], rounds=1, warmup=1, rank=2)
    assert snapshot(model) == before
    assert all(torch.equal(t, values[key]) for key, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_candidates_losses_and_batches_of_ones_own() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
            return {"y": scale * self.linear(x)}

    def bias_only(model: nn.Module) -> nn.Module:
        model.requires_grad_(False).linear.bias.requires_grad_(True)
        return model

    x = torch.randn(3, 4)
    options: dict[str, Any] = {"candidates": {"bias": bias_only}, "loss": lambda out: out["y"].sum(), "rounds": 1}
    for batch in (x, (x,), {"x": x, "scale": 2.0}):
        cost = benchmark_step(Pair(), batch, **options)["bias"]
        assert cost.trained == 2
    sgd = benchmark_step(Pair(), x, **options, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))["bias"]
    assert sgd.resident_mib < cost.resident_mib


def test_autocast_reaches_the_forward_pass() -> None:
    seen = []

    def loss(out: Tensor) -> Tensor:
        seen.append(out.dtype)
        return out.float().sum()

    options: dict[str, Any] = {"candidates": ["full"], "loss": loss, "rounds": 1, "warmup": 1}
    wide = benchmark_step(toy(), torch.randn(32, 64), **options)["full"]
    assert set(seen) == {torch.float32}
    seen.clear()
    narrow = benchmark_step(toy(), torch.randn(32, 64), **options, autocast=torch.bfloat16)["full"]
    assert set(seen) == {torch.bfloat16}
    assert narrow.operations["forward"] > wide.operations["forward"]  # the casts


def test_errors() -> None:
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match=r"unknown candidate 'loar'; there are frozen, full, lora, dora"):
        benchmark_step(toy(), x, candidates=["loar"])
    with pytest.raises(ValueError, match=r"rounds and warmup must be at least 1, got 0 and 3"):
        benchmark_step(toy(), x, rounds=0)
    with pytest.raises(ValueError, match=r"the model returns tuple, so give `loss`"):
        benchmark_step(nn.LSTM(64, 64), x, candidates=["full"])
    with pytest.raises(ValueError, match=r"loss must give a tensor with one element"):
        benchmark_step(toy(), x, candidates=["full"], loss=lambda out: out)
    with pytest.raises(KeyError, match=r"no candidate 'dora' was measured; there are frozen"):
        benchmark_step(toy(), x, candidates=["frozen"], rounds=1)["dora"]
