"""The contract of every method in METHODS: values, gradients, initial values, counts."""

import copy
import os
from typing import Any
from unittest import mock

import pytest
import torch
from budgets import assert_within_budget
from counts import COUNTS
from hypothesis import given
from hypothesis import strategies as st
from nets import CLASSES, VARIANTS, make_layer, net, options_of, perturb, variant_id
from torch import Tensor, nn
from torch.nn import functional as F

from peftlite import AdapterLinear, adapters, inject_adapters, param_groups, remove_adapters
from peftlite.sharing import SharedTensor

Variant = tuple[str, dict[str, Any]]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 3, 5, 8, 13, 31, 64, 67]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
every_method = pytest.mark.parametrize("method", CLASSES)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes, rank, dtype and bias of a layer, and the batch that it sees."""
    in_features, out_features = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    return {
        "in_features": in_features,
        "out_features": out_features,
        "rank": draw(st.integers(1, min(in_features, out_features))),
        "dtype": draw(st.sampled_from(DTYPES)),
        "bias": draw(st.booleans()),
        "alpha": draw(st.sampled_from([None, 0.5, 1, 16])),
        "batch": draw(st.sampled_from([(), (0,), (1,), (7,), (2, 3), (0, 3), (3, 1, 5)])),
        "layout": draw(st.sampled_from(["contiguous", "strided", "transposed", "expanded"])),
        "seed": draw(st.integers(0, 999)),
    }


def batch_of(case: dict[str, Any]) -> Tensor:
    """An input of the case's shape, dtype and memory layout."""
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (*case["batch"], case["in_features"])
    if case["layout"] == "strided":
        x = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)[..., ::2]
    elif case["layout"] == "transposed":
        x = torch.randn(*reversed(shape), generator=generator).permute(*reversed(range(len(shape))))
    elif case["layout"] == "expanded":
        x = torch.randn(shape[-1], generator=generator).expand(shape)
    else:
        x = torch.randn(shape, generator=generator)
    return x.to(case["dtype"])


def layer_of(variant: Variant, case: dict[str, Any]) -> AdapterLinear:
    """The case's layer, as injected."""
    options = {"alpha": case["alpha"]} if case["alpha"] and "alpha" in options_of(variant[0]) else {}
    sizes = (case["in_features"], case["out_features"], case["rank"])
    layer = make_layer(variant, *sizes, bias=case["bias"], dtype=case["dtype"], seed=case["seed"], **options)
    if layer.bias is not None:  # small beside the output; for large biases see methods/test_dora.py
        layer.bias.mul_(1 / 16)
    return layer


def run(layer: AdapterLinear, x: Tensor, dy: Tensor, *, dense: bool = False) -> dict[str, Tensor]:
    """Output and every gradient of `layer`, or of the dense weight that it stands for."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = F.linear(x, layer.effective_weight(), layer.bias) if dense else layer(x)
    own = layer.adapter_parameters()
    grads = torch.autograd.grad(y, [x, *own.values()], dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(["x", *own], grads, strict=True))}


def check_against_dense(layer: AdapterLinear, x: Tensor, dtype: torch.dtype) -> None:
    """Compare output and gradients, computed in `dtype`, with fp64 autograd through the effective weight."""
    dy = torch.randn(*x.shape[:-1], layer.out_features, generator=torch.Generator().manual_seed(3)).to(dtype)
    actual = run(layer, x, dy)
    with mock.patch.dict(os.environ, PEFTLITE_IMPL="reference"):
        eager = run(layer, x, dy)
    exact = copy.deepcopy(layer).double()
    with torch.autocast("cpu", enabled=False):
        wide = run(exact, x.double(), dy.double())
        oracle = terms = run(exact, x.double(), dy.double(), dense=True)
        if "norm_grad" in options_of(layer.method):  # the gradient through the norm may cancel the other one exactly
            exact.norm_grad = False
            terms = run(exact, x.double(), dy.double(), dense=True)
        # A sum of few terms that cancel may come out exact in eager by luck: the size of what was added counts too.
        added = exact.effective_weight().detach().abs() + exact.base_weight().abs()
        sizes = {"y": x.double().abs() @ added.T, "x": dy.double().abs() @ added}
        # Sums, and sums within sums: what cancels in one is weighed by another.
        exact.load_state_dict({name: value.abs() for name, value in exact.state_dict().items()})
        whole = run(exact, x.double().abs(), dy.double().abs(), dense=True)
    for name, expected in oracle.items():
        spans = (terms[name], whole[name], sizes.get(name, expected))
        assert_within_budget(name, actual[name], eager[name], expected, dtype, *spans)
        # `eager` may be the method's own code, and then says nothing of its formula. In fp64 that is right to far below fp32.
        assert_within_budget(f"{name} in fp64", wide[name], expected, expected, torch.float32, *spans)
    assert actual["y"].dtype == dtype
    assert actual["x"].dtype == x.dtype
    for name, parameter in layer.adapter_parameters().items():
        assert actual[name].dtype == parameter.dtype
    assert layer.weight.grad is None


@every_variant
@given(case=cases())
def test_identity_at_birth_is_exact(variant: Variant, case: dict[str, Any]) -> None:
    """Invariant §1: born as the base.
    Invariant §2: born as the base.
    Invariant §20: identity at birth, exact, in every dtype.
    """
    layer, x = layer_of(variant, case), batch_of(case)
    with torch.no_grad():
        layer.weight[::3] = 0  # rows of zeros, as pruned models and mixtures of experts have them
        layer = CLASSES[variant[0]].from_linear(layer.to_linear(), layer.rank, **variant[1]).eval()
    rows = x.reshape(-1, x.shape[-1])
    expected = F.linear(rows, layer.weight, layer.bias).view(*x.shape[:-1], -1 if x.numel() else layer.out_features)
    assert layer(x).dtype == expected.dtype
    # What nn.Linear makes of x, of its rows, or of a copy of them: for some layouts torch rounds these three otherwise.
    direct, copied = (F.linear(t, layer.weight, layer.bias).view(expected.shape) for t in (x, rows.contiguous()))
    assert any(torch.equal(layer(x), candidate) for candidate in (expected, direct, copied))
    if x.is_contiguous():  # for others F.linear itself rounds otherwise than for the same rows
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer.effective_weight().to(case["dtype"]), layer.weight)


@every_variant
@given(case=cases())
def test_output_and_gradients_are_those_of_the_effective_weight(variant: Variant, case: dict[str, Any]) -> None:
    """Invariant §16: gradients through the dense weight ≡ those of the branch."""
    layer = layer_of(variant, case)
    perturb(layer)
    check_against_dense(layer, batch_of(case), case["dtype"])


@every_variant
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(variant: Variant, base: torch.dtype) -> None:
    """Invariant §20: casts, copies, meta device, autocast and compilation."""
    layer = make_layer(variant, 31, 13, 5, base_dtype=base)
    assert layer.weight.dtype == base
    perturb(layer)
    with torch.autocast("cpu", torch.bfloat16):
        check_against_dense(layer, torch.randn(7, 31, generator=torch.Generator().manual_seed(0)), torch.bfloat16)


@every_variant
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(variant: Variant, bias: bool) -> None:
    exact = {"norm_grad": True} if "norm_grad" in options_of(variant[0]) else {}  # the default treats the norm as constant
    layer = make_layer(variant, 5, 3, 2, bias=bias, dtype=torch.float64, **{**variant[1], **exact})
    perturb(layer)
    own = list(layer.adapter_parameters())

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(own, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in layer.adapter_parameters().values()]
    for shape in [(5,), (4, 5), (2, 3, 5)]:
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        assert torch.autograd.gradcheck(function, (x, *values))


@every_variant
@pytest.mark.parametrize("optimizer", ["sgd", "fused adamw"])
def test_training_leaves_the_base_alone(variant: Variant, optimizer: str) -> None:
    """Invariant §20: exactly the documented tensors have gradients, the base has none."""
    model, base = net(), net()
    inject_adapters(model, "all-linear", 2, method=CLASSES[variant[0]], trainable="head", seed=0, **variant[1])
    assert {key: model.state_dict()[key].data_ptr() for key in base.state_dict()}  # every key of the base is still there
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    groups = param_groups(model, 0.05)
    opt = torch.optim.SGD(groups) if optimizer == "sgd" else torch.optim.AdamW(groups, fused=True)
    x, target = torch.randn(12, 8), torch.randn(12, 3)
    before = F.mse_loss(model(x), target).item()
    for _ in range(20):
        F.mse_loss(model(x), target).backward()
        opt.step()
        opt.zero_grad()
    assert F.mse_loss(model.eval()(x), target).item() < before
    for layer in adapters(model).values():  # no stale cache anywhere: the layer is still its effective weight
        check_against_dense(layer, torch.randn(5, layer.in_features), torch.float32)
    remove_adapters(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    original = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter is frozen[name]
            assert torch.equal(parameter, original[name])
            assert parameter.grad is None


@every_variant
def test_base_checkpoint_still_loads(variant: Variant) -> None:
    model = inject_adapters(net(0), "all-linear", 2, method=CLASSES[variant[0]], **variant[1])
    result = model.load_state_dict(net(1).state_dict(), strict=False)
    assert not result.unexpected_keys
    own = {f"{name}.{key}" for name, layer in adapters(model).items() for key in layer.adapter_state()}
    assert set(result.missing_keys) == own
    assert torch.equal(model.encoder[0].query.weight, net(1).encoder[0].query.weight)


@every_variant
def test_initial_values_depend_on_seed_and_name_alone(variant: Variant) -> None:
    def values(targets: list[str], seed: int | None = 5) -> dict[str, Tensor]:
        model = inject_adapters(net(), targets, 2, method=CLASSES[variant[0]], seed=seed, **variant[1])
        return {f"{name}.{key}": t for name, layer in adapters(model).items() for key, t in layer.adapter_state().items()}

    alone, other_order = values(["query"]), values(["up", "query", "down"])
    torch.manual_seed(77)
    larger = values(["down", "value", "query", "up"])
    for key, value in alone.items():
        for other in (other_order[key], larger[key]):
            # Bases are as long as the largest layer needs; each layer uses its first rows.
            assert torch.equal(value, other[: len(value)] if ".basis" in key else other)
    torch.manual_seed(1)
    first, second = values(["query"], None), values(["query"], None)
    torch.manual_seed(1)
    again = values(["query"], None)
    assert all(torch.equal(first[key], again[key]) for key in first)
    if draws(variant):  # others start from the base weight alone
        assert any(not torch.equal(first[key], second[key]) for key in first)
        own = [key.removeprefix("encoder.0.") for key in alone if key.startswith("encoder.0.")]
        if not any(isinstance(m, SharedTensor) for m in make_layer(variant, 8, 8, 2).modules()):
            assert any(not torch.equal(alone[f"encoder.0.{key}"], alone[f"encoder.1.{key}"]) for key in own)
        other_seed = values(["query"], seed=6)
        assert any(not torch.equal(alone[key], other_seed[key]) for key in alone)


def draws(variant: Variant) -> bool:
    """Whether the initial values of `variant` are drawn at random."""
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    make_layer(variant, 8, 8, 2, generator=generator)
    return not torch.equal(generator.get_state(), before)


@every_method
@given(in_features=st.integers(1, 40), out_features=st.integers(1, 40), data=st.data())
def test_parameter_count(method: str, in_features: int, out_features: int, data: st.DataObject) -> None:
    """Invariant §1: count r (in + out).
    Invariant §20: counts by closed formulas, for any shape.
    """
    rank = data.draw(st.integers(1, min(in_features, out_features)))
    layer = make_layer((method, {}), in_features, out_features, rank)
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert trained == COUNTS[method](in_features, out_features, rank)
    assert trained == sum(p.numel() for p in layer.adapter_parameters().values())


@every_variant
def test_config_rebuilds_the_layer(variant: Variant) -> None:
    layer = make_layer(variant, 7, 5, 3)
    perturb(layer)
    config = dict(layer.config())
    rebuilt = type(layer).from_linear(layer.to_linear(), config.pop("rank"), **config).eval()
    rebuilt.load_state_dict(layer.state_dict())
    x = torch.randn(4, 7)
    assert rebuilt.config() == layer.config()
    assert torch.equal(rebuilt(x), layer(x))


@every_variant
def test_dropin_layer_is_a_linear_layer(variant: Variant) -> None:
    torch.manual_seed(0)
    layer = CLASSES[variant[0]](7, 5, 3, bias=False, dtype=torch.bfloat16, **variant[1]).eval()
    assert layer.bias is None
    assert (layer.weight.dtype, layer.weight.requires_grad) == (torch.bfloat16, False)
    x = torch.randn(4, 7).bfloat16()
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    assert set(layer.adapter_parameters()) == {name for name, p in layer.named_parameters() if p.requires_grad}
    assert isinstance(nn.Sequential(layer)[0], CLASSES[variant[0]])
    assert "rank=3" in repr(layer)


@every_variant
def test_built_on_the_meta_device_and_loaded_later(variant: Variant) -> None:
    """Invariant §20: casts, copies, meta device, autocast and compilation."""
    source = make_layer(variant, 7, 5, 3)
    perturb(source)
    layer = CLASSES[variant[0]](7, 5, 3, device="meta", **variant[1]).eval()
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(4, 7)
    assert torch.equal(layer(x), source(x))
