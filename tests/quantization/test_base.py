"""A quantised base under every method: the function of the dense layer, nothing dense kept, and the whole life of a model."""

import copy
import io
import os
import runpy
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import VARIANTS, assert_same, net, outcome, perturb, refused, variant_id
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import peftlite.quantization.packed
from peftlite import (
    METHODS,
    QuantizedLinear,
    adapters,
    dequantize_base,
    disable_adapters,
    inject_adapters,
    load_adapters,
    merge_adapters,
    merged,
    param_groups,
    quantize_base,
    remove_adapters,
    save_adapters,
    summary,
)
from peftlite.kernels.row_norm import CPU_BLOCK

ENCODER = ["query", "value", "up", "down"]
HERE = Path(__file__).resolve()
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
every_code = pytest.mark.parametrize("code", ["nf4", "int8"])


def quantized_net(variant: tuple[str, dict[str, Any]], code: str = "nf4", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A net whose encoder is quantised and adapted, and perturbed, in evaluation mode."""
    model = quantize_base(net().to(dtype), ENCODER, code)
    inject_adapters(model, ENCODER, 2, method=variant[0], trainable="head", seed=0, **variant[1])
    perturb(model)
    return model.eval()


@every_variant
@pytest.mark.parametrize(("code", "dtype"), [("nf4", torch.float32), ("nf4", torch.bfloat16), ("int8", torch.float32)])
def test_equals_the_method_on_the_dequantised_layer(
    variant: tuple[str, dict[str, Any]], code: str, dtype: torch.dtype
) -> None:
    """Invariant §2: on a quantised base ≡ on the dequantised one.
    Invariant §7: no gradient on the base; gradients ≡ those over the dequantised weight, dense and frozen.
    Invariant §20: on a quantised base ≡ on the dequantised one.
    """
    model = quantized_net(variant, code, dtype)
    plain = dequantize_base(quantize_base(net().to(dtype), ENCODER, code))
    inject_adapters(plain, ENCODER, 2, method=variant[0], trainable="head", seed=0, **variant[1])
    perturb(plain)
    x = torch.randn(6, 8).to(dtype)
    actual, expected = outcome(model, x), outcome(plain.eval(), x)
    assert_same(actual, expected)
    base = {n for n, p in model.named_parameters() if ".weight." in n}
    assert base
    assert not base & set(actual)
    for name, layer in adapters(model).items():
        assert torch.equal(layer.effective_weight(), plain.get_submodule(name).effective_weight())


@every_variant
def test_identity_at_birth_and_when_disabled(variant: tuple[str, dict[str, Any]]) -> None:
    model, x = quantize_base(net(), ENCODER).eval(), torch.randn(5, 8)
    expected = model(x)
    inject_adapters(model, ENCODER, 2, method=variant[0], **variant[1]).eval()
    assert torch.equal(model(x), expected)
    perturb(model)
    with disable_adapters(model):
        assert torch.equal(model(x), expected)


class Watch:
    """Keeps a weak reference to every dense piece that is made, with its elements and dtype."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[Any, int, torch.dtype]] = []
        original = peftlite.quantization.packed.dequantize

        def dequantize(*arguments: Any) -> Tensor:
            result = original(*arguments)
            self.made.append((weakref.ref(result.untyped_storage()), result.numel(), result.dtype))
            return result

        monkeypatch.setattr(peftlite.quantization.packed, "dequantize", dequantize)

    def alive(self) -> int:
        return sum(reference() is not None for reference, *_ in self.made)


@pytest.mark.parametrize("method", ["lora", "dora", "plain"])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_dense_weight_waits_for_the_backward_pass(method: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantize_base(nn.Sequential(nn.Linear(96, 80), nn.Tanh()), "0")
    if method != "plain":
        perturb(inject_adapters(model, "0", 4, method=method, dropout=0.1))
    x, watch, saved = torch.randn(7, 96, requires_grad=True), Watch(monkeypatch), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        y = model(x)
    assert watch.made
    assert not watch.alive()
    plain = [t for t in saved if not isinstance(t, peftlite.quantization.packed.PackedTensor)]
    assert not [t for t in plain if t.numel() >= 80 * 96]
    made = len(watch.made)
    y.float().sum().backward()
    assert len(watch.made) > made
    assert not watch.alive()


def test_dora_makes_no_dense_fp32_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(1024, 512, dtype=torch.bfloat16)
    model = quantize_base(nn.Sequential(layer), "0")
    watch = Watch(monkeypatch)
    perturb(inject_adapters(model, "0", 4, method="dora", norm_grad=True))
    model(torch.randn(3, 1024, dtype=torch.bfloat16)).sum().backward()
    whole = [(count, dtype) for _, count, dtype in watch.made if count > CPU_BLOCK + 1024]
    assert whole
    assert {dtype for _, dtype in whole} == {torch.bfloat16}
    assert len(whole) <= 2  # the product with W, forward and backward; the norm goes by blocks of rows


@every_variant
def test_copies_pickles_and_state(variant: tuple[str, dict[str, Any]]) -> None:
    model, x = quantized_net(variant), torch.randn(5, 8)
    expected = outcome(model, x)
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for other in (copy.deepcopy(model), torch.load(pickled, weights_only=False)):
        assert_same(outcome(other, x), expected)
    state = model.state_dict()
    assert all(type(value) in (Tensor, nn.Parameter) for value in state.values())
    other = quantize_base(net(7), ENCODER)
    inject_adapters(other, ENCODER, 2, method=variant[0], trainable="head", seed=9, **variant[1])
    other.load_state_dict(state)
    assert_same(outcome(other.eval(), x), expected)


@every_variant
@every_code
def test_remove_gives_the_quantised_layers_back(variant: tuple[str, dict[str, Any]], code: str) -> None:
    model, x = quantize_base(net(), ENCODER, code).eval(), torch.randn(5, 8)
    before, y = {key: t.clone() for key, t in model.state_dict().items()}, model(x)
    held = [m.weight for m in model.modules() if isinstance(m, QuantizedLinear)]
    inject_adapters(model, ENCODER, 2, method=variant[0], **variant[1])
    assert set(before) <= set(model.state_dict())
    opt = torch.optim.SGD(param_groups(model, 0.1))
    model(x).square().sum().backward()
    opt.step()
    remove_adapters(model)
    assert [m.weight for m in model.modules() if isinstance(m, QuantizedLinear)] == held
    assert list(model.state_dict()) == list(before)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(model.eval()(x), y)


@every_variant
def test_checkpoint_of_adapters(variant: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    model, x, path = quantized_net(variant), torch.randn(5, 8), tmp_path / "adapters.safetensors"
    save_adapters(model, path)
    fresh = quantize_base(net(), ENCODER)
    load_adapters(fresh, path)
    assert_same(outcome(fresh.eval(), x), outcome(model, x))
    dense = net()
    with refused(dense, r"not the one that this adapter was trained on \(that was nf4, this is dense\)"):
        load_adapters(dense, path)
    int8 = quantize_base(net(), ENCODER, "int8")
    with refused(int8, "that was nf4, this is int8"):
        load_adapters(int8, path)


@every_variant
def test_casts_leave_the_codes_alone(variant: tuple[str, dict[str, Any]]) -> None:
    model = quantized_net(variant)
    before = {key: t.clone() for key, t in model.state_dict().items() if ".weight." in key}
    model.to(torch.bfloat16)
    assert {layer.weight.dtype for layer in adapters(model).values()} == {torch.bfloat16}
    assert model(torch.randn(5, 8).bfloat16()).dtype == torch.bfloat16
    model.float()
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key
        assert model.state_dict()[key].dtype == value.dtype


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own, inside
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_compiled_into_one_graph_that_saves_no_dense_weight(method: str) -> None:
    torch.compiler.reset()
    model = quantize_base(nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 40)), "all-linear")
    perturb(inject_adapters(model, "all-linear", 2, method=method, seed=0))
    x, saved = torch.randn(5, 24), []
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        actual = outcome(model, x, compiled)
    assert saved
    assert not [t for t in saved if t.shape in ((16, 24), (24, 16), (40, 16), (16, 40)) or t.shape == (384,)]
    expected = outcome(model, x)
    for key, value in expected.items():
        assert torch.allclose(actual[key], value, rtol=1e-5, atol=1e-6 * value.abs().max().item()), key


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing(method: str) -> None:
    model, x = quantized_net((method, {})), torch.randn(6, 8)

    def run(x: Tensor) -> Tensor:
        for block in model.encoder:
            x = checkpoint(block, x, use_reentrant=False)
        return model.head(x)

    assert_same(outcome(model, x, run), outcome(model, x))


@pytest.mark.parametrize("method", METHODS)
def test_merge_into_dense_layers(method: str) -> None:
    model, x = quantized_net((method, {})), torch.randn(5, 8)
    exact = {name: layer.effective_weight().detach() for name, layer in adapters(model).items()}
    with merged(model), torch.no_grad():
        inside = model(x)
    report = merge_adapters(model, quantized="dequantize")
    assert report.worst.lost < 1e-6
    for name, weight in exact.items():
        assert type(model.get_submodule(name)) is nn.Linear
        assert torch.equal(model.get_submodule(name).weight, weight)
    assert torch.equal(model(x), inside)
    half = quantized_net((method, {}))
    merge_adapters(half, quantized="dequantize", dtype=torch.bfloat16)
    assert torch.equal(half.encoder[0].up.weight, exact["encoder.0.up"].bfloat16())


@pytest.mark.parametrize("method", METHODS)
@every_code
def test_merge_and_quantise_again(method: str, code: str) -> None:
    model = quantized_net((method, {}), code)
    exact = {name: layer.effective_weight().detach() for name, layer in adapters(model).items()}
    with pytest.warns(UserWarning, match="rounds every merged weight to its code again"):
        report = merge_adapters(model, quantized="requantize")
    for name, weight in exact.items():
        layer = model.get_submodule(name)
        assert type(layer) is QuantizedLinear
        assert layer.weight.form.code == code
        once = quantize_base(nn.Sequential(nn.Linear(*weight.shape[::-1])), "0", code)[0]
        with torch.no_grad():
            linear = nn.Linear(*weight.shape[::-1])
            linear.weight.copy_(weight)
        once = QuantizedLinear(linear, layer.weight.form)
        assert torch.equal(layer.weight.tensor().dense(), once.weight.tensor().dense())
    assert report.worst.lost > (0.05 if code == "nf4" else 0.001)
    inject_adapters(model, ENCODER, 2, method=method)  # and on it goes


@pytest.mark.parametrize("method", METHODS)
def test_merge_onto_the_original_weights(method: str) -> None:
    model, originals = quantized_net((method, {})), net().state_dict()
    update = {name: (layer.effective_weight() - layer.base_weight()).detach() for name, layer in adapters(model).items()}
    with pytest.warns(UserWarning, match="weights that the adapters were not trained on"):
        merge_adapters(model, quantized="original", originals=originals)
    for name, delta in update.items():
        assert torch.equal(model.get_submodule(name).weight, delta + originals[f"{name}.weight"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, r"the base of 'encoder.0.query' is quantised \(8 layers in all\): say what merging makes of it"),
        ({"quantized": "dequantise"}, "quantized must be 'dequantize', 'requantize' or 'original', got 'dequantise'"),
        ({"quantized": "original"}, "go together; got quantized='original' and originals not given"),
        ({"quantized": "dequantize", "originals": {}}, "go together; got quantized='dequantize' and originals given"),
        ({"quantized": "original", "originals": {}}, r"must hold 'encoder.0.query.weight' of shape \(8, 8\), but it has none"),
        (
            {"quantized": "original", "originals": {"encoder.0.query.weight": torch.ones(2, 3)}},
            r"must hold 'encoder.0.query.weight' of shape \(8, 8\), but it has shape \(2, 3\)",
        ),
        ({"quantized": "requantize", "dtype": torch.half}, "dtype=torch.float16 is for quantised layers that become dense"),
    ],
)
def test_merges_that_are_refused(options: dict[str, Any], match: str) -> None:
    model = quantized_net(("lora", {}))
    with refused(model, match):
        merge_adapters(model, **options)


def test_a_dense_model_takes_no_mode() -> None:
    model = inject_adapters(net(), ENCODER, 2)
    with refused(model, "quantized='dequantize' was asked for, but no adapted layer has a quantised base"):
        merge_adapters(model, quantized="dequantize")


def test_a_merged_weight_that_overflows() -> None:
    model = quantized_net(("lora", {}), dtype=torch.float16)
    with torch.no_grad():
        model.encoder[0].up.lora_b.fill_(1e6)
    with refused(model, "encoder.0.up: the merged weight overflows torch.float16"):
        merge_adapters(model, quantized="dequantize")


def test_what_quantise_base_refuses() -> None:
    model = net()
    with refused(model, "code must be 'nf4' or 'int8', got 'fp4'"):
        quantize_base(model, "query", "fp4")
    with refused(model, "target 'kwery' matches no"):
        quantize_base(model, "kwery")
    model.encoder[1].up.weight.data[0, :3] = torch.inf
    with refused(model, "encoder.1.up: the weight has 3 non-finite values of 128, and cannot be quantised"):
        quantize_base(model, "all-linear")
    quantize_base(model, "query")
    with refused(model, "'encoder.0.query' is quantised already .*leave it out with `exclude`"):
        quantize_base(model, ["query", "value"])
    with refused(model, "base_dtype=torch.bfloat16 was asked for a layer whose weight is quantised"):
        inject_adapters(model, "query", 2, base_dtype=torch.bfloat16)
    inject_adapters(model, "query", 2)
    with refused(model, "the model carries 2 adapters .the first is 'encoder.0.query'.*call quantize_base first"):
        quantize_base(model, "value")
    with refused(model, "the model carries adapters, which stand on the quantised base"):
        dequantize_base(model)
    with pytest.raises(ValueError, match="Net has no quantised layer to make dense"):
        dequantize_base(net())
    tied = net()
    tied.head[0].weight = tied.encoder[0].query.weight
    with refused(tied, "encoder.0.query.weight is tied to head.0.weight: quantising it would change that as well"):
        quantize_base(tied, "query")


def test_quantised_layers_of_others_are_refused() -> None:
    foreign = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model = nn.Sequential(nn.Linear(4, 4), foreign(4, 4))
    with refused(model, "matches Linear4bit '1'.*Layers of bitsandbytes are not wrapped: load the model in 16 bits"):
        inject_adapters(model, ["0", "1"], 2)
    model = nn.Sequential(nn.Linear(4, 4))
    packed = type("Int4Tensor", (nn.Parameter,), {"__module__": "torchao.quantization"})
    model[0].weight = packed(torch.ones(4, 4))
    with refused(model, "the weight of '0' is a Int4Tensor of torchao, which cannot be wrapped; load the model in 16 bits"):
        inject_adapters(model, "0", 2)


def test_a_state_of_another_format_is_refused() -> None:
    model, state = quantize_base(net(), ENCODER), quantize_base(net(), ENCODER, scale_code="fp8_e4m3").state_dict()
    with pytest.raises(RuntimeError, match=r'encoder.0.query.weight was quantised as \["nf4", 64, "fp8_e4m3", 256, 8, 8\]'):
        model.load_state_dict(state)
    del state["encoder.0.query.weight.layout"]
    other = quantize_base(net(), ENCODER, scale_code="fp8_e4m3")
    with pytest.raises(RuntimeError, match=r'Missing key.*"encoder.0.query.weight.layout"'):
        other.load_state_dict(state)


def test_nothing_can_be_written_into_the_base() -> None:
    base = quantized_net(("lora", {})).encoder[0].up.base_weight()
    for write in (lambda: base.mul_(2), lambda: base.copy_(torch.ones(16, 8)), lambda: torch.add(base, 1, out=base)):
        with pytest.raises(RuntimeError, match=r"would write into a quantised base weight, which is read-only"):
            write()


def test_the_packed_tensor_looks_like_the_dense_one() -> None:
    packed = quantize_base(nn.Sequential(nn.Linear(40, 24)), "0")[0].weight.tensor()
    dense = packed.dense()
    assert (packed.shape, packed.dtype, packed.device, packed.requires_grad) == ((24, 40), torch.float32, dense.device, False)
    assert repr(packed) == "PackedTensor(nf4, shape=(24, 40), dtype=torch.float32, device=cpu)"
    index = torch.tensor([5, -1])
    for view in (lambda w: w[3:9], lambda w: w[:], lambda w: w[2], lambda w: w[index], lambda w: w[:, 1:7], lambda w: w.T):
        assert torch.equal(view(packed) + 0, view(dense))
    for cast in (torch.bfloat16, torch.float64):
        assert torch.equal(packed.to(cast).to(torch.float32) + 0, dense.to(cast).to(torch.float32))
    assert torch.equal(packed.int(), dense.int())
    assert torch.equal(packed.new_zeros(3), torch.zeros(3))


def test_quantised_on_the_meta_device_and_loaded_later() -> None:
    model = quantize_base(net(), ENCODER).eval()
    with torch.device("meta"):
        empty = type(model)()
    quantize_base(empty, ENCODER).load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(5, 8)
    assert torch.equal(empty.eval()(x), model(x))


def test_sizes_are_those_of_the_code() -> None:
    """Invariant §21: NF4 without and with double quantisation: 4.5 and 4.127 bits per parameter."""
    model = quantize_base(nn.Sequential(nn.Linear(768, 768, bias=False)), "0")
    held = sum(p.nbytes for p in model.parameters())
    assert held == model[0].weight.nbytes
    assert 8 * (held - 4) / 768**2 == 4.126953125
    inject_adapters(model, "0", 8)
    assert (summary(model).trained, summary(model).total) == (12288, 768**2 + 12288)


def learn(model: nn.Module, x: Tensor, target: Tensor, steps: int = 30) -> list[float]:
    """Train, and return the loss before each step."""
    opt, losses = torch.optim.AdamW(param_groups(model, 1e-2)), []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), target)
        losses.append(loss.item())
        loss.backward()
        opt.step()
        opt.zero_grad()
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_an_nf4_net_trains(method: str) -> None:
    model = quantize_base(net(), ENCODER)
    inject_adapters(model, ENCODER, 2, method=method, trainable="head", seed=0)
    x = torch.randn(48, 8)
    losses = learn(model, x, x[:, :3].argmax(1))
    assert losses[-1] < losses[0] / 2


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """§7: an NF4 net on two gloo processes under torchrun."""
    program = HERE.with_name("share_of_training.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    learn_share = runpy.run_path(str(program))["learn"]
    start = quantize_base(net().encoder.double(), ENCODER).state_dict()
    for method in ("lora", "dora"):
        alone = learn_share(method, 0, 1)
        first, second = (torch.load(tmp_path / f"{method}-{rank}.pt") for rank in (0, 1))
        assert alone.keys() == first.keys()
        for key, value in alone.items():
            assert torch.equal(first[key], second[key]), key
            if key in start:
                assert torch.equal(value, start[key]), key
                assert torch.equal(first[key], start[key]), key
            else:  # fp64 sums in another order, five steps long
                bound = 5 * 96 * torch.finfo(torch.float64).eps * value.abs().max()
                assert (first[key] - value).abs().max() <= bound, key
