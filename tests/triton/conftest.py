"""Tests in Triton's interpreter: they need TRITON_INTERPRET=1 before any kernel is decorated, hence a process of their own.

Here ``test_interpreter.py`` starts that process. By hand: ``TRITON_INTERPRET=1 python -m pytest tests/triton``.
"""

import os
import warnings

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DRIVER = "test_interpreter.py"

collect_ignore = [DRIVER] if INTERPRETED else []
collect_ignore_glob = [] if INTERPRETED else [name for name in os.listdir(os.path.dirname(__file__)) if name != DRIVER]


@pytest.fixture(autouse=True)
def numpy_is_quiet():
    """The interpreter computes with numpy, which warns where a GPU answers with infinity or NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
