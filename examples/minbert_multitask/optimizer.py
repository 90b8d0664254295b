"""The optimizer: which parameter gets which learning rate, and its state as named tensors."""

from __future__ import annotations

from torch import Tensor, nn, optim

import peftlite
from examples.minbert_multitask.network import MultitaskBert, adapted_parameters
from examples.minbert_multitask.settings import Settings


def make_optimizer(network: MultitaskBert, settings: Settings) -> optim.Optimizer:
    """AdamW or Adamax over everything that the run will ever train; each group keeps its peak rate as `peak_lr`.

    Call it before `schedule.release` freezes what progressive unfreezing trains later.
    """
    if settings.has_adapters():
        groups = peftlite.param_groups(
            network, settings.lr, weight_decay=settings.weight_decay, head_lr=settings.head_lr
        )
        if settings.unfreeze == "progressive":
            protected = adapted_parameters(network)
            released = [p for p in network.backbones.parameters() if id(p) not in protected]
            groups += _groups(released, settings.unfreeze_lr, settings.weight_decay)
    else:
        backbone = [p for p in network.backbones.parameters() if p.requires_grad]
        groups = _groups(backbone, settings.lr, settings.weight_decay)
        groups += _groups(list(network.heads.parameters()), settings.head_lr, settings.weight_decay)
    for group in groups:
        group["peak_lr"] = group["lr"]
    if settings.optimizer == "adamax":
        return optim.Adamax(groups)
    return optim.AdamW(groups, fused=True)


def _groups(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> list[dict]:
    """Two groups: matrices, and the vectors (biases, norms), which are not decayed."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    return [
        {"params": params, "lr": lr, "weight_decay": decay}
        for params, decay in ((matrices, weight_decay), (vectors, 0.0))
        if params
    ]


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
