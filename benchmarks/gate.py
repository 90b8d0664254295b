"""What a suite checks before it times: that a candidate computes the right thing, and trains what it says."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Check, compare

SAMPLES = 16  # numbers, at least, from which the error of plain torch is taken
Autocast = Callable[[], AbstractContextManager[Any]]


def check_candidate(
    name: str, model: nn.Module, base: nn.Module, batch: tuple[Tensor, ...], *, dtype: torch.dtype, autocast: Autocast
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
    """
    with torch.no_grad():
        precise = [tensor.double() if tensor.is_floating_point() else tensor for tensor in batch]
        oracle = copy.deepcopy(base).eval().double()(*precise)
        with autocast():
            plain = base.eval()(*batch)
    with autocast():
        actual = model.eval()(*batch)
    checks = [compare(f"{name}: output at birth against the base model", actual.detach(), plain, oracle, dtype=dtype)]

    if any(parameter.requires_grad for parameter in model.parameters()):
        actual.float().square().mean().backward()
        wrong = [key for key, value in model.named_parameters() if value.requires_grad != (value.grad is not None)]
    else:
        wrong = ["none trains"]
    model.zero_grad(set_to_none=True)
    checks.append(Check(f"{name}: gradients where they belong {wrong[:3] if wrong else ''}".rstrip(), len(wrong), 0))
    return checks


def _run(layer: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output of `forward(x)`, and the gradients of `(forward(x) * upstream).sum()` in `x` and the adapter's tensors."""
    x = x.clone().requires_grad_()
    parameters = layer.adapter_parameters()
    y = forward(x)
    gradients = torch.autograd.grad((y * upstream.to(y.dtype)).sum(), [x, *parameters.values()])
    return {"output": y.detach(), **dict(zip(["d x", *(f"d {key}" for key in parameters)], gradients, strict=True))}


def _stacked(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of several draws, name by name, as one tensor."""
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def check_adapters(
    name: str, layers: Mapping[str, nn.Module], *, dtype: torch.dtype, autocast: Autocast, seed: int
) -> list[Check]:
    """Check `layer(x) == F.linear(x, layer.effective_weight(), layer.bias)`, and all gradients, against fp64.

    One layer of each kind and shape is checked, on a copy whose adapter tensors are perturbed, as most of a method is
    invisible at birth; in eval mode, since the specification knows no dropout. The error of plain torch in a tensor of few
    elements (SD-LoRA's magnitudes) may be small by luck, and so would the budget: such a layer is checked on several draws,
    whose results are compared as one tensor.

    Args:
        name: of the candidate, for the message.
        layers: its adapter layers by name.
        dtype: the lowest precision of the forward pass.
        autocast: makes the context of the forward pass.
        seed: of the perturbation and the inputs.
    """
    kinds = {(type(layer), layer.in_features, layer.out_features): key for key, layer in layers.items()}
    checks: list[Check] = []
    for (_, in_features, out_features), key in kinds.items():
        layer = copy.deepcopy(layers[key]).eval()
        device = layer.weight.device
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int, generator: torch.Generator = generator, device: torch.device = device) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        with torch.no_grad():
            for tensor in layer.adapter_parameters().values():
                tensor.add_(0.02 * noise(*tensor.shape).to(tensor.dtype))
        least = min(tensor.numel() for tensor in layer.adapter_parameters().values())
        draws = [(noise(2, 7, in_features), noise(2, 7, out_features)) for _ in range(-(-SAMPLES // least))]

        def specified(x: Tensor, layer: nn.Module) -> Tensor:
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            return F.linear(x, layer.effective_weight().to(x.dtype), bias)

        precise = copy.deepcopy(layer).double()
        oracle = _stacked(
            [_run(precise, lambda x, p=precise: specified(x, p), x.double(), upstream.double()) for x, upstream in draws]
        )
        with autocast():
            actual = _stacked([_run(layer, layer, *draw) for draw in draws])
            plain = _stacked([_run(layer, lambda x, layer=layer: specified(x, layer), *draw) for draw in draws])
        checks += [compare(f"{name}: {key}: {what}", actual[what], plain[what], oracle[what], dtype=dtype) for what in oracle]
    return checks
