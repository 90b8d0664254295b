"""Which implementation of an operation runs, in which precision, and why not another."""

import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

IMPLEMENTATIONS = ("reference", "torch", "triton")
SMALL = 100_000  # elements of the output: below, starting a Triton kernel takes longer than torch's own launches


def choose(operation: str, impl: str, x: Tensor, weight: Tensor, *, has_triton: bool = True) -> str:
    """Name the implementation of `operation` that runs: one of `IMPLEMENTATIONS`.

    Args:
        operation: name of the operation, for messages.
        impl: ``"reference"`` (plain torch, the oracle), ``"torch"`` (memory-lean autograd on ATen calls), ``"triton"``
            (fused kernels) or ``"auto"``: Triton on a GPU where it is installed, has the dtypes, and there is enough to compute
            to pay for its launches (always in compiled code and captured graphs); torch otherwise. The environment
            variable ``PEFTLITE_IMPL`` replaces ``"auto"`` and nothing else.
        x: the input, ``(..., in)``.
        weight: ``(out, in)``.
        has_triton: whether the operation has such kernels at all.

    Raises:
        ValueError: for a name that is none of these, or for Triton where it cannot run, saying why. An explicit
            request never falls back in silence.
    """
    asked = f"impl={impl!r}"
    automatic = False
    if impl == "auto":
        impl = os.environ.get("PEFTLITE_IMPL", "")
        asked = f"PEFTLITE_IMPL={impl}"
        automatic = not impl
    if automatic:
        return "triton" if has_triton and _triton_pays(x, weight) else "torch"
    implementations = IMPLEMENTATIONS if has_triton else IMPLEMENTATIONS[:-1]
    if impl not in implementations:
        raise ValueError(
            f"{operation}: {asked} was asked for, but its implementations are {', '.join(implementations)}; "
            f"choose one of them, or 'auto'."
        )
    if impl == "triton":
        reason = triton_obstacle(x.device, compute_dtype(x), weight.dtype)
        if reason:
            raise ValueError(f"{operation}: {asked} was asked for, but {reason}; use impl='torch', or 'auto'.")
    return impl


def _triton_pays(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cuda" or triton_obstacle(x.device, compute_dtype(x), weight.dtype):
        return False
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return True
    return x.numel() // x.shape[-1] * weight.shape[0] >= SMALL


def triton_obstacle(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why the Triton kernels cannot compute with `dtypes` on `device`, or None where they can."""
    if not _triton_is_installed():
        return "Triton is not installed (pip install triton)"
    from peftlite.kernels.launch_triton import obstacle

    return next(filter(None, (obstacle(device, dtype) for dtype in dtypes)), None)


# What torch.compiler.assume_constant_result does, which would import the compiler (over a second) into every process.
triton_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _triton_is_installed() -> bool:
    try:
        return find_spec("triton.language") is not None
    except ModuleNotFoundError:
        return False


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear operation on `x` runs: autocast's where it applies, else that of `x`.

    Autocast leaves fp64 alone, as it does for torch's own operations.

    Raises:
        ValueError: if `x` is not a floating point tensor: the weights would be cast to integers.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating point tensor, got {x.dtype}; convert it first, for example with x.float().")
    device = x.device.type
    if _autocast_is_on(device) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _autocast_is_on(device: str) -> bool:
    # The meta device, for one, knows no autocast and raises when it is asked.
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


_UNCHANGED = nullcontext()


class _AutocastOff:
    """What ``torch.autocast(device, enabled=False)`` does to operations, without its many checks."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self._device, False)

    def __exit__(self, *exception: object) -> None:
        torch.set_autocast_enabled(self._device, True)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off; where it is off already nothing is entered, which small layers notice."""
    if not _autocast_is_on(device.type):
        return _UNCHANGED
    if torch.compiler.is_compiling():  # which knows this one
        return torch.autocast(device.type, enabled=False)
    return _AutocastOff(device.type)


class _Given(NamedTuple):
    """Stands for `inspect.BoundArguments`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """There are none."""


class _Positional(inspect.Signature):
    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return _Given(args, kwargs)


Function = TypeVar("Function", bound=Callable[..., Any])


def positional(function: Function) -> Function:
    """Declare that `function`, the forward pass of an autograd function, is given all of its arguments by position.

    `Function.apply` asks for its signature at every call and binds the arguments to it, which takes a small layer longer than
    its products do.
    """
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    function.__signature__ = _Positional(parameters, return_annotation=signature.return_annotation)  # type: ignore[attr-defined]
    return function


def has_values(tensor: Tensor) -> bool:
    """Whether `tensor` holds numbers to look at; on the meta device, and as a fake tensor, it has none."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def check_linear_shapes(
    operation: str,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> None:
    """Raise a `ValueError` that names the shapes unless all agree, or if the weight is not frozen.

    They are x (..., in), weight (out, in), lora_a (r, in), lora_b (out, r), bias (out,) and magnitude (out,).
    """
    out_features, in_features = weight.shape
    rank = lora_a.shape[0]
    if x.shape[-1] != in_features:
        raise ValueError(
            f"{operation}: the last dimension of x must be in_features = {in_features}, got x of shape {tuple(x.shape)}."
        )
    if lora_a.shape != (rank, in_features) or lora_b.shape != (out_features, rank):
        raise ValueError(
            f"{operation}: for weight {tuple(weight.shape)} lora_a must be (r, {in_features}) and lora_b "
            f"({out_features}, r); got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}."
        )
    for name, tensor in (("bias", bias), ("magnitude", magnitude)):
        if tensor is not None and tensor.shape != (out_features,):
            raise ValueError(
                f"{operation}: for weight {tuple(weight.shape)} {name} must be ({out_features},); got {tuple(tensor.shape)}."
            )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{operation}: weight requires a gradient, but this operation treats it as frozen and gives none; "
            "call weight.requires_grad_(False), or train it outside an adapter."
        )


def saved_tensors(operation: str, ctx: Any) -> tuple[Tensor, ...]:
    """What the forward pass saved; a `RuntimeError` that says what to do where the output was changed in place."""
    try:
        return tuple(ctx.saved_tensors)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{operation}: a tensor that its backward pass needs was changed in place after the forward pass, most "
            "likely the layer's output by the operation that follows it (nn.ReLU(inplace=True), y += ..., "
            "y.mul_(...)). Use the out-of-place form of that operation."
        ) from error
