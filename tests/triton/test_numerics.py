"""The shared arithmetic, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl
from guarded import Guards
from torch._subclasses.fake_tensor import FakeTensorMode

from peftlite.kernels.dora_linear import dora_linears
from peftlite.kernels.launch_triton import Launch, architecture, launch, observing, obstacle, recording
from peftlite.kernels.numerics_triton import TL_DTYPES, dot, input_precision, rounded, widened
from peftlite.kernels.weight_decomposed import DoRAArguments

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _round_kernel(x, y, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, rounded(widened(tl.load(x + i, mask=i < count)), DTYPE), mask=i < count)


@triton.jit
def _dot_kernel(a, b, c, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(c + i * N + j, dot(tl.load(a + i * N + j), tl.load(b + i * N + j), tl.zeros((N, N), tl.float32), "ieee"))


def run_rounding(x, dtype, guards):
    y = guards.empty(*x.shape, dtype=dtype)
    grid, constexprs = (triton.cdiv(x.numel(), 256),), {"DTYPE": TL_DTYPES[dtype], "BLOCK": 256}
    launch(_round_kernel, grid, x, y, x.numel(), num_warps=1, num_stages=1, **constexprs)
    guards.check()
    return y


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest_even(dtype):
    bits = torch.randint(-(2**31), 2**31, (5000,)).to(torch.int32)
    ties = ((bits >> 16) << 16) + 0x8000  # half-way between two bf16 numbers
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4e38, 1e-40, 65519.9, 65520.0, 1.0 + 2**-8])
    x = torch.cat([bits.view(torch.float32), ties.view(torch.float32), special])
    x = x[~x.isnan()]
    assert torch.equal(run_rounding(x, dtype, Guards()), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_widening_is_exact(dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)  # every number there is
    x = x[~x.isnan()]
    assert torch.equal(run_rounding(x, torch.float32, Guards()), x.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF])
def test_nan_stays_nan(dtype, bits):
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert run_rounding(x, dtype, Guards()).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_small_integers_are_exact(dtype):
    a, b = torch.randint(-8, 9, (2, 16, 16)).to(dtype)
    c = Guards().empty(16, 16)
    launch(_dot_kernel, (1,), a, b, c, num_warps=1, num_stages=1, N=16)
    assert torch.equal(c.double(), a.double() @ b.double())


def test_fp32_products_keep_their_digits_unless_tf32_is_allowed(monkeypatch):
    assert input_precision(torch.float32, "sm_90") == "tf32x3"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert input_precision(torch.float32, "sm_90") == "tf32"
    assert input_precision(torch.float32, "gfx942") == input_precision(torch.bfloat16, "sm_90") == "ieee"


def test_observers_see_every_launch_and_recordings_run_none():
    x, y = torch.ones(3), torch.zeros(3)
    arguments = {"num_warps": 2, "num_stages": 1, "DTYPE": tl.float32, "BLOCK": 4}
    seen = []
    with observing(seen.append):
        with recording("sm_80") as launches:
            assert architecture(torch.device("cpu")) == "sm_80"
            launch(_round_kernel, (1,), x, y, 3, **arguments)
        assert torch.equal(y, torch.zeros(3))
        launch(_round_kernel, (1,), x, y, 3, **arguments)
        launch(_round_kernel, (0,), x, y, 3, **arguments)
    launch(_round_kernel, (1,), x, y, 3, **arguments)
    assert torch.equal(y, x)
    assert len(seen) == 2
    assert launches == seen[:1] == [Launch(_round_kernel, (1,), (x, y, 3), {"DTYPE": tl.float32, "BLOCK": 4}, 2, 1)]
    assert launches[0].name == "_round_kernel"
    assert architecture(torch.device("cpu")) == "interpreter"


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("count", [1, 3])
def test_the_kernels_make_their_tensors_for_an_estimate_and_start_nothing(count, dropout):
    # As on a GPU, where `estimate_memory` follows the tensors of both passes.
    def passes():
        x = torch.ones(32, 64, requires_grad=True)
        a, b, m = (torch.ones(shape, requires_grad=True) for shape in ((8, 64), (48, 8), (48,)))
        layers = [DoRAArguments(torch.ones(48, 64), torch.ones(48), a, b, m, 1.0)] * count
        sum(y.sum() for y in dora_linears(x, layers, dropout=dropout, impl="triton")).backward()
        return x.grad.shape, a.grad.shape, b.grad.shape, m.grad.shape

    with FakeTensorMode(), recording("sm_90", keep=False) as launches, observing(launches.append):
        shapes = passes()
    assert len({launch.name for launch in launches}) >= 4
    assert shapes == passes()


def test_what_stands_in_the_way_is_said():
    assert "in float64" in obstacle(torch.device("cpu"), torch.float64)
    assert "meta device" in obstacle(torch.device("meta"), torch.float32)
    assert obstacle(torch.device("cpu"), torch.float32) is None
    with recording("sm_90"):
        assert obstacle(torch.device("meta"), torch.bfloat16) is None
