"""Who takes part in `benchmarks.kernels`, and whether they all compute the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.formulas import FORMULAS
from benchmarks.gpu_layers import SCALE, Case, Tensors, ours, results
from benchmarks.harness import Check, compare
from peftlite.kernels.dispatch import triton_obstacle
from peftlite.kernels.dora_linear import dora_linear
from peftlite.kernels.row_norm import BaseSquare, row_norm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS, COMPILED = "torch", "compiled reference"
Forward = Callable[[Case, Tensors], Tensor]


@dataclass(frozen=True)
class KernelSettings:
    """Everything that a cell's figures depend on, besides the commit and the versions."""

    operation: str
    model: str
    rows: int
    in_features: int
    out_features: int
    rank: int
    dtype: str
    rounds: int
    warmup: int
    device: str
    threads: int
    compile: bool
    seed: int = 0

    @property
    def key(self) -> str:
        """The cell's name in the result file."""
        shape = f"{self.in_features} -> {self.out_features}"
        rows = "" if self.operation == "row_norm" else f", {self.rows} rows"
        return f"{self.device}, {self.operation}, {self.model}: {shape}{rows}, r={self.rank}, {self.dtype}"

    @property
    def case(self) -> Case:
        """The layer; `row_norm` has no batch to speak of."""
        rows = 1 if self.operation == "row_norm" else self.rows
        return Case(self.operation, rows, self.in_features, self.out_features, self.rank, DTYPES[self.dtype])


class Candidates(NamedTuple):
    """Functions of a case and its tensors by name, and why others are missing."""

    forward: dict[str, Forward]
    absent: dict[str, str]


def candidates(settings: KernelSettings, no_compiler: str | None) -> Candidates:
    """Who takes part in a cell, the reference first.

    Args:
        settings: of the cell.
        no_compiler: why there is no `torch.compile`, or None.
    """
    device, absent = torch.device(settings.device), {}
    if settings.operation == "row_norm":
        found: dict[str, Forward] = {"reference": _norm_reference, OURS: _norm}
        absent["triton"] = "runs inside dora_linear's; see benchmarks.gpu"
    else:
        found = {"reference": lambda case, t: ours(case, t, "reference"), OURS: lambda case, t: ours(case, t, "torch")}
        obstacle = "there is no GPU" if device.type != "cuda" else triton_obstacle(device, DTYPES[settings.dtype])
        if obstacle:
            absent["triton"] = obstacle
        else:
            found["triton"] = lambda case, t: ours(case, t, "triton")
    if settings.operation == "dora":
        square = BaseSquare()
        found[f"{OURS}, ‖W‖² kept"] = lambda case, t: _dora(t, square)  # as `DoRALinear` calls it
    if no_compiler:
        absent[COMPILED] = no_compiler
    else:
        torch.compiler.reset()
        found[COMPILED] = torch.compile(found["reference"], fullgraph=True, dynamic=False)
    for name, formula in FORMULAS[settings.operation].items():
        found[name] = lambda case, t, formula=formula: formula(t)
    return Candidates(found, absent)


def _dora(t: Tensors, square: BaseSquare) -> Tensor:
    assert t.magnitude is not None
    return dora_linear(t.x, t.weight, t.bias, t.lora_a, t.lora_b, t.magnitude, SCALE, base_square=square, impl="torch")


def _norm(case: Case, t: Tensors) -> Tensor:
    return row_norm(t.weight, t.lora_a, t.lora_b, SCALE, compute=case.dtype)


@torch.no_grad()
def _norm_reference(case: Case, t: Tensors) -> Tensor:
    wide = torch.promote_types(t.weight.dtype, t.lora_a.dtype)
    return torch.linalg.vector_norm(t.weight.to(wide) + SCALE * (t.lora_b @ t.lora_a), dim=1)


def outcome(case: Case, t: Tensors, forward: Forward) -> dict[str, Tensor]:
    """The output, and the gradients where the operation has any."""
    return {"output": forward(case, t).detach()} if case.operation == "row_norm" else results(case, t, forward)


def gate(case: Case, t: Tensors, found: Mapping[str, Forward]) -> dict[str, list[Check]]:
    """Output and every gradient of every candidate against the reference in fp64."""
    reference = found["reference"]
    oracle, plain = outcome(case, t.to(torch.float64), reference), outcome(case, t, reference)
    checks = {}
    for name, forward in found.items():
        actual = plain if name == "reference" else outcome(case, t, forward)
        checks[name] = [
            compare(f"{case}: {name}: {key}", actual[key], plain[key], oracle[key], dtype=case.dtype) for key in oracle
        ]
    return checks


def leave_out_inexact(found: Candidates, checks: dict[str, list[Check]], operation: str) -> None:
    """Move the candidates of others that are not as exact as the reference to the absent; ours would stop the cell."""
    for name in (COMPILED, *FORMULAS[operation]):
        red = [check for check in checks.get(name, []) if not check.green]
        if red:
            found.absent[name] = "not timed, since it is off: " + "; ".join(map(str, red))
            del found.forward[name], checks[name]
