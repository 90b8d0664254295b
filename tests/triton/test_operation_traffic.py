"""Whole operations in the interpreter: how many launches they make, and how often they pass over the tensors of size M x N."""

import pytest
import torch

from benchmarks.traffic import Transfer, passes, traffic
from peftlite.kernels.dora_linear import dora_linears
from peftlite.kernels.lora_linear import lora_linears
from peftlite.kernels.low_rank import LoRAArguments
from peftlite.kernels.prepared_triton import Layer, Prepared, offer
from peftlite.kernels.weight_decomposed import DoRAArguments

# Multiples of 16, as the wide tiles want; nothing else has as many elements as x or y, the ranks of three modules neither.
ROWS, IN, OUT, RANK, SCALE = 64, 112, 80, 16, 2.0


def metered(operation: str, dtype: torch.dtype, *, dropout: float = 0.0, count: int = 1) -> tuple[list[Transfer], ...]:
    """The transfers of what is prepared once per step, of a forward and of a backward pass, for layers that read the same x."""
    x = torch.randn(ROWS, IN).to(dtype).requires_grad_()
    dora, layers, reached = operation == "dora", [], {}
    for k in range(count):
        weight, bias = torch.randn(OUT, IN).to(dtype), torch.randn(OUT).to(dtype)
        a, b = torch.randn(RANK, IN, requires_grad=True), torch.randn(OUT, RANK, requires_grad=True)
        magnitude = torch.linalg.vector_norm(weight.float() + SCALE * b @ a, dim=1).detach().requires_grad_()
        layers.append(
            DoRAArguments(weight, bias, a, b, magnitude, SCALE) if dora else LoRAArguments(weight, bias, a, b, SCALE)
        )
        reached |= {f"weight{k}": weight, f"lora_a{k}": a, f"lora_b{k}": b, f"magnitude{k}": magnitude}
    own = [Layer(of.lora_a, of.lora_b, SCALE, *((of.weight, of.magnitude) if dora else ())) for of in layers]
    prepared = Prepared(own, dtype)
    for k, module in enumerate(prepared.modules):
        reached |= {f"packed_a{k}": module.packed_a, f"packed_b{k}": module.packed_b}
        if module.out is not None:
            reached[f"out{k}"] = module.out
    before = traffic(prepared.refresh, pointed_at={name: tensor.detach() for name, tensor in reached.items()})
    offer(prepared)
    outputs = []
    run = dora_linears if dora else lora_linears
    there = traffic(lambda: outputs.extend(run(x, layers, dropout=dropout, impl="triton")))
    upstream = [torch.randn(ROWS, OUT).to(dtype) for _ in layers]
    back = traffic(lambda: torch.autograd.backward(outputs, upstream))
    assert all(tensor.grad is not None for layer in layers for tensor in (x, layer.lora_a, layer.lora_b))
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
    weight = norm.named("weight0")
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


@pytest.mark.parametrize(("operation", "forward", "backward"), [("lora", 3, 3), ("dora", 3, 5)])
def test_three_modules_that_read_the_same_x_read_it_once(operation, forward, backward):
    """Of their own tensors each makes as many passes as alone; what is saved are passes over x and its gradient."""
    before, there, back = metered(operation, torch.float32, count=3)
    assert (passes(there, ROWS * OUT, 4), passes(back, ROWS * OUT, 4)) == (3 * forward, 3 * backward)
    (shrink,) = [transfer for transfer in there if transfer.call == "_row_shrink_kernel"]
    assert (shrink.named("X0").read, shrink.named("X0").revisits) == (ROWS * IN * 4, 1)
    assert passes(there, ROWS * IN, 4) == 3 + 1, "x by each base product and once by the shrink; alone each reads it twice"
    # Gradient of x: one product writes it, two add to it, so does the low-rank path; the gradients of A read x once. Alone
    # each makes four passes, and two additions of three passes each bring the gradients together.
    assert passes(back, ROWS * IN, 4) == (1 + 2 + 2) + 2 + 1
    norms = [transfer for transfer in before if "row_norm" in transfer.call and "finish" not in transfer.call]
    for norm in norms:
        for k in range(3):
            weight = norm.named(f"weight{k}")
            assert (weight.read, weight.revisits, weight.covered) == (OUT * IN * 4, 1, 1.0)
    assert len(norms) == (1 if operation == "dora" else 0), "one launch for the norms of all three"
