"""The libraries that a benchmark compares, ours among them: how each adapts a model, and what its layers have to compute.

The peers run as they are installed. What their layers have to compute is read off their tensors by the published
formulas, LoRA (Hu et al. 2021, arXiv:2106.09685) and DoRA (Liu et al. 2024, arXiv:2402.09353), for the gate to check.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor, nn

import peftlite
from benchmarks.gate import Formula, own_formula
from peftlite.kernels.lora_linear import lora_linear_reference
from peftlite.kernels.weight_decomposed import dora_linear_reference


@dataclass(frozen=True)
class Plan:
    """What to adapt, and how; the scale is always 2.

    Attributes:
        targets: last segments of the names of the linears.
        rank: of the updates.
        dropout: of the adapters.
        fuse: groups of targets that read the same input, for a library that can run them together.
        base_dtype: what the adapted frozen weights are held in, for a library that can hold them apart.
        seed: of the initial values.
    """

    targets: Sequence[str]
    rank: int
    dropout: float
    fuse: Sequence[Sequence[str]] = ()
    base_dtype: torch.dtype | None = None
    seed: int = 0


SCALE = 2.0


class Library(NamedTuple):
    """A library under comparison.

    Attributes:
        package: name of the distribution; its version goes into the result.
        methods: of the benchmark's, those that it has.
        inject: puts adapters into a model, which it may change, and freezes the rest: (method, model, plan) -> model.
        layers: the adapter layers of a model by the names of the linears that they replaced.
        formula: what a layer has to compute.
    """

    package: str
    methods: tuple[str, ...]
    inject: Callable[[str, nn.Module, Plan], nn.Module]
    layers: Callable[[nn.Module], dict[str, nn.Module]]
    formula: Callable[[nn.Module], Formula]

    def version(self) -> str | None:
        """The installed version, or None."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


def _inject_ours(method: str, model: nn.Module, plan: Plan) -> nn.Module:
    return peftlite.inject_adapters(
        model,
        list(plan.targets),
        plan.rank,
        method=method,
        alpha=SCALE * plan.rank,
        dropout=plan.dropout,
        base_dtype=plan.base_dtype,
        fuse=plan.fuse,
        seed=plan.seed,
    )


def _effective_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None) -> Tensor:
    """``W + s B A``, or ``m ⊙ (W + s B A) / ‖W + s B A‖_row`` with the norm a constant, in the factors' dtype."""
    whole = weight.to(b.dtype) + scale * (b @ a)
    if magnitude is None:
        return whole
    return (magnitude / whole.detach().norm(dim=1))[:, None] * whole


def _branches(
    weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """``x Wᵀ + s (x Aᵀ) Bᵀ + b``, or the same with a gain, in plain torch."""
    if magnitude is None:
        return lambda x: lora_linear_reference(x, weight, bias, a, b, scale)
    return lambda x: dora_linear_reference(x, weight, bias, a, b, magnitude, scale)


def _our_formula(layer: nn.Module) -> Formula:
    branches = _branches(layer.weight, layer.bias, layer.lora_a, layer.lora_b, layer.scale, getattr(layer, "magnitude", None))
    return own_formula(layer)._replace(branches=branches)


def _inject_peft(method: str, model: nn.Module, plan: Plan) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=plan.rank,
        lora_alpha=int(SCALE * plan.rank),
        lora_dropout=plan.dropout,
        target_modules=list(plan.targets),
        use_dora=method == "dora",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return peft.inject_adapter_in_model(config, model)


def _peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners.lora import Linear

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def _peft_formula(layer: nn.Module) -> Formula:
    adapter = "default"
    base, scale = layer.base_layer, layer.scaling[adapter]
    tensors = {"lora_a": layer.lora_A[adapter].weight, "lora_b": layer.lora_B[adapter].weight}
    if adapter in layer.lora_magnitude_vector:
        tensors["magnitude"] = layer.lora_magnitude_vector[adapter].weight
    a, b, m = tensors["lora_a"], tensors["lora_b"], tensors.get("magnitude")
    dropout = getattr(layer.lora_dropout[adapter], "p", 0.0)  # an `Identity` where it is 0
    return Formula(
        lambda: _effective_weight(base.weight, a, b, scale, m),
        base.bias,
        tensors,
        layer.r[adapter],
        scale,
        dropout,
        _branches(base.weight, base.bias, a, b, scale, m),
    )


def _inject_loralib(method: str, model: nn.Module, plan: Plan) -> nn.Module:
    import loralib

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        for name in target_names(model, plan):
            old = model.get_submodule(name)
            new = loralib.Linear(
                old.in_features,
                old.out_features,
                r=plan.rank,
                lora_alpha=int(SCALE * plan.rank),
                lora_dropout=plan.dropout,
                merge_weights=False,  # or `eval()` would change the weights, and the gate could not look inside
                bias=old.bias is not None,
                device=old.weight.device,
            )
            new.weight, new.bias = old.weight, old.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    loralib.mark_only_lora_as_trainable(model)
    return model


def target_names(model: nn.Module, plan: Plan) -> list[str]:
    """The names of the linears of a plain `model` that `plan` adapts."""
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name in linears if name.rpartition(".")[2] in plan.targets]


def _loralib_layers(model: nn.Module) -> dict[str, nn.Module]:
    import loralib

    return {name: module for name, module in model.named_modules() if isinstance(module, loralib.Linear)}


def _loralib_formula(layer: nn.Module) -> Formula:
    tensors = {"lora_a": layer.lora_A, "lora_b": layer.lora_B}
    dropout = getattr(layer.lora_dropout, "p", 0.0)  # a plain function where it is 0
    return Formula(
        lambda: _effective_weight(layer.weight, layer.lora_A, layer.lora_B, layer.scaling, None),
        layer.bias,
        tensors,
        layer.r,
        layer.scaling,
        dropout,
        _branches(layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling, None),
    )


LIBRARIES: dict[str, Library] = {
    "ours": Library("peftlite", ("lora", "dora"), _inject_ours, peftlite.adapters, _our_formula),
    "peft": Library("peft", ("lora", "dora"), _inject_peft, _peft_layers, _peft_formula),
    "loralib": Library("loralib", ("lora",), _inject_loralib, _loralib_layers, _loralib_formula),
}
PEERS = [name for name in LIBRARIES if name != "ours"]


def versions() -> dict[str, str | None]:
    """The installed version of each peer."""
    return {name: LIBRARIES[name].version() for name in PEERS}
