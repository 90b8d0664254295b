import importlib
import math

import pytest
import torch


class _PoisonedTorch:
    """`torch`, except that memory which nobody has written holds NaN."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*args, **kwargs):
        return torch.empty(*args, **kwargs).fill_(math.nan)

    @staticmethod
    def empty_like(*args, **kwargs):
        return torch.empty_like(*args, **kwargs).fill_(math.nan)


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Matrices this small gain nothing from threads, and lose much where other processes hold the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def poisoned():
    """Let the operations allocate NaN, so that an element which they forget to write shows."""
    new_empty = torch.Tensor.new_empty
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lora_linear", "dora_linear", "paca_linear", "row_norm"):
            patch.setattr(importlib.import_module(f"peftlite.kernels.{name}"), "torch", _PoisonedTorch())
        patch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(math.nan))
        yield
