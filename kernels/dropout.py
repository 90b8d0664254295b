"""Which probabilities dropout knows, and masks on ATen calls, kept as bits: a backward pass waits with 1/8 byte an element."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftlite.kernels import native, native_library

LEVELS = 1 << 16  # probabilities are multiples of 1 / LEVELS, here and in the Triton kernels
# A 64-bit number of eight bytes that are 0 or 1, times this, has byte k as bit k of its uppermost byte: 2^(8 k + 56 - 7 j)
# lies there for j = k only, and no two of the products share a bit, so that nothing is carried.
GATHER = sum(1 << (56 - 7 * k) for k in range(8))


def drop_threshold(dropout: float) -> int:
    """The draws below this number, of 65536, drop their element: `dropout` rounded to the nearest such share, never all.

    Raises:
        ValueError: if `dropout` is not in [0, 1).
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
    return min(round(dropout * LEVELS), LEVELS - 1)


def keep_probability(dropout: float) -> float:
    """The probability ``1 - p`` with which elements are in fact kept; divide by this one, not by ``1 - dropout``."""
    return 1.0 - drop_threshold(dropout) / LEVELS


def draw_keep_mask(x: Tensor, dropout: float) -> tuple[Tensor | None, float]:
    """Draw which elements of `x` survive dropout, and the probability that one does.

    The probability of a drop is `dropout` rounded to a multiple of 2⁻¹⁶, so that one 64-bit number decides on four elements:
    on CPU, drawing costs more than a product with few columns.

    Returns:
        ``(ceil(elements / 8),)`` bytes, uint8, bit k of byte j for element ``8 j + k``, to be read by `kept`; None where the
        probability of a drop is 0. And the probability ``1 - p`` to divide by.

    Raises:
        ValueError: if `dropout` is not in [0, 1).
    """
    drops = drop_threshold(dropout)
    if not drops:
        return None, 1.0
    # Compiled code has no `random_`, and draws the same numbers by a registered operation.
    return (_draw_op if torch.compiler.is_compiling() else _draw)(x.detach(), drops), keep_probability(dropout)


def _draw(x: Tensor, drops: int) -> Tensor:
    if x.device.type == "cpu" and native_library.library() is not None:
        return native.draw_bits(x, drops)
    numbers = torch.empty(-(-x.numel() // 8) * 2, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    decisions = numbers.view(torch.int16) >= drops - LEVELS // 2
    return (decisions.view(torch.int64) * GATHER).view(torch.uint8)[7::8].contiguous()


_draw_op = torch.library.custom_op(
    "peftlite::draw_keep_mask", _draw, mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)


@_draw_op.register_fake
def _(x: Tensor, drops: int) -> Tensor:
    return x.new_empty(-(-x.numel() // 8), dtype=torch.uint8)


def drop(x: Tensor, mask: Tensor) -> Tensor:
    """``x ⊙ mask``, not divided by anything, for a `mask` of `draw_keep_mask`."""
    return native.mask(x, mask) if native_library.reads(x) else kept(mask, x.shape, x.dtype).mul_(x)


def add_dropped(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """``x + y ⊙ mask`` in place of x."""
    if native_library.reads(x, y) and x.dtype == y.dtype:
        native.add_masked(x, y, mask)
        return x
    return x.addcmul_(y, kept(mask, x.shape, x.dtype))


def kept(mask: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The bits of `mask` as numbers: 1 for an element that survives, 0 for one that is dropped.

    Every byte fetches its eight numbers from a table, which on CPU takes less time than converting booleans.
    """
    table = torch.arange(256, device=mask.device)[:, None] >> torch.arange(8, device=mask.device)
    numbers = (table & 1).to(dtype).index_select(0, mask.int())
    return numbers.view(-1)[: math.prod(shape)].view(shape)
