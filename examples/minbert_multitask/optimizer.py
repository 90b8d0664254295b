"""The optimizer: which parameter gets which learning rate, and its state as named tensors."""

from __future__ import annotations

from torch import Tensor, optim

import peftlite
from examples.minbert_multitask.network import MultitaskBert, adapted_parameters
from examples.minbert_multitask.settings import Settings


def make_optimizer(
    network: MultitaskBert, settings: Settings, *, lora_plus_ratio: float = 1.0
) -> optim.Optimizer:
    """AdamW or Adamax over everything that the run will ever train; each group keeps its peak rate as `peak_lr`.

    With progressive unfreezing all that will be released must be in it, so that is left trainable: `schedule.release`
    freezes it again until its time. For `lora_plus_ratio` see `peftlite.param_groups`.
    """
    groups = peftlite.param_groups(network.heads, settings.head_lr, weight_decay=settings.weight_decay)
    if settings.method != "linear-probe":
        if settings.unfreeze == "progressive":
            protected = adapted_parameters(network)
            for parameter in network.backbones.parameters():
                if id(parameter) not in protected:
                    parameter.requires_grad_(True)
        beside_adapters = settings.unfreeze_lr if settings.has_adapters() else settings.lr
        groups += peftlite.param_groups(
            network.backbones,
            settings.lr,
            head_lr=beside_adapters,
            weight_decay=settings.weight_decay,
            lora_plus_ratio=lora_plus_ratio,
        )
    for group in groups:
        group["peak_lr"] = group["lr"]
    if settings.optimizer == "adamax":
        return optim.Adamax(groups)
    return optim.AdamW(groups, fused=True)


def optimizer_tensors(optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `optimizer.<index>.<key>` tensors, the index counting parameters over the groups."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(optimizer: optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, into an optimizer over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        prefix, _, rest = name.partition(".")
        if prefix == "optimizer":
            index, key = rest.split(".", 1)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
