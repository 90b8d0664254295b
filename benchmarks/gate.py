"""What a suite checks before it times: that a candidate, ours or a peer's, computes the right thing and trains what it says."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.harness import Check, compare

SAMPLES = 16  # numbers, at least, from which the error of plain torch is taken
Autocast = Callable[[], AbstractContextManager[Any]]


class Formula(NamedTuple):
    """What an adapter layer has to compute, ``x weight()ᵀ + bias``, said in terms of its own tensors.

    Attributes:
        weight: the effective weight `(out, in)`, a differentiable function of `tensors`.
        bias: `(out,)` or None.
        tensors: the adapter's tensors, all of which train, by name.
        rank: of the update.
        scale: its factor.
        dropout: of the update's input in training mode.
        branches: the layer of x in plain torch with the low-rank product one factor after the other, as it is published,
            where the method has that form. It rounds otherwise than `weight` does, and neither is the better.
    """

    weight: Callable[[], Tensor]
    bias: Tensor | None
    tensors: dict[str, Tensor]
    rank: int
    scale: float
    dropout: float
    branches: Callable[[Tensor], Tensor] | None = None


def own_formula(layer: nn.Module) -> Formula:
    """The `Formula` of one of our layers: its `effective_weight` is its specification."""
    return Formula(
        layer.effective_weight, layer.bias, layer.adapter_parameters(), layer.rank, layer.scale, getattr(layer, "dropout", 0.0)
    )


def check_candidate(
    name: str,
    model: nn.Module,
    base: nn.Module,
    batch: tuple[Tensor, ...],
    *,
    dtype: torch.dtype,
    autocast: Autocast,
    model_dtype: torch.dtype | None = None,
) -> list[Check]:
    """Checks that hold for any method, ours or a peer's, in eval mode before the first step.

    The model computes what `base` computes; and a backward pass reaches every parameter that is to train, no other.

    Args:
        name: of the candidate, for the message.
        model: the candidate as its builder returned it.
        base: the model that it was built from.
        batch: positional arguments of both; a small one will do.
        dtype: the lowest precision of the forward pass.
        autocast: makes the context of the forward pass.
        model_dtype: what all frozen tensors of the candidate are held in, where that is not the dtype of `base`.
    """
    with autocast():
        actual = model.eval()(*batch)
    plain, oracle = _plain_and_oracle(base, batch, {}, autocast=autocast, model_dtype=model_dtype)
    checks = [compare(f"{name}: output at birth against the base model", actual.detach(), plain, oracle, dtype=dtype)]

    if any(parameter.requires_grad for parameter in model.parameters()):
        actual.float().square().mean().backward()
        wrong = [key for key, value in model.named_parameters() if value.requires_grad != (value.grad is not None)]
    else:
        wrong = ["none trains"]
    model.zero_grad(set_to_none=True)
    checks.append(Check(f"{name}: gradients where they belong {wrong[:3] if wrong else ''}".rstrip(), len(wrong), 0))
    return checks


@torch.no_grad()
def _plain_and_oracle(
    base: nn.Module,
    batch: tuple[Tensor, ...],
    weights: Mapping[str, Tensor],
    *,
    autocast: Autocast,
    model_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The output of `base` with other `weights` in places, plainly and in fp64."""
    precise = [tensor.double() if tensor.is_floating_point() else tensor for tensor in batch]
    oracle = functional_call(copy.deepcopy(base).eval().double(), dict(weights), tuple(precise))
    plain = copy.deepcopy(base).eval()
    if model_dtype is not None:
        plain = plain.to(model_dtype)
    state = plain.state_dict()
    own = {key: value.to(state[key].dtype) for key, value in weights.items()}
    with autocast():
        return functional_call(plain, own, batch), oracle


def check_adapted_model(
    name: str,
    model: nn.Module,
    base: nn.Module,
    batch: tuple[Tensor, ...],
    layers: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype,
    autocast: Autocast,
    seed: int,
    formula: Callable[[nn.Module], Formula] = own_formula,
    model_dtype: torch.dtype | None = None,
) -> list[Check]:
    """Check the output of the whole model, its adapters perturbed, against `base` with their effective weights in fp64.

    Args:
        name: of the candidate, for the message.
        model: the candidate; a copy is perturbed.
        base: the model that it was built from.
        batch: positional arguments of both; a small one will do.
        layers: the adapter layers of `model` by name.
        dtype: the lowest precision of the forward pass.
        autocast: makes the context of the forward pass.
        seed: of the perturbation.
        formula: reads off a layer what it has to compute.
        model_dtype: as in `check_candidate`.
    """
    twin = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key in layers:
        layer = twin.get_submodule(key)
        _perturb(formula(layer), generator)
        weights[f"{key}.weight"] = formula(_doubled(layer)).weight().detach()
    with torch.no_grad(), autocast():
        actual = twin(*batch)
    plain, oracle = _plain_and_oracle(base, batch, weights, autocast=autocast, model_dtype=model_dtype)
    return [compare(f"{name}: output of the adapted model", actual, plain, oracle, dtype=dtype)]


@torch.no_grad()
def _perturb(formula: Formula, generator: torch.Generator) -> None:
    for tensor in formula.tensors.values():
        tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator).to(tensor))


def _doubled(layer: nn.Module) -> nn.Module:
    """A copy in fp64, without the group that it may belong to: a group's other layers stay what they are."""
    group = getattr(layer, "group", None)
    if group is not None:
        layer.group = None
    twin = copy.deepcopy(layer).double()
    if group is not None:
        layer.group = group
    return twin


def _run(
    formulas: Sequence[Formula], forwards: Sequence[Callable[[Tensor], Tensor]], x: Tensor, upstreams: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Outputs for one x, and the gradients of ``Σ (y * upstream).sum()`` in x and the adapters' tensors."""
    x = x.clone().requires_grad_()
    ys = [forward(x) for forward in forwards]
    tensors = _trained(formulas)
    loss = torch.stack([(y * upstream.to(y.dtype)).sum() for y, upstream in zip(ys, upstreams, strict=True)]).sum()
    gradients = torch.autograd.grad(loss, [x, *tensors.values()])
    outputs = {f"{index} output": y.detach() for index, y in enumerate(ys)}
    return outputs | dict(zip(["0 d x", *tensors], gradients, strict=True))


def _trained(formulas: Sequence[Formula]) -> dict[str, Tensor]:
    return {f"{index} d {key}": value for index, each in enumerate(formulas) for key, value in each.tensors.items()}


def _terms(formulas: Sequence[Formula], x: Tensor, upstreams: Sequence[Tensor]) -> dict[str, Tensor]:
    """``Σ |gradient of one row of x|`` for each tensor of the `formulas`: what its gradient sums up, and may cancel there."""
    ys = [_specified(each)(x) for each in formulas]
    rows = torch.stack([(y * upstream).sum(-1).flatten() for y, upstream in zip(ys, upstreams, strict=True)]).sum(0)
    tensors = _trained(formulas)
    totals = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for row in rows:
        gradients = torch.autograd.grad(row, list(tensors.values()), retain_graph=True)
        for total, gradient in zip(totals.values(), gradients, strict=True):
            total += gradient.abs()
    return totals


def _branches(formulas: Sequence[Formula]) -> list[Callable[[Tensor], Tensor]]:
    """The other order of products, if all `formulas` know one."""
    found = [each.branches for each in formulas if each.branches is not None]
    return found if len(found) == len(formulas) else []


def _same_in_either_order(
    label: str,
    precise: Sequence[Formula],
    x: Tensor,
    upstreams: Sequence[Tensor],
    exact: Mapping[str, Tensor],
    terms: Mapping[str, Tensor],
) -> list[Check]:
    """Check that both orders are one formula: in fp64 they may differ by what fp32 would round at most."""
    if not _branches(precise):
        return []
    other = _run(precise, _branches(precise), x, upstreams)
    checks = []
    for key, oracle in exact.items():
        what = f"{label}: {key.split(' ', 1)[1]} in either order"
        checks.append(compare(what, other[key], oracle, oracle, dtype=torch.float32, terms=terms[key]))
    return checks


def _plain(
    formulas: Sequence[Formula], x: Tensor, upstreams: Sequence[Tensor], exact: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What plain torch gives: of the orders of products that the `formulas` know, for each tensor the one that errs more."""
    orders = [order for order in ([_specified(each) for each in formulas], _branches(formulas)) if order]
    results = [_run(formulas, forwards, x, upstreams) for forwards in orders]
    return {
        name: max((result[name] for result in results), key=lambda t: (t.double() - oracle).abs().max().item())
        for name, oracle in exact.items()
    }


def _stacked(results: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of several draws, name by name, as one tensor."""
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def _specified(formula: Formula) -> Callable[[Tensor], Tensor]:
    bias = formula.bias
    return lambda x: F.linear(x, formula.weight().to(x.dtype), None if bias is None else bias.to(x.dtype))


def _units(layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Names of the layers to check: one of each kind and shape, with those that it runs together with."""
    names = {layer: key for key, layer in layers.items()}
    kinds: dict[Any, list[str]] = {}
    for layer in layers.values():
        group = getattr(layer, "group", None)
        members = [layer] if group is None else list(group.layers)
        kind = tuple((type(member), member.in_features, member.out_features) for member in members)
        kinds[group is not None, kind] = [names[member] for member in members]
    return list(kinds.values())


def check_adapters(
    name: str,
    layers: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype,
    autocast: Autocast,
    seed: int,
    formula: Callable[[nn.Module], Formula] = own_formula,
    input_dtype: torch.dtype = torch.float32,
) -> list[Check]:
    """Check ``layer(x) == F.linear(x, effective weight, bias)``, and all gradients, against fp64.

    One layer of each kind and shape is checked, together with those of its group, on a copy whose adapter tensors are
    perturbed, as most of a method is invisible at birth; in eval mode, since the formula knows no dropout. The error of
    plain torch in a tensor of few elements (SD-LoRA's magnitudes) may be small by luck, and so would the budget: such a
    layer is checked on several draws, whose results are compared as one tensor. Where the formula knows two orders of products
    plain torch may take either: a sum over thousands of output features before the one over rows errs by several times what the
    reverse does. A gradient is a sum over rows of x: its
    budget counts the size of their parts, as what they are rounded by does not cancel with them.

    Args:
        name: of the candidate, for the message.
        layers: its adapter layers by name.
        dtype: the lowest precision of the forward pass.
        autocast: makes the context of the forward pass.
        seed: of the perturbation and the inputs.
        formula: reads off a layer what it has to compute.
        input_dtype: what the layers are fed.
    """
    checks: list[Check] = []
    for unit in _units(layers):
        copies = copy.deepcopy([layers[key] for key in unit])
        for layer in copies:
            layer.eval()  # not in one expression: loralib's returns None
        formulas = [formula(layer) for layer in copies]
        generator = torch.Generator().manual_seed(seed)
        for each in formulas:
            _perturb(each, generator)
        device = next(copies[0].parameters()).device
        least = min(tensor.numel() for each in formulas for tensor in each.tensors.values())
        precise = [formula(_doubled(layer)) for layer in copies]
        drawn: list[tuple[dict[str, Tensor], ...]] = []
        sizes: list[dict[str, Tensor]] = []
        for _ in range(-(-SAMPLES // least)):
            x = torch.randn(2, 7, copies[0].in_features, generator=generator).to(device, input_dtype)
            upstreams = [torch.randn(2, 7, layer.out_features, generator=generator).to(device) for layer in copies]
            wide = [each.double() for each in upstreams]
            exact = _run(precise, [_specified(each) for each in precise], x.double(), wide)
            sizes.append(exact | _terms(precise, x.double(), wide))
            checks += _same_in_either_order(f"{name}: {unit[0]}", precise, x.double(), wide, exact, sizes[-1])
            with autocast():
                plainly = _plain(formulas, x, upstreams, exact)
                drawn.append((_run(formulas, copies, x, upstreams), plainly, exact))
        actual, plain, oracle = (_stacked(results) for results in zip(*drawn, strict=True))
        terms = _stacked(sizes)
        for key in oracle:
            index, what = key.split(" ", 1)
            label = f"{name}: {unit[int(index)]}: {what}"
            checks.append(compare(label, actual[key], plain[key], oracle[key], dtype=dtype, terms=terms[key]))
    return checks


def check_setup(
    name: str,
    layers: Mapping[str, nn.Module],
    expected: Sequence[str],
    *,
    rank: int,
    scale: float,
    dropout: float,
    formula: Callable[[nn.Module], Formula] = own_formula,
) -> list[Check]:
    """Check that the layers that carry an adapter are those of `expected`, with this rank, scale and dropout: a candidate
    that adapts less, or drops nothing, would be compared with more than itself.
    """
    wrong = sorted(set(expected) ^ set(layers))
    for key, layer in layers.items():
        found = formula(layer)
        if (found.rank, found.scale, found.dropout) != (rank, scale, dropout):
            wrong.append(f"{key} with rank {found.rank}, scale {found.scale:g}, dropout {found.dropout:g}")
    return [Check(f"{name}: layers, rank, scale and dropout as asked {wrong[:3] if wrong else ''}".rstrip(), len(wrong), 0)]
