"""Dropout masks as bits: element (i, j) is kept where a 16-bit draw, a function of (seed, i, j) alone, reaches a threshold.

The draws are outputs of Philox 4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose
counter is (column // 8, row): one call decides eight neighbouring columns, one byte of the mask. Tiles, splits and launches
therefore do not change a mask. The seed is read on the device, so that a captured CUDA graph draws anew in each replay.

T1 draws the mask beside its product and stores the bits, which the backward pass reads: a kernel that draws alone would be
one more launch, and in the passes over x nothing would be saved.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftlite.kernels.dropout import drop_threshold

ROUNDS = tl.constexpr(7)


@triton.jit
def draw_bits(seed, rows, bytes_, threshold):
    """Bytes `(rows, bytes_)` of the mask as int32; bit k of byte j is column ``8 j + k``."""
    zero = tl.zeros((rows.shape[0], bytes_.shape[0]), tl.int32)
    column = zero + bytes_[None, :].to(tl.int32)
    row = zero + rows[:, None].to(tl.int32)
    a, b, c, d = tl.philox(seed, column, row, zero, zero, ROUNDS)
    bits = ((a & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32)
    bits |= ((a >> 16).to(tl.int32) >= threshold).to(tl.int32) << 1
    bits |= ((b & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32) << 2
    bits |= ((b >> 16).to(tl.int32) >= threshold).to(tl.int32) << 3
    bits |= ((c & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32) << 4
    bits |= ((c >> 16).to(tl.int32) >= threshold).to(tl.int32) << 5
    bits |= ((d & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32) << 6
    bits |= ((d >> 16).to(tl.int32) >= threshold).to(tl.int32) << 7
    return bits


@triton.jit
def load_bits(MASK, rows, bytes_, stride, row_count, byte_count):
    """Bytes `(rows, bytes_)` of a stored mask `(row_count, byte_count)` as int32, zeros outside of it."""
    inside = (rows < row_count)[:, None] & (bytes_ < byte_count)[None, :]
    return tl.load(MASK + rows[:, None].to(tl.int64) * stride + bytes_[None, :], mask=inside, other=0).to(tl.int32)


@triton.jit
def kept(bits, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The bytes `bits (BLOCK_M, BLOCK_C // 8)` as booleans `(BLOCK_M, BLOCK_C)`.

    One load of a byte serves eight columns; a load per column would be eight narrow ones.
    """
    single = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(single, (BLOCK_M, BLOCK_C)) != 0


def unpack_mask(mask: Tensor, columns: int) -> Tensor:
    """The bits of `mask (M, ceil(columns / 8))` as a bool tensor `(M, columns)`."""
    shifts = torch.arange(8, device=mask.device, dtype=torch.uint8)
    return ((mask[:, :, None] >> shifts) & 1).flatten(1)[:, :columns].bool()


def keep_mask_reference(seed: int, rows: int, columns: int, dropout: float) -> Tensor:
    """The same mask in torch operations on CPU, bool `(rows, columns)`: what the kernels must draw, for tests."""
    count = -(-columns // 8)
    column, row = torch.arange(count).expand(rows, count), torch.arange(rows)[:, None].expand(rows, count)
    zero = torch.zeros_like(row)
    words = philox_reference(seed, (column, row, zero, zero))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return (torch.stack(halves, dim=-1) >= drop_threshold(dropout)).flatten(1)[:, :columns]


def philox_reference(seed: int, counter: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Four words of Philox 4x32-7 for a counter of four words; unsigned 32-bit numbers, held in int64."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(ROUNDS.value):
        high_a, low_a = _multiply(c0, 0xD2511F53)
        high_b, low_b = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of products of unsigned 32-bit numbers; int64 wraps where it overflows."""
    middle = (a >> 16) * b + (((a & 0xFFFF) * b) >> 16)
    return middle >> 16, (a * b) & 0xFFFFFFFF
