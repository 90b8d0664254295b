"""What the step suite compares: full fine-tuning, our adapters and the peers', each in one or several precisions.

A candidate is written ``NAME`` or ``NAME@PRECISION``; without a precision it runs in that of the cell.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gate import check_adapted_model, check_adapters, check_candidate, check_setup
from benchmarks.harness import Check
from benchmarks.peers import LIBRARIES, PEERS, SCALE, Plan, target_names

BASELINE = "full-frozen-embeddings"
TARGETS = {"qv": ["query", "value"], "all-linear": ["query", "key", "value", "dense"]}
GROUPS = {"qv": [("query", "value")], "all-linear": [("query", "key", "value")]}


class Precision(NamedTuple):
    """How a candidate computes.

    Attributes:
        amp: whether the forward pass runs under bf16 autocast.
        base: what the adapted frozen weights are held in, where that is not fp32.
        model: what every frozen tensor is held in, where that is not fp32.
        adapters: what the adapters are held in.
    """

    amp: bool = False
    base: torch.dtype | None = None
    model: torch.dtype | None = None
    adapters: torch.dtype = torch.float32

    def lowest(self) -> torch.dtype:
        """The lowest precision in the forward pass, which sets the gate's budget."""
        return torch.bfloat16 if self.amp else self.model or self.base or torch.float32


PRECISIONS = {
    "fp32": Precision(),
    "amp": Precision(amp=True),
    "bf16-base": Precision(amp=True, base=torch.bfloat16),
    "bf16-model": Precision(amp=True, model=torch.bfloat16),
    "bf16-all": Precision(amp=True, model=torch.bfloat16, adapters=torch.bfloat16),
}


class Candidate(NamedTuple):
    """A method of a library, or full fine-tuning, whose library is None; `grouped` layers that read one input run together."""

    library: str | None
    method: str
    grouped: bool = False


CANDIDATES: dict[str, Candidate] = {
    "full": Candidate(None, "full"),
    BASELINE: Candidate(None, "full-frozen-embeddings"),
    **{method: Candidate("ours", method) for method in LIBRARIES["ours"].methods},
    **{f"{method}-grouped": Candidate("ours", method, grouped=True) for method in LIBRARIES["ours"].methods},
    **{f"{name}-{method}": Candidate(name, method) for name in PEERS for method in LIBRARIES[name].methods},
}


def split(name: str) -> tuple[Candidate, str | None]:
    """The candidate that `name` means, and its own precision or None.

    Raises:
        ValueError: there is no such candidate or precision, or it does not go together.
    """
    kind, _, precision = name.partition("@")
    if kind not in CANDIDATES:
        raise ValueError(f"no candidate {kind}; there are {', '.join(CANDIDATES)}, each also with @PRECISION")
    if "@" in name and precision not in PRECISIONS:
        raise ValueError(f"{name}: no precision {precision}; there are {', '.join(PRECISIONS)}")
    if precision in ("bf16-model", "bf16-all") and CANDIDATES[kind].library is None:
        raise ValueError(f"{name}: full fine-tuning trains fp32 weights; take @amp or @fp32")
    if precision == "bf16-base" and CANDIDATES[kind].library != "ours":
        raise ValueError(f"{name}: only our layers hold their base in a dtype of its own; take @bf16-model, @amp or @fp32")
    return CANDIDATES[kind], precision or None


def of_library(names: Iterable[str], library: str | None, method: str) -> list[str]:
    """Those of the candidates `names` that are `method` of `library`."""
    return [name for name in names if split(name)[0][:2] == (library, method)]


def default_candidates(amp: str) -> tuple[str, ...]:
    """What a cell compares unless it is told otherwise: with autocast every library's precisions as well."""
    if amp == "off":
        return tuple(CANDIDATES)
    names = ["full@fp32", f"{BASELINE}@fp32", BASELINE]
    for name, candidate in CANDIDATES.items():
        if candidate.library is not None:
            names.append(name)
        if candidate.grouped:
            names.append(f"{name}@bf16-base")
        if candidate.grouped or candidate.library == "peft":
            names.append(f"{name}@bf16-model")
        if candidate.library == "peft":
            names.append(f"{name}@bf16-all")
    return tuple(names)


def build(name: str, model: nn.Module, plan: Plan, precision: Precision) -> nn.Module:
    """The model of candidate `name` with `requires_grad` set, made of `model`, which is changed.

    Args:
        name: of the candidate.
        model: a copy of the base model, of its own.
        plan: what to adapt; its `fuse` is for the grouped candidates.
        precision: what the candidate's frozen tensors are held in.
    """
    candidate = split(name)[0]
    if precision.model is not None:
        model = model.to(precision.model)
    if candidate.library is None:
        if candidate.method == "full-frozen-embeddings":
            model.embeddings.requires_grad_(False)
        return model
    own = replace(plan, base_dtype=precision.base, fuse=plan.fuse if candidate.grouped else ())
    library = LIBRARIES[candidate.library]
    model = library.inject(candidate.method, model, own)
    for layer in library.layers(model).values():
        # By default a library's adapters may be in the base's dtype; a comparison holds them all in one.
        for tensor in library.formula(layer).tensors.values():
            tensor.data = tensor.data.to(precision.adapters)
    return model


def check(
    name: str, model: nn.Module, base: nn.Module, batch: tuple[Tensor, ...], plan: Plan, precision: Precision
) -> list[Check]:
    """All checks of the gate that apply to candidate `name`, as `build` returned it.

    Args:
        name: of the candidate.
        model: what is to be timed.
        base: the model that it was built from.
        batch: positional arguments of both; a small one will do.
        plan: what was to be adapted, and how.
        precision: as `build` was given it.
    """

    def autocast() -> torch.autocast:
        return torch.autocast(batch[0].device.type, torch.bfloat16, enabled=precision.amp)

    how: dict[str, Any] = {"dtype": precision.lowest(), "autocast": autocast}
    checks = check_candidate(name, model, base, batch, model_dtype=precision.model, **how)
    candidate = split(name)[0]
    if candidate.library is None:
        return checks
    library = LIBRARIES[candidate.library]
    layers = library.layers(model)
    checks += check_setup(
        name, layers, target_names(base, plan), rank=plan.rank, scale=SCALE, dropout=plan.dropout, formula=library.formula
    )
    more: dict[str, Any] = {"seed": plan.seed, "formula": library.formula, **how}
    checks += check_adapters(name, layers, input_dtype=precision.model or torch.float32, **more)
    return checks + check_adapted_model(name, model, base, batch, layers, model_dtype=precision.model, **more)


def missing(names: Iterable[str]) -> list[str]:
    """Packages that the candidates `names` need and that are not installed."""
    needed = {split(name)[0].library for name in names}
    return [LIBRARIES[name].package for name in PEERS if name in needed and LIBRARIES[name].version() is None]
