"""Sphinx settings: pages in reStructuredText, the reference from the docstrings, every example run by doctest."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `examples`, which is not installed

from peftlite import __version__  # noqa: E402  (needs the path)

project = "peftlite"
author = copyright = "the peftlite authors"
version = release = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.doctest"]
exclude_patterns = ["_build", "methods/*"]  # the latter are included by methods.rst
html_theme = "furo"
html_title = f"peftlite {__version__}"
html_copy_source = False

default_role = "literal"  # docstrings put names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

# Types of other projects, whose pages a build without a network cannot look up.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn)(\..+)?"),
    (r"py:.*", r"(collections\.abc|os|pathlib)\..+"),
    (r"py:class", r"peftlite\.((\w+|methods\.\w+)\.Model|sharing\.Shared)"),  # type variables
]

doctest_global_setup = """
import os, tempfile
import torch
from torch import nn
import peftlite
from peftlite import *
from peftlite.kernels.dora_linear import dora_linear
from peftlite.kernels.lora_linear import lora_linear
from peftlite.kernels.paca_linear import paca_linear
from peftlite.kernels.row_norm import row_norm
from peftlite.methods.sdlora import reduced_rank
from peftlite.sharing import SharedPool, group_of
from peftlite.quantization import Format
from peftlite.targets import matches
from peftlite.training.lora_gen import LoRAGenerator, load_balance_loss
here = tempfile.TemporaryDirectory()  # examples may write files
os.chdir(here.name)
torch.manual_seed(0)
torch.set_num_threads(1)
"""
doctest_global_cleanup = f"os.chdir({str(ROOT)!r})"  # the folder above goes with its page


def changelog_as_rst(app: Sphinx, path: Path, document: str, content: list[str]) -> None:
    """Turn CHANGELOG.md, which uses headings, lists and code in backticks only, into reStructuredText."""
    if path.name != "CHANGELOG.md":
        return
    lines = []
    for line in content[0].splitlines():
        level, _, title = line.partition(" ")
        lines += [title, "=-"[len(level) - 1] * len(title)] if level in ("#", "##") else [line]
    content[0] = "\n".join(lines)


def setup(app: Sphinx) -> None:
    """Register what the settings above cannot say."""
    app.connect("include-read", changelog_as_rst)
