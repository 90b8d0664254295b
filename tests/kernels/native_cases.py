"""What the tests of the native passes draw, and how near to fp64 they ask the passes to be."""

import torch

from peftlite.kernels import native, native_library

EPS = torch.finfo(torch.float32).eps
WIDEST = len(native_library.INSTRUCTION_SETS) - 1
SETS = [WIDEST]  # of the instruction sets the last one is in use


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def draw_mask(rows, columns):
    """Bits of dropout, and the same as numbers."""
    torch.manual_seed(rows + columns)
    bits = native.draw_bits(torch.empty(rows, columns), 20000)
    stays = [byte >> bit & 1 for byte in bits.tolist() for bit in range(8)][: rows * columns]
    return bits, torch.tensor(stays, dtype=torch.float64).view(rows, columns)


def multiplied(factors, dtype):
    """Factors as the passes multiply them: where there are dot products of bf16, they are bf16."""
    return (factors.to(dtype) if SETS[-1] == WIDEST else factors).double()


def assert_close(actual, oracle, terms, rounded=torch.float32, *, steps=4):
    """Within so many roundings of the `terms` in fp32, and one of the result to its dtype."""
    assert torch.isfinite(actual).all()
    allowed = steps * EPS * terms + torch.finfo(rounded).eps / 2 * oracle.abs() * (rounded != torch.float32)
    assert ((actual.double() - oracle).abs() <= allowed).all()
