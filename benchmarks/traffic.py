"""Bytes that a computation reads and writes, call by call: ATen operations and interpreted Triton kernels by one rule.

The rule: an operation reads each tensor that it is given and writes each that it makes, once and whole; views and
uninitialised allocations move nothing. A Triton kernel under the interpreter is metered exactly, load by load and store by
store, and elements that it visits more than once count as often. Both give `Transfer` records, so that a sum over "the
tensors of M x N elements" means the same for a library of ATen calls and for fused kernels. This is the traffic that the
code asks for: what caches save and what matrix products read again is the machine's affair.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftlite.analysis.meters import OpenCustomOps

# Overwrite their first argument without reading it.
_OVERWRITES = {"copy_", "fill_", "zero_", "bernoulli_", "uniform_", "normal_", "random_"}
_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Access(NamedTuple):
    """What one call did to one tensor.

    Attributes:
        name: the kernel's argument; for ATen its position, counted over the tensors of the call.
        numel: elements of the tensor.
        read: bytes.
        written: bytes.
        revisits: the most often that any one element was loaded; None where the meter cannot know.
        covered: share of the elements that were loaded at least once; None where the meter cannot know.
    """

    name: str
    numel: int
    read: int
    written: int
    revisits: int | None = None
    covered: float | None = None


class Transfer(NamedTuple):
    """One call, an ATen operation or a kernel, and its accesses."""

    call: str
    accesses: tuple[Access, ...]

    def named(self, name: str) -> Access:
        """The access to argument `name`.

        Raises:
            KeyError: the call has no tensor of that name.
        """
        for access in self.accesses:
            if access.name == name:
                return access
        raise KeyError(f"{self.call} has no tensor {name!r}; it has {', '.join(access.name for access in self.accesses)}")


def passes(transfers: Iterable[Transfer], numel: int, itemsize: int) -> float:
    """Bytes moved from and to tensors of `numel` elements, in units of ``numel x itemsize``: one read or write is 1."""
    moved = sum(a.read + a.written for transfer in transfers for a in transfer.accesses if a.numel == numel)
    return moved / (numel * itemsize)


def total_bytes(transfers: Iterable[Transfer]) -> int:
    """All bytes, read and written."""
    return sum(access.read + access.written for transfer in transfers for access in transfer.accesses)


def _distinct_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that are distinct in memory: an expanded dimension is read once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


class _AtenMeter(TorchDispatchMode):
    def __init__(self, transfers: list[Transfer]) -> None:
        super().__init__()
        self.transfers = transfers
        self.paused = False  # inside a kernel: the interpreter's own ATen calls are none of the computation's

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if not (self.paused or func.is_view or name in _ALLOCATES or func.namespace not in ("aten", "prims")):
            self.transfers.append(Transfer(name, tuple(self._accesses(func, name, args, kwargs, result))))
        return result

    @staticmethod
    def _accesses(func: Any, name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Access]:
        written: set[int] = set()
        position = 0
        shape_only = name.startswith("new_") or name.endswith("_like")  # the argument gives its shape and dtype alone
        for index, argument in enumerate(func._schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
                nbytes = _distinct_bytes(tensor)
                reads = not (shape_only or (writes and (argument.is_out or name in _OVERWRITES)))
                yield Access(str(position), tensor.numel(), nbytes if reads else 0, nbytes if writes else 0)
                position += 1
                if writes:
                    written.add(tensor.untyped_storage()._cdata)
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if tensor.untyped_storage()._cdata not in written:
                yield Access(str(position), tensor.numel(), 0, _distinct_bytes(tensor))
                position += 1


class _Watched(NamedTuple):
    """A tensor argument of the running kernel, with counters over the memory that it spans."""

    name: str
    tensor: Tensor
    own: np.ndarray  # which of the spanned places are its elements: a column of a matrix spans the others too
    loads: np.ndarray
    stores: np.ndarray

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "_Watched":
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        own = np.zeros(span if tensor.numel() else 0, bool)
        if tensor.numel():
            np.lib.stride_tricks.as_strided(own, tensor.shape, tensor.stride())[...] = True
        return cls(name, tensor, own, np.zeros(own.shape, np.int64), np.zeros(own.shape, np.int64))

    def take(self, addresses: np.ndarray, *, store: bool) -> np.ndarray:
        """Count the addresses that are elements of this tensor; the others."""
        place, inside_element = np.divmod(addresses - self.tensor.data_ptr(), self.tensor.element_size())
        mine = (place >= 0) & (place < self.own.size) & (inside_element == 0)
        mine[mine] = self.own[place[mine]]
        np.add.at(self.stores if store else self.loads, place[mine], 1)
        return addresses[~mine]

    def access(self) -> Access:
        size, numel = self.tensor.element_size(), self.tensor.numel()
        covered = int(np.count_nonzero(self.loads)) / numel if numel else 0.0
        most = int(self.loads.max(initial=0))
        return Access(self.name, numel, int(self.loads.sum()) * size, int(self.stores.sum()) * size, most, covered)


class StrayAccessError(AssertionError):
    """A kernel loaded or stored outside of every tensor that it was given."""


class _KernelMeter:
    """Counts the lanes of each load and store of interpreted kernels, by the tensor that they touch."""

    def __init__(self, transfers: list[Transfer], aten: _AtenMeter, pointed_at: dict[str, Tensor]) -> None:
        self.transfers, self.aten, self.pointed_at = transfers, aten, pointed_at
        self.watched: list[_Watched] = []
        self.kernel = ""

    def count(self, addresses: np.ndarray, mask: np.ndarray, *, store: bool) -> None:
        touched = addresses[np.broadcast_to(mask, addresses.shape)].astype(np.int64)
        for watched in self.watched:
            if touched.size:
                touched = watched.take(touched, store=store)
        if touched.size:
            raise StrayAccessError(
                f"{self.kernel} {'stores to' if store else 'loads from'} {touched.size} addresses outside of its tensors "
                f"{', '.join(watched.name for watched in self.watched)}; correct its mask, or name tensors that it reaches "
                "through a table of pointers in `pointed_at`"
            )

    def run(self, name: str, names: list[str], arguments: tuple[Any, ...], keywords: dict[str, Any], go: Callable) -> None:
        tensors = dict(zip(names, arguments, strict=False)) | keywords
        tensors = {key: value for key, value in tensors.items() if isinstance(value, Tensor)} | self.pointed_at
        self.kernel, self.watched = name, [_Watched.of(key, tensor) for key, tensor in tensors.items()]
        self.aten.paused = True
        try:
            go(*arguments, **keywords)
        finally:
            self.aten.paused = False
        self.transfers.append(Transfer(name, tuple(watched.access() for watched in self.watched)))
        self.watched = []  # autograd copies a gradient that somebody else still holds


@contextmanager
def _metered_interpreter(meter: _KernelMeter) -> Iterator[None]:
    """Put `meter` between interpreted kernels and memory.

    Triton offers no hook there. The two places are the builder's masked load and store, through which plain ones go
    too, and the executor that runs a grid; `tests/triton` meters a kernel of known traffic, which notices if they move.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    load, store, call = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        meter.count(pointers.data, mask.data, store=False)
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        meter.count(pointers.data, mask.data, store=True)
        return store(pointers, value, mask, *rest)

    def counted_call(executor: Any, *arguments: Any, **keywords: Any) -> None:
        meter.run(
            executor.fn.__name__, executor.arg_names, arguments, keywords, lambda *a, **k: call(executor, *a, **k)
        )

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    interpreter.GridExecutor.__call__ = counted_call
    try:
        yield
    finally:
        del builder.create_masked_load, builder.create_masked_store  # the class's own show again
        interpreter.GridExecutor.__call__ = call


def aten_traffic(function: Callable[[], object]) -> list[Transfer]:
    """The transfers of the ATen operations that `function()` dispatches, custom operations opened."""
    transfers: list[Transfer] = []
    with _AtenMeter(transfers), OpenCustomOps():
        function()
    return transfers


def traffic(function: Callable[[], object], *, pointed_at: dict[str, Tensor] | None = None) -> list[Transfer]:
    """The transfers of `function()` in order: ATen operations, and Triton kernels that the interpreter runs.

    Args:
        function: the computation; its kernels must have been made under ``TRITON_INTERPRET=1``.
        pointed_at: tensors by name that kernels reach through tables of pointers and not as arguments.

    Raises:
        StrayAccessError: a kernel touches memory outside of its tensors.
    """
    transfers: list[Transfer] = []
    aten = _AtenMeter(transfers)
    with _metered_interpreter(_KernelMeter(transfers, aten, pointed_at or {})), aten, OpenCustomOps():
        function()
    return transfers
