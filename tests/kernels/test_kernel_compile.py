"""The operations under torch.compile: one graph, the numbers of eager, no recompilation."""

import pytest
import torch
from oracles import NAMES, assert_within_budget, make_case
from torch import nn

from peftlite.kernels import dora_linear as dora_module
from peftlite.kernels import lora_linear as lora_module
from peftlite.kernels.dora_linear import dora_linear
from peftlite.kernels.dropout import draw_keep_mask
from peftlite.kernels.lora_linear import lora_linear


class Layer(nn.Module):
    """The operation between two others, so that the graph has something to fuse around it."""

    def __init__(self, case):
        super().__init__()
        for name in NAMES:
            tensor = case.tensors.get(name)
            if name != "x" and tensor is not None:
                self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=name != "weight"))
        self.options = case.options
        self.bias = getattr(self, "bias", None)

    def forward(self, x):
        arguments = [torch.tanh(x), *(getattr(self, name) for name in NAMES[1:] if hasattr(self, name))]
        op = dora_linear if hasattr(self, "magnitude") else lora_linear
        return torch.relu(op(*arguments, 0.5, **self.options))


def results(layer, run, x, dy, autocast=False):
    x = x.detach().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(x)
    y.backward(dy.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


CASES = {
    "lora": {},
    "lora-bf16": {"stored": torch.bfloat16, "compute": torch.bfloat16, "bias": False},
    "dora": {"dora": True},
    "dora-exact": {"dora": True, "options": {"norm_grad": True}, "bias": False},
    "dora-formed-anew": {"dora": True, "options": {"keep_output": False}},
    "dora-autocast": {"dora": True, "compute": torch.bfloat16},
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own imports
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", CASES)
def test_one_graph_equals_eager_and_is_never_compiled_again(name, backend):
    if backend == "inductor" and name not in ("lora", "dora"):
        backend = "eager"  # dynamo alone; the generated code does not depend on what happens inside the operation
    case = make_case(13, 16, 24, 4, **CASES[name])
    layer = Layer(case)
    oracle_layer = Layer(make_case(13, 16, 24, 4, **CASES[name])).double()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    eps = torch.finfo(case.compute or torch.float32).eps
    for step in range(20):
        with torch.no_grad():
            for p, q in zip(layer.parameters(), oracle_layer.parameters(), strict=True):
                if p.requires_grad:
                    p.add_(0.01 * torch.randn_like(p))
                q.copy_(p)
        x, dy = torch.randn(13, 16), torch.randn(13, 24)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            actual = results(layer, compiled, x, dy, case.compute is not None)
        expected = results(layer, layer, x, dy, case.compute is not None)
        oracle = results(oracle_layer, oracle_layer, x.double(), dy.double())
        for a, e, o in zip(actual, expected, oracle, strict=True):
            assert_within_budget(a, e, o, eps)


@pytest.mark.parametrize("dora", [False, True])
def test_one_graph_serves_every_batch_size(dora):
    layer = Layer(make_case(1, 16, 24, 4, dora=dora))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (5, 13, 64):
        x = torch.randn(rows, 3, 16)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.compiler.set_stance("default" if rows == 5 else "fail_on_recompile"):
            y = compiled(x)
        y.sum().backward()
        assert torch.equal(y, layer(x))


@pytest.mark.parametrize(("dora", "options"), [(False, {}), (True, {}), (True, {"dropout_mode": "peft"})])
def test_dropout_compiles(dora, options):
    layer = Layer(make_case(13, 16, 24, 4, dora=dora, options={"dropout": 0.5, **options}))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(13, 16), torch.randn(13, 24)
    torch.manual_seed(0)
    actual = results(layer, compiled, x, dy)
    torch.manual_seed(0)
    for a, e in zip(actual, results(layer, layer, x, dy), strict=True):
        assert torch.equal(a, e)


def arguments(rows, dora, dtype, bias, dropped, trained):
    tensors = make_case(rows, 5, 7, 2, dora=dora, x=dtype, bias=bias, needs=trained).tensors
    mask = draw_keep_mask(tensors["x"], 0.5)[0] if dropped else None
    return [tensors[name] for name in NAMES if name in tensors], mask, 0.5 if dropped else 1.0


SETTINGS = [
    (6, torch.float32, True, False, ("x", "lora_a", "lora_b", "magnitude")),
    (6, torch.float32, True, True, ("x", "bias", "lora_a", "lora_b", "magnitude")),
    (0, torch.float32, False, False, ("x", "lora_a", "lora_b")),
    (1, torch.bfloat16, True, True, ("lora_b",)),
    (6, torch.float16, False, False, ()),
]


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double precision:UserWarning")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_opcheck_of_the_forward_operations(dora, setting):
    rows, dtype, bias, dropped, trained = setting
    tensors, mask, keep = arguments(rows, dora, dtype, bias, dropped, trained)
    op = dora_module._forward_op if dora else lora_module._forward_op
    for norm_grad in (False, True) if dora else (None,):
        torch.library.opcheck(op, (*tensors, 0.5, mask, keep, *([norm_grad, not norm_grad] if dora else [])))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_opcheck_of_the_backward_operations(dora, setting):
    rows, dtype, bias, dropped, trained = setting
    (x, weight, b, *adapter), mask, keep = arguments(rows, dora, dtype, bias, dropped, ())
    dy = torch.randn(rows, 7).to(dtype)
    needs = [name in trained for name in ("x", "lora_a", "lora_b")]
    with torch.no_grad():
        if dora:
            y, h, norm = dora_module._forward_op(x, weight, b, *adapter, 0.5, mask, keep, True, True)
            rest = (y, h, norm, 0.5, mask, keep, True, [*needs, "magnitude" in trained])
            torch.library.opcheck(dora_module._backward_op, (dy, x, weight, b, *adapter, *rest))
        else:
            _, h = lora_module._forward_op(x, weight, b, *adapter, 0.5, mask, keep)
            torch.library.opcheck(lora_module._backward_op, (dy, x, weight, *adapter, h, 0.5, mask, keep, needs))
