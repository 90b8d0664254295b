"""DyLoRA: every truncation is a LoRA, and a step trains what was drawn and nothing else (Valipour et al. 2022)."""

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from budgets import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from nets import make_layer, net, perturb, refused
from torch import Tensor, nn
from torch.nn import functional as F

from peftlite import DyLoRA, DyLoRALinear, LoRALinear, adapters, convert_to_lora, inject_adapters, param_groups
from peftlite.methods.dylora import set_rank, truncate

DYLORA = ("dylora", {})
OPTIMIZERS = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"centered": True}),
]


def made(rank: int = 4, optimizer: Any = torch.optim.SGD, settings: Any = None, **options: Any) -> Any:
    """A perturbed net in fp64, its optimizer, and the controller."""
    model = inject_adapters(net().double(), ["query", "up"], rank, method="dylora", alpha=6, seed=0)
    perturb(model)
    steps = optimizer(param_groups(model, 0.02), **(settings or {}))
    return model.train(), steps, DyLoRA(model, steps, **options)


def lora_of(layer: DyLoRALinear, rank: int) -> LoRALinear:
    """The plain LoRA of slices, with the same alpha."""
    lora = LoRALinear.from_linear(layer.to_linear(), rank, alpha=layer.alpha, rslora=layer.rslora)
    lora.load_state_dict({**layer.state_dict(), "lora_a": layer.lora_a[:rank], "lora_b": layer.lora_b[:, :rank]})
    return lora


@given(sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)), rslora=st.booleans(), data=st.data())
def test_every_truncation_is_a_lora(sizes: tuple[int, int], rslora: bool, data: st.DataObject) -> None:
    """Invariant §3: forward at rank b ≡ LoRA of the slices with scale α / b; forward at the full rank ≡ LoRA; truncate(b) ≡
    forward at rank b.
    """
    rank = data.draw(st.integers(1, min(sizes)))
    alpha = data.draw(st.sampled_from([None, 0.5, 16]))
    layer = make_layer(DYLORA, *sizes, rank, alpha=alpha, rslora=rslora)
    perturb(layer)
    x = torch.randn(3, sizes[0])
    for b in range(1, rank + 1):
        lora, y = lora_of(layer, b), None
        assert lora.scale == (alpha or rank) / (math.sqrt(b) if rslora else b)
        layer.set_rank(b)
        y = layer(x)
        assert torch.equal(y, lora(x))
        assert torch.equal(layer.effective_weight(), lora.effective_weight())
        cut = copy.deepcopy(layer)
        cut.truncate(b)
        assert torch.equal(cut(x), y)
        assert (cut.rank, cut.scale, sum(p.numel() for p in cut.adapter_parameters().values())) == (
            b, lora.scale, b * sum(sizes)
        )  # fmt: skip
        # What is drawn in training computes the same, by masks.
        layer.set_rank(rank)
        layer.train().draw(b)
        exact = copy.deepcopy(lora).double()(x.double()).detach()
        terms = F.linear(x.abs(), lora.weight.abs() + lora.scale * lora.lora_b.abs() @ lora.lora_a.abs(), lora.bias.abs())
        assert_within_budget("y", layer(x), y, exact, torch.float32, terms.double())
        layer.eval().draw(None)


def test_birth_is_the_base_at_every_rank() -> None:
    """Invariant §3: born as the base at every rank."""
    layer, x = make_layer(DYLORA, 9, 7, 5), torch.randn(4, 9)
    for b in range(1, 6):
        layer.set_rank(b)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.train().draw(b)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.eval()


@pytest.mark.parametrize("update", ["frozen", "full"])
@pytest.mark.parametrize("unit", [1, 2])
def test_gradient_support(update: str, unit: int) -> None:
    """Invariant §3: frozen update: component b alone has a gradient; full update: components above b have none."""
    model, optimizer, controller = made(update=update, unit=unit)
    seen = set()
    for _ in range(12):
        b = controller.rank
        seen.add(b)
        model(torch.randn(5, 8).double()).square().sum().backward()
        for layer in adapters(model).values():
            first = b - unit if update == "frozen" else 0
            oracle = lora_of(layer, b)
            learns = torch.zeros(4, dtype=torch.bool)
            learns[first:b] = True
            assert torch.equal(layer.lora_a.grad.abs().sum(1) > 0, learns)
            assert torch.equal(layer.lora_b.grad.abs().sum(0) > 0, learns)
            assert oracle.rank == b
        optimizer.step()
        optimizer.zero_grad()
    assert seen == set(range(unit, 5, unit))


@pytest.mark.parametrize("update", ["frozen", "full"])
def test_gradients_are_those_of_the_slices(update: str) -> None:
    layer = make_layer(DYLORA, 9, 7, 5, dtype=torch.float64)
    perturb(layer)
    x, dy = torch.randn(6, 9).double(), torch.randn(6, 7).double()
    for b in range(1, 6):
        lora = lora_of(layer, b)
        lora(x).backward(dy)
        layer.train().draw(b, b - 1 if update == "frozen" else 0)
        layer.zero_grad()
        layer(x).backward(dy)
        first = b - 1 if update == "frozen" else 0
        for actual, expected in (
            (layer.lora_a.grad[first:b], lora.lora_a.grad[first:]),
            (layer.lora_b.grad[:, first:b], lora.lora_b.grad[:, first:]),
        ):
            bound = 2 * 7 * 6 * torch.finfo(torch.float64).eps * expected.abs().max()  # sums of at most 42 terms
            assert (actual - expected).abs().max() <= bound


@pytest.mark.parametrize(("optimizer", "settings"), OPTIMIZERS)
@pytest.mark.parametrize("update", ["frozen", "full"])
def test_what_is_not_trained_stays_bit_for_bit(optimizer: Any, settings: Any, update: str) -> None:
    model, steps, controller = made(optimizer=optimizer, settings=settings, update=update)
    for number in range(8):
        b = controller.rank
        parameters = {p: dim for layer in adapters(model).values() for p, dim in ((layer.lora_a, 0), (layer.lora_b, 1))}
        before = {p: {"": p.detach().clone(), **copy.deepcopy(steps.state.get(p, {}))} for p in parameters}
        model(torch.randn(5, 8).double()).square().sum().backward()
        steps.step()
        steps.zero_grad()
        for p, dim in parameters.items():
            outside = [k for k in range(4) if not (b - 1 if update == "frozen" else 0) <= k < b]
            for key, value in {"": p.detach(), **steps.state[p]}.items():
                if value is not None and value.shape == p.shape:
                    old = before[p].get(key, torch.zeros_like(value)) if number else before[p].get(key, torch.zeros_like(p))
                    assert torch.equal(value.index_select(dim, torch.tensor(outside, dtype=torch.int64)),
                                       old.index_select(dim, torch.tensor(outside, dtype=torch.int64)))  # fmt: skip
            assert not torch.equal(p.detach(), before[p][""])


def test_the_authors_way_moves_them() -> None:
    model, optimizer, controller = made(optimizer=torch.optim.AdamW, untouched="advance", ranks=[2], update="frozen")
    before = {name: layer.lora_a.detach().clone() for name, layer in adapters(model).items()}
    model(torch.randn(5, 8).double()).square().sum().backward()
    optimizer.step()
    for name, layer in adapters(model).items():
        assert not torch.equal(layer.lora_a[3], before[name][3])  # by weight decay
    assert controller.rank == 2


def test_draws_follow_the_probabilities() -> None:
    """Invariant §3: drawn ranks follow their probabilities."""
    count = 4000
    for options, expected in [
        ({}, {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}),
        ({"unit": 2}, {2: 0.5, 4: 0.5}),
        ({"ranks": [1, 3], "probabilities": [3, 1]}, {1: 0.75, 3: 0.25}),
    ]:
        controller = made(seed=5, **options)[2]
        drawn = Counter(controller.rank_at(step) for step in range(count))
        assert set(drawn) == set(expected)
        for rank, p in expected.items():
            assert abs(drawn[rank] / count - p) < 5 * math.sqrt(p * (1 - p) / count)  # five standard errors


def test_one_rank_for_the_whole_model_and_smaller_layers_use_all_they_have() -> None:
    model = inject_adapters(net(), ["query", "up"], 4, method="dylora", rank_pattern={"0.query": 2})
    controller = DyLoRA(model, torch.optim.SGD(param_groups(model, 0.1)), ranks=[3])
    assert {name: int(layer.drawn) for name, layer in controller.layers.items()} == {
        "encoder.0.query": 2, "encoder.0.up": 3, "encoder.1.query": 3, "encoder.1.up": 3,
    }  # fmt: skip
    assert controller.layers["encoder.0.query"].live.tolist() == [False, True]
    controller.detach()
    set_rank(model, 3)
    assert [layer.active_rank for layer in adapters(model).values()] == [2, 3, 3, 3]
    truncate(model, 3)
    assert [layer.rank for layer in adapters(model).values()] == [2, 3, 3, 3]
    assert {layer.rank for layer in adapters(convert_to_lora(model)).values()} == {2, 3}


def test_with_the_largest_rank_alone_it_trains_like_lora() -> None:
    """Invariant §20.7: DyLoRA at its full rank."""
    torch.manual_seed(0)
    x, target = torch.randn(16, 8), torch.randn(16, 3)

    def outcome(method: str, dtype: torch.dtype) -> Tensor:
        model = inject_adapters(net().to(dtype), "all-linear", 3, method=method, alpha=6, seed=0)
        optimizer = torch.optim.SGD(param_groups(model, 0.05))
        if method == "dylora":
            DyLoRA(model, optimizer, ranks=[3], update="full")
        for _ in range(3):
            F.mse_loss(model(x.to(dtype)), target.to(dtype)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()(x.to(dtype)).detach()

    eager, oracle = outcome("lora", torch.float32), outcome("lora", torch.float64)
    assert_within_budget("y", outcome("dylora", torch.float32), eager, oracle, torch.float32)


def test_one_training_serves_every_rank() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 16)
    goal = linear.weight.detach() + torch.randn(16, 3) @ torch.diag(torch.tensor([1.0, 0.5, 0.25])) @ torch.randn(3, 16) / 4
    model = inject_adapters(nn.Sequential(linear), "0", 4, method="dylora", seed=0)
    optimizer = torch.optim.AdamW(param_groups(model, 0.03, weight_decay=0.0))
    x = torch.randn(128, 16)
    y = F.linear(x, goal, linear.bias).detach()
    base = F.mse_loss(model(x), y).item()
    with DyLoRA(model, optimizer, update="full"):
        for _ in range(300):
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    losses = []
    for rank in (1, 2, 3, 4):
        set_rank(model.eval(), rank)
        losses.append(F.mse_loss(model(x), y).item())
    assert max(losses) < base / 2
    assert losses[3] < losses[0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own, inside
def test_one_graph_serves_every_drawn_rank() -> None:
    torch.compiler.reset()
    layer = make_layer(DYLORA, 9, 7, 5).train()
    perturb(layer)
    graphs = []
    compiled = torch.compile(layer, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1], fullgraph=True)
    x = torch.randn(4, 9)
    for b in range(1, 6):
        layer.draw(b, b - 1)
        assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 1


WRONG = [
    ({"update": "half"}, r"update must be one of 'frozen', 'full', got 'half'"),
    ({"untouched": "drop"}, r"untouched must be one of 'keep', 'advance', got 'drop'"),
    ({"unit": 0}, r"unit must be an integer of at least 1, got 0"),
    ({"unit": 5}, r"ranks must be multiples of unit = 5 from 1 to 4, the largest rank in the model, got \[\]"),
    ({"ranks": [2, 5]}, r"ranks must be multiples of unit = 1 from 1 to 4, .* got \[5\]"),
    ({"ranks": [0.5]}, r"ranks must be an integer of at least 0, got 0.5"),
    ({"unit": 2, "ranks": [1, 2]}, r"ranks must be multiples of unit = 2 .* got \[1\]"),
    ({"probabilities": [1, 2]}, r"probabilities must be 4 numbers, one for each of the ranks \[1, 2, 3, 4\], .*got \[1, 2\]"),
    ({"probabilities": [0, 0, 0, 0]}, r"none negative and not all 0, got \[0, 0, 0, 0\]"),
    ({"probabilities": [1, -1, 0, math.nan]}, r"none negative and not all 0, got \[1, -1, 0, nan\]"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)


@pytest.mark.parametrize("rank", [0, 5, True, 1.5])
def test_ranks_out_of_range(rank: Any) -> None:
    model = inject_adapters(net(), "query", 4, method="dylora", rank_pattern={"0.query": 2})
    for act in (set_rank, truncate):
        with refused(model, rf"active_rank must be an integer from 1 to the layer's rank 4, got {rank}"):
            act(model, rank)
        with refused(plain := net(), r"Net has no layer of method 'dylora', whose rank could be set"):
            act(plain, 1)


def test_no_truncation_under_a_controller() -> None:
    model = made()[0]
    with refused(model, r"a DyLoRA controller still draws ranks for this layer; call its detach\(\) before truncating"):
        truncate(model, 2)
