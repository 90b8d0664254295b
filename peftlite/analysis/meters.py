"""Deterministic meters: FLOPs, bytes saved for backward, peak bytes of a forward, operations dispatched.

They count what a computation does, not how long it takes, so the same code gives the same figures on any machine, busy
or idle (with and without the native passes it is not quite the same code). All of them watch the ATen operations below
autograd, and so see inside a `torch.autograd.Function`. An operation registered with `torch.library` is one opaque node
at that level; `OpenCustomOps` opens it, so that its body counts too. Out of sight stay kernels launched past ATen
(Triton), scratch memory inside a single ATen operation, and tensors that a function hides from autograd by setting them
as attributes of its context.
"""

import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from peftlite.kernels.native_library import NAMESPACE

_BACKENDS = ("CPU", "CUDA", "CompositeExplicitAutograd")
# Operations that multiply matrices, by name: one of these without a formula would be a silent zero in the sum.
_MATMUL_LIKE = re.compile(r"(mm|mv|dot)_?$|attention|linear|convolution")


def _is_packed(*arguments: Any) -> bool:
    """Whether there is a tensor among them that is made of others; its own storage is a sham.

    A mode that leaves an operation on such a tensor to it then sees those that the tensor makes of it.
    """
    return any(isinstance(leaf, Tensor) and is_traceable_wrapper_subclass(leaf) for leaf in tree_leaves(arguments))


class OpenCustomOps(TorchDispatchMode):
    """Runs the body of an operation registered with `torch.library` under the modes that were active around it.

    The native passes stay closed: like ATen's operations they are one pass, and call none.

    Args:
        namespace: open those of this namespace alone; by default all.
    """

    def __init__(self, namespace: str | None = None) -> None:
        super().__init__()
        self._namespace = namespace

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if _is_packed(args, kwargs):
            return NotImplemented
        if func.namespace == "prim":  # a fake tensor asked for its device, for one
            return func(*args, **kwargs)
        if func.namespace in ("aten", "prims"):
            # Below autograd, as in a custom operation's body, `matmul` and its like arrive before they are taken apart.
            with self:
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        if self._namespace not in (None, func.namespace) or func.namespace == NAMESPACE:
            return func(*args, **kwargs)
        devices = {leaf.device.type.upper() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for backend in _BACKENDS:
            key = getattr(torch._C.DispatchKey, backend)
            fits = backend in devices or backend == "CompositeExplicitAutograd"
            if fits and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
                # A mode is switched off inside its own handler; entering it again lets it see the body's ATen calls.
                with self:
                    return func._op_dk(key, *args, **kwargs)
        return func(*args, **kwargs)


def _matmul_flop(a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a_shape.numel() * (b_shape[-1] if len(b_shape) > 1 else 1)


def _added_matmul_flop(c_shape: Any, a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _matmul_flop(a_shape, b_shape)


def _updated_weight_flop(w_shape: Any, a_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * w_shape.numel() * a_shape[0]


def _adapt_output_flop(y_shape: Any, x_shape: Any, *args: Any, **kwargs: Any) -> int:
    _, _, _, a_shape, _, _, *given = args
    defaults: list[Any] = [True, False, None, None, None, None, None, None]
    shrinks, multiplies, weight_shape, *_, norm_scale = [*given, *defaults[len(given) :]]
    low_rank = a_shape[0] * (y_shape.numel() + shrinks * x_shape.numel())
    dense = y_shape[0] * multiplies + a_shape[0] * (norm_scale is not None)
    return 2 * (low_rank + (dense * weight_shape.numel() if dense else 0))


def _output_gradients_flop(dy_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    u_shape, db_shape = args[3], args[5]
    return 2 * dy_shape.numel() * b_shape[1] * ((u_shape is not None) + (db_shape is not None))


def _input_gradients_flop(dx_shape: Any, x_shape: Any, mask: Any, u_shape: Any, *args: Any, **kwargs: Any) -> int:
    _, _, _, weights, *_ = args
    low_rank = u_shape[1] * sum(shape.numel() for shape in (dx_shape, x_shape) if shape is not None)
    return 2 * (low_rank + u_shape[0] * sum(shape.numel() for shape in weights))


def _attention_flop(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
    from torch.utils.flop_counter import sdpa_flop_count

    return sdpa_flop_count(q_shape, k_shape, v_shape)


def _attention_backward_flop(grad_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return sdpa_backward_flop_count(grad_shape, q_shape, k_shape, v_shape)


def _extra_formulas() -> dict[Any, Callable[..., int]]:
    """FLOP formulas for matrix products that torch's own counter leaves at zero: in-place and CPU variants, native passes."""
    aten, native = torch.ops.aten, getattr(torch.ops, NAMESPACE)
    return {
        native.row_norm: _updated_weight_flop,
        native.adapt_output: _adapt_output_flop,
        native.output_gradients: _output_gradients_flop,
        native.input_gradients: _input_gradients_flop,
        aten.addmm_: _added_matmul_flop,
        aten.baddbmm_: _added_matmul_flop,
        aten.addmv: _added_matmul_flop,
        aten.addmv_: _added_matmul_flop,
        aten.mv: _matmul_flop,
        aten.dot: _matmul_flop,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
    }


class _RefuseUncounted(TorchDispatchMode):
    """Raises when an operation multiplies matrices and no formula says how many FLOPs that is."""

    def __init__(self, known: Iterable[Any]) -> None:
        super().__init__()
        self._known = set(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        packet = func._overloadpacket
        if func.namespace == "aten" and packet not in self._known and _MATMUL_LIKE.search(packet.__name__):
            raise NotImplementedError(
                f"FLOPs asked of a computation that calls {packet}, for which no formula is known, so the sum would be "
                "too small; add its formula to peftlite/analysis/meters.py"
            )
        return func(*args, **(kwargs or {}))


def flops(function: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attentions in `function()`; a multiply-add is 2.

    Element-wise work counts nothing: it is bound by memory, and `count_operations` and the byte meters show it.

    Raises:
        NotImplementedError: an operation looks like a matrix product and has no formula.
    """
    from torch.utils.flop_counter import FlopCounterMode, flop_registry  # it imports triton, which peftlite must not

    extra = _extra_formulas()
    counter = FlopCounterMode(display=False, custom_mapping=extra)
    with counter, _RefuseUncounted([*flop_registry, *extra]), OpenCustomOps():
        function()
    return counter.get_total_flops()


def count_operations(function: Callable[[], object]) -> Counter[str]:
    """How often `function()` dispatches each ATen operation; views, which compute nothing, are left out."""
    counts: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if not func.is_view:
                counts[str(func._overloadpacket)] += 1
            return func(*args, **(kwargs or {}))

    with Count(), OpenCustomOps():
        function()
    return counts


class Saved(NamedTuple):
    """Bytes held for the backward pass and the number of distinct storages that hold them."""

    bytes: int
    storages: int


def saved_for_backward(function: Callable[[], object], *, exclude: Iterable[nn.Module | Tensor] = ()) -> Saved:
    """Bytes that autograd keeps between the forward `function()` and its backward, each storage counted once, whole.

    A storage counts once however many operations, or views, save it: an output that an adapter layer and its consumer
    both keep costs its memory once.

    Args:
        function: the forward pass; what it returns is dropped.
        exclude: modules, whose parameters and buffers do not count, and tensors (the input batch), which do not either:
            they stay in memory without the backward as well.
    """
    there: set[int] = set()
    for item in exclude:
        tensors = [item] if isinstance(item, Tensor) else [*item.parameters(), *item.buffers()]
        there.update(tensor.untyped_storage()._cdata for tensor in tensors)
    # The storages themselves are kept: an address that is freed and used again would hide the second tensor.
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in plain_parts(tensor):
            storage = part.untyped_storage()
            if storage._cdata not in there:
                saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return Saved(sum(storage.nbytes() for storage in saved.values()), len(saved))


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold the numbers of `tensor`: itself, or what a packed one is made of, whose own storage is a sham."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


class LiveStorages(TorchDispatchMode):
    """Follows the storages that operations create, from creation to the end of their last reference."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._live: dict[int, int] = {}  # storage identity -> bytes
        self._finalizers: list[weakref.finalize] = []

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for finalizer in self._finalizers:
            finalizer.detach()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if _is_packed(args, kwargs):
            return NotImplemented
        given = [leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        known = {storage._cdata for storage in given}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                # An output whose storage came in is a view or an in-place write, of ours or of the surroundings'.
                if storage._cdata not in known and storage._cdata not in self._live:
                    self._born(storage)
        for storage in given:  # `resize_` and `out=` may grow a storage in place
            if storage._cdata in self._live:
                self._set(storage._cdata, storage.nbytes())
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        finalizer = weakref.finalize(storage, self._died, storage._cdata)
        finalizer.atexit = False
        self._finalizers.append(finalizer)
        self._set(storage._cdata, storage.nbytes())

    def _set(self, identity: int, nbytes: int) -> None:
        self.current += nbytes - self._live.get(identity, 0)
        self._live[identity] = nbytes
        self.peak = max(self.peak, self.current)

    def _died(self, identity: int) -> None:
        self.current -= self._live.pop(identity)


class Transient(NamedTuple):
    """Bytes of the tensors created by a computation: the most alive at once, and those alive at its end."""

    peak: int
    kept: int


def transient_bytes(function: Callable[[], object]) -> Transient:
    """Peak of the bytes alive at once among the storages that `function()` creates, and the bytes alive when it ends.

    What `function` returns counts as kept, with everything that its graph saved.
    """
    with LiveStorages() as live, OpenCustomOps():
        result = function()
        figures = Transient(live.peak, live.current)
    del result
    return figures
