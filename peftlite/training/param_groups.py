"""Parameter groups for the optimizer of an adapted model."""

from typing import Any

from torch import nn

from peftlite.adapter import AdapterLinear


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.01,
    head_lr: float | None = None,
    lora_plus_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Group the parameters of `model` that train, for any torch optimizer.

    Matrices decay, vectors (biases, norms, DoRA's magnitude) do not. What trains outside the adapters has its own
    learning rate. Empty groups are left out.

    Args:
        model: a model after `inject_adapters` (or any other).
        lr: learning rate of the adapters.
        weight_decay: decay of the matrices.
        head_lr: learning rate of what trains outside the adapters, by default `lr`.
        lora_plus_ratio: learning rate of `lora_b` over that of the rest of the adapter; LoRA+ (Hayou et al. 2024,
            arXiv:2402.12354) recommends about 16.

    Returns:
        Groups with ``name`` (``adapters``, ``lora_b``, ``heads``, each perhaps followed by ``_no_decay``), ``params``,
        ``lr`` and ``weight_decay``.

    Raises:
        ValueError: if nothing trains, or for a learning rate, decay or ratio out of range.

    Example:
        >>> from peftlite import inject_adapters
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> groups = param_groups(inject_adapters(model, "0", rank=4, trainable="2"), lr=1e-3, head_lr=1e-4)
        >>> [(group["name"], group["lr"], len(group["params"])) for group in groups]
        [('adapters', 0.001, 2), ('heads', 0.0001, 1), ('heads_no_decay', 0.0001, 1)]
    """
    head_lr = lr if head_lr is None else head_lr
    for name, value in {"lr": lr, "head_lr": head_lr, "lora_plus_ratio": lora_plus_ratio}.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}.")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay!r}.")
    layers = [m for m in model.modules() if isinstance(m, AdapterLinear)]
    owner = {id(p): key for layer in layers for key, p in layer.adapter_parameters().items()}
    groups: dict[str, dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        key = owner.get(id(parameter))
        kind, rate = ("adapters", lr) if key is not None else ("heads", head_lr)
        if key is not None and key.rpartition(".")[2] == "lora_b" and lora_plus_ratio != 1.0:
            kind, rate = "lora_b", lr * lora_plus_ratio
        decays = parameter.ndim >= 2
        kind += "" if decays else "_no_decay"
        group = groups.setdefault(
            kind, {"name": kind, "params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0}
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError(f"no parameter of {type(model).__name__} trains; call inject_adapters first.")
    return list(groups.values())
