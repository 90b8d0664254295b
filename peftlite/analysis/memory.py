"""The memory of a training step before it is taken: the step runs on tensors that have shapes and hold nothing."""

import copy
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

from peftlite.analysis.meters import OpenCustomOps
from peftlite.analysis.step import MIB, Batch, Step, device_of, mean_square
from peftlite.analysis.timeline import PhaseMemory, Timeline
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

    Forward, backward and optimizer run twice on fake tensors, which have shape, dtype and device and hold no numbers; every
    storage is followed from its birth to its end, and the second step counts. That takes seconds and next to no memory, and
    leaves `model`, its gradients and the random numbers as they are. It is exact as to tensors. Not in it are what a single
    operation takes inside itself (workspaces of cuBLAS), what the allocator holds unused, the interpreter and the CUDA
    context. Compiled code keeps other tensors.

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
        listed = ", ".join(sorted(devices))
        raise ValueError(f"model and batch lie on {listed}, and an estimate is for one device; move them to one.")
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a loss may hold real tensors, such as the labels
    with FakeCopyMode(mode):
        twin = copy.deepcopy(model)
    log = Timeline(CUDA_BLOCK if device.type == "cuda" else 1)
    with _explained(), mode, _no_launches(device):
        for parameter in twin.parameters():
            parameter.grad = None
        fake = tree_map_only(Tensor, mode.from_tensor, batch)
        step = Step(twin.train(), fake, loss or mean_square, optimizer, device, autocast)
        with log, OpenCustomOps("peftlite"):  # another's may be no torch code, and fail on what holds nothing
            log.run(step)
            state = _state(step)
            other = log.beside(state)
            phases, saved = log.run(step)
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
            f"an estimate runs the model on tensors without numbers, and the model asks for some ({error}); measure such a "
            "model with benchmark_step, or take the question out of its forward pass."
        ) from error
