"""inject_adapters: what is replaced and frozen, and every error, after which the model is exactly as before."""

import copy
import math
from typing import Any

import pytest
import torch
from nets import Net, net, perturb, refused
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from peftlite import (
    METHODS,
    DoRALinear,
    LoRALinear,
    adapters,
    disable_adapters,
    find_targets,
    inject_adapters,
    remove_adapters,
)


def test_targets_by_last_segment_glob_list_and_callable() -> None:
    assert list(find_targets(net(), "query")) == ["encoder.0.query", "encoder.1.query"]
    assert list(find_targets(net(), ["value", "encoder.1.*"])) == [
        "encoder.0.value",
        *(f"encoder.1.{name}" for name in ("query", "value", "up", "down")),
    ]
    assert list(find_targets(net(), "encoder.0.query")) == ["encoder.0.query"]
    assert list(find_targets(net(), lambda name, module: module.out_features == 3)) == ["head.2"]
    assert len(find_targets(net(), "all-linear")) == 10
    assert len(find_targets(net(), "all-linear", exclude=["head.*", "encoder.0.*"])) == 4


def test_freezes_everything_but_adapters_and_trainable() -> None:
    model = inject_adapters(net(), "all-linear", 2, trainable=["head", "norm.bias"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    own = {f"{name}.{key}" for name, layer in adapters(model).items() for key in layer.adapter_parameters()}
    heads = {name for name, _ in model.named_parameters() if name.startswith("head.")}
    assert trained == own | heads | {"encoder.0.norm.bias", "encoder.1.norm.bias"}
    assert all(not name.startswith("head") for name in adapters(model))


def test_takes_the_parameters_over_and_copies_nothing() -> None:
    model = net()
    before = {name: id(p) for name, p in model.named_parameters()}
    inject_adapters(model, "all-linear", 2, method="dora")
    assert {name: id(p) for name, p in model.named_parameters() if name in before} == before


@pytest.mark.parametrize("training", [True, False])
def test_keeps_the_training_mode(training: bool) -> None:
    model = inject_adapters(net().train(training), "query", 2)
    assert {layer.training for layer in adapters(model).values()} == {training}


def test_patterns_give_rank_and_alpha_by_name() -> None:
    model = inject_adapters(
        net(), ["query", "up"], 2, alpha=4, rank_pattern={"encoder.0.query": 3, "query": 5}, alpha_pattern={"up": 1}
    )
    assert {name: (layer.rank, layer.scale) for name, layer in adapters(model).items()} == {
        "encoder.0.query": (3, 4 / 3),
        "encoder.0.up": (2, 0.5),
        "encoder.1.query": (5, 4 / 5),
        "encoder.1.up": (2, 0.5),
    }


def test_method_may_be_a_class_and_options_reach_it() -> None:
    model = inject_adapters(net(), "query", 4, method=DoRALinear, rslora=True, dropout=0.5, dropout_mode="peft")
    layer = adapters(model)["encoder.0.query"]
    assert isinstance(layer, DoRALinear)
    assert (layer.scale, layer.dropout, layer.dropout_mode) == (2.0, 0.5, "peft")


@pytest.mark.parametrize("targets", ["first", "second", "all-linear"])
def test_a_module_under_two_names_is_replaced_under_both(targets: str) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.deep = nn.ModuleDict({"second": self.first})

        def forward(self, x: Tensor) -> Tensor:
            return self.deep["second"](self.first(x))

    model = inject_adapters(Shared(), targets, 2)
    assert isinstance(model.first, LoRALinear)
    assert model.deep["second"] is model.first
    assert len(adapters(model)) == 1
    copied = copy.deepcopy(model)
    assert copied.deep["second"] is copied.first
    remove_adapters(model)
    assert type(model.first) is nn.Linear
    assert model.deep["second"] is model.first
    assert not find_targets(Shared(), lambda name, m: name == "first").keys() - {"first"}
    with refused(model, r"leave no nn.Linear of Shared"):
        inject_adapters(model, "all-linear", 2, exclude="second")


def test_disable_adapters_is_the_base_bit_for_bit_and_nests() -> None:
    """Invariant §1: disabled ≡ base."""
    base, model, x = net().eval(), inject_adapters(net(), "all-linear", 2, method="dora").eval(), torch.randn(5, 8)
    perturb(model)
    adapted = model(x)
    assert not torch.equal(adapted, base(x))
    with disable_adapters(model):
        with disable_adapters(model):
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), adapted)
    with pytest.raises(RuntimeError, match="stop"), disable_adapters(model):
        raise RuntimeError("stop")
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize("function", [remove_adapters, lambda model: disable_adapters(model).__enter__()])
def test_without_adapters(function: Any) -> None:
    model = net()
    with refused(model, r"(remove|disable)_adapters: Net carries no adapters; call inject_adapters first"):
        function(model)


def test_base_dtype_rounds_the_targets_alone() -> None:
    model = inject_adapters(net(), "query", 2, base_dtype="bfloat16")
    layer = adapters(model)["encoder.0.query"]
    assert (layer.weight.dtype, layer.bias.dtype, layer.lora_a.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert model.encoder[0].up.weight.dtype == torch.float32
    assert torch.equal(layer.weight, net().encoder[0].query.weight.bfloat16())
    y = model.eval()(torch.randn(3, 8))  # fp32 in, fp32 out: the base is cast inside
    assert y.dtype == torch.float32


def test_adapters_are_fp32_by_default_over_a_16_bit_base() -> None:
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)]:
        model = inject_adapters(net().to(dtype), "query", 2, method="dora")
        assert {p.dtype for p in adapters(model)["encoder.0.query"].adapter_parameters().values()} == {expected}
    model = inject_adapters(net(), "query", 2, adapter_dtype="bfloat16")
    assert adapters(model)["encoder.0.query"].lora_a.dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
def test_injecting_twice(method: str) -> None:
    model = inject_adapters(net(), "query", 2, method=method)
    with refused(model, r"already carries 2 adapters \(the first is 'encoder.0.query'\); call remove_adapters"):
        inject_adapters(model, "value", 2)


def test_adapter_in_adapter() -> None:
    model = nn.Sequential(LoRALinear(4, 4, 2), nn.Linear(4, 2))
    with refused(model, r"already carries 1 adapters \(the first is '0'\)"):
        inject_adapters(model, "all-linear", 2)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"targets": "qeury"}, r"target 'qeury' matches no nn.Linear of Net; .* Did you mean 'query'\?"),
    ({"targets": ["query", "valeu"]}, r"target 'valeu' matches no nn.Linear .* Did you mean 'value'\?"),
    ({"targets": "uer"}, r"target 'uer' matches no nn.Linear"),
    ({"targets": "norm"}, r"target 'norm' matches LayerNorm 'encoder.0.norm' of Net, but only layers of the exact type"),
    ({"targets": lambda name, module: False}, r"the targets '<lambda>' leave no nn.Linear of Net to adapt; it has 10 in all"),
    ({"targets": []}, r"the targets \[\] leave no nn.Linear of Net"),
    ({"targets": "query", "exclude": ["query"]}, r"the targets 'query' leave no nn.Linear of Net"),
    ({"exclude": ["quary"]}, r"exclude 'quary' matches no target of Net.* Did you mean 'query'\?"),
    ({"trainable": ["haed"]}, r"trainable 'haed' matches no module or parameter.* Did you mean 'head'\?"),
    ({"trainable": "0.query"}, r"'encoder.0.query' is both a target and part of what `trainable` trains in full"),
    ({"trainable": "query.bias"}, r"'encoder.0.query' is both a target and part of what `trainable` trains in full"),
    ({"trainable": "encoder.1"}, r"'encoder.1.query' is both a target"),
    ({"rank_pattern": {"quary": 1}}, r"rank_pattern 'quary' matches no target.* Did you mean 'query'\?"),
    ({"rank_pattern": {"up": 1}}, r"rank_pattern 'up' matches no target"),
    ({"alpha_pattern": {"valu": 1.0}}, r"alpha_pattern 'valu' matches no target.* Did you mean 'value'\?"),
    ({"rank_pattern": {"1.value": 9}}, r"layer 'encoder.1.value': rank must be an integer from 1 to .* = 8"),
    ({"alpha_pattern": {"1.value": -1.0}}, r"alpha must be a positive number, got -1.0"),
    *(
        ({"rank": rank}, rf"'encoder.0.query': rank must be an integer from 1 to .* = 8 for a layer of 8 -> 8.*got {rank!r}")
        for rank in (0, -1, 9, True, 2.0, "2", None)
    ),
    *(({"alpha": alpha}, r"alpha must be a positive number, got") for alpha in (0, -8.0, math.nan, math.inf, True, "8")),
    *(({"dropout": dropout}, r"dropout must be in \[0, 1\), got") for dropout in (1.0, -0.1, 1, math.nan, None, "0.1", True)),
    ({"method": "lara"}, r"unknown method 'lara'; there are .*dora.* Did you mean 'lora'\?"),
    ({"method": nn.Linear}, r"unknown method <class .*Linear"),
    ({"method": "dora", "dropout_mode": "all"}, r"dropout_mode must be 'lowrank' or 'peft', got 'all'"),
    ({"base_dtype": "int8"}, r"base_dtype must be one of .* got 'int8'"),
    ({"base_dtype": torch.int64}, r"base_dtype must be one of .* got torch.int64"),
    ({"adapter_dtype": "float8_e4m3fn"}, r"adapter_dtype must be one of .* got 'float8_e4m3fn'"),
    ({"base_dtype": torch.bfloat16, "alpha": -1}, r"alpha must be a positive number"),
]


@pytest.mark.parametrize(("change", "match"), WRONG)
def test_wrong_requests(change: dict[str, Any], match: str) -> None:
    model = net()
    next(model.encoder[0].query.parameters()).requires_grad_(False)  # flags of either kind must survive
    with refused(model, match):
        inject_adapters(model, **{"targets": ["query", "value"], "rank": 2, **change})


@pytest.mark.parametrize("method", METHODS)
def test_unknown_option(method: str) -> None:
    model = net()
    with refused(model, r"Linear has no option 'lora_alpha'; its options are .*generator", TypeError):
        inject_adapters(model, "query", 2, method=method, lora_alpha=8)


class Fast(nn.Module):
    """A model with blocks whose fast path reads the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"block": nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 8))})
        self.attention = nn.MultiheadAttention(8, 2)
        self.out = nn.Linear(8, 2)


@pytest.mark.parametrize("targets", ["all-linear", "linear1", "layers.*", lambda name, module: True])
def test_fast_path_parents(targets: Any) -> None:
    model = Fast()
    with refused(model, r"'layers.block.0.linear1' lies in TransformerEncoderLayer 'layers.block.0', whose fast path reads"):
        inject_adapters(model, targets, 2)
    inject_adapters(model, "all-linear", 2, exclude="linear?")
    assert list(adapters(model)) == ["layers.block.1", "out"]


def test_fast_path_parent_is_the_model_or_holds_a_shared_layer() -> None:
    with refused(model := nn.TransformerEncoderLayer(8, 2, 16), r"lies in TransformerEncoderLayer '\(the model itself\)'"):
        inject_adapters(model, "linear1", 2)
    with refused(model := Fast(), r"target 'out_proj' matches NonDynamicallyQuantizableLinear 'layers.block.0.self_attn.out"):
        inject_adapters(model, "out_proj", 2)
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = nn.Linear(8, 8)
    with refused(model := nn.Sequential(attention), r"'0.out_proj' lies in MultiheadAttention '0'"):
        inject_adapters(model, "all-linear", 2)
    model = Fast()
    model = nn.ModuleDict({"alias": model.layers["block"][0].linear1, "model": model})
    with refused(model, r"'model.layers.block.0.linear1' lies in TransformerEncoderLayer 'model.layers.block.0'"):
        inject_adapters(model, "alias", 2)


def test_the_model_is_itself_a_layer() -> None:
    with refused(model := nn.Linear(4, 4), r"the model is itself an nn.Linear and has no parent .* use from_linear"):
        inject_adapters(model, "all-linear", 2)
    with refused(model := LoRALinear(4, 4, 2), r"the model is itself a LoRALinear and has no parent; use its to_linear"):
        remove_adapters(model)
    assert type(model.to_linear()) is nn.Linear


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks(register: str) -> None:
    model = net()
    getattr(model.encoder[0].value, register)(lambda *args: None)
    with refused(model, r"'encoder.0.value' has hooks, which would be lost with the layer; register them after injection"):
        inject_adapters(model, ["query", "value"], 2)


def test_computed_weights() -> None:
    model = net()
    parametrizations.weight_norm(model.encoder[0].query)
    with refused(model, r"matches ParametrizedLinear 'encoder.0.query' .* exact type nn.Linear"):
        inject_adapters(model, "0.query", 2)
    with refused(model, r"ParametrizedLinear 'encoder.0.query'"):  # one of the two that the name means
        inject_adapters(model, "query", 2)
    model = net()
    prune.l1_unstructured(model.encoder[0].up, "weight", 3)
    with refused(model, r"the weight of 'encoder.0.up' is not a Parameter but computed .* make it permanent first"):
        inject_adapters(model, "up", 2)
    model = net()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.encoder[1].down)
    with refused(model, r"the weight of 'encoder.1.down' is not a Parameter but computed \(weight_norm, pruning\?\)"):
        inject_adapters(model, "all-linear", 2)


class Tied(nn.Module):
    """An embedding whose weight is the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.hidden = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 9)
        self.decoder.weight = self.embedding.weight


def test_tied_weights() -> None:
    with refused(model := Tied(), r"decoder.weight is tied to embedding.weight: holding it in another dtype would change"):
        inject_adapters(model, "all-linear", 2, base_dtype=torch.bfloat16)
    with refused(model := Tied(), r"'decoder' is both a target and part of what `trainable` trains in full"):
        inject_adapters(model, "decoder", 2, trainable="embedding")
    inject_adapters(model, "all-linear", 2)
    assert model.decoder.weight is model.embedding.weight
    remove_adapters(model)
    assert model.decoder.weight is model.embedding.weight


def test_an_interrupted_injection_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = net(), []

    def fail_late(layer: LoRALinear, **options: Any) -> None:
        calls.append(layer)
        if len(calls) == 3:
            raise KeyboardInterrupt
        built(layer, **options)

    built = LoRALinear.build
    monkeypatch.setattr(LoRALinear, "build", fail_late)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    with pytest.raises(KeyboardInterrupt):
        inject_adapters(model, "all-linear", 2, base_dtype=torch.bfloat16)
    assert all(a is b for a, b in zip(modules.values(), model.modules(), strict=True))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_refused_layer_leaves_the_linear_layer_alone() -> None:
    with refused(linear := nn.Linear(4, 4), r"alpha must be a positive number"):
        LoRALinear.from_linear(linear, 2, alpha=-1, base_dtype="bfloat16")
    assert isinstance(net(), Net)
