"""Whole operations in the interpreter: how many launches they make, and how often they pass over the tensors of size M x N."""

import pytest
import torch

from benchmarks.traffic import Transfer, passes, traffic
from peftlite.kernels.dora_linear import dora_linear
from peftlite.kernels.lora_linear import lora_linear
from peftlite.kernels.prepared_triton import Layer, Prepared, offer

ROWS, IN, OUT, RANK, SCALE = 64, 48, 80, 16, 2.0


def metered(operation: str, dtype: torch.dtype, *, dropout: float = 0.0) -> tuple[list[Transfer], ...]:
    """The transfers of what is prepared once per step, of a forward and of a backward pass."""
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((ROWS, IN), (OUT, IN), (OUT,)))
    x.requires_grad_()
    a, b = torch.randn(RANK, IN, requires_grad=True), torch.randn(OUT, RANK, requires_grad=True)
    magnitude = torch.linalg.vector_norm(weight.float() + SCALE * b @ a, dim=1).detach().requires_grad_()
    dora = operation == "dora"
    prepared = Prepared([Layer(a, b, SCALE, *((weight, magnitude) if dora else ()))], dtype)
    reached = {"weight": weight, "lora_a": a, "lora_b": b, "magnitude": magnitude}
    module = prepared.modules[0]
    reached |= {"packed_a": module.packed_a, "packed_b": module.packed_b}
    if module.out is not None:
        reached["out"] = module.out
    before = traffic(prepared.refresh, pointed_at={name: tensor.detach() for name, tensor in reached.items()})
    offer(prepared)
    outputs = []

    def forward() -> None:
        if dora:
            outputs.append(dora_linear(x, weight, bias, a, b, magnitude, SCALE, dropout=dropout, impl="triton"))
        else:
            outputs.append(lora_linear(x, weight, bias, a, b, SCALE, dropout=dropout, impl="triton"))

    there = traffic(forward)
    upstream = torch.randn(ROWS, OUT).to(dtype)
    back = traffic(lambda: outputs[0].backward(upstream))
    assert all(tensor.grad is not None for tensor in (x, a, b))
    return before, there, back


def calls(transfers: list[Transfer]) -> list[str]:
    return [transfer.call for transfer in transfers]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_dora_moves_three_passes_forward_and_five_backward(dtype):
    """Against 16 and 20 of PEFT, which tests/benchmarks/test_traffic.py counts by the same rule."""
    before, there, back = metered("dora", dtype)
    assert passes(there, ROWS * OUT, dtype.itemsize) == 3, calls(there)
    assert passes(back, ROWS * OUT, dtype.itemsize) == 5, calls(back)
    assert (len(there), len(back)) == (3, 7), (calls(there), calls(back))
    (norm,) = [transfer for transfer in before if "row_norm" in transfer.call]
    weight = norm.named("weight")
    assert (weight.read, weight.revisits, weight.covered) == (OUT * IN * dtype.itemsize, 1, 1.0), "T0 reads W exactly once"
    assert not [t for t in (*there, *back) if "norm" in t.call or "pack" in t.call], "prepared once, not in each pass"


def test_lora_launches_three_forward_and_five_backward():
    """In fp32: only CUDA multiplies 16-bit matrices into fp32 gradients without conversions around it."""
    _, there, back = metered("lora", torch.float32)
    assert (len(there), len(back)) == (3, 5), (calls(there), calls(back))
    assert (passes(there, ROWS * OUT, 4), passes(back, ROWS * OUT, 4)) == (3, 3)


@pytest.mark.parametrize(("operation", "forward", "backward"), [("lora", 3, 3), ("dora", 3, 5)])
def test_dropout_adds_no_pass_and_only_the_launch_that_draws_the_seed(operation, forward, backward):
    _, there, back = metered(operation, torch.float32, dropout=0.25)
    assert (passes(there, ROWS * OUT, 4), passes(back, ROWS * OUT, 4)) == (forward, backward)
    assert "_row_shrink_kernel" in calls(there), "the mask is drawn where x is read, and not in a pass of its own"
    assert len(there) == 4, calls(there)
