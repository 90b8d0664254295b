"""OffloadedAdamW: bit for bit torch's AdamW, with the moments on the host."""

import copy
from typing import Any

import pytest
import torch
from nets import net
from torch import Tensor, nn

import peftlite.training.offload
from peftlite import inject_adapters, param_groups, quantize_base
from peftlite.training import OffloadedAdamW

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
devices = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))],
)


def model_on(device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = quantize_base(net().encoder.to(dtype), ["query", "value"])
    return inject_adapters(model, "all-linear", 2, method="dora", seed=0).to(device)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    p = next(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(X.to(p.device)).square().mean().backward()
        optimizer.step()


def assert_same(first: Any, second: Any) -> None:
    values = [list(m.parameters()) for m in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state_dict()["state"].values() for value in state.values()]


@devices
@pytest.mark.parametrize("bucket", [1 << 20, 0])
def test_the_bits_are_those_of_torch(device: str, bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peftlite.training.offload, "BUCKET", bucket)
    ours, theirs = model_on(device), model_on(device)
    options = {"betas": (0.8, 0.95), "eps": 1e-6}
    mine = OffloadedAdamW(param_groups(ours, 1e-2, lora_plus_ratio=4), **options)
    reference = torch.optim.AdamW(param_groups(theirs, 1e-2, lora_plus_ratio=4), **options, foreach=False)
    train(ours, mine, 6)
    train(theirs, reference, 6)
    assert_same(ours, theirs)
    assert {value.device.type for value in states(mine)} == {"cpu"}
    for a, b in zip(states(mine), states(reference), strict=True):
        assert torch.equal(a, b.cpu())


@devices
@pytest.mark.parametrize(("first", "second"), [(OffloadedAdamW, torch.optim.AdamW), (torch.optim.AdamW, OffloadedAdamW)])
def test_states_go_from_one_to_the_other(device: str, first: Any, second: Any) -> None:
    whole, halves = model_on(device), model_on(device)
    train(whole, torch.optim.AdamW(param_groups(whole, 1e-2), foreach=False), 6)
    before = first(param_groups(halves, 1e-2), **({"foreach": False} if first is torch.optim.AdamW else {}))
    train(halves, before, 3)
    state = copy.deepcopy(before.state_dict())
    after = second(param_groups(halves, 0.5), **({"foreach": False} if second is torch.optim.AdamW else {}))
    if second is torch.optim.AdamW:  # its groups have more options, and load_state_dict takes those of the file
        for group, default in zip(state["param_groups"], after.state_dict()["param_groups"], strict=True):
            group.update({key: value for key, value in default.items() if key not in group})
    after.load_state_dict(state)
    train(halves, after, 3)
    assert_same(whole, halves)
    if second is OffloadedAdamW:
        assert {value.device.type for value in states(after)} == {"cpu"}


def test_closures_missing_gradients_and_groups_added_later() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = OffloadedAdamW([a], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = a.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    optimizer.add_param_group({"params": [b]})
    before = b.detach().clone()
    optimizer.step()
    assert torch.equal(b, before)
    assert b not in optimizer.state or not optimizer.state[b]


def test_gradient_scaling_skips_steps_that_overflowed() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer, scaler = OffloadedAdamW([p], lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, torch.inf):
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        before = p.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, p) == (factor != 1.0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, "lr, eps and weight_decay must not be negative, got -1.0"),
        ({"weight_decay": float("nan")}, "must not be negative"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        OffloadedAdamW([nn.Parameter(torch.ones(1))], **options)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"takes dense gradients, and one is sparse; use torch.optim.SparseAdam"):
        OffloadedAdamW(embedding.parameters()).step()


def test_devices_without_streams_are_refused() -> None:
    p = nn.Parameter(torch.ones(2, device="meta"))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="moves moments to CUDA devices, got a parameter on meta; use torch's AdamW"):
        OffloadedAdamW([p]).step()
