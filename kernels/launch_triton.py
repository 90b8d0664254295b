"""The one place where Triton kernels start, so that launches can be counted, metered, and recorded without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from peftlite.kernels.numerics_triton import INTERPRETED

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: everything that fixes what is compiled and what runs."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """The kernel's name in the sources."""
        return str(self.kernel.__name__)


_observers: list[Callable[[Launch], None]] = []
_recorded: list[tuple[str, list[Launch] | None]] = []  # the recordings that are on, innermost last


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int, **constexprs: Any) -> None:
    """Start `kernel` on `grid`, or note it down where a recording is on.

    The host never waits, and nothing is tuned here. Contraction to fused multiply-add is on explicitly, since Triton's own
    default differs between versions.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: number of programs in up to three dimensions; nothing runs where one of them is 0.
        args: what is not a constexpr, in the kernel's order.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        constexprs: the kernel's constexprs by name.
    """
    if 0 in grid:
        return
    if _observers or _recorded:
        event = Launch(kernel, grid, args, constexprs, num_warps, num_stages)
        for observer in _observers:
            observer(event)
        if _recorded:
            if (kept := _recorded[-1][1]) is not None:
                kept.append(event)
            return
    kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


@contextmanager
def observing(observer: Callable[[Launch], None]) -> Iterator[None]:
    """Call `observer` with every `Launch` before it starts."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def recording(arch: str, *, keep: bool = True) -> Iterator[list[Launch]]:
    """Start nothing; yield the list of what would have been launched on `arch`, such as ``"sm_90"`` or ``"gfx942"``.

    Without `keep` the list stays empty, so that no tensor outlives its use: for estimates of memory.

    Operations answer with tensors that nobody has written. They take tensors of any device here, the meta device among them.
    """
    launches: list[Launch] = []
    _recorded.append((arch, launches if keep else None))
    try:
        yield launches
    finally:
        _recorded.pop()


def architecture(device: torch.device) -> str:
    """The architecture that kernels on `device` are configured for: the recorded one, ``"interpreter"``, or the GPU's own."""
    if _recorded:
        return _recorded[-1][0]
    if INTERPRETED:
        return "interpreter"
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute in `dtype` on `device`, or None where they can."""
    if dtype not in DTYPES:
        return f"the kernels compute in float32, float16 and bfloat16, and the computation is in {str(dtype).partition('.')[2]}"
    if device.type != "cuda" and not (INTERPRETED or _recorded):
        return f"the kernels run on CUDA devices, and x is on {device} (TRITON_INTERPRET=1 at the start interprets them)"
    if device.type == "meta" and not _recorded:
        return "the kernels need values, and x is on the meta device"
    return None
