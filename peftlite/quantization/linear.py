"""The frozen linear layer whose weight is stored in 4 or 8 bits, and the module that holds such a weight."""

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from peftlite.kernels.dispatch import compute_dtype
from peftlite.quantization.blockwise import Format, part_shapes, quantize
from peftlite.quantization.packed import NAMES, PackedTensor

LAYOUT = "layout"  # key of the state dict under which the format stands


class PackedWeight(nn.Module):
    """Hold a frozen matrix ``(out, in)`` in 4 or 8 bits.

    `codes`, `scales` and, where these are in 8 bits too, `scale_scales` and `scale_offset` are frozen Parameters and not
    buffers, since DistributedDataParallel sends every buffer in every forward pass. Casts (``model.half()``) leave them
    alone and change `dtype` only, the dtype in which the weight counts as dense. The state dict holds plain tensors, and a
    small one that says how they are to be read; a model that was quantised otherwise refuses them.

    Args:
        weight: the matrix to store, of any floating dtype; on the meta device only the shapes are made.
        form: how it is stored.
        dtype: the dtype in which it counts as dense, by default that of `weight`.

    Raises:
        ValueError: if `weight` has non-finite values.
    """

    codes: Tensor
    scales: Tensor
    scale_scales: Tensor | None
    scale_offset: Tensor | None

    def __init__(self, weight: Tensor, form: Format, *, dtype: torch.dtype | None = None) -> None:
        rows, columns = weight.shape
        if weight.is_meta:
            shapes = part_shapes(weight.numel(), form)
            kinds = (torch.uint8, torch.float32 if form.scale_code is None else torch.uint8, torch.float32, torch.float32)
            parts = tuple(weight.new_empty(shape, dtype=kind) for shape, kind in zip(shapes, kinds, strict=False))
        else:
            check_finite(weight)
            parts = quantize(weight.detach(), form)
        super().__init__()
        self.form, self.shape, self.dtype = form, torch.Size((rows, columns)), dtype or weight.dtype
        for name in NAMES:
            self.register_parameter(name, None)
        for name, part in zip(NAMES, parts, strict=False):
            setattr(self, name, nn.Parameter(part, requires_grad=False))
        _let_compilers_in()

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.codes.device

    def numel(self) -> int:
        """Number of elements of the matrix."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(p.nbytes for p in self.parameters())

    def tensor(self) -> PackedTensor:
        """The matrix as a tensor that becomes dense where an operation reads it."""
        form, (rows, columns) = self.form, self.shape
        parts = tuple(p for p in (self.codes, self.scales, self.scale_scales, self.scale_offset) if p is not None)
        if torch.compiler.is_compiling():
            return _packed_tensor(parts, form.code, form.block, form.scale_code, form.scale_block, rows, columns, self.dtype)
        return PackedTensor(parts, form, (rows, columns), self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = [p for p in self.parameters() if p.is_floating_point()]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype

        def apply(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype != tensor.dtype and any(tensor is p for p in kept):
                return tensor.to(result.device)  # the very values, and not those of a rounded copy
            return result

        return super()._apply(apply, recurse)

    def _layout(self) -> Tensor:
        form = self.form
        described = [form.code, form.block, form.scale_code, form.scale_block, *self.shape]
        return torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + LAYOUT] = self._layout()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stored = state_dict.get(prefix + LAYOUT)
        if stored is not None and not stored.is_meta and not torch.equal(stored.cpu(), self._layout()):
            found, own = (bytes(t.tolist()).decode() for t in (stored.cpu(), self._layout()))
            error_msgs.append(
                f"{prefix[:-1]} was quantised as {found} (code, block, code and block of the scales, shape), but here it is "
                f"{own}; quantise the model in the same way before loading."
            )
            return
        if stored is None and strict:
            missing_keys.append(prefix + LAYOUT)
        own_state = {key: value for key, value in state_dict.items() if key != prefix + LAYOUT}
        super()._load_from_state_dict(own_state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _let_compilers_in()

    def extra_repr(self) -> str:
        """Format and shape, for ``print(model)``."""
        form = self.form
        return f"{form.code}, shape={tuple(self.shape)}, block={form.block}, scale_code={form.scale_code}, dtype={self.dtype}"


def _packed_tensor(parts: tuple[Tensor, ...], *form_and_shape: Any) -> PackedTensor:
    *form, rows, columns, dtype = form_and_shape  # plain values: a compiler carries no others
    return PackedTensor(parts, Format(*form), (rows, columns), dtype)


@functools.cache
def _let_compilers_in() -> None:
    """Let compiled code call `_packed_tensor`; not at import, since torch's compiler takes seconds to load."""
    torch.compiler.allow_in_graph(_packed_tensor)


class QuantizedLinear(nn.Module):
    """Compute ``y = x deq(W)ᵀ + b`` with a frozen W in 4 or 8 bits, which becomes dense for the product alone.

    The backward pass makes it dense again for ``dx = dy deq(W)``; W and b get no gradient from here (b may be made to
    train). `quantize_base` makes such layers, and `inject_adapters` takes them as it takes ``nn.Linear``.

    Args:
        linear: the layer to quantise. Its bias is taken over, its weight is read.
        form: how the weight is stored.

    Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314.
    """

    weight: PackedWeight
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, form: Format) -> None:
        weight = PackedWeight(linear.weight, form)
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = weight
        self.bias = linear.bias
        self.train(linear.training)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ``nn.Linear`` with the frozen weight ``deq(W)``, in `dtype` or that which the weight had, and the same bias."""
        weight = self.weight.tensor().dense().to(dtype or self.weight.dtype)
        layer = plain_linear(nn.Parameter(weight, requires_grad=False), self.bias).train(self.training)
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map x ``(..., in)`` to ``(..., out)``."""
        dtype = compute_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.tensor().to(dtype), bias)

    def extra_repr(self) -> str:
        """Shape, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def plain_linear(weight: nn.Parameter | PackedWeight, bias: Tensor | None) -> nn.Linear | QuantizedLinear:
    """The plain layer that holds `weight` and `bias`, the very objects: an ``nn.Linear``, or a `QuantizedLinear`."""
    out_features, in_features = weight.shape
    if isinstance(weight, PackedWeight):
        layer: Any = QuantizedLinear.__new__(QuantizedLinear)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = in_features, out_features
    else:
        layer = nn.Linear(in_features, out_features, bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def check_finite(weight: Tensor, where: str = "") -> None:
    """Raise a `ValueError` if `weight` has values that no scale can hold; on the meta device there are none."""
    bad = 0 if weight.is_meta else int((~torch.isfinite(weight.detach())).sum())
    if bad:
        raise ValueError(
            f"{where}the weight has {bad} non-finite values of {weight.numel()}, and cannot be quantised; repair it, or leave "
            "the layer out with `exclude`."
        )


def packed_weights(module: nn.Module) -> Iterator[PackedWeight]:
    """Every packed weight in `module`."""
    return (m for m in module.modules() if isinstance(m, PackedWeight))
