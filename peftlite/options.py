"""What the options of layers may be."""

import math
from numbers import Real

import torch


def check_alpha(alpha: float) -> float:
    """`alpha` as a float; a `ValueError` unless it is a positive number."""
    if not (_is_number(alpha) and math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a positive number, got {alpha!r}; to switch a layer off use disable_adapters.")
    return float(alpha)


def check_dropout(dropout: float) -> float:
    """`dropout` as a float; a `ValueError` unless it is in [0, 1)."""
    if not (_is_number(dropout) and 0.0 <= dropout < 1.0):
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}.")
    return float(dropout)


def floating_dtype(option: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """`dtype`, which may be given by its name; a `ValueError` that names the `option` unless it has 16 bits or more."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1):
        raise ValueError(
            f"{option} must be one of torch.float64, torch.float32, torch.bfloat16, torch.float16 (or its name), got {dtype!r}."
        )
    return found


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """The name of `dtype`, as files and configs hold it."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
