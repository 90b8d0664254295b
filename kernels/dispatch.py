"""Which implementation of an operation runs, in which precision, and why not another."""

import os

import torch
from torch import Tensor

IMPLEMENTATIONS = ("reference", "torch")


def choose(operation: str, impl: str) -> str:
    """Name the implementation of `operation` that runs: one of `IMPLEMENTATIONS`.

    Args:
        operation: name of the operation, for messages.
        impl: ``"reference"`` (plain torch, the oracle), ``"torch"`` (memory-lean autograd on ATen calls) or ``"auto"``.
            The environment variable ``PEFTLITE_IMPL`` replaces ``"auto"`` and nothing else.

    Raises:
        ValueError: for a name that is none of these. An explicit request never falls back in silence.
    """
    asked = f"impl={impl!r}"
    if impl == "auto":
        impl = os.environ.get("PEFTLITE_IMPL", "torch")
        asked = f"PEFTLITE_IMPL={impl}"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"{operation}: {asked} was asked for, but its implementations are {', '.join(IMPLEMENTATIONS)}; "
            f"choose one of them, or 'auto'."
        )
    return impl


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear operation on `x` runs: autocast's where it applies, else that of `x`.

    Autocast leaves fp64 alone, as it does for torch's own operations.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.get_autocast_dtype(device)
    return x.dtype


def check_linear_shapes(operation: str, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    """Raise a `ValueError` that names the shapes unless x (..., in), weight (out, in), a (r, in), b (out, r) agree."""
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
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{operation}: weight requires a gradient, but this operation treats it as frozen and gives none; "
            "call weight.requires_grad_(False), or train it outside an adapter."
        )


def draw_keep_mask(x: Tensor, dropout: float) -> Tensor | None:
    """Draw which elements of `x` survive dropout, a bool tensor like `x`, or None where `dropout` is 0."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
    if dropout == 0.0:
        return None
    return torch.rand(x.shape, device=x.device) >= dropout
