"""A matrix that is stored in 4 or 8 bits and becomes dense where an operation reads it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from peftlite.quantization.blockwise import Format, Parts, dequantize, dequantize_at, dequantize_op

NAMES = ("codes", "scales", "scale_scales", "scale_offset")
aten = torch.ops.aten


class PackedTensor(Tensor):
    """Stand for the dense matrix ``level[codes] · scales`` without holding it: any operation on it makes it dense for itself.

    Shape, dtype and device are those of the dense matrix. Operations that only look at it (`detach`, the transpose, a cast)
    give another such tensor, so that autograd saves the packed form for the backward pass, where the product with the
    gradient makes it dense again. Rows make those rows dense and no others. Nothing can be written into it.

    Args:
        parts: what `quantize` returned. They are held by reference.
        form: their format.
        shape: ``(out, in)``.
        dtype: dtype to which the dense numbers are rounded, from fp32.
        cast: a second dtype, to which they are then rounded; the dtype of the tensor.
        transposed: whether the tensor is the transpose, ``(in, out)``.
    """

    form: Format
    codes: Tensor

    @staticmethod
    def __new__(
        cls,
        parts: Parts,
        form: Format,
        shape: tuple[int, int],
        dtype: torch.dtype,
        cast: torch.dtype | None = None,
        transposed: bool = False,
    ) -> "PackedTensor":
        size, stride = (shape, (shape[1], 1)) if not transposed else (shape[::-1], (1, shape[1]))
        return Tensor._make_wrapper_subclass(
            cls, size, strides=stride, dtype=cast or dtype, device=parts[0].device, requires_grad=False
        )

    def __init__(
        self,
        parts: Parts,
        form: Format,
        shape: tuple[int, int],
        dtype: torch.dtype,
        cast: torch.dtype | None = None,
        transposed: bool = False,
    ) -> None:
        # One attribute each, as compilers want them.
        for name, part in zip(NAMES, parts, strict=False):
            setattr(self, name, part)
        self.form, self.matrix, self.base_dtype, self.transposed = form, shape, dtype, transposed

    @property
    def parts(self) -> Parts:
        """The tensors that hold the numbers."""
        return tuple(getattr(self, name) for name in self.__tensor_flatten__()[0])

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        names = list(NAMES[: 2 if self.form.scale_code is None else 4])
        return names, (self.form, self.matrix, self.base_dtype, self.dtype, self.transposed)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: tuple[Any, ...], size: Any, stride: Any) -> "PackedTensor":
        return PackedTensor(tuple(inner[name] for name in NAMES if name in inner), *context)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedTensor({self.form.code}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @property
    def is_real(self) -> bool:
        """Whether it holds numbers, and does not stand for some while a compiler traces the program."""
        return type(self.codes) in (Tensor, torch.nn.Parameter)

    def dense(self, after: Tensor | None = None) -> Tensor:
        """The dense matrix, in the tensor's dtype; in compiled code it is made once `after` is there."""
        form, (rows, columns) = self.form, self.matrix
        # Rounding straight to the last dtype saves a pass, and is the same where the first one keeps all digits.
        direct = self.dtype if self.base_dtype.itemsize >= 4 else self.base_dtype
        if self.is_real:
            flat = dequantize(self.parts, form, 0, rows * columns, direct)
        else:
            options = (form.code, form.block, form.scale_code, form.scale_block)
            flat = dequantize_op(list(self.parts), *options, rows * columns, direct, after)
        matrix = flat.view(rows, columns).to(self.dtype)
        return matrix.t() if self.transposed else matrix

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the matrix, dense."""
        columns = self.matrix[1]
        flat = dequantize(self.parts, self.form, start * columns, stop * columns, self.base_dtype)
        return flat.view(stop - start, columns).to(self.dtype)

    def rows_at(self, index: Tensor) -> Tensor:
        """The rows that `index`, integers, names, dense."""
        count, columns = self.matrix
        index = torch.where(index < 0, index + count, index)
        places = index[:, None] * columns + torch.arange(columns, device=index.device)
        return dequantize_at(self.parts, self.form, places, self.base_dtype).to(self.dtype)

    def _as(self, *, cast: torch.dtype | None = None, flip: bool = False) -> "PackedTensor":
        return PackedTensor(
            self.parts, self.form, self.matrix, self.base_dtype, cast or self.dtype, self.transposed != flip
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0], PackedTensor):
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func._schema.is_mutable:
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
            written = (a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
            if any(isinstance(given.get(name), PackedTensor) for name in written):
                raise RuntimeError(
                    f"{func} would write into a quantised base weight, which is read-only; dequantise the layer first "
                    "(dequantize_base), or work on a dense copy, weight.clone()."
                )
        others = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not isinstance(t, PackedTensor)]
        after = others[0] if others else None
        args, kwargs = tree_map_only(PackedTensor, lambda t: t.dense(after), (args, kwargs))
        return func(*args, **kwargs)

    # Attributes and methods are not treated otherwise than those of any tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def _cast(packed: PackedTensor, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """A cast alone stays packed; a copy to another device, or in another memory format, is dense."""
    device = options.pop("device", None)
    elsewhere = device is not None and torch.device(device) != packed.device
    if elsewhere or any(value not in (None, False, torch.strided, torch.preserve_format) for value in options.values()):
        return NotImplemented
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    # A chain of casts rounds at every step; two steps are remembered.
    if packed.dtype not in (packed.base_dtype, dtype) and packed.dtype.itemsize < 4:
        return NotImplemented
    return packed._as(cast=dtype)


def _transpose(packed: PackedTensor, first: int = 0, second: int = 1) -> PackedTensor:
    return packed._as(flip=first % 2 != second % 2)


def _slice(packed: PackedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if packed.transposed or dim % 2 != 0 or step != 1 or not packed.is_real:
        return NotImplemented
    begin, stop, _ = slice(start, end).indices(packed.matrix[0])
    if (begin, stop) == (0, packed.matrix[0]):
        return packed._as()
    return packed.rows(begin, max(begin, stop))


def _index(packed: PackedTensor, indices: list[Tensor | None]) -> Any:
    index = indices[0]
    if packed.transposed or len(indices) != 1 or index is None or index.ndim != 1 or index.dtype == torch.bool:
        return NotImplemented
    if not packed.is_real or 8 * index.numel() > packed.matrix[0]:  # for many rows the dense matrix is cheaper
        return NotImplemented
    return packed.rows_at(index)


def _stand_in(func: Any) -> Callable[..., Tensor]:
    """What only asks for dtype and device gets them from an empty tensor."""

    def make(packed: PackedTensor, *args: Any, **kwargs: Any) -> Tensor:
        return func(torch.empty(0, dtype=packed.dtype, device=packed.device), *args, **kwargs)

    return make


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: PackedTensor._as,
    aten.alias.default: PackedTensor._as,
    aten._to_copy.default: _cast,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
    **{
        func: _stand_in(func)
        for func in (aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)
    },
}
