"""The storages of a training step, noted one after the other, and what is alive at the peak of each phase."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from peftlite.analysis.meters import LiveStorages, plain_parts
from peftlite.analysis.step import Step


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


class Timeline(LiveStorages):
    """Note the size of each storage whenever it changes, by a number that no other storage ever has.

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

    def run(self, step: Step) -> tuple[dict[str, PhaseMemory], int]:
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
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    action()
                kept = sum(self._sizes.get(number, 0) for number in saved - before.keys())
            else:
                action()
            if phase == "backward":
                gradients = self.numbers(p.grad for p in step.trained if p.grad is not None)
            ends[phase] = len(self._events)
        step.value = torch.empty(0)
        kinds = dict.fromkeys(saved, "saved") | dict.fromkeys(gradients, "gradients") | dict.fromkeys(before, "before")
        return peaks(self._events, ends, kinds), kept


def peaks(events: list[tuple[int, int]], ends: dict[str, int], kinds: dict[int, str]) -> dict[str, PhaseMemory]:
    """The sums by kind at the moment of each phase in which most is alive, out of the sizes noted one after the other.

    Args:
        events: number of a storage and its new size.
        ends: how many of them have come by the end of each phase.
        kinds: by number; a storage without one is transient, and one from before does not count.
    """
    sizes: dict[int, int] = {}
    alive = {"gradients": 0, "saved": 0, "transient": 0, "before": 0}
    found, start = {}, 0
    for phase, end in ends.items():
        peak = PhaseMemory(alive["gradients"], alive["saved"], alive["transient"])
        for number, size in events[start:end]:
            alive[kinds.get(number, "transient")] += size - sizes.get(number, 0)
            sizes[number] = size
            if alive["gradients"] + alive["saved"] + alive["transient"] > peak.total:
                peak = PhaseMemory(alive["gradients"], alive["saved"], alive["transient"])
        found[phase], start = peak, end
    return found
