"""lora_linear and dora_linear assembled from the kernels: outputs and every gradient against fp64."""

import math

import oracles
import pytest
import torch
from oracles import NAMES, make_case

from peftlite.kernels import dora_linear_triton, lora_linear_triton
from peftlite.kernels.dora_linear import dora_linear
from peftlite.kernels.dropout_triton import keep_mask_reference
from peftlite.kernels.launch_triton import observing
from peftlite.kernels.lora_linear import lora_linear
from peftlite.kernels.pack_triton import pack_adapters
from peftlite.kernels.row_norm_triton import row_norm_gain

pytestmark = pytest.mark.usefixtures("poisoned")
HALF, FULL, FP16 = torch.bfloat16, torch.float32, torch.float16
ADAPTER = ("lora_a", "lora_b", "magnitude")
DROPOUT = 0.25  # a multiple of 2⁻¹⁶, so that the oracle divides by the same probability


def kernels_mask(x, dropout):
    """The mask that the kernels draw, in the place of `draw_mask`."""
    if not dropout:
        return None, 1.0
    seed = torch.randint(2**62, (1,)).item()
    return keep_mask_reference(seed, math.prod(x.shape[:-1]), x.shape[-1], dropout).reshape(x.shape), 1 - dropout


@pytest.fixture
def same_mask(monkeypatch):
    monkeypatch.setattr(oracles, "draw_mask", kernels_mask)


def check(*shape, **options):
    make_case(*shape, **options).check(["triton"])


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("x", [FULL, FP16, HALF])
@pytest.mark.parametrize("shape", [(1, 8, 7, 1), (33, 72, 40, 5), (75, 100, 33, 16), (7, 40, 129, 17)])
def test_shapes_and_dtypes(dora, x, shape):
    check(*shape, dora=dora, x=x, stored=x)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"stored": HALF},
        {"x": HALF, "stored": FULL, "adapter": HALF},
        {"x": HALF, "stored": HALF, "bias": False},
        {"compute": HALF},
        {"compute": HALF, "stored": HALF},
        {"x_layout": "transposed", "dy_layout": "transposed"},
        {"x_layout": "strided", "dy_layout": "expanded"},
        {"x_layout": "expanded", "dy_layout": "strided"},
        {"x_layout": "batched", "dy_layout": "batched"},
        {"options": {"norm_grad": True}},
        {"x": HALF, "bias": False, "options": {"norm_grad": True}},
        {"options": {"keep_output": False}},
        {"x": HALF, "stored": HALF, "options": {"keep_output": False, "norm_grad": True}},
    ],
    ids=str,
)
def test_storage_layouts_and_options(dora, options):
    if not dora:
        options = {key: value for key, value in options.items() if key != "options"}
    check(13, 24, 40, 3, dora=dora, **options)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rank", [100, 384])
def test_large_ranks(dora, rank):
    for dropout in (0.0, DROPOUT) if rank == 100 else (0.0,):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(oracles, "draw_mask", kernels_mask)
            check(5, 40, 24, rank, dora=dora, x=HALF, options={"dropout": dropout})


@pytest.mark.usefixtures("same_mask")
@pytest.mark.parametrize("x", [FULL, FP16, HALF])
@pytest.mark.parametrize("options", [{"dora": False}, {"dora": True}, {"dora": True, "norm_grad": True}], ids=str)
def test_dropout_with_the_mask_replayed(x, options):
    dora = options["dora"]
    more = {key: value for key, value in options.items() if key != "dora"}
    check(33, 57, 24, 5, dora=dora, x=x, stored=x, options={"dropout": DROPOUT, **more})


def test_dropout_as_peft_means_it():
    check(13, 24, 40, 3, dora=True, options={"dropout": 0.25, "dropout_mode": "peft"})


CHOICES = [(), ("x",), ("bias",), ("lora_a",), ("lora_b",), ("magnitude",), ADAPTER, ("x", "lora_b"), ("lora_a", "magnitude")]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("needs", CHOICES, ids="-".join)
def test_what_trains(dora, needs):
    for norm_grad in (False, True) if dora else (False,):
        check(5, 24, 40, 3, dora=dora, needs=needs, options={"norm_grad": norm_grad} if dora else {})


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
def test_an_empty_batch(dora, dropout):
    case = make_case(0, 8, 12, 3, dora=dora, options={"dropout": dropout})
    results = case.results("triton")
    assert results["y"].shape == (0, 12)
    for name, value in results.items():
        assert value.shape == (results["y"] if name == "y" else case.tensors[name]).shape
        assert not value.count_nonzero()


def arguments(case):
    inputs = case.inputs()
    return [inputs[name] for name in NAMES if name in inputs]


def test_magnitudes_of_zero_and_biases_that_swamp_the_output_keep_their_gradient():
    case = make_case(33, 24, 40, 3, dora=True, x=HALF, stored=HALF)
    with torch.no_grad():
        case.tensors["magnitude"][:7] = 0
        case.tensors["magnitude"][7:9] = 1e-6
        case.tensors["bias"][20:30] = 1000
    case.check(["triton"])


def test_born_with_a_gain_of_one_the_base_comes_out_bit_for_bit():
    case = make_case(33, 24, 40, 3, dora=True, x=HALF, stored=HALF)
    x, weight, bias, a, b, _ = (t.detach() for t in arguments(case))
    b.zero_()
    magnitude = row_norm_gain(weight, *pack_adapters(a, b, HALF), None, 1.0)[1]
    expected = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(dora_linear(x, weight, bias, a, b, magnitude, 1.0, impl="triton"), expected)
    assert torch.equal(lora_linear(x, weight, bias, a, b, 1.0, impl="triton"), expected)


def test_an_output_changed_in_place_is_an_error_that_says_so():
    y = dora_linear(*arguments(make_case(5, 8, 12, 3, dora=True)), 1.0, impl="triton")
    with pytest.raises(RuntimeError, match=r"dora_linear: .* changed in place .* Use the out-of-place form"):
        torch.relu_(y).sum().backward()


@pytest.mark.parametrize("dora", [False, True])
def test_the_same_bits_every_time(dora):
    case = make_case(75, 72, 40, 5, dora=dora, x=HALF, options={"dropout": DROPOUT})
    first, second = case.results("triton"), case.results("triton")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(("dora", "forward", "backward"), [(False, 1, 1), (True, 2, 6)])
def test_launches(dora, forward, backward):
    """Kernels beside torch's 2 and 4 products for LoRA, 1 and 1 for DoRA; what prepares a step is not counted."""
    case, seen = make_case(13, 24, 40, 3, dora=dora, needs=("x", *ADAPTER)), []
    with observing(lambda event: seen.append(event.name)):
        y = (dora_linear if dora else lora_linear)(*arguments(case), 1.0, impl="triton")
        seen = [name for name in seen if "pack" not in name and "row_norm" not in name]
        assert len(seen) == forward
        y.sum().backward()
    assert len(seen) == forward + backward


def test_twice_differentiable_is_refused():
    inputs = arguments(make_case(5, 8, 12, 3, dora=True))
    y = dora_linear(*inputs, 1.0, impl="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


SETTINGS = {
    "plain": {}, "dropout": {"dropout": DROPOUT}, "exact": {"norm_grad": True}, "formed anew": {"keep_output": False},
}  # fmt: skip


@pytest.mark.parametrize(("dora", "setting"), [(False, "plain"), (False, "dropout"), *((True, name) for name in SETTINGS)])
def test_one_graph_equals_eager(dora, setting):
    case = make_case(13, 16, 24, 4, dora=dora, options=SETTINGS[setting] | {"impl": "triton"})
    operation = dora_linear if dora else lora_linear

    def run(*tensors):
        return torch.relu(operation(torch.tanh(tensors[0]), *tensors[1:], 0.5, **case.options))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        inputs = arguments(case)
        torch.manual_seed(1)
        y = function(*inputs)
        y.backward(case.dy)
        results.append([y.detach(), *(t.grad for t in inputs if t.grad is not None)])
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(eager, graph)
    torch._dynamo.reset()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double precision:UserWarning")
def test_opcheck(dora):
    module = dora_linear_triton if dora else lora_linear_triton
    for rows, dtype in ((6, HALF), (0, FULL)):
        x, weight, bias, a, b, *magnitude = arguments(make_case(rows, 8, 12, 3, dora=dora, x=dtype))
        packed = pack_adapters(a.detach(), b.detach(), dtype)
        gains = [row_norm_gain(weight, *packed, magnitude[0].detach(), 0.5)] if dora else []
        seed = torch.tensor([7]) if rows else None
        tail = [0.5, DROPOUT if rows else 0.0, *([True, True] if dora else [])]
        torch.library.opcheck(module._forward_op, (x, weight, bias, a, b, *magnitude, *packed, *gains, seed, *tail))
