"""Tolerances from data: what plain eager code loses in the same dtype is what we may lose, twice."""

import torch
from torch import Tensor


def budget(eager: Tensor, oracle: Tensor, dtype: torch.dtype, *terms: Tensor) -> float:
    """``2 (max|eager - oracle| + eps(dtype) max|oracle|)``: `eager` is plain torch in `dtype`, `oracle` the same in fp64.

    Where the oracle is a sum whose `terms` cancel, the largest of them counts as well.
    """
    if oracle.numel() == 0:
        return 0.0
    lost = (eager.double() - oracle).abs().max().item()
    return 2 * (lost + torch.finfo(dtype).eps * max(t.abs().max().item() for t in (oracle, *terms)))


def assert_within_budget(
    what: str, actual: Tensor, eager: Tensor, oracle: Tensor, dtype: torch.dtype, *terms: Tensor
) -> None:
    """Fail unless `actual` is finite, has the shape of `oracle` and lies within `budget` of it."""
    assert oracle.dtype == torch.float64
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    error = (actual.double() - oracle).abs().max().item() if oracle.numel() else 0.0
    allowed = budget(eager, oracle, dtype, *terms)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
