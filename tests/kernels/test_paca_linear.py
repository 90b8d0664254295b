"""paca_linear: outputs and every gradient against a dense fp64 oracle, what it saves, and compilation."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import DTYPES, SIZES, assert_within_budget
from torch import Tensor

from peftlite.kernels import paca_linear as module
from peftlite.kernels.paca_linear import paca_linear

pytestmark = pytest.mark.usefixtures("poisoned")
NAMES = ("x", "bias", "columns")


def tensors(rows: int, inner: int, outer: int, rank: int, dtype: torch.dtype, stored: torch.dtype) -> dict[str, Tensor]:
    """Operands by name, and a gradient of the output."""
    draw = torch.Generator().manual_seed(rows + inner + outer)
    values = {
        "x": torch.randn(rows, inner, generator=draw).to(dtype),
        "weight": (torch.randn(outer, inner, generator=draw) / inner**0.5).to(stored),
        "bias": torch.randn(outer, generator=draw).to(stored),
        "columns": torch.randn(outer, rank, generator=draw).to(torch.promote_types(dtype, torch.float32)),
        "dy": torch.randn(rows, outer, generator=draw).to(dtype),
    }
    return values | {"index": torch.randperm(inner, generator=draw)[:rank]}


def results(t: dict[str, Tensor], impl: str, needs: tuple[str, ...] = NAMES, scale: float = 0.7) -> dict[str, Tensor]:
    """Output and gradients of an implementation, or of the dense definition in fp64, or of that in the dtype of x."""
    dtype = {"oracle": torch.float64, "eager": t["x"].dtype}.get(impl)
    leaves = {name: (t[name] if dtype is None else t[name].to(dtype)).detach().requires_grad_(name in needs) for name in NAMES}
    x, bias, columns = leaves.values()
    if dtype is None:
        y = paca_linear(x, t["weight"], bias, columns, t["index"], scale, impl=impl)
    else:
        y = x @ t["weight"].to(dtype).T + scale * x[:, t["index"]] @ columns.T + bias
    trained = [leaves[name] for name in needs]
    return {"y": y.detach()} | dict(zip(needs, torch.autograd.grad(y, trained, t["dy"].to(y.dtype)), strict=True))


@given(
    rows=st.sampled_from([0, 1, 5, 31]),
    inner=SIZES,
    outer=SIZES,
    dtype=st.sampled_from(DTYPES[1:]),
    stored=st.sampled_from(DTYPES[1:]),
    data=st.data(),
)
def test_output_and_every_gradient(
    rows: int, inner: int, outer: int, dtype: torch.dtype, stored: torch.dtype, data: st.DataObject
) -> None:
    t = tensors(rows, inner, outer, data.draw(st.integers(1, inner)), dtype, stored)
    oracle, eager = results(t, "oracle"), results(t, "eager")
    for impl in ("torch", "reference"):
        for name, value in results(t, impl).items():
            assert value.dtype == (dtype if name == "y" else t[name].dtype)
            eps = max(torch.finfo(dtype).eps, torch.finfo(value.dtype).eps)
            assert_within_budget(value, eager[name], oracle[name], eps, f"{impl}: {name}")


@pytest.mark.parametrize("needs", [c for n in (1, 2, 3) for c in itertools.combinations(NAMES, n)], ids="-".join)
def test_every_choice_of_what_trains(needs: tuple[str, ...]) -> None:
    t = tensors(7, 5, 11, 3, torch.float32, torch.bfloat16)
    oracle, eager, actual = (results(t, impl, needs) for impl in ("oracle", "eager", "torch"))
    for name in ("y", *needs):
        assert_within_budget(actual[name], eager[name], oracle[name], torch.finfo(actual[name].dtype).eps, name)


def test_keeps_the_picked_inputs_alone() -> None:
    t = tensors(50, 40, 30, 3, torch.float32, torch.bfloat16)
    own = {value.untyped_storage().data_ptr() for value in t.values()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor):
        paca_linear(t["x"].requires_grad_(), t["weight"], t["bias"], t["columns"].requires_grad_(), t["index"], 1.0)
    assert [tuple(s.shape) for s in saved if s.untyped_storage().data_ptr() not in own] == [(50, 3)]


def test_operation_is_registered_soundly() -> None:
    t = tensors(7, 5, 11, 3, torch.float32, torch.float32)
    forward = (t["x"].requires_grad_(), t["weight"], t["bias"], t["columns"].requires_grad_(), t["index"], 0.5)
    torch.library.opcheck(module._forward_op, forward)
    backward = (t["dy"], t["weight"], t["columns"].detach(), torch.randn(7, 3), t["index"], 0.5, [True, True])
    torch.library.opcheck(module._backward_op, backward)


def test_shapes_that_do_not_fit() -> None:
    t = tensors(7, 5, 11, 3, torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"for weight \(11, 5\) x must be \(..., 5\), index \(r,\) and columns \(11, r\); got"):
        paca_linear(t["x"], t["weight"], None, t["columns"][:, :2], t["index"], 1.0)
    with pytest.raises(ValueError, match=r"paca_linear: impl='fast' was asked for"):
        paca_linear(t["x"], t["weight"], None, t["columns"], t["index"], 1.0, impl="fast")
