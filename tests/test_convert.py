"""to_lora and convert_to_lora: whichever method is a low-rank update is one exactly, and the others say that they are not."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import assert_within_budget
from nets import VARIANTS, make_layer, net, perturb, refused, variant_id
from torch import nn

from peftlite import (
    METHODS,
    AdapterLinear,
    LoRALinear,
    adapters,
    convert_to_lora,
    inject_adapters,
    load_adapters,
    merge_adapters,
    remove_adapters,
    save_adapters,
)

Variant = tuple[str, dict[str, Any]]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)


def is_low_rank(method: str) -> bool:
    """Whether a method says that its update can be written as LoRA."""
    return METHODS[method].to_lora is not AdapterLinear.to_lora


@every_variant
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_factors_give_the_effective_weight(variant: Variant, dtype: torch.dtype) -> None:
    for sizes in [(13, 31, 3), (8, 6, 5), (6, 8, 5), (1, 1, 1)]:
        layer = make_layer(variant, *sizes, dtype=dtype)
        perturb(layer)
        if not is_low_rank(variant[0]):
            with pytest.raises(ValueError, match=r"cannot be written as plain LoRA: .*merge_adapters\(model\) folds it into"):
                layer.to_lora()
            continue
        a, b = layer.to_lora()
        assert (a.shape[1], b.shape[0], a.shape[0]) == (layer.in_features, layer.out_features, b.shape[1])
        own = {p.dtype for p in layer.adapter_parameters().values()}
        assert {a.dtype, b.dtype} == own
        assert not a.requires_grad
        assert not b.requires_grad
        held = {t.untyped_storage().data_ptr() for t in layer.adapter_state().values()}
        assert not {a.untyped_storage().data_ptr(), b.untyped_storage().data_ptr()} & held
        eager = layer.effective_weight().detach()
        oracle = copy.deepcopy(layer).double().effective_weight().detach()
        base = layer.base_weight().detach()
        assert_within_budget("W", base + b @ a, eager, oracle, torch.promote_types(a.dtype, dtype), base.double())


@every_variant
def test_a_converted_model_computes_the_same(variant: Variant, tmp_path: Path) -> None:
    model = inject_adapters(net(), "all-linear", 5, method=variant[0], trainable="head", seed=0, **variant[1])
    perturb(model)
    model.eval()
    if not is_low_rank(variant[0]):
        with refused(model, r"^encoder.0.query: .* cannot be written as plain LoRA"):
            convert_to_lora(model)
        return
    x = torch.randn(5, 8)
    before, exact = model(x).detach(), copy.deepcopy(model).double()(x.double()).detach()
    weights = {name: layer.weight for name, layer in adapters(model).items()}
    heads = [p.requires_grad for p in model.head.parameters()]
    assert convert_to_lora(model) is model
    layers = adapters(model)
    assert {type(layer) for layer in layers.values()} == {LoRALinear}
    assert {layer.scale for layer in layers.values()} == {1.0}
    assert all(layer.weight is weights[name] for name, layer in layers.items())
    assert all(p.requires_grad for layer in layers.values() for p in layer.adapter_parameters().values())
    assert [p.requires_grad for p in model.head.parameters()] == heads
    dropout = variant[1].get("dropout", 0.0)
    assert {layer.dropout for layer in layers.values()} == {dropout}
    assert_within_budget("y", model(x), before, exact, torch.float32)
    save_adapters(model, tmp_path / "f")
    assert torch.equal(load_adapters(net(), tmp_path / "f").eval()(x), model(x))


def test_dora_is_none() -> None:
    assert is_low_rank("lora")
    assert not is_low_rank("dora")


def test_scale_dropout_and_base_dtype_stay(tmp_path: Path) -> None:
    model = inject_adapters(net(), "query", 2, alpha=6, rslora=True, dropout=0.5, base_dtype="bfloat16")
    perturb(model)
    before = adapters(copy.deepcopy(model))
    for name, layer in adapters(convert_to_lora(model)).items():
        assert (layer.weight.dtype, layer.config()["base_dtype"], layer.dropout) == (torch.bfloat16, "bfloat16", 0.5)
        eager, oracle = before[name].effective_weight(), copy.deepcopy(before[name]).double().effective_weight()
        assert_within_budget("W", layer.effective_weight(), eager, oracle, torch.float32)
    save_adapters(model, tmp_path / "f")
    assert adapters(load_adapters(net(), tmp_path / "f"))["encoder.0.query"].weight.dtype == torch.bfloat16
    merge_adapters(model)
    assert model.encoder[0].query.weight.dtype == torch.bfloat16


def test_a_module_under_two_names_is_replaced_under_both() -> None:
    model = net()
    model.alias = model.encoder[0].query
    inject_adapters(model, "query", 2)
    convert_to_lora(model)
    assert model.alias is model.encoder[0].query
    assert type(remove_adapters(model).alias) is nn.Linear


def test_without_adapters_and_without_a_parent() -> None:
    with refused(model := net(), r"convert_to_lora: Net carries no adapters; call inject_adapters first"):
        convert_to_lora(model)
    with refused(layer := LoRALinear(4, 4, 2), r"the model is itself a LoRALinear and has no parent; use its to_lora\(\)"):
        convert_to_lora(layer)
