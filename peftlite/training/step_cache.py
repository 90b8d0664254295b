"""StepCache: prepare the adapters for the Triton kernels once per optimizer step."""

from types import TracebackType
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from peftlite.fusion import FusedGroup
from peftlite.kernels.dispatch import triton_obstacle
from peftlite.methods.dora import DoRALinear
from peftlite.methods.lora import LoRALinear


class StepCache:
    """Compute packed factors and ``g = m / ‖W + s B A‖_row`` of all LoRA and DoRA layers once per step, in two launches or few.

    Without it each forward pass prepares its own layer, which is always right; the cache spares these launches where layers
    run several times between steps, and groups them where they run once. It serves ``impl="triton"`` in eager code;
    compiled code prepares inside its graph.

    Values are prepared when the cache is made and after each step of the optimizers, fused ones included. Loading a state dict,
    ``model.to(...)`` and other writes that torch can see make a layer prepare itself until the next step. **Writes that
    torch cannot see need `invalidate`**: those to ``.data``, and steps of optimizers that the cache was not given. A backward
    pass that is run after the step that followed its forward pass raises an error.

    Args:
        model: a model after `inject_adapters`.
        optimizers: every optimizer that trains one of its adapters.
        dtype: of the computation: autocast's where it is used, otherwise that of the activations.

    Raises:
        ValueError: if the model has no LoRA or DoRA layer, or if the kernels cannot run where it is.

    Example:
        .. code-block:: python

            cache = StepCache(model, optimizer, dtype=torch.bfloat16)
            ...                       # the loop stays as it is
            cache.close()             # or use it as a context manager
    """

    def __init__(self, model: nn.Module, *optimizers: torch.optim.Optimizer, dtype: torch.dtype) -> None:
        layers = _in_order(model)
        if not layers:
            raise ValueError(f"StepCache: {type(model).__name__} has no LoRA or DoRA layer; call inject_adapters first.")
        if not optimizers:
            raise ValueError("StepCache: no optimizer was given, and nothing would tell when a step was made; pass them all.")
        reasons = (triton_obstacle(m.lora_a.device, dtype, m.base_weight().dtype, m.lora_a.dtype) for m in layers)
        reason = next(filter(None, reasons), None)
        if reason:
            raise ValueError(f"StepCache prepares adapters for the Triton kernels, but {reason}; train without the cache.")
        from peftlite.kernels.prepared_triton import Layer, Prepared, offer

        self._prepared = Prepared([_tensors(layer, Layer) for layer in layers], dtype)
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]
        self.refresh()
        offer(self._prepared)

    def refresh(self) -> None:
        """Prepare all layers from what their tensors hold now."""
        with torch.no_grad():
            self._prepared.refresh()

    def invalidate(self) -> None:
        """Let each forward pass prepare its own layer until the next step: for writes that torch cannot see."""
        self._prepared.fresh = False

    def close(self) -> None:
        """Detach from the optimizers, for good."""
        self.invalidate()
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _after_step(self, *_: Any) -> None:
        self.refresh()


def _in_order(model: nn.Module) -> list[LoRALinear | DoRALinear]:
    """The layers, with those that run together next to each other: their packed factors then lie side by side."""
    layers = [m for m in model.modules() if isinstance(m, (LoRALinear, DoRALinear))]
    places = {layer: (place, 0) for place, layer in enumerate(layers)}
    for place, layer in enumerate(layers):
        if isinstance(layer.group, FusedGroup) and layer is layer.group.layers[0]:
            places |= {member: (place, number) for number, member in enumerate(layer.group.layers) if member in places}
    return sorted(layers, key=places.__getitem__)


def _tensors(layer: LoRALinear | DoRALinear, make: Any) -> Any:
    if isinstance(layer, DoRALinear):
        return make(layer.lora_a, layer.lora_b, layer.scale, layer.base_weight(), layer.magnitude)
    return make(layer.lora_a, layer.lora_b, layer.scale)
