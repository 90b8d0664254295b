"""What the operations launch: their forward and backward passes run on tensors without values, while the launches are noted.

The shapes come from the table of configurations (a rank, a width and a batch on either side of each bound in it), the options
are those that change a kernel: bias, dropout, exact norm, an x without a gradient, rows off 16-byte borders.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftlite.kernels import configs
from peftlite.kernels.dora_linear import DoRAArguments, dora_linears
from peftlite.kernels.launch_triton import Launch, recording
from peftlite.kernels.lora_linear import LoRAArguments, lora_linears
from peftlite.kernels.prepared_triton import Layer, Prepared

LARGE = {"rank": 384, "columns": 4096, "rows": 8192}  # at least; more where a bound of the table reaches that far


class Variant(NamedTuple):
    """A launch, the dtype of the computation that it belongs to, whether its rows are aligned, and who launched it."""

    launch: Launch
    dtype: str
    aligned: bool
    why: str


@dataclass(frozen=True)
class Scenario:
    """One forward and backward pass of `operation` on tensors without values.

    Besides ``"lora"`` and ``"dora"`` there is ``"prepare"``, what a step prepares for many layers.
    """

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
    layers: int = 1  # that read the same x

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
            *([f"{self.layers} layers"] if self.layers > 1 else []),
        ]
        shape = f"{self.rows} x {self.in_features} -> {self.out_features}, r={self.rank}"
        return ", ".join([f"{self.operation} {shape}", *flags])

    def run(self) -> None:
        """The two passes; outside of a recording they need a device."""

        def empty(*shape: int, dtype: torch.dtype = self.dtype, grad: bool = False) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)

        x, made = empty(self.rows, self.in_features, grad=self.x_grad), []
        for _ in range(self.layers):
            weight = empty(self.out_features, self.in_features)
            bias = empty(self.out_features) if self.bias else None
            a = empty(self.rank, self.in_features, dtype=torch.float32, grad=True)
            b = empty(self.out_features, self.rank, dtype=torch.float32, grad=True)
            made.append(DoRAArguments(weight, bias, a, b, empty(self.out_features, dtype=torch.float32, grad=True), 2.0))
        if self.operation == "prepare":
            stored = [Layer(layer.lora_a, layer.lora_b, layer.scale, layer.weight, layer.magnitude) for layer in made]
            Prepared(stored, self.dtype).refresh()
            return
        if self.operation == "lora":
            plain = [LoRAArguments(*layer[:4], layer.scale) for layer in made]
            ys = lora_linears(x, plain, dropout=self.dropout, impl="triton")
        else:
            ys = dora_linears(x, made, dropout=self.dropout, norm_grad=self.norm_grad, impl="triton")
        torch.autograd.backward(ys, [empty(*y.shape) for y in ys])


def _around(bound: str) -> list[int]:
    """Each value of `bound` in the table, and one beyond them; not rank 0, where large ranks leave the product to cuBLAS."""
    entries = [entry for listed in configs.read(configs.BUILT_IN).values() for entry in listed]
    values = sorted({entry["when"][bound] for entry in entries if entry["when"].get(bound)})
    return [*values, max([LARGE[bound], *(2 * value for value in values)])]


def scenarios(dtypes: Sequence[torch.dtype], *, brief: bool = False) -> Iterator[Scenario]:
    """Every pass whose launches differ: all shapes in the dtypes that have tiles of their own, all options for one shape.

    fp16 differs from bf16 in the name of a type alone, so that the least rank will do there. Options other than dropout take
    work out of a kernel, so that the least rank will do too. Rows off 16-byte borders cost registers, at all sizes of tiles.
    With `brief` the least and the greatest rank stand for all.
    """
    ranks, rows, columns = (_around(name) for name in ("rank", "rows", "columns"))
    if brief:
        ranks = [ranks[0], ranks[-1]]
    for dtype in dtypes:
        own = dtype != torch.float16
        for rank in ranks if own else ranks[:1]:
            for m in rows:
                for c in columns if own else columns[-1:]:
                    yield Scenario("dora", dtype, m, c, c, rank)
            yield Scenario("lora", dtype, rows[-1], columns[-1], columns[-1], rank, dropout=0.05)
            yield Scenario("dora", dtype, rows[-1], columns[-1], columns[-1], rank, dropout=0.05)
        if own:
            large = (dtype, rows[-1], columns[-1], columns[-1], ranks[0])
            yield Scenario("lora", *large)
            yield Scenario("dora", *large, bias=False)
            yield Scenario("dora", *large, x_grad=False)
            yield Scenario("lora", *large, x_grad=False, dropout=0.05)
            yield Scenario("dora", *large, norm_grad=True)
            yield Scenario("dora", *large, layers=3)
            yield Scenario("prepare", *large)
            for rank in (3, ranks[-1]) if dtype == torch.bfloat16 else (3, *ranks[-2:]):
                yield Scenario("dora", dtype, 33, 100, 77, rank, dropout=0.05)


class Record(NamedTuple):
    """What all scenarios launch on an architecture, and the entries of the table of configurations that none looked up."""

    variants: list[Variant]
    uncovered: set[str]


def launched(scenario: Scenario, architecture: str) -> list[Variant]:
    """The launches of one scenario, in order."""
    with recording(architecture) as launches:
        scenario.run()
    dtype = str(scenario.dtype).removeprefix("torch.")
    return [Variant(launch, dtype, scenario.aligned, str(scenario)) for launch in launches]


def record(architecture: str) -> Record:
    """Every launch of every scenario on `architecture`, repeated ones included; on gfx in bf16 alone, for information."""
    brief = not architecture.startswith("sm_")
    dtypes = (torch.bfloat16,) if brief else (torch.bfloat16, torch.float16, torch.float32)
    looked_up: set[int] = set()
    look_up: Callable[..., dict[str, int]] = configs._config

    def noted(*arguments: Any) -> dict[str, int]:
        use = look_up(*arguments)
        looked_up.add(id(use))
        return use

    configs._config = noted  # type: ignore[assignment]
    try:
        found = [variant for scenario in scenarios(dtypes, brief=brief) for variant in launched(scenario, architecture)]
    finally:
        configs._config = look_up  # type: ignore[assignment]
    missed = set()
    for kernel, entries in configs.read(configs.BUILT_IN).items():
        for number, entry in enumerate(entries):
            if id(entry["use"]) not in looked_up and entry["when"].get("arch") != "interpreter":
                missed.add(f"entry {number} of {kernel}: {entry['when']}")
    return Record(found, missed)
