"""Task order, learning rates and unfreezing: pure functions of their settings."""

import math
from collections import Counter

import pytest

from examples.minbert_multitask.network import adapted_parameters, build_network, prepare_training
from examples.minbert_multitask.schedule import (
    SAMPLINGS,
    apportion,
    lr_factor,
    plan_steps,
    release,
    released_layers,
)

SIZES = {"sst": 6, "quora": 20, "sts": 4}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_plan_is_fixed_by_its_settings_and_numbers_each_tasks_steps(sampling):
    plan = plan_steps(SIZES, sampling=sampling, seed=1, epochs=3)
    assert plan == plan_steps(SIZES, sampling=sampling, seed=1, epochs=3)
    assert len(plan) == 90
    for task in SIZES:
        numbers = [step.number for step in plan if step.task == task]
        assert numbers == list(range(len(numbers)))
    # A plan of a given number of steps is the beginning of the longer one (annealing depends on the number of epochs)
    if sampling != "annealed":
        assert plan_steps(SIZES, sampling=sampling, seed=1, steps=50) == plan[:50]


@pytest.mark.parametrize("sampling", ["sequential", "proportional"])
def test_an_epoch_is_one_pass_over_each_task(sampling):
    plan = plan_steps(SIZES, sampling=sampling, seed=1, epochs=2)
    for epoch in (plan[:30], plan[30:]):
        assert Counter(step.task for step in epoch) == SIZES


def test_the_samplings_order_tasks_as_they_say():
    sequential = [step.task for step in plan_steps(SIZES, sampling="sequential", seed=1, epochs=1)]
    assert sequential == ["sst"] * 6 + ["quora"] * 20 + ["sts"] * 4
    turns = [step.task for step in plan_steps(SIZES, sampling="round-robin", seed=1, epochs=1)]
    assert turns == ["sst", "quora", "sts"] * 10
    shuffled = [plan_steps(SIZES, sampling="proportional", seed=seed, epochs=1) for seed in (1, 2)]
    assert shuffled[0] != shuffled[1]
    annealed = plan_steps(SIZES, sampling="annealed", seed=1, epochs=3)
    first, last = Counter(s.task for s in annealed[:30]), Counter(s.task for s in annealed[60:])
    assert first == SIZES
    powers = {task: size**0.2 for task, size in SIZES.items()}
    assert last == apportion(30, powers)
    assert last["quora"] < first["quora"]


def test_apportion_adds_up():
    assert apportion(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert apportion(7, {"a": 3, "b": 4}) == {"a": 3, "b": 4}


def test_plan_errors():
    with pytest.raises(ValueError, match="sampling 'random' is unknown; choose one of sequential, round-robin"):
        plan_steps(SIZES, sampling="random", seed=1, epochs=1)
    with pytest.raises(ValueError, match="give either epochs or steps, at least 1; got epochs=1, steps=2"):
        plan_steps(SIZES, sampling="annealed", seed=1, epochs=1, steps=2)
    with pytest.raises(ValueError, match="task 'sst' has no training example"):
        plan_steps({"sst": 0}, sampling="annealed", seed=1, epochs=1)


def test_learning_rate_warms_up_and_decays():
    linear = [lr_factor(step, 100, warmup=0.1, schedule="linear") for step in range(100)]
    assert linear[:10] == [(step + 1) / 11 for step in range(10)]
    assert linear[10] == 1.0
    assert linear[99] == pytest.approx(1 / 90, rel=1e-12)
    cosine = [lr_factor(step, 100, warmup=0.0, schedule="cosine") for step in range(100)]
    assert cosine[0] == 1.0
    assert cosine[50] == pytest.approx(0.5, rel=1e-12)
    assert all(math.isclose(a + b, 1.0) for a, b in zip(cosine[1:], reversed(cosine[1:]), strict=True))
    assert lr_factor(99, 100, warmup=0.0, schedule="constant") == 1.0
    with pytest.raises(ValueError, match="lr-schedule 'step' is unknown; choose one of linear, cosine, constant"):
        lr_factor(0, 1, warmup=0, schedule="step")


def test_layers_are_released_a_quarter_per_epoch():
    assert [released_layers(epoch, 12) for epoch in range(6)] == [0, 3, 6, 9, 12, 12]
    assert [released_layers(epoch, 6) for epoch in range(6)] == [0, 2, 3, 5, 6, 6]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_release_reaches_the_top_layers_first_and_never_what_an_adapter_covers(tiny, method):
    settings = tiny(method=method, unfreeze="progressive").resolved()
    network, _ = build_network(settings)
    prepare_training(network, settings)
    protected = adapted_parameters(network)
    before = {id(p): p.requires_grad for p in network.parameters() if id(p) in protected}
    assert bool(before) == (method == "lora")
    assert release(network.backbones, protected, 0, 2) == []
    for epoch, layers in ((2, {"1"}), (3, {"0", "1"})):
        names = release(network.backbones, protected, epoch, 2)
        assert {name.split(".")[3] for name in names} == layers
    everything = release(network.backbones, protected, 4, 2)
    assert "shared.embeddings.word_embeddings.weight" in everything
    assert len(everything) == len(list(network.backbones.parameters())) - len(before)
    assert {id(p): p.requires_grad for p in network.parameters() if id(p) in protected} == before
