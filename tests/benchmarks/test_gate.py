"""What the gate allows: the error of plain torch, in the order of products that rounds more."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gate import Formula, check_adapters
from peftlite.kernels.lora_linear import lora_linear_reference

OUT, IN = 40, 8
LARGE = 2.0**10


class Rounding(nn.Module):
    """LoRA whose gradient of h passes through a large partial sum and loses digits there."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.in_features, self.out_features = IN, OUT
        self.weight = torch.randn(OUT, IN, generator=generator)
        self.lora_a = nn.Parameter(torch.randn(2, IN, generator=generator))
        self.lora_b = nn.Parameter(torch.randn(OUT, 2, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return rounding(x, self.weight, self.lora_a, self.lora_b)


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, b):
        ctx.save_for_backward(h, b)
        return h @ b.T

    @staticmethod
    def backward(ctx, dy):
        h, b = ctx.saved_tensors
        dh = (dy @ b + LARGE) - LARGE
        return dh, dy.flatten(0, -2).T @ h.flatten(0, -2)


def rounding(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x @ weight.T + _Rounding.apply(x @ a.T, b)


def formula(layer: nn.Module, *, branches: bool, error: float = 0.0) -> Formula:
    a, b, weight = layer.lora_a, layer.lora_b, layer.weight

    def plain(x: Tensor) -> Tensor:
        wide = x.dtype == torch.float64
        return lora_linear_reference(x, weight, None, a, b, 1.0) if wide else rounding(x, weight, a, b)

    tensors = {"lora_a": a, "lora_b": b}
    return Formula(lambda: weight + b @ a * (1 + error), None, tensors, 2, 1.0, 0.0, plain if branches else None)


@pytest.mark.parametrize(("branches", "error", "red"), [(False, 0.0, ["d x", "d lora_a"]), (True, 0.0, []), (True, 1e-3, None)])
def test_either_order_of_products_is_plain_torch(branches, error, red):
    """A sum in another order is allowed what that order loses, and no more: a wrong formula stays red."""
    found = check_adapters(
        "ours",
        {"layer": Rounding()},
        dtype=torch.float32,
        autocast=nullcontext,
        seed=0,
        formula=lambda layer: formula(layer, branches=branches, error=error),
    )
    failed = [check.name.rpartition(": ")[2] for check in found if not check.green]
    assert failed == red if red is not None else "output in either order" in failed
