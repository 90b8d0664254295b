"""Tests in Triton's interpreter: they need TRITON_INTERPRET=1 before any kernel is decorated, hence a process of their own.

Here ``test_interpreter.py`` starts that process. By hand: ``TRITON_INTERPRET=1 python -m pytest tests/triton``.
"""

import importlib
import math
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DRIVER = "test_interpreter.py"

collect_ignore = [DRIVER] if INTERPRETED else []
collect_ignore_glob = [] if INTERPRETED else [name for name in os.listdir(os.path.dirname(__file__)) if name != DRIVER]

sys.path.append(str(Path(__file__).parents[1] / "kernels"))  # for the oracles of the operations


def _patch_once():
    """Let a device function put the interpreter's operations into Triton's language in its first call alone.

    Triton looks through the whole language in every call, a third of the time of these tests. What a first call puts there
    stays, or is put there again at the launch of a kernel, before any device function runs.
    """
    from triton.runtime.interpreter import InterpretedFunction

    first, called = InterpretedFunction.__call__, set()

    def call(function, *args, **kwargs):
        if function.fn in called:
            return function.rewrite()(*args, **kwargs)
        result = first(function, *args, **kwargs)
        called.add(function.fn)
        return result

    InterpretedFunction.__call__ = call


if INTERPRETED:
    _patch_once()


class _PoisonedTorch:
    """`torch`, except that memory which nobody has written holds NaN, or the largest integer."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*args, **kwargs):
        return poison(torch.empty(*args, **kwargs))

    @staticmethod
    def empty_like(*args, **kwargs):
        return poison(torch.empty_like(*args, **kwargs))


def poison(tensor):
    return tensor.fill_(math.nan if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poisoned(monkeypatch):
    """Let operations and launch functions allocate NaN, so that an element which a kernel forgets to write shows."""
    new_empty = torch.Tensor.new_empty
    steps = ("pack", "row_norm", "row_shrink", "col_shrink", "col_finish", "expand", "dropout")
    for name in ("lora_linear", "dora_linear", *steps):
        module = importlib.import_module(f"peftlite.kernels.{name}_triton")
        if hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", _PoisonedTorch())
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))


@pytest.fixture(autouse=True)
def numpy_is_quiet():
    """The interpreter computes with numpy, which warns where a GPU answers with infinity or NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
