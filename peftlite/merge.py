"""Fold adapters into the base weights, for good or for a while, and say what the rounding cost."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftlite.adapter import AdapterLinear
from peftlite.inject import check_not_tied, replace_module, require_adapters


@dataclass(frozen=True)
class MergedLayer:
    """What merging one layer did.

    Attributes:
        name: dotted name of the layer.
        update_norm: ``‖W' - W‖_F``, the exact update.
        rounding_error: ``‖round(W') - W'‖_F``, from the one rounding to the dtype of the base.
    """

    name: str
    update_norm: float
    rounding_error: float

    @property
    def lost(self) -> float:
        """Share of the update that the rounding lost, ``rounding_error / update_norm``; 0 where there is no update."""
        return self.rounding_error / self.update_norm if self.update_norm else 0.0


@dataclass(frozen=True)
class MergeReport:
    """What `merge_adapters` did, layer by layer; ``str()`` is a table."""

    layers: tuple[MergedLayer, ...]

    @property
    def worst(self) -> MergedLayer:
        """The layer that lost the largest share of its update."""
        return max(self.layers, key=lambda layer: layer.lost)

    def __str__(self) -> str:
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [f"{'layer':<{width}}  {'update norm':>11}  {'rounding error':>14}  {'lost':>8}"]
        lines += [
            f"{layer.name:<{width}}  {layer.update_norm:>11.4g}  {layer.rounding_error:>14.3g}  {layer.lost:>8.3%}"
            for layer in self.layers
        ]
        return "\n".join(lines)


def merge_adapters(model: nn.Module) -> MergeReport:
    """Fold every adapter into its base weight, in place: plain ``nn.Linear`` layers again, with the adapters' function.

    The merged weight is computed in fp32 at least and rounded once to the dtype of the base. Nothing is written unless
    all layers can be merged.

    Returns:
        Per layer the norm of the update, the rounding error, and the share of the update that it cost. Merging a small
        update into a bf16 weight can lose much of it: look at ``report.worst``.

    Raises:
        ValueError: if a merged weight is not finite, or a base weight is tied to another module, which the merge would
            change as well.

    Example:
        >>> from peftlite import inject_adapters
        >>> model = inject_adapters(nn.Sequential(nn.Linear(4, 4)), "0", rank=2)
        >>> merge_adapters(model).worst.lost
        0.0
    """
    layers = require_adapters(model, "merge_adapters")
    if "" in layers:
        raise ValueError(
            f"the model is itself a {type(model).__name__} and has no parent; use to_linear(effective_weight()) instead."
        )
    for name, layer in layers.items():
        check_not_tied(model, layer, name, "merging")
    # First every check, then the writing: computed twice, so that no second set of weights is held.
    report = MergeReport(tuple(_merge_one(name, layer)[1] for name, layer in layers.items()))
    for name, layer in layers.items():
        replace_module(model, layer, layer.to_linear(_merge_one(name, layer)[0]))
    return report


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside the block the layers compute with merged weights, at the speed of plain linear layers; for inference.

    The base weights are not written: the merged ones stand beside them for as long as the block lasts, and changes that
    the adapters undergo inside the block do not show.

    Raises:
        ValueError: if a merged weight is not finite.
        RuntimeError: from a layer that is run in training mode inside the block.
    """
    layers = require_adapters(model, "merged")
    weights = {name: _merge_one(name, layer)[0] for name, layer in layers.items()}
    before = {name: layer.stand("merged", weights[name]) for name, layer in layers.items()}
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.stand(*before[name])


def _wide(layer: AdapterLinear) -> AdapterLinear:
    """`layer`, or a copy in fp32 if some of its adapter is held in 16 bits and it would round at every step."""
    dtypes = {t.dtype for t in layer.adapter_state().values() if t.is_floating_point()}
    if all(dtype.itemsize >= 4 for dtype in dtypes):
        return layer
    return copy.deepcopy(layer).float()


@torch.no_grad()
def _merge_one(name: str, layer: AdapterLinear) -> tuple[Tensor, MergedLayer]:
    exact = _wide(layer).effective_weight()
    if not torch.isfinite(exact).all():
        bad = int((~torch.isfinite(exact)).sum())
        raise ValueError(
            f"{name}: the merged weight would have {bad} non-finite values of {exact.numel()}; the adapter or the base has "
            "diverged. Nothing was merged; remove_adapters gives the base back."
        )
    base = layer.base_weight()
    rounded = exact.to(base.dtype)
    if not torch.isfinite(rounded).all():
        raise ValueError(
            f"{name}: the merged weight overflows {base.dtype}; nothing was merged. Cast the model to a wider dtype first."
        )
    return rounded, MergedLayer(
        name,
        update_norm=torch.linalg.vector_norm(exact - base).item(),
        rounding_error=torch.linalg.vector_norm(rounded.to(exact.dtype) - exact).item(),
    )
