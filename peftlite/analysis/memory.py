"""The memory of a training step before it is taken: the step runs on tensors that have shapes and hold nothing."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from peftlite.analysis.meters import LiveStorages, OpenCustomOps, plain_parts
from peftlite.analysis.step import MIB, Batch, Step, device_of, mean_square
from peftlite.kernels.dispatch import triton_obstacle

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
CUDA_BLOCK = 512  # bytes: the allocator's unit
_UNANSWERED = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes alive at the peak of one phase of a step, beside what is there between two steps.

    Attributes:
        gradients: of the parameters.
        saved: what the forward pass keeps for the backward pass.
        transient: everything else that is alive just then.
    """

    gradients: int
    saved: int
    transient: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.gradients + self.saved + self.transient


@dataclass(frozen=True)
class MemoryEstimate:
    """The bytes of one training step, by what they are for; ``str()`` is a table.

    Attributes:
        parameters: all of them, trained or frozen; what several share counts once.
        buffers: likewise.
        batch: the tensors that the model is called with.
        optimizer_state: after the first step.
        other: what else the first step left behind, such as caches.
        saved: everything that the forward pass keeps for the backward pass.
        phases: what comes on top at the peak of each of ``forward`` (with the loss), ``backward`` and ``optimizer``.
    """

    parameters: int
    buffers: int
    batch: int
    optimizer_state: int
    other: int
    saved: int
    phases: dict[str, PhaseMemory]

    @property
    def resident(self) -> int:
        """What is there between two steps."""
        return self.parameters + self.buffers + self.batch + self.optimizer_state + self.other

    @property
    def peak_phase(self) -> str:
        """The phase in which most memory is in use."""
        return max(self.phases, key=lambda phase: self.phases[phase].total)

    @property
    def total(self) -> int:
        """The most bytes in use at once."""
        return self.resident + self.phases[self.peak_phase].total

    def __str__(self) -> str:
        between = ("parameters", "buffers", "batch", "optimizer_state", "other")
        rows = [[name.replace("_", " "), *([getattr(self, name)] * len(self.phases))] for name in between]
        for field in fields(PhaseMemory):
            rows.append([field.name, *(getattr(phase, field.name) for phase in self.phases.values())])
        rows.append(["total", *(self.resident + phase.total for phase in self.phases.values())])
        lines = ["MiB at the peak of" + "".join(f"{phase:>11}" for phase in self.phases)]
        lines += [f"{name:18}" + "".join(f"{size / MIB:11.2f}" for size in sizes) for name, *sizes in rows]
        return "\n".join([*lines, f"{self.total / MIB:.2f} MiB at most, in the {self.peak_phase} phase"])


def estimate_memory(
    model: nn.Module,
    batch: Batch,
    *,
    optimizer: str | Optimizer = "adamw",
    loss: Callable[[Any], Tensor] | None = None,
    autocast: torch.dtype | None = None,
) -> MemoryEstimate:
    """Compute the peak of the bytes in use during a training step of `model`, by what they are for, without taking the step.

    Forward, backward and optimizer run twice on fake tensors (`torch._subclasses.fake_tensor`), which have shape, dtype and device and hold no
    numbers, and every storage is followed from its birth to its end; the second step counts. That takes seconds, no memory and no
    GPU time, and leaves `model`, its gradients and the random numbers as they are. It is exact as to tensors. Not in it are: what a
    single operation takes inside itself (the workspaces of cuBLAS and cuDNN), what the allocator holds unused, the interpreter and
    the CUDA context; with ``torch.compile`` other tensors are kept.

    Args:
        model: as it is to be trained: adapters in place, ``requires_grad`` set, on its device. A copy in training mode is used.
        batch: what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
        optimizer: ``"adamw"``, ``"adam"``, ``"sgd"`` (torch's, by default), or a function from the list of parameters that
            train to an optimizer.
        loss: from the model's output to a scalar; by default the mean of squares of an output that is a tensor. A loss over
            many classes keeps tensors of its own, so give yours.
        autocast: the dtype to which the forward pass autocasts, such as ``torch.bfloat16``; by default none.

    Raises:
        ValueError: for an unknown optimizer, tensors on several devices, an output that needs a `loss`, or a model whose
            computation depends on the numbers in its tensors.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> estimate = estimate_memory(model, torch.randn(4, 16))
        >>> estimate.parameters, estimate.optimizer_state  # 610 fp32 numbers; two moments of each, and 4 step counters
        (2440, 4896)
        >>> estimate.phases["optimizer"].gradients
        2440
    """
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            names = ", ".join(map(repr, OPTIMIZERS))
            raise ValueError(f"unknown optimizer {optimizer!r}; there are {names}, and a function makes one of your own.")
        optimizer = OPTIMIZERS[optimizer]
    inputs = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    device = device_of(model, batch)
    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers(), *inputs)}
    if len(devices) > 1:
        raise ValueError(f"model and batch lie on {', '.join(sorted(devices))}; an estimate is for one device, so move them to one.")
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a loss may hold real tensors, such as the labels
    with FakeCopyMode(mode):
        twin = copy.deepcopy(model)
    log = _Log(CUDA_BLOCK if device.type == "cuda" else 1)
    with _explained(), mode, _no_launches(device):
        for parameter in twin.parameters():
            parameter.grad = None
        fake = tree_map_only(Tensor, mode.from_tensor, batch)
        step = Step(twin.train(), fake, loss or mean_square, optimizer, device)
        with log, OpenCustomOps("peftlite"):  # another's may be no torch code, and fail on what holds nothing
            log.run(step, autocast)
            state = _state(step)
            other = log.beside(state)
            phases, saved = log.run(step, autocast)
    known: set[int] = set()
    return MemoryEstimate(
        parameters=_bytes(model.parameters(), known, log.block),
        buffers=_bytes(model.buffers(), known, log.block),
        batch=_bytes(inputs, known, log.block),
        optimizer_state=_bytes(state, known, log.block),
        other=other,
        saved=saved,
        phases=phases,
    )


class _Log(LiveStorages):
    """Notes the size of each storage whenever it changes, by a number that no other storage ever has.

    Args:
        block: what sizes are rounded up to.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block
        self._numbers: dict[int, int] = {}  # storage identity -> number; identities return, numbers do not
        self._counter = itertools.count()
        self._sizes: dict[int, int] = {}  # of those alive, by number
        self._events: list[tuple[int, int]] = []  # a number and its new size, 0 at the end of its life

    def _set(self, identity: int, nbytes: int) -> None:
        super()._set(identity, -(-nbytes // self.block) * self.block)
        number = self._numbers.setdefault(identity, -1)
        if number < 0:
            number = self._numbers[identity] = next(self._counter)
        self._note(number, self._live[identity])

    def _died(self, identity: int) -> None:
        super()._died(identity)
        self._note(self._numbers.pop(identity), 0)

    def _note(self, number: int, size: int) -> None:
        self._events.append((number, size))
        if size:
            self._sizes[number] = size
        else:
            self._sizes.pop(number, None)

    def numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        """Those of the storages of `tensors` that are followed."""
        identities = (part.untyped_storage()._cdata for tensor in tensors for part in plain_parts(tensor))
        return {self._numbers[identity] for identity in identities if identity in self._numbers}

    def beside(self, tensors: Iterable[Tensor]) -> int:
        """Bytes alive in other storages than those of `tensors`."""
        apart = self.numbers(tensors)
        return sum(size for number, size in self._sizes.items() if number not in apart)

    def run(self, step: Step, autocast: torch.dtype | None) -> tuple[dict[str, PhaseMemory], int]:
        """Take the step; the peak of each phase beside what was there before, and all bytes saved for the backward pass."""
        before = dict(self._sizes)
        self._events.clear()
        saved: set[int] = set()
        gradients: set[int] = set()
        kept, ends = 0, {}

        def pack(tensor: Tensor) -> Tensor:
            saved.update(self.numbers([tensor]))
            return tensor

        for phase, action in step.actions().items():
            if phase == "forward":
                with _autocast(step.device, autocast), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    action()
                kept = sum(self._sizes.get(number, 0) for number in saved - before.keys())
            else:
                action()
            if phase == "backward":
                gradients = self.numbers(p.grad for p in step.trained if p.grad is not None)
            ends[phase] = len(self._events)
        step.value = torch.empty(0)
        kinds = dict.fromkeys(saved, "saved") | dict.fromkeys(gradients, "gradients") | dict.fromkeys(before, "before")
        return _peaks(self._events, ends, kinds), kept


def _peaks(events: list[tuple[int, int]], ends: dict[str, int], kinds: dict[int, str]) -> dict[str, PhaseMemory]:
    """The sums by kind at the moment of each phase in which most is alive, out of the sizes noted one after the other.

    Args:
        events: number of a storage and its new size.
        ends: how many of them have come by the end of each phase.
        kinds: by number; a storage without one is transient, and one from before does not count.
    """
    sizes: dict[int, int] = {}
    alive = {"gradients": 0, "saved": 0, "transient": 0, "before": 0}
    peaks, start = {}, 0
    for phase, end in ends.items():
        peak = PhaseMemory(alive["gradients"], alive["saved"], alive["transient"])
        for number, size in events[start:end]:
            alive[kinds.get(number, "transient")] += size - sizes.get(number, 0)
            sizes[number] = size
            if alive["gradients"] + alive["saved"] + alive["transient"] > peak.total:
                peak = PhaseMemory(alive["gradients"], alive["saved"], alive["transient"])
        peaks[phase], start = peak, end
    return peaks


def _state(step: Step) -> list[Tensor]:
    return [] if step.optimizer is None else [t for t in tree_leaves(dict(step.optimizer.state)) if isinstance(t, Tensor)]


def _bytes(tensors: Iterable[Tensor], known: set[int], block: int) -> int:
    """Bytes of the storages that are not `known` yet; they are then."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            total += -(-storage.nbytes() // block) * block
    return total


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _no_launches(device: torch.device) -> AbstractContextManager[object]:
    """On a GPU, where Triton would read what is not there: kernels make their tensors and do not start."""
    if device.type != "cuda" or triton_obstacle(device, torch.float32):
        return nullcontext()
    from peftlite.kernels.launch_triton import architecture, recording

    return recording(architecture(device), keep=False)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn torch's errors about numbers that are not there into one that says what to do."""
    try:
        yield
    except _UNANSWERED as error:
        raise ValueError(
            f"an estimate runs the model on tensors without numbers, and the model asks for some: {error}. Measure such a model "
            "with benchmark_step, or take the question out of its forward pass."
        ) from error
