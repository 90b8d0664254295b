"""top_layers and train_only: what trains, and that the backward pass goes no further down than it must."""

from pathlib import Path

import pytest
import torch
from nets import Net, net, perturb, refused
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from peftlite import (
    METHODS,
    adapters,
    inject_adapters,
    load_adapters,
    param_groups,
    save_adapters,
    summary,
    top_layers,
    train_only,
)


def test_takes_the_targets_of_the_last_layers() -> None:
    model = net()
    inject_adapters(model, top_layers(model, ["query", "up"], 1), 2)
    assert list(adapters(model)) == ["encoder.1.query", "encoder.1.up"]
    model = net()
    inject_adapters(model, top_layers(model, "all-linear", 2, exclude="head.*"), 2)
    assert len(adapters(model)) == 8


def test_the_outermost_number_counts_and_names_that_only_end_alike_are_left_alone() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(net().encoder, net().encoder), "b": net().encoder, "query": nn.Linear(8, 8)})
    inject_adapters(model, top_layers(model, "query", 1), 2)
    assert list(adapters(model)) == ["a.1.0.query", "a.1.1.query", "b.1.query"]


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_is_computed_below(method: str) -> None:
    """Invariant §16: adapters in the top layers: no gradient is computed below."""
    model = net()
    inject_adapters(model, top_layers(model, ["query", "up"], 1), 2, method=method)
    perturb(model)
    below: list[Tensor] = []
    model.encoder[0].register_forward_hook(lambda module, inputs, output: below.append(output))
    with FlopCounterMode(display=False) as forward:
        y = model.eval()(torch.randn(5, 8))
    assert [output.requires_grad for output in below] == [False]
    with FlopCounterMode(display=False) as backward:
        y.square().sum().backward()
    own = {id(p) for layer in adapters(model).values() for p in layer.adapter_parameters().values()}
    assert {id(p) for p in model.parameters() if p.grad is not None} == own
    whole = inject_adapters(net(), ["query", "up"], 2, method=method)
    perturb(whole)
    y = whole.eval()(torch.randn(5, 8))
    with FlopCounterMode(display=False) as deeper:
        y.square().sum().backward()
    assert backward.get_total_flops() < deeper.get_total_flops()
    assert forward.get_total_flops() > 0


def test_what_is_no_stack_and_counts_that_do_not_fit() -> None:
    for count in (0, 3, True, 1.0):
        with refused(model := net(), r"count must be an integer from 1 to 2, the number of layers in 'encoder', got"):
            top_layers(model, "query", count)
    flat = nn.ModuleDict({"query": nn.Linear(4, 4)})
    with refused(flat, r"no target lies in the last 1 numbered layers of ModuleDict: 'query' and the others lie in none; name"):
        top_layers(flat, "query", 1)
    uneven = nn.Sequential(nn.ModuleDict({"query": nn.Linear(4, 4)}), nn.ModuleDict({"value": nn.Linear(4, 4)}))
    with refused(uneven, r"no target lies in the last 1 numbered layers of Sequential: the last ones hold no target; name the"):
        top_layers(uneven, "query", 1)
    with refused(model, r"target 'querry' matches no nn.Linear"):
        top_layers(model, "querry", 1)


def bitfit() -> Net:
    """A net whose biases and head train."""
    return train_only(net(), ["bias", "head"])


def test_bitfit_trains_biases_and_the_head_and_nothing_else() -> None:
    model = bitfit()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.endswith(".bias") or name.startswith("head.")}
    assert summary(model).trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {group["name"] for group in param_groups(model, 1e-3)} == {"heads", "heads_no_decay"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2))
    model(torch.randn(16, 8)).square().sum().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in trained if name.startswith("encoder.")} <= changed <= trained


def test_bitfit_is_saved_and_loaded(tmp_path: Path) -> None:
    model, x = bitfit(), torch.randn(5, 8)
    perturb(model)
    save_adapters(model, tmp_path / "f")
    loaded = load_adapters(net(), tmp_path / "f")
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_train_only_refuses_adapters_nothing_and_unknown_names() -> None:
    with refused(inject_adapters(model := net(), "query", 2), r"carries 2 adapters .*which train_only would freeze; name what"):
        train_only(model, "bias")
    with refused(model := net(), r"trainable 'biass' matches no module or parameter"):
        train_only(model, "biass")
    with refused(model, r"trainable is empty, and nothing would train; name modules or parameters"):
        train_only(model, [])
