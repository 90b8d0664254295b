import importlib
import math

import pytest
import torch
from native_cases import SETS, WIDEST

from peftlite.kernels import native_library, row_norm

NOT_NATIVE = "built without the native passes: no C compiler when the package was installed"


def poison(tensor):
    """Fill `tensor` with what nobody computes."""
    return tensor.fill_(math.nan if tensor.is_floating_point() else 85)


class _PoisonedTorch:
    """`torch`, except that memory which nobody has written holds NaN."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*args, **kwargs):
        return poison(torch.empty(*args, **kwargs))

    @staticmethod
    def empty_like(*args, **kwargs):
        return poison(torch.empty_like(*args, **kwargs))


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Matrices this small gain nothing from threads, and lose much where other processes hold the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["large", "small", "native"])
def passes(request, monkeypatch):
    """DoRA's passes on ATen calls, where every weight counts as large, then as small; and those in C."""
    if request.param == "native":
        if native_library.library() is None:
            pytest.skip(NOT_NATIVE)
    else:
        monkeypatch.setattr(native_library, "library", lambda: None)
        monkeypatch.setattr(row_norm, "SMALL", 0 if request.param == "large" else row_norm.SMALL)
    return request.param


@pytest.fixture(params=range(WIDEST + 1), ids=["plain", "avx2", "avx512", "dots"])
def instruction_set(request):
    """Every set that the native passes are compiled for in turn, as far as the machine has it."""
    if native_library.library() is None:
        pytest.skip(NOT_NATIVE)
    choose = native_library.library().peftlite_instruction_set
    if choose(request.param) != request.param:
        choose(WIDEST)
        pytest.skip(f"this processor lacks instruction set {request.param}")
    SETS.append(request.param)
    yield request.param
    SETS.pop()
    choose(WIDEST)


@pytest.fixture
def three_threads():
    """Small matrices are shared out among threads as well: among more than the machine has."""
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def poisoned():
    """Let the operations allocate NaN, so that an element which they forget to write shows."""
    new_empty = torch.Tensor.new_empty
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lora_linear", "dora_linear", "paca_linear", "row_norm", "native"):
            patch.setattr(importlib.import_module(f"peftlite.kernels.{name}"), "torch", _PoisonedTorch())
        patch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))
        yield
