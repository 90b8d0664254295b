"""What a training step costs under several ways to train the same model."""

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.analysis.meters import count_operations, transient_bytes
from peftlite.inject import inject_adapters
from peftlite.methods import METHODS
from peftlite.selection import top_layers
from peftlite.targets import Targets

MIB = 2**20
PHASES = ("forward", "backward", "optimizer")
Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]
Builder = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class StepCost:
    """The cost of one training step of one candidate.

    Attributes:
        name: name of the candidate.
        milliseconds: median time of each phase, ``forward`` (with the loss), ``backward``, ``optimizer``; a phase that does
            not take place has 0.
        operations: ATen operations that each phase dispatches, views left out; on a GPU about its kernel launches.
        peak_mib: most memory in use at once, with parameters, buffers and the optimizer's state.
        resident_mib: of that, what is there between two steps.
        trained: number of parameters that train.
    """

    name: str
    milliseconds: dict[str, float]
    operations: dict[str, int]
    peak_mib: float
    resident_mib: float
    trained: int

    @property
    def step(self) -> float:
        """Milliseconds of a whole step, the sum of its phases."""
        return sum(self.milliseconds.values())


@dataclass(frozen=True)
class StepReport:
    """The candidates in the order in which they ran; ``str()`` is a table.

    Attributes:
        costs: one entry for each candidate.
        device: where the model ran.
    """

    costs: tuple[StepCost, ...]
    device: str

    def __getitem__(self, name: str) -> StepCost:
        for cost in self.costs:
            if cost.name == name:
                return cost
        raise KeyError(f"no candidate {name!r} was measured; there are {', '.join(cost.name for cost in self.costs)}.")

    def __str__(self) -> str:
        header = ["", *(f"{phase}, ms" for phase in PHASES), "step, ms", "operations", "peak, MiB", "resident, MiB", "trained"]
        rows = [
            [
                cost.name,
                *(f"{cost.milliseconds[phase]:.2f}" for phase in PHASES),
                f"{cost.step:.2f}",
                str(sum(cost.operations.values())),
                f"{cost.peak_mib:.1f}",
                f"{cost.resident_mib:.1f}",
                f"{cost.trained:,}",
            ]
            for cost in self.costs
        ]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in (header, *rows)
        )


def benchmark_step(
    model: nn.Module,
    batch: Batch,
    *,
    targets: Targets = "all-linear",
    rank: int = 8,
    top: int | None = None,
    candidates: Iterable[str] | Mapping[str, Builder] = ("frozen", "full", "lora", "dora", "paca"),
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = torch.optim.AdamW,
    autocast: torch.dtype | None = None,
    rounds: int = 10,
    warmup: int = 3,
) -> StepReport:
    """Measure forward, backward and optimizer time, operations and peak memory of a training step for each candidate.

    LoRA trains few parameters and yet may be slower per step than full fine-tuning: its products are small and come on top
    of the base's. Whether it is depends on model, batch and machine, so measure yours. Each candidate trains its own copy
    of `model`, one after the other, so that one copy more than the model itself must fit. Times are medians over rounds, on
    CUDA synchronised at each phase; operations and, on CPU, memory are counted, not sampled, and are exact.

    Args:
        model: the model, without adapters; left as it is. The copies run in training mode.
        batch: what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
        targets: where adapters go, as for `inject_adapters`.
        rank: their rank.
        top: also measure LoRA in the last `top` layers alone (see `top_layers`), as candidate ``"lora, top <top>"``.
        candidates: names: ``"frozen"`` (a forward pass, nothing trains), ``"full"`` (all parameters train), and the names in
            `METHODS`. Or a mapping from names of your own to functions that prepare a copy of the model for training.
        loss: from the model's output to a scalar; by default the mean of squares of an output that is a tensor.
        optimizer: makes the optimizer from the list of parameters that train.
        autocast: the dtype to which the forward pass autocasts; by default none.
        rounds: steps that are timed.
        warmup: steps before them.

    Raises:
        ValueError: for an unknown candidate, too few rounds, an output that needs a `loss`, or a loss that is no scalar.

    Source: the questions are those of Ko 2025, "LoRA Is Slower Than You Think", arXiv:2507.08833.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> report = benchmark_step(model, torch.randn(4, 16), candidates=["full", "lora"], rank=1, rounds=2)
        >>> report["full"].trained, report["lora"].trained
        (610, 82)
    """
    if rounds < 1 or warmup < 1:
        raise ValueError(f"rounds and warmup must be at least 1, got {rounds} and {warmup}; the first step allocates.")
    builders = dict(candidates) if isinstance(candidates, Mapping) else {n: _builder(n, targets, rank) for n in candidates}
    if top is not None:
        builders[f"lora, top {top}"] = lambda model: inject_adapters(model, top_layers(model, targets, top), rank)
    device = device_of(model, batch)
    costs = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for name, build in builders.items():
            before = _allocated(device)
            step = Step(build(copy.deepcopy(model)).train(), batch, loss or mean_square, optimizer, device, autocast)
            costs.append(step.measure(name, rounds, warmup, before))
            del step
    return StepReport(tuple(costs), str(device))


class Step:
    """One step of one candidate, phase by phase."""

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        loss: Callable[[Any], Tensor],
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        device: torch.device,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.batch, self.loss, self.device, self.autocast = model, batch, loss, device, autocast
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer(self.trained) if self.trained else None
        self.phases = PHASES if self.trained else PHASES[:1]
        self.value = torch.empty(0)

    def forward(self) -> None:
        mixed = nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
        with mixed:
            if isinstance(self.batch, Mapping):
                output = self.model(**self.batch)
            else:
                output = self.model(*(self.batch if isinstance(self.batch, tuple) else (self.batch,)))
            self.value = self.loss(output)
        if not isinstance(self.value, Tensor) or self.value.numel() != 1:
            raise ValueError(f"loss must give a tensor with one element, got {self.value!r}.")

    def backward(self) -> None:
        self.value.backward()

    def update(self) -> None:
        assert self.optimizer is not None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def actions(self) -> dict[str, Callable[[], None]]:
        every = {"forward": self.forward, "backward": self.backward, "optimizer": self.update}
        return {phase: every[phase] for phase in self.phases}

    def __call__(self) -> dict[str, float]:
        taken = dict.fromkeys(PHASES, 0.0)
        for phase, action in self.actions().items():
            start = self._now()
            action()
            taken[phase] = 1e3 * (self._now() - start)
        self.value = torch.empty(0)
        return taken

    def measure(self, name: str, rounds: int, warmup: int, before: int) -> StepCost:
        for _ in range(warmup):
            self()
        times = [self() for _ in range(rounds)]
        operations = dict.fromkeys(PHASES, 0)
        for phase, action in self.actions().items():
            operations[phase] = count_operations(action).total()
        self.value = torch.empty(0)
        peak, resident = self._memory(before)
        return StepCost(
            name=name,
            milliseconds={phase: statistics.median(t[phase] for t in times) for phase in PHASES},
            operations=operations,
            peak_mib=peak / MIB,
            resident_mib=resident / MIB,
            trained=sum(p.numel() for p in self.trained),
        )

    def _memory(self, before: int) -> tuple[int, int]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            resident = _allocated(self.device)
            self()
            return torch.cuda.max_memory_allocated(self.device) - before, resident - before
        state = self.optimizer.state.values() if self.optimizer else ()
        tensors = [t for values in state for t in values.values() if isinstance(t, Tensor)]
        storages = {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes()
            for t in (*tensors, *self.model.parameters(), *self.model.buffers())
        }
        resident = sum(storages.values())
        return resident + transient_bytes(self).peak, resident

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _builder(name: str, targets: Targets, rank: int) -> Builder:
    if name == "frozen":
        return lambda model: model.requires_grad_(False)
    if name == "full":
        return lambda model: model.requires_grad_(True)
    if name not in METHODS:
        known = ", ".join(["frozen", "full", *METHODS])
        raise ValueError(f"unknown candidate {name!r}; there are {known}, and a mapping takes functions of your own.")
    return lambda model: inject_adapters(model, targets, rank, method=name, seed=0)


def mean_square(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(f"the model returns {type(output).__name__}, so give `loss`, a function from that to a scalar.")
    return output.float().square().mean()


def device_of(model: nn.Module, batch: Batch) -> torch.device:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
    for tensor in (*values, *model.parameters()):
        if isinstance(tensor, Tensor):
            return tensor.device
    return torch.device("cpu")


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
