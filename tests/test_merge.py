"""merge_adapters and merged: one rounding, nothing written before everything is checked, an honest report."""

import copy
from typing import Any

import pytest
import torch
from budgets import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from nets import VARIANTS, net, perturb, refused, variant_id
from torch import Tensor, nn

from peftlite import LoRALinear, adapters, inject_adapters, merge_adapters, merged, save_adapters

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def injected(variant: tuple[str, dict[str, Any]] = ("lora", {}), dtype: torch.dtype = torch.float32) -> nn.Module:
    """A perturbed net in evaluation mode."""
    model = inject_adapters(net().to(dtype), "all-linear", 2, method=variant[0], seed=0, **variant[1]).eval()
    perturb(model)
    return model


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_weights_are_rounded_once(variant: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    """Invariant §1: merged ≡ unmerged.
    Invariant §2: merged ≡ unmerged.
    Invariant §5: merged ≡ unmerged.
    Invariant §20: merged ≡ unmerged with perturbed adapters.
    """
    model = injected(variant, dtype)
    with torch.no_grad():
        exact = {n: layer.effective_weight() for n, layer in adapters(copy.deepcopy(model)).items()}
    biases = {n: layer.bias for n, layer in adapters(model).items()}
    report = merge_adapters(model)
    assert not adapters(model)
    assert [layer.name for layer in report.layers] == list(exact)
    for name, weight in exact.items():
        linear = model.get_submodule(name)
        assert type(linear) is nn.Linear
        assert weight.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(linear.weight, weight.to(dtype))
        assert linear.bias is biases[name]
        assert not linear.training


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_in_16_bits_is_merged_in_fp32(method: str) -> None:
    model = injected((method, {})).bfloat16()
    expected = {n: layer.effective_weight() for n, layer in adapters(copy.deepcopy(model).float()).items()}
    merge_adapters(model)
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight.bfloat16()), name


def test_the_report_says_what_rounding_lost() -> None:
    model = injected(dtype=torch.bfloat16)
    layers = {n: (layer.effective_weight().double(), layer.weight.double()) for n, layer in adapters(model).items()}
    report = merge_adapters(model)
    for line in report.layers:
        exact, base = layers[line.name]
        rounding = exact.float().bfloat16().double() - exact
        for value, expected in ((line.update_norm, (exact - base).norm()), (line.rounding_error, rounding.norm())):
            eager = torch.tensor(value, dtype=torch.float32)
            assert_within_budget(line.name, eager, expected.float(), expected.detach(), torch.float32)
        assert 0 < line.lost == line.rounding_error / line.update_norm < 1
    assert report.worst.lost == max(line.lost for line in report.layers)
    table = str(report).splitlines()
    assert table[0].split() == ["layer", "update", "norm", "rounding", "error", "lost"]
    assert [row.split()[0] for row in table[1:]] == list(layers)
    assert table[1].endswith("%")


def test_a_newborn_adapter_changes_nothing() -> None:
    model = inject_adapters(net().bfloat16(), "all-linear", 2, method="dora")
    report = merge_adapters(model)
    assert report.worst.update_norm == report.worst.lost == 0
    for key, value in net().bfloat16().state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize("where", ["lora_b", "weight", "inf"])
@pytest.mark.parametrize("function", [merge_adapters, lambda model: merged(model).__enter__()])
def test_not_finite(where: str, function: Any) -> None:
    """Invariant §20: merging and restoring leaves no trace, and NaN is noticed."""
    model = injected()
    tensor = getattr(adapters(model)["encoder.1.up"], "weight" if where == "inf" else where)
    tensor.data[1, 1] = torch.inf if where == "inf" else torch.nan
    with refused(model, r"encoder.1.up: the merged weight would have \d+ non-finite values of 128; .* Nothing was merged"):
        function(model)


def test_overflow_of_fp16() -> None:
    model = injected(dtype=torch.float16)
    layer = adapters(model)["encoder.1.value"]
    layer.lora_b.data[0] = 1e5
    layer.lora_a.data[:] = 1
    with refused(model, r"encoder.1.value: the merged weight overflows torch.float16; nothing was merged.* wider dtype"):
        merge_adapters(model)


class Tied(nn.Module):
    """An embedding whose weight is the output layer's; two linear layers that share a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.decoder = nn.Linear(4, 9)
        self.decoder.weight = self.embedding.weight
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.one.bias = self.two.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.two(self.one(self.embedding(x))))


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("decoder", r"decoder.weight is tied to embedding.weight: merging would change that as well. Untie it first"),
        ("one", r"one.bias is tied to two.bias"),
    ],
)
def test_tied_weights_are_refused_but_may_be_merged_for_a_while(target: str, match: str) -> None:
    model, x = inject_adapters(Tied(), target, 2).eval(), torch.arange(9)
    perturb(model)
    with refused(model, match):
        merge_adapters(model)
    before, embedding = model(x), model.embedding.weight.clone()
    oracle = copy.deepcopy(model).double()(x)
    with merged(model):
        assert_within_budget("output", model(x), before, oracle, torch.float32)
    assert torch.equal(model.embedding.weight, embedding)


@given(seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_merged_block_restores_every_bit(seed: int, dtype: torch.dtype) -> None:
    """Invariant §1: merging for a while restores every bit.
    Invariant §20: merging and restoring leaves no trace, and NaN is noticed.
    """
    model, x = injected(dtype=dtype), torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    perturb(model, seed)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = model(x)
    with merged(model):
        inside = model(x)
        with merged(model):
            assert torch.equal(model(x), inside)
        assert torch.equal(model(x), inside)
    assert torch.equal(model(x), adapted)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    merge_adapters(model)
    assert torch.equal(model(x), inside)


def test_merged_block_is_for_inference(tmp_path: Any) -> None:
    model, x = injected(), torch.randn(3, 8)
    with merged(model):
        model.train()
        with pytest.raises(RuntimeError, match=r"inside merged\(model\) was run in training mode.*model.eval\(\) first"):
            model(x)
        model.eval()
        save_adapters(model, tmp_path / "f")
    with pytest.raises(KeyError), merged(model):
        raise KeyError
    model.train()
    model(x).sum().backward()
    assert adapters(model)["encoder.0.up"].lora_b.grad is not None


@pytest.mark.parametrize("function", [merge_adapters, lambda model: merged(model).__enter__()])
def test_without_adapters(function: Any) -> None:
    with refused(model := net(), r"merged?(_adapters)?: Net carries no adapters; call inject_adapters first"):
        function(model)


def test_the_model_is_itself_a_layer() -> None:
    layer = LoRALinear(4, 3, 2)
    perturb(layer)
    with refused(layer, r"the model is itself a LoRALinear and has no parent; use to_linear\(effective_weight\(\)\) instead"):
        merge_adapters(layer)
    weight = layer.effective_weight().detach()
    linear = layer.to_linear(layer.effective_weight())
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, weight)


def test_a_shared_layer_is_merged_once() -> None:
    model = nn.Sequential(shared := nn.Linear(4, 4), nn.Tanh(), shared)
    inject_adapters(model, "0", 2)
    perturb(model)
    weight = model[0].effective_weight().detach()
    assert len(merge_adapters(model).layers) == 1
    assert model[0] is model[2]
    assert torch.equal(model[0].weight, weight)
