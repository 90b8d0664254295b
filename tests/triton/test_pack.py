"""P0 against torch's own casts, bit for bit."""

import pytest
import torch
from guarded import Guards
from torch.nn import functional as F

from peftlite.kernels.pack_triton import pack_adapters, pack_grouped, padded_rank
from peftlite.kernels.table_triton import Module, tables

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def factors(rank, columns, rows, dtype=torch.float32):
    return torch.randn(rank, columns).to(dtype), torch.randn(rows, rank).to(dtype)


def expected(lora_a, lora_b, dtype):
    extra = padded_rank(lora_a.shape[0]) - lora_a.shape[0]
    return F.pad(lora_a.to(dtype), (0, 0, 0, extra)), F.pad(lora_b.to(dtype), (0, extra))


def outputs(guards, lora_a, lora_b, dtype, misaligned=False):
    rank = padded_rank(lora_a.shape[0])
    shapes = ((rank, lora_a.shape[1]), (lora_b.shape[0], rank))
    return tuple(guards.empty(*shape, dtype=dtype, misaligned=misaligned) for shape in shapes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("master", DTYPES)
@pytest.mark.parametrize(("rank", "columns", "rows"), [(1, 8, 100), (3, 257, 8), (16, 72, 72), (17, 100, 1), (100, 33, 20)])
def test_packing_is_a_cast_and_zeros(dtype, master, rank, columns, rows):
    guards = Guards()
    lora_a, lora_b = (guards.copy(t, misaligned=rank == 3) for t in factors(rank, columns, rows, master))
    out = outputs(guards, lora_a, lora_b, dtype, misaligned=rank == 17)
    assert pack_adapters(lora_a, lora_b, dtype, out=out) is out
    guards.check()
    for packed, cast in zip(out, expected(lora_a, lora_b, dtype), strict=True):
        assert torch.equal(packed, cast)
    for packed, cast in zip(pack_adapters(lora_a, lora_b, dtype), expected(lora_a, lora_b, dtype), strict=True):
        assert torch.equal(packed, cast)


def test_factors_that_are_packed_already_are_not_copied():
    lora_a, lora_b = factors(32, 8, 9, torch.bfloat16)
    assert pack_adapters(lora_a, lora_b, torch.bfloat16) == (lora_a, lora_b)
    assert pack_adapters(lora_a, lora_b, torch.float16)[0] is not lora_a


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_of_all_sizes_is_packed_like_each_alone(dtype):
    guards, modules = Guards(), []
    for number, (rank, columns, rows) in enumerate([(1, 8, 100), (16, 256, 96), (3, 257, 8), (12, 64, 512), (33, 80, 7)]):
        lora_a, lora_b = (guards.copy(t) for t in factors(rank, columns, rows))
        modules.append(Module(lora_a, lora_b, *outputs(guards, lora_a, lora_b, dtype, misaligned=number == 3), scale=1.0))
    made = tables(modules)
    assert sorted(len(table.modules) for table in made) == [1, 1, 3]  # aligned ones of rank 16, others, rank 48
    pack_grouped(made)
    guards.check()
    for module in modules:
        for packed, cast in zip((module.packed_a, module.packed_b), expected(module.lora_a, module.lora_b, dtype), strict=True):
            assert torch.equal(packed, cast)


def test_a_dtype_that_no_kernel_has_is_refused():
    lora_a, lora_b = factors(16, 8, 8, torch.float64)
    with pytest.raises(ValueError, match=r"prepare float32, float16 and bfloat16, got \[torch.float64.*use impl='torch'"):
        tables([Module(lora_a, lora_b, lora_a.half(), lora_b.half(), 1.0)])
