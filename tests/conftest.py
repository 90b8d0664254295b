"""Settings of the suite: one hypothesis profile for laptop and CI alike, and one thread."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples everywhere, so that CI is never more lenient than a laptop; HYPOTHESIS_PROFILE=explore draws others.
settings.register_profile("same", deadline=None, derandomize=True, database=None, max_examples=25)
settings.register_profile("explore", deadline=None, max_examples=200, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    """The same random numbers in every test, alone or in company."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--method-file PATH`` runs the contract over a method that is not in the library."""
    parser.addoption("--method-file", type=Path, help="file with the method that the contract runs over, in place of METHODS")


def pytest_configure(config: pytest.Config) -> None:
    """Take the method of ``--method-file`` before any test asks which methods there are."""
    if (path := config.getoption("--method-file")) is not None:
        import nets

        nets.use_method_file(path)
