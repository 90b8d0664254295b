"""param_groups: every trained parameter in exactly one group, with the right rate and decay."""

import math
from typing import Any

import pytest
import torch
from nets import net, refused
from torch.nn import functional as F

from peftlite import METHODS, adapters, inject_adapters, param_groups


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_every_trained_parameter_is_in_one_group(method: str, ratio: float) -> None:
    model = inject_adapters(net(), ["query", "up"], 2, method=method, trainable="head")
    groups = param_groups(model, 1e-3, head_lr=1e-4, weight_decay=0.1, lora_plus_ratio=ratio)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0), name
            if name.startswith("head"):
                assert group["lr"] == 1e-4
            else:
                assert group["lr"] == (1e-3 * ratio if name.endswith("lora_b") else 1e-3)
    kinds = {"adapters", "heads", "heads_no_decay"} | ({"lora_b"} if ratio != 1 else set())
    own = [p for layer in adapters(model).values() for p in layer.adapter_parameters().values()]
    kinds |= {"adapters_no_decay"} if any(p.ndim < 2 for p in own) else set()
    assert {group["name"] for group in groups} == kinds


def test_the_optimizer_takes_them_and_trains() -> None:
    torch.manual_seed(0)
    model, x, target = inject_adapters(net(), "all-linear", 2, method="dora"), torch.randn(32, 8), torch.randn(32, 3)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, lora_plus_ratio=4))
    losses = []
    for _ in range(20):
        loss = F.mse_loss(model(x), target)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_a_tied_parameter_is_listed_once_and_a_plain_model_works() -> None:
    model = net()
    model.encoder[1].query.weight = model.encoder[0].query.weight
    groups = param_groups(model, 1e-3)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {group["name"] for group in groups} == {"heads", "heads_no_decay"}


@pytest.mark.parametrize("name", ["lr", "head_lr", "lora_plus_ratio"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_rates_out_of_range(name: str, value: float) -> None:
    with refused(model := inject_adapters(net(), "query", 2), rf"{name} must be positive, got {value}"):
        arguments: dict[str, Any] = {"lr": 1e-3, name: value}
        param_groups(model, **arguments)


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_decay_out_of_range(value: float) -> None:
    with refused(model := inject_adapters(net(), "query", 2), rf"weight_decay must not be negative, got {value}"):
        param_groups(model, 1e-3, weight_decay=value)


def test_nothing_trains() -> None:
    with refused(model := net().requires_grad_(False), r"no parameter of Net trains; call inject_adapters first"):
        param_groups(model, 1e-3)
