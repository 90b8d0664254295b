"""What the operations launch: their forward and backward passes run on tensors without values, while the launches are noted.

The shapes come from the table of configurations (a rank, a width and a batch on either side of each bound in it), the options
are those that change a kernel: bias, dropout, exact norm, an x without a gradient, rows off 16-byte borders.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftlite.kernels import configs
from peftlite.kernels.dora_linear import dora_linear
from peftlite.kernels.launch_triton import Launch, recording
from peftlite.kernels.lora_linear import lora_linear

LARGE = {"rank": 384, "columns": 4096, "rows": 8192}  # beyond every bound that the table makes
LOW_PRECISION = (torch.bfloat16, torch.float16)


class Variant(NamedTuple):
    """A launch, the dtype of the computation that it belongs to, whether its rows are aligned, and who launched it."""

    launch: Launch
    dtype: str
    aligned: bool
    why: str


@dataclass(frozen=True)
class Scenario:
    """One forward and backward pass of an operation on tensors without values."""

    operation: str
    dtype: torch.dtype
    rows: int
    in_features: int
    out_features: int
    rank: int
    bias: bool = True
    dropout: float = 0.0
    x_grad: bool = True
    norm_grad: bool = False

    @property
    def aligned(self) -> bool:
        """Whether every row starts at a multiple of 16 bytes, and ends there."""
        return self.in_features % 16 == 0 and self.out_features % 16 == 0

    def __str__(self) -> str:
        flags = [
            *(["bias"] if self.bias else []),
            *([f"dropout {self.dropout:g}"] if self.dropout else []),
            *([] if self.x_grad else ["x without gradient"]),
            *(["exact norm"] if self.norm_grad else []),
        ]
        shape = f"{self.rows} x {self.in_features} -> {self.out_features}, r={self.rank}"
        return ", ".join([f"{self.operation} {shape}", *flags])

    def run(self) -> None:
        """The two passes; outside of a recording they need a device."""

        def empty(*shape: int, dtype: torch.dtype = self.dtype, grad: bool = False) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)

        x, weight = empty(self.rows, self.in_features, grad=self.x_grad), empty(self.out_features, self.in_features)
        bias = empty(self.out_features) if self.bias else None
        a = empty(self.rank, self.in_features, dtype=torch.float32, grad=True)
        b = empty(self.out_features, self.rank, dtype=torch.float32, grad=True)
        options: dict[str, Any] = {"dropout": self.dropout, "impl": "triton"}
        if self.operation == "lora":
            y = lora_linear(x, weight, bias, a, b, 2.0, **options)
        else:
            magnitude = empty(self.out_features, dtype=torch.float32, grad=True)
            y = dora_linear(x, weight, bias, a, b, magnitude, 2.0, norm_grad=self.norm_grad, **options)
        y.backward(empty(*y.shape))


def _around(bound: str) -> list[int]:
    """Each value of `bound` in the table, and one beyond them."""
    table = configs.read(configs.BUILT_IN)
    values = {e["when"][bound] for entries in table.values() for e in entries if bound in e["when"] and e["use"]}
    return [*sorted(value for value in values if value < LARGE[bound]), LARGE[bound]]


def scenarios() -> Iterator[Scenario]:
    """Every pass whose launches differ; the options are crossed with all shapes in bf16, with fewer in the other dtypes."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rank in _around("rank"):
            for rows in _around("rows"):
                for columns in _around("columns"):
                    shape = (dtype, rows, columns, columns, rank)
                    yield Scenario("dora", *shape)
                    yield Scenario("lora", *shape, dropout=0.05)
                    yield Scenario("dora", *shape, dropout=0.05)
        large = (dtype, *(LARGE[name] for name in ("rows", "columns", "columns")))
        for rank in (16, LARGE["rank"]) if dtype == torch.bfloat16 else (16,):
            yield Scenario("lora", *large, rank)
            yield Scenario("dora", *large, rank, bias=False)
            yield Scenario("dora", *large, rank, x_grad=False)
            yield Scenario("lora", *large, rank, x_grad=False, dropout=0.05)
            yield Scenario("dora", *large, rank, norm_grad=True)
        yield Scenario("dora", dtype, 33, 100, 77, 3, dropout=0.05)


class Record(NamedTuple):
    """What all scenarios launch on an architecture, and the entries of the table of configurations that none looked up."""

    variants: list[Variant]
    uncovered: list[str]


def launched(scenario: Scenario, architecture: str) -> list[Variant]:
    """The launches of one scenario, in order."""
    with recording(architecture) as launches:
        scenario.run()
    dtype = str(scenario.dtype).removeprefix("torch.")
    return [Variant(launch, dtype, scenario.aligned, str(scenario)) for launch in launches]


def record(architecture: str) -> Record:
    """Every launch of every scenario on `architecture`, repeated ones included."""
    looked_up: set[int] = set()
    look_up: Callable[..., dict[str, int]] = configs._config

    def noted(*arguments: Any) -> dict[str, int]:
        use = look_up(*arguments)
        looked_up.add(id(use))
        return use

    configs._config = noted  # type: ignore[assignment]
    try:
        found = [variant for scenario in scenarios() for variant in launched(scenario, architecture)]
    finally:
        configs._config = look_up  # type: ignore[assignment]
    missed = []
    for kernel, entries in configs.read(configs.BUILT_IN).items():
        for number, entry in enumerate(entries):
            names = entry["when"].get("arch", architecture)
            if architecture in ([names] if isinstance(names, str) else names) and id(entry["use"]) not in looked_up:
                missed.append(f"entry {number} of {kernel} on {architecture}: {entry['when']}")
    return Record(found, missed)
