"""Factors and gains that were prepared once for many forward passes, by whoever takes it on to say when they are stale.

`peftlite.training.step_cache` is that owner: it prepares after each optimizer step. It must, because versions of tensors
are not raised by fused optimizers and by writes to ``.data``. What can be seen is checked all the same: a tensor that
stands elsewhere, or whose version is higher, is not what was prepared.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from peftlite.kernels.group_triton import rows_side_by_side, stacked
from peftlite.kernels.pack_triton import pack_adapters, pack_grouped, padded_rank
from peftlite.kernels.row_norm_triton import row_norm_gain, row_norm_gain_grouped
from peftlite.kernels.table_triton import Module, tables


@dataclass(frozen=True)
class Layer:
    """The tensors of one adapted layer; `weight` and `magnitude` are None where there is no norm."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    weight: Tensor | None = None
    magnitude: Tensor | None = None

    def place(self) -> tuple[object, ...]:
        """Where the tensors stand in memory, and all else that the tables hold."""
        return (self.scale, *[(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in self.tensors()])

    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        return [t for t in (self.lora_a, self.lora_b, self.weight, self.magnitude) if t is not None]

    def versions(self) -> list[int]:
        """Counters that most writes raise, though not all: higher ones prove a write, equal ones prove nothing."""
        return [t._version for t in self.tensors()]


class Prepared:
    """Packed factors and gains of many layers in `dtype`, written by one launch of each kernel per kind of layer.

    Neighbours in `layers` whose packed A have one shape have them side by side, as those that run together want it.
    """

    def __init__(self, layers: Iterable[Layer], dtype: torch.dtype) -> None:
        self.layers, self.dtype = list(layers), dtype
        self.fresh = False
        self._build()

    def _build(self) -> None:
        self.places = [layer.place() for layer in self.layers]
        self.versions = [layer.versions() for layer in self.layers]
        self.modules = []
        for (device, rank, columns), run in groupby(self.layers, key=_shape):
            neighbours = list(run)
            packed = torch.empty(len(neighbours), rank, columns, dtype=self.dtype, device=device)
            self.modules += [self._module(layer, a) for layer, a in zip(neighbours, packed, strict=True)]
        self.packing = tables(self.modules)
        self.norms = tables([module for module in self.modules if module.weight is not None])

    def _module(self, layer: Layer, packed_a: Tensor) -> Module:
        a, b = layer.lora_a.detach(), layer.lora_b.detach()
        rows = len(b)
        packed = packed_a, b.new_empty(rows, len(packed_a), dtype=self.dtype)
        if layer.weight is None or layer.magnitude is None:
            return Module(a, b, *packed, scale=layer.scale)
        out = a.new_empty(2, rows, dtype=torch.float32)
        return Module(a, b, *packed, layer.scale, layer.weight.detach(), layer.magnitude.detach(), out)

    def refresh(self) -> None:
        """Write packed factors and gains anew from what the layers hold now."""
        if self.places != [layer.place() for layer in self.layers]:  # as after model.to(...)
            self._build()
        self.versions = [layer.versions() for layer in self.layers]
        pack_grouped(self.packing)
        row_norm_gain_grouped(self.norms)
        for module in self.modules:
            # A backward pass that still waits for the former values must fail, not use these.
            written = [module.packed_a, module.packed_b] + ([] if module.out is None else [module.out])
            torch.autograd.graph.increment_version(written)
        self.fresh = True


def _shape(layer: Layer) -> tuple[torch.device, int, int]:
    rank, columns = layer.lora_a.shape
    return layer.lora_a.device, padded_rank(rank), columns


_owners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def offer(preparation: Prepared) -> None:
    """Let forward passes use `preparation` while it is fresh; its owner holds it, and letting it go withdraws it."""
    for number, layer in enumerate(preparation.layers):
        _owners[layer.lora_a] = (ref(preparation), number)


def prepared(lora_a: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Packed A and B, and gains and norms of a layer with a norm, if somebody holds fresh ones for this layer and dtype."""
    owner, number = _owners.get(lora_a, (None, 0)) if _owners else (None, 0)
    preparation = owner() if owner is not None else None
    if preparation is None or not preparation.fresh or preparation.dtype != dtype:
        return None
    layer = preparation.layers[number]
    known = (scale, preparation.places[number], preparation.versions[number])
    if known != (layer.scale, layer.place(), layer.versions()):
        return None
    module = preparation.modules[number]
    return module.packed_a, module.packed_b, module.out


def prepare(layers: Sequence[Any], dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What a forward pass of layers that run together needs: prepared already, or else prepared now.

    Args:
        layers: `LoRAArguments` or `DoRAArguments` of one padded rank and width of the input.
        dtype: of the computation.

    Returns:
        A of all, side by side ``(Σ RP, in)``, B ``(out, RP)`` of each, and for DoRA g and n ``(2, out)`` of each.
    """
    magnitudes = [getattr(layer, "magnitude", None) for layer in layers]
    found = [prepared(layer.lora_a, layer.scale, dtype) for layer in layers]
    ready = [f for f, magnitude in zip(found, magnitudes, strict=True) if f and (magnitude is None or f[2] is not None)]
    if len(ready) == len(layers):
        return stacked([f[0] for f in ready]), [f[1] for f in ready], [f[2] for f in ready if f[2] is not None]
    factors = [(layer.lora_a.detach(), layer.lora_b.detach()) for layer in layers]
    outs: list[Any] = [None]
    if len(layers) > 1:
        (_, columns), rank = factors[0][0].shape, padded_rank(len(factors[0][0]))
        a = factors[0][0].new_empty(len(layers), rank, columns, dtype=dtype)
        outs = [(own, b.new_empty(len(b), rank, dtype=dtype)) for own, (_, b) in zip(a, factors, strict=True)]
    packed = [pack_adapters(*pair, dtype, out=out) for pair, out in zip(factors, outs, strict=True)]
    gains = [
        row_norm_gain(rows_side_by_side(layer.weight.detach()), *own, magnitude.detach(), layer.scale)
        for layer, own, magnitude in zip(layers, packed, magnitudes, strict=True)
        if magnitude is not None
    ]
    return stacked([a for a, _ in packed]), [b for _, b in packed], gains
