"""Arithmetic that the Triton kernels share: products, rounding, and the precision of fp32 products.

Kernels load, convert with `widened`, compute in fp32, and store through `rounded`; operands of a product keep their dtype
and go through `dot`. Triton's interpreter multiplies raw bit patterns where bf16 is multiplied, cuts bf16 off instead of
rounding, and loses bf16's subnormal numbers; all of this is put right here, and nowhere else.
"""

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # fixed when the kernels are decorated

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def widened(x):
    """`x` in fp32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """fp32 `x` in `DTYPE`, rounded to nearest with ties to even; NaN stays NaN."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Adding to the bits of a NaN may carry it into a number.
        return tl.where(x == x, even, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b`` with fp32 accumulation; `PRECISION` matters to fp32 operands, see `input_precision`."""
    if INTERPRETED:
        return tl.dot(widened(a), widened(b), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


def input_precision(dtype: torch.dtype, arch: str) -> str:
    """How the matrix units multiply operands of `dtype`.

    16-bit operands multiply exactly, whatever is set. fp32 operands are split into three TF32 products, which keeps fp32's
    digits at a fraction of the price of fp32 units, or rounded to TF32 where the user allows that
    (``torch.set_float32_matmul_precision("high")``). AMD's units have no TF32 that all of them share.
    """
    if dtype != torch.float32 or not arch.startswith("sm_"):
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
