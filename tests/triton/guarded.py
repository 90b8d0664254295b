"""Tensors inside larger buffers: outputs that hold NaN until they are written, and margins that nobody may touch."""

import math

import torch
from torch import Tensor

from peftlite.kernels.row_shrink_triton import row_shrink

MARGIN = 64  # elements on either side; a multiple of 16 bytes, so that the tensor stays aligned
CANARY = -1234.0  # exact in every dtype


class Guards:
    """Makes tensors with margins, and tells whether the margins still hold what was put there."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int, int]] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, misaligned: bool = False) -> Tensor:
        """A contiguous tensor of NaN (0xFF bytes for integers), one element off its alignment if `misaligned`."""
        size, margin = math.prod(shape), MARGIN + int(misaligned)
        buffer = torch.full((size + 2 * MARGIN + 1,), CANARY if dtype.is_floating_point else 77, dtype=dtype)
        buffer[margin : margin + size] = math.nan if dtype.is_floating_point else torch.iinfo(dtype).max
        self.buffers.append((buffer, margin, size))
        return buffer[margin : margin + size].view(shape)

    def copy(self, tensor: Tensor, misaligned: bool = False) -> Tensor:
        """A copy of `tensor` with margins of NaN: what is read there by mistake shows in the result."""
        inside = self.empty(*tensor.shape, dtype=tensor.dtype, misaligned=misaligned)
        inside.copy_(tensor)
        if tensor.dtype.is_floating_point:
            buffer, margin, size = self.buffers.pop()
            buffer[:margin], buffer[margin + size :] = math.nan, math.nan
        return inside

    def check(self) -> None:
        """Fail if a margin was written."""
        for buffer, margin, size in self.buffers:
            canary = CANARY if buffer.dtype.is_floating_point else 77
            assert (buffer[:margin] == canary).all(), "written before the beginning of a tensor"
            assert (buffer[margin + size :] == canary).all(), "written past the end of a tensor"


def floor(exact: Tensor, dtype: torch.dtype) -> float:
    """Relative error, in the Euclidean norm, of rounding the fp64 result to `dtype`: what no kernel can be below."""
    norm = exact.norm()
    return ((exact.to(dtype).double() - exact).norm() / norm).item() if norm > 0 else 0.0


def assert_rounded(what: str, actual: Tensor, exact: Tensor) -> None:
    """Elementwise results: at most 1.1 times the error of rounding the exact result to the dtype of `actual`.

    Where that is fp32, whose arithmetic rounds more than once, the bound is that of sums instead.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    error, norm = (actual.double() - exact).norm().item(), exact.norm().item()
    allowed = 8 * 2.0**-24 if actual.dtype == torch.float32 else 1.1 * floor(exact, actual.dtype)
    assert error <= allowed * norm, f"{what}: relative error {error / max(norm, 1e-300):.3g}, allowed {allowed:.3g}"


def assert_summed(what: str, actual: Tensor, exact: Tensor, terms: int, scale: Tensor | None = None) -> None:
    """Sums in fp32 of `terms` products: within ``4 · 2⁻²⁴ √terms`` of the exact result, in the Euclidean norm.

    Args:
        what: for the message.
        actual: the kernel's sums, fp32.
        exact: the same in fp64.
        terms: how many numbers were added.
        scale: the sums of the absolute values, where the terms may cancel; by default `exact` itself.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    size = (exact if scale is None else scale).norm().item()
    error, allowed = (actual.double() - exact).norm().item(), 4 * 2.0**-24 * max(1, terms) ** 0.5 * size
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g} for sums of {terms} terms"


def draw_mask(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """The bits that T1 draws for a matrix `(rows, columns)`."""
    x, a = torch.zeros(rows, columns), torch.zeros(16, columns)
    _, mask = row_shrink([x], [a], [1.0], by_rank=True, seed=seed, dropout=dropout)
    assert mask is not None
    return mask
