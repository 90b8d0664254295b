import importlib
import math

import pytest
import torch

from peftlite.kernels import native, row_norm


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
        if native.library() is None:
            pytest.skip("built without the native passes: no C compiler when the package was installed")
    else:
        monkeypatch.setattr(native, "library", lambda: None)
        monkeypatch.setattr(row_norm, "SMALL", 0 if request.param == "large" else row_norm.SMALL)
    return request.param


@pytest.fixture(scope="module")
def poisoned():
    """Let the operations allocate NaN, so that an element which they forget to write shows."""
    new_empty = torch.Tensor.new_empty
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lora_linear", "dora_linear", "paca_linear", "row_norm", "native"):
            patch.setattr(importlib.import_module(f"peftlite.kernels.{name}"), "torch", _PoisonedTorch())
        patch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))
        yield
