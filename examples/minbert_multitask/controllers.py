"""Methods that change the training step: which controller a run has, and its state in the run's files."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from torch import Tensor, nn, optim

import peftlite
from examples.minbert_multitask.settings import Settings

Values = dict[str, Any]


BOOSTING_ROUNDS = 4


def injected_rank(settings: Settings) -> int:
    """The rank to inject: AdaLoRA prunes from 1.5 times the rank that it is to reach, XGBLoRA reaches it in rounds."""
    if settings.method == "adalora":
        return math.ceil(1.5 * settings.rank)
    return math.ceil(settings.rank / BOOSTING_ROUNDS) if settings.method == "xgblora" else settings.rank


def make_controller(
    backbones: nn.Module, optimizer: optim.Optimizer, settings: Settings, steps: int
) -> peftlite.Controller | None:
    """The controller of `settings.method` for a run of `steps` optimizer steps; None for methods that have none."""
    if settings.method == "adalora":
        return peftlite.AdaLoRA(backbones, optimizer, total_steps=steps, target_rank=settings.rank)
    if settings.method == "dylora":
        return peftlite.DyLoRA(backbones, optimizer, seed=settings.seed)
    if settings.method == "xgblora":
        period = max(1, steps // BOOSTING_ROUNDS)  # the last round has the rest
        return peftlite.XGBLoRA(
            backbones, optimizer, steps_per_round=period, rounds=BOOSTING_ROUNDS, seed=settings.seed
        )
    if settings.method == "reflora":  # the paper's 100 steps of warm-up are too many for a short run
        return peftlite.RefLoRA(backbones, optimizer, warmup_steps=min(100, math.ceil(settings.warmup * steps) + 1))
    if settings.method == "lisa":
        layers = [layer for bert in backbones.children() for layer in bert.encoder.layer]
        active = max(1, min(2, len(layers) // 2))
        period = max(1, min(20, steps // 10))  # a short run must change its layers too
        return peftlite.LISA(backbones, optimizer, layers, active=active, period=period, seed=settings.seed)
    return None


def saving(controller: peftlite.Controller | None) -> contextlib.AbstractContextManager[None]:
    """A block in which everything that the run trains counts as training, so that it is saved."""
    return controller.all_training() if isinstance(controller, peftlite.LISA) else contextlib.nullcontext()


def controller_state(controller: peftlite.Controller | None) -> tuple[dict[str, Tensor], Values]:
    """The controller's state as `controller.<key>.<name>` tensors, and plain values."""
    if controller is None:
        return {}, {}
    state = controller.state_dict()
    nested = {key: value for key, value in state.items() if isinstance(value, dict) and key != "settings"}
    tensors = {f"controller.{key}.{name}": value for key, entry in nested.items() for name, value in entry.items()}
    return tensors, {**{key: value for key, value in state.items() if key not in nested}, "nested": list(nested)}


def load_controller_state(controller: peftlite.Controller | None, tensors: dict[str, Tensor], values: Values) -> None:
    """Put back what `controller_state` gave."""
    if controller is None:
        return
    nested: dict[str, dict[str, Tensor]] = {key: {} for key in values["nested"]}
    for name, value in tensors.items():
        prefix, _, rest = name.partition(".")
        if prefix == "controller":
            key, name = rest.split(".", 1)
            nested[key][name] = value
    plain = {key: value for key, value in values.items() if key != "nested"}
    controller.load_state_dict({**plain, **nested})
