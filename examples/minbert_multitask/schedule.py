"""What happens at which step: the task, the learning rate, the layers that train. Pure functions of (settings, step).

Nothing here has state, so a resumed run needs to know its step and nothing else.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

from torch import nn

SAMPLINGS = ("sequential", "round-robin", "proportional", "annealed")
LR_SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Step:
    """One optimizer step: the task and its running number among the steps of that task, from 0."""

    task: str
    number: int


def plan_steps(
    sizes: dict[str, int], *, sampling: str, seed: int, epochs: int | None = None, steps: int | None = None
) -> list[Step]:
    """The whole sequence of optimizer steps, fixed by `(sizes, sampling, seed)` alone.

    An epoch is as many steps as one pass over every task takes, whatever the sampling, so that samplings compare at
    equal cost. `sequential`: one pass of each task after the other. `round-robin`: the tasks in turn. `proportional`:
    one pass of each, shuffled. `annealed`: shares ∝ N^α with α = 1 - 0.8 (e - 1)/(E - 1) in epoch e of E, shuffled
    (Stickland and Murray 2019, arXiv:1902.02671): large tasks first, then all alike.

    Args:
        sizes: Steps that one pass over each task takes.
        sampling: One of `SAMPLINGS`.
        seed: Seed of the shuffles.
        epochs: Number of epochs; or
        steps: total number of steps.

    Raises:
        ValueError: Unknown sampling, an empty task, or not exactly one of `epochs` and `steps`, >= 1.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling {sampling!r} is unknown; choose one of {', '.join(SAMPLINGS)}")
    if (epochs is None) == (steps is None) or (epochs or steps or 0) < 1:
        raise ValueError(f"give either epochs or steps, at least 1; got epochs={epochs}, steps={steps}")
    for task, size in sizes.items():
        if size < 1:
            raise ValueError(f"task {task!r} has no training example")
    per_epoch = sum(sizes.values())
    total = epochs * per_epoch if epochs is not None else steps
    n_epochs = math.ceil(total / per_epoch)
    order: list[str] = []
    for epoch in range(n_epochs):
        order += _epoch_order(sizes, sampling, random.Random(f"{seed}/{epoch}"), epoch, n_epochs)
    plan, seen = [], dict.fromkeys(sizes, 0)
    for task in order[:total]:
        plan.append(Step(task, seen[task]))
        seen[task] += 1
    return plan


def _epoch_order(sizes: dict[str, int], sampling: str, rng: random.Random, epoch: int, n_epochs: int) -> list[str]:
    """The tasks of one epoch, in order."""
    total = sum(sizes.values())
    if sampling == "sequential":
        return [task for task, size in sizes.items() for _ in range(size)]
    if sampling == "round-robin":
        names = list(sizes)
        # Each epoch goes on where the last one stopped, so that no task is favoured when they do not divide the epoch.
        return [names[(epoch * total + i) % len(names)] for i in range(total)]
    counts = dict(sizes)
    if sampling == "annealed":
        alpha = 1 - 0.8 * epoch / max(1, n_epochs - 1)
        counts = apportion(total, {task: size**alpha for task, size in sizes.items()})
    order = [task for task, count in counts.items() for _ in range(count)]
    rng.shuffle(order)
    return order


def apportion(total: int, weights: dict[str, float]) -> dict[str, int]:
    """Whole numbers that add up to `total`, in proportion to `weights` (largest remainders)."""
    whole = sum(weights.values())
    exact = {name: total * weight / whole for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda n: counts[n] - exact[n])[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def lr_factor(step: int, total: int, *, warmup: float, schedule: str) -> float:
    """Share of the peak learning rate at `step` (from 0) of `total`: linear warm-up, then decay to 0, or constant.

    Args:
        step: Number of the step.
        total: Number of steps of the whole run.
        warmup: Share of the steps that warm up, in [0, 1).
        schedule: `"linear"` or `"cosine"` decay, or `"constant"`.
    """
    if schedule not in LR_SCHEDULES:
        raise ValueError(f"lr-schedule {schedule!r} is unknown; choose one of {', '.join(LR_SCHEDULES)}")
    warm = round(warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warm) / max(1, total - warm)
    return 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def released_layers(epoch: int, layers: int) -> int:
    """How many of the top layers train in `epoch` (from 0): none, then a quarter more each, all from epoch 4 on."""
    return min(layers, math.ceil(layers * epoch / 4))


def release(backbones: nn.Module, protected: set[int], epoch: int, layers: int) -> list[str]:
    """Let what progressive unfreezing reaches in `epoch` train and freeze the rest; return the names of what trains.

    From epoch 4 on the embeddings train as well. Parameters whose `id` is in `protected` (the adapters, and the
    base weights and biases under them) are never touched: a base weight that trained below its adapter would make the
    update full rank, the flaw of the paper's own runs.
    """
    first = layers - released_layers(epoch, layers)
    names = []
    for name, parameter in backbones.named_parameters():
        if id(parameter) in protected:
            continue
        layer = re.search(r"encoder\.layer\.(\d+)\.", name)
        trains = int(layer[1]) >= first if layer else epoch >= 4
        parameter.requires_grad_(trains)
        if trains:
            names.append(name)
    return names
