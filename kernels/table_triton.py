"""Tables of pointers, by which one launch serves many modules; built once, ahead of time, since they travel to the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftlite.kernels.configs import config, fitted
from peftlite.kernels.launch_triton import DTYPES, architecture


@dataclass(frozen=True)
class Module:
    """What the preparation of one adapted layer reads and writes; all but `weight` contiguous, `weight` in its rows.

    `weight`, `magnitude` and `out` are None for a layer without a norm; `out (2, out)` takes gain and norm.
    """

    lora_a: Tensor
    lora_b: Tensor
    packed_a: Tensor
    packed_b: Tensor
    scale: float
    weight: Tensor | None = None
    magnitude: Tensor | None = None
    out: Tensor | None = None

    def row(self) -> list[int]:
        """The module's line of the table."""
        rank, columns = self.lora_a.shape
        own = [self.lora_a, self.lora_b, self.packed_a, self.packed_b]
        fields = [t.data_ptr() for t in own] + [rank, columns, self.lora_b.shape[0]]
        if self.weight is None or self.magnitude is None or self.out is None:
            return [*fields, 0, 0, 0, 0]
        return [*fields, self.weight.data_ptr(), self.weight.stride(0), self.magnitude.data_ptr(), self.out.data_ptr()]

    def kind(self) -> tuple[object, ...]:
        """What modules that share a table have in common, since kernels are compiled for it."""
        tensors = (self.lora_a, self.lora_b, self.packed_a, self.weight, self.magnitude)
        dtypes = [None if t is None else t.dtype for t in tensors]
        if any(dtype is not None and dtype not in DTYPES for dtype in dtypes):
            raise ValueError(f"Triton kernels prepare float32, float16 and bfloat16, got {dtypes}; use impl='torch'.")
        return (*dtypes, self.packed_a.shape[0], self.aligned(), *self.tile().items())

    def tile(self) -> dict[str, int]:
        """The tiles of the module's norm, which fix the order of its sums and with it the last bits."""
        if self.weight is None:
            return {}
        return norm_tile(self.weight, self.packed_a.shape[0])

    def aligned(self) -> bool:
        """Whether all rows begin at multiples of 16 bytes."""
        stride = 0 if self.weight is None else self.weight.stride(0)
        pointers = [p for p in (*self.row()[:4], *self.row()[7:8], *self.row()[9:]) if p]
        return all(pointer % 16 == 0 for pointer in pointers) and self.lora_a.shape[1] % 16 == 0 and stride % 16 == 0


class Table:
    """Modules of one kind, and their pointers and sizes on the device: `pointers (modules, 11)` int64, `scales` fp32."""

    def __init__(self, modules: Sequence[Module]) -> None:
        self.modules = list(modules)
        device = self.modules[0].lora_a.device
        self.rows = [module.row() for module in self.modules]
        self.pointers = torch.tensor(self.rows, dtype=torch.int64, device=device)
        self.scales = torch.tensor([module.scale for module in self.modules], dtype=torch.float32, device=device)
        self.aligned = self.modules[0].aligned()
        self.most_columns = max(module.lora_a.shape[1] for module in self.modules)
        self.most_rows = max(module.lora_b.shape[0] for module in self.modules)


def tables(modules: Sequence[Module]) -> list[Table]:
    """One table per kind of module."""
    kinds: dict[tuple[object, ...], list[Module]] = {}
    for module in modules:
        kinds.setdefault((module.lora_a.device, *module.kind()), []).append(module)
    return [Table(group) for group in kinds.values()]


def norm_tile(weight: Tensor, rank: int) -> dict[str, int]:
    """The tiles of the norm of the rows of `weight`; `rank` is the padded one."""
    rows, columns = weight.shape
    arch = architecture(weight.device)
    tile = config("row_norm", arch=arch, dtype=weight.dtype, rank=rank, columns=columns, rows=rows)
    return fitted(tile, [weight], BLOCK_N=64, BLOCK_K=64)
