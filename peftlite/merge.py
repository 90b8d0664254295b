"""Fold adapters into the base weights, for good or for a while, and say what the rounding cost."""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from peftlite.adapter import AdapterLinear
from peftlite.inject import check_not_tied, replace_module, require_adapters
from peftlite.quantization.blockwise import Format
from peftlite.quantization.linear import PackedWeight

WARNINGS = {
    "requantize": "merge_adapters(quantized='requantize') rounds every merged weight to its code again: the merged model does "
    "not compute what was trained, and report.worst says how much of an update was lost. 'dequantize' keeps it.",
    "original": "merge_adapters(quantized='original') adds the updates to weights that the adapters were not trained on: they "
    "had learnt beside the quantised ones. Evaluate the result; 'dequantize' keeps the function that was trained.",
}


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


def merge_adapters(
    model: nn.Module,
    *,
    quantized: str | None = None,
    originals: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> MergeReport:
    """Fold every adapter into its base weight, in place: plain layers again, with the adapters' function.

    The merged weight is computed in fp32 at least and rounded once to the dtype of the base. Nothing is written unless
    all layers can be merged.

    Args:
        model: a model with adapters.
        quantized: what becomes of the layers whose base is quantised, W = deq(codes), when U is the merged weight.
            ``"dequantize"``: ``nn.Linear`` layers with U, the function that was trained; recommended. ``"requantize"``: U
            is quantised as W was, which changes it as much as the update or more, hence a warning. ``"original"``:
            ``nn.Linear`` layers with ``W₀ + (U - W)`` for the weights W₀ before quantisation, in `originals`; the adapters
            were not trained on these, hence a warning.
        originals: for ``"original"``, the state dict of the model before `quantize_base`.
        dtype: dtype of the ``nn.Linear`` layers that take the place of quantised ones; by default that of the weights that
            were quantised.

    Returns:
        Per layer the norm of the update, the rounding error, and the share of the update that it cost. Merging a small
        update into a bf16 weight, or a quantised one, can lose much of it: look at ``report.worst``.

    Raises:
        ValueError: if a merged weight is not finite, or a base weight is tied to another module, which the merge would
            change as well; if the base is quantised and `quantized` does not say what is to become of it, or the other
            way round; if `originals` lack a weight.

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
    packed = {name: layer.weight for name, layer in layers.items() if isinstance(layer.weight, PackedWeight)}
    _check_mode(packed, quantized, originals, dtype)
    for name, layer in layers.items():
        check_not_tied(model, layer, name, "merging")
    if quantized in WARNINGS:
        warnings.warn(WARNINGS[quantized], stacklevel=2)

    def merge(name: str, layer: AdapterLinear) -> tuple[Tensor | PackedWeight, MergedLayer]:
        if name not in packed:
            return _merge_one(name, layer)
        original = None if originals is None else originals[f"{name}.weight"]
        form = packed[name].form if quantized == "requantize" else None
        return _merge_one(name, layer, dtype=dtype, original=original, form=form)

    # First every check, then the writing: computed twice, so that no second set of weights is held.
    report = MergeReport(tuple(merge(name, layer)[1] for name, layer in layers.items()))
    for name, layer in layers.items():
        replace_module(model, layer, layer.to_linear(merge(name, layer)[0]))
    return report


def _check_mode(
    packed: Mapping[str, PackedWeight],
    quantized: str | None,
    originals: Mapping[str, Tensor] | None,
    dtype: torch.dtype | None,
) -> None:
    """Raise a `ValueError` unless the options of `merge_adapters` fit each other and the model."""
    if quantized not in (None, "dequantize", *WARNINGS):
        raise ValueError(f"quantized must be 'dequantize', 'requantize' or 'original', got {quantized!r}.")
    if packed and quantized is None:
        raise ValueError(
            f"the base of {next(iter(packed))!r} is quantised ({len(packed)} layers in all): say what merging makes of it, "
            "with quantized='dequantize' (dense layers that compute what was trained; recommended), 'requantize' (small, but "
            "the update is rounded to the code) or 'original' (onto the weights before quantisation, given as `originals`)."
        )
    if quantized is not None and not packed:
        raise ValueError(f"quantized={quantized!r} was asked for, but no adapted layer has a quantised base; leave it out.")
    if dtype is not None and quantized not in ("dequantize", "original"):
        raise ValueError(
            f"dtype={dtype} is for quantised layers that become dense, with quantized='dequantize' or 'original'; got "
            f"quantized={quantized!r}."
        )
    if (originals is not None) != (quantized == "original"):
        raise ValueError(
            "quantized='original' and `originals`, the state dict of the model before quantisation, go together; got "
            f"quantized={quantized!r} and originals {'given' if originals is not None else 'not given'}."
        )
    for name, weight in packed.items() if originals is not None else ():
        found = (originals or {}).get(f"{name}.weight")
        if found is None or found.shape != weight.shape:
            held = "has none" if found is None else f"has shape {tuple(found.shape)}"
            raise ValueError(
                f"`originals` must hold {name + '.weight'!r} of shape {tuple(weight.shape)}, but it {held}; pass the state "
                "dict of the model before quantize_base."
            )


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
    weights = {name: cast(Tensor, _merge_one(name, layer)[0]) for name, layer in layers.items()}
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
    wide = copy.deepcopy(layer).float()
    if isinstance(wide.weight, PackedWeight):
        wide.weight.dtype = layer.weight.dtype  # the dense weight is the one that was rounded to this dtype
    return wide


@torch.no_grad()
def _merge_one(
    name: str,
    layer: AdapterLinear,
    *,
    dtype: torch.dtype | None = None,
    original: Tensor | None = None,
    form: Format | None = None,
) -> tuple[Tensor | PackedWeight, MergedLayer]:
    """The merged weight, on the `original` base weight instead of its own, in `dtype`, or as the `form` would hold it."""
    base = layer.base_weight()
    exact = _wide(layer).effective_weight()
    if not torch.isfinite(exact).all():
        bad = int((~torch.isfinite(exact)).sum())
        raise ValueError(
            f"{name}: the merged weight would have {bad} non-finite values of {exact.numel()}; the adapter or the base has "
            "diverged. Nothing was merged; remove_adapters gives the base back."
        )
    update_norm = torch.linalg.vector_norm(exact - base).item()
    if original is not None:
        exact = exact - base + original.to(exact.device)
    result = exact.to(dtype or base.dtype) if form is None else PackedWeight(exact, form, dtype=base.dtype)
    rounded = result.tensor().dense() if isinstance(result, PackedWeight) else result
    if not torch.isfinite(rounded).all():
        raise ValueError(
            f"{name}: the merged weight overflows {rounded.dtype}; nothing was merged. Cast the model to a wider dtype first."
        )
    rounding_error = torch.linalg.vector_norm(rounded.to(exact.dtype) - exact).item()
    return result, MergedLayer(name, update_norm, rounding_error)
