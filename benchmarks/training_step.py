"""One training step, timed phase by phase and metered."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.analysis.meters import count_operations, flops, saved_for_backward, transient_bytes

MIB = 2**20


class TrainingStep:
    """Forward, loss (mean of squares of the model's output), backward, optimizer; called, it returns milliseconds.

    Of the milliseconds, `cpu` are those that the process computed, over all its threads: where other jobs share the
    machine they stray less than the time on the wall.

    Args:
        model: it is put into training mode; its parameters that require a gradient are trained.
        batch: the model's positional arguments, the same in every step.
        autocast: makes the context of the forward pass.
        adamw: options of `torch.optim.AdamW` beyond learning rate and weight decay.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: tuple[Tensor, ...],
        *,
        autocast: Callable[[], AbstractContextManager[Any]],
        adamw: dict[str, bool],
    ) -> None:
        self.model, self.batch, self.autocast = model.train(), batch, autocast
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.01, **adamw)

    def forward(self) -> Tensor:
        """The loss."""
        with self.autocast():
            output = self.model(*self.batch)
        return output.float().square().mean()

    def update(self) -> None:
        """The optimizer's phase."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _now(self) -> float:
        if self.batch[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self) -> dict[str, float]:
        start, computed = self._now(), time.process_time()
        loss = self.forward()
        forward = self._now()
        loss.backward()
        backward = self._now()
        self.update()
        end = self._now()
        return {
            "step": 1e3 * (end - start),
            "forward": 1e3 * (forward - start),
            "backward": 1e3 * (backward - forward),
            "optimizer": 1e3 * (end - backward),
            "cpu": 1e3 * (time.process_time() - computed),
        }


def meter(step: TrainingStep) -> dict[str, Any]:
    """The figures of a step that no clock enters: FLOPs, bytes, operations, trained parameters."""
    step()  # the optimizer allocates its state in the first step
    saved = saved_for_backward(step.forward, exclude=[step.model, *step.batch])
    gflop = flops(lambda: step.forward().backward()) / 1e9
    step.optimizer.zero_grad(set_to_none=True)
    losses: list[Tensor] = []
    operations = {
        "forward": count_operations(lambda: losses.append(step.forward())).total(),
        "backward": count_operations(lambda: losses[0].backward()).total(),
        "optimizer": count_operations(step.update).total(),
    }
    return {
        "gflop": gflop,
        "saved_mib": saved.bytes / MIB,
        "saved_storages": saved.storages,
        "forward_peak_mib": transient_bytes(step.forward).peak / MIB,
        "operations": operations,
        "trained": sum(parameter.numel() for parameter in step.trained),
    }
