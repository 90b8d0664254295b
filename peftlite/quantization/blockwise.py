"""Numbers in 4 or 8 bits, a block at a time: ``w ≈ c_block · level[index]``, ``c_block = max |w|`` over the block.

With double quantisation the scales c are stored the same way: ``c ≈ mean(c) + d_block · level[index]``. Layout, codes and
order of the halves of a byte are those of bitsandbytes (Dettmers et al. 2023, arXiv:2305.14314), byte for byte.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftlite.quantization.levels import BITS, decoding_table, encode, levels

CHUNK = 1 << 18  # elements that are converted at a time on a CPU: 1 MiB in fp32
DEVICE_CHUNK = 1 << 24
Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Format:
    """How numbers are stored.

    Attributes:
        code: ``"nf4"`` (4 bits) or ``"int8"``.
        block: numbers that share a scale, even; they are consecutive in the flattened matrix.
        scale_code: ``"dynamic"`` or ``"fp8_e4m3"``, the code of the scales in 8 bits; None keeps them in fp32.
        scale_block: scales that share a second scale, in fp32.
    """

    code: str = "nf4"
    block: int = 64
    scale_code: str | None = "dynamic"
    scale_block: int = 256

    def __post_init__(self) -> None:
        if self.code not in ("nf4", "int8"):
            raise ValueError(f"code must be 'nf4' or 'int8', got {self.code!r}.")
        if self.scale_code not in (None, "dynamic", "fp8_e4m3"):
            raise ValueError(f"scale_code must be 'dynamic', 'fp8_e4m3' or None (scales in fp32), got {self.scale_code!r}.")
        for name, value in (("block", self.block), ("scale_block", self.scale_block)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 2 or value % 2:
                raise ValueError(f"{name} must be an even number of elements, at least 2, got {value!r}.")

    @property
    def bits(self) -> float:
        """Bits per number for a large matrix, 4.127 for NF4 with double quantisation and 4.5 without.

        Example:
            >>> Format().bits, Format(scale_code=None).bits
            (4.126953125, 4.5)
        """
        scale = 32.0 if self.scale_code is None else BITS[self.scale_code] + 32 / self.scale_block
        return BITS[self.code] + scale / self.block


@torch.no_grad()
def quantize(values: Tensor, form: Format) -> Parts:
    """Store `values`, of any shape and flattened row by row, in the format `form`.

    Returns:
        ``codes``, uint8, two numbers per byte for a code of 4 bits, the first in the high half; ``scales``, fp32 per block.
        With a `scale_code` the scales are uint8, and ``scale_scales``, fp32, and ``scale_offset``, fp32 and of shape (),
        follow.
    """
    codes, scales = _quantize_blocks(values.reshape(-1), form.code, form.block)
    if form.scale_code is None:
        return codes, scales
    offset = scales.mean() if scales.numel() else scales.new_zeros(())
    scale_codes, scale_scales = _quantize_blocks(scales - offset, form.scale_code, form.scale_block)
    return codes, scale_codes, scale_scales, offset


def part_shapes(count: int, form: Format) -> tuple[tuple[int, ...], ...]:
    """The shapes of what `quantize` returns for `count` numbers."""
    blocks = -(-count // form.block)
    codes = ((count * BITS[form.code] + 7) // 8,)
    if form.scale_code is None:
        return codes, (blocks,)
    return codes, (blocks,), (-(-blocks // form.scale_block),), ()


def _quantize_blocks(flat: Tensor, code: str, block: int) -> tuple[Tensor, Tensor]:
    """Codes and fp32 scales of a flat tensor, whose last block may be shorter."""
    step = _chunk(flat.device, block)
    codes, scales = [], []
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].float()
        missing = -part.numel() % block
        blocks = F.pad(part, (0, missing)).view(-1, block)
        scale = blocks.abs().amax(dim=1)
        # A block of zeros has scale 0, and any divisor will do.
        index = encode(blocks / torch.where(scale > 0, scale, 1.0)[:, None], code).view(-1)
        if BITS[code] == 4:
            index = index[: part.numel() + part.numel() % 2]  # an odd end is filled with the index of 0
            index = (index[::2] << 4) | index[1::2]
        else:
            index = index[: part.numel()]
        codes.append(index)
        scales.append(scale)
    if not codes:
        return flat.new_empty(0, dtype=torch.uint8), flat.new_empty(0, dtype=torch.float32)
    return torch.cat(codes), torch.cat(scales)


@torch.no_grad()
def dequantize(parts: Parts, form: Format, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Numbers `start` to `stop` of what `parts` store, flat: computed in fp32, rounded once to `dtype`.

    Beside the result only chunks that stay in a CPU's cache are made.
    """
    codes, scales, *second = parts
    out = torch.empty(stop - start, dtype=dtype, device=codes.device)
    step = _chunk(codes.device, form.block)
    # Chunks begin where blocks do, so that a chunk's codes are whole bytes and its scales a slice.
    for first in range(start - start % form.block, stop, step):
        last = min(first + step, stop)
        lowest, highest = first // form.block, -(-last // form.block)
        if second:
            assert form.scale_code is not None
            scale = _decode_blocks(scales, second[0], form.scale_code, form.scale_block, lowest, highest).add_(second[1])
        else:
            scale = scales[lowest:highest]
        values = _decode_codes(codes, form.code, first, last)
        values = _times_scales(values, scale, form.block)
        begin = max(first, start)
        out[begin - start : last - start] = values[begin - first :]
    return out


def _decode_blocks(codes: Tensor, scales: Tensor, code: str, block: int, start: int, stop: int) -> Tensor:
    """Numbers `start` to `stop` of one level of storage, in fp32."""
    first = start - start % block
    values = _decode_codes(codes, code, first, stop)
    return _times_scales(values, scales[first // block : -(-stop // block)], block)[start - first :]


def _decode_codes(codes: Tensor, code: str, start: int, stop: int) -> Tensor:
    """The levels of the numbers from an even `start` to `stop`, flat, in fp32."""
    per_byte = 8 // BITS[code]
    table = decoding_table(code, codes.device)
    some = codes[start // per_byte : -(-stop // per_byte)]
    return F.embedding(some.int(), table).view(-1)[: stop - start]


def _times_scales(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Multiply each block of `values` by its scale, in place; the last block may be short."""
    whole = values.numel() // block
    values[: whole * block].view(whole, block).mul_(scales[:whole, None])
    if whole * block < values.numel():
        values[whole * block :].mul_(scales[whole])
    return values


@torch.no_grad()
def dequantize_at(parts: Parts, form: Format, places: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers at the flat `places` (integers, any shape), as `dequantize` gives them."""
    codes, scales, *second = parts
    blocks = places // form.block
    if second:
        assert form.scale_code is not None
        level = levels(form.scale_code, codes.device)[scales[blocks].int()]
        scale = level * second[0][blocks // form.scale_block] + second[1]
    else:
        scale = scales[blocks]
    per_byte = 8 // BITS[form.code]
    both = decoding_table(form.code, codes.device)[codes[places // per_byte].int()]
    return (both.gather(-1, (places % per_byte)[..., None]).squeeze(-1) * scale).to(dtype)


def _chunk(device: torch.device, block: int) -> int:
    size = CHUNK if device.type == "cpu" else DEVICE_CHUNK
    return max(1, size // block) * block


@torch.library.custom_op("peftlite::dequantize", mutates_args=())
def dequantize_op(
    parts: list[Tensor],
    code: str,
    block: int,
    scale_code: str | None,
    scale_block: int,
    count: int,
    dtype: torch.dtype,
    after: Tensor | None,
) -> Tensor:
    """`dequantize` of all `count` numbers, for compiled code.

    `after` is not read: it keeps the compiler from computing the numbers once, in the forward pass, and keeping them for
    the backward pass, where they are wanted again.
    """
    return dequantize(tuple(parts), Format(code, block, scale_code, scale_block), 0, count, dtype)


@dequantize_op.register_fake
def _(
    parts: list[Tensor],
    code: str,
    block: int,
    scale_code: str | None,
    scale_block: int,
    count: int,
    dtype: torch.dtype,
    after: Tensor | None,
) -> Tensor:
    return parts[0].new_empty(count, dtype=dtype)
