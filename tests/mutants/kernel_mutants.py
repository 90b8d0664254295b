"""Kernels with one line broken on purpose, and the tests that must notice.

Run as a script in a folder that holds a copy of the repository, with TRITON_INTERPRET=1: it breaks the copy in one place
after the other, runs the tests named beside it, and prints how each run ended. Each run is a fork of this process, which has
imported all but the library and its tests already, and takes assertions as they are: no message of theirs is read.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple


class Mutant(NamedTuple):
    """One broken line: `old` stands in `file` exactly once, and `tests` are arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


EXPAND = ("tests/triton/test_expand.py", "-k", "75-257 and dtype1")
SHRINK = ("tests/triton/test_row_shrink.py", "-k", "against_fp64 and 33-100 and dtype1")
GROUPS = ("tests/triton/test_row_shrink.py", "-k", "groups_equal and 2")
NORM = ("tests/triton/test_row_norm_kernel.py", "-k", "norm_and_gain and dtype0 and stored0 or rows_that_cancel")

MUTANTS = (
    Mutant(
        "a mask that lets one column too many through",
        "kernels/expand_triton.py",
        "in_rows, in_columns = row < rows, column < columns",
        "in_rows, in_columns = row < rows, column <= columns",
        EXPAND,
    ),
    Mutant(
        "a missing scale",
        "kernels/row_shrink_triton.py",
        "h = pick(group, scale0, scale1, scale2, scale3, GROUP) * h",
        "h = 1.0 * h",
        SHRINK,
    ),
    Mutant(
        "an unwritten tail",
        "kernels/expand_triton.py",
        "tl.store(here, rounded(result, Y0.dtype.element_ty), mask=inside)",
        "tl.store(here, rounded(result, Y0.dtype.element_ty), mask=inside & (column < columns // 16 * 16)[None, :])",
        EXPAND,
    ),
    Mutant(
        "a wrong offset: every member of a group writes where the first does",
        "kernels/row_shrink_triton.py",
        "here = H + row[:, None] * stride_h + (group * RANK + rank)[None, :]",
        "here = H + row[:, None] * stride_h + rank[None, :]",
        GROUPS,
    ),
    Mutant(
        "a missing gain",
        "kernels/expand_triton.py",
        "result = result * gain[None, :]",
        "result = result * 1.0",
        EXPAND,
    ),
    Mutant(
        "rounded twice: the low-rank product before it is added",
        "kernels/expand_triton.py",
        "if HAS_MASK:\n        byte",
        "product = rounded(product, Y0.dtype.element_ty).to(tl.float32)\n    if HAS_MASK:\n        byte",
        EXPAND,
    ),
    Mutant(
        "a partial sum left out",
        "kernels/row_norm_triton.py",
        "for piece in tl.range(0, SPLIT):\n        square += tl.load",
        "for piece in tl.range(0, SPLIT - 1):\n        square += tl.load",
        NORM,
    ),
    Mutant(
        "one rank too few",
        "kernels/expand_triton.py",
        "in_rank = rank < RANK",
        "in_rank = rank < RANK - 1",
        EXPAND,
    ),
)


def apply(mutant: Mutant, root: Path) -> str:
    """Break the copy under `root`; the text that was there before.

    Raises:
        ValueError: the line is not there, or there more than once: the mutant is out of date.
    """
    path = root / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"mutant {mutant.name!r} wants to replace {mutant.old!r} in {mutant.file}, which holds it {text.count(mutant.old)} "
            "times, not once; write the mutant anew"
        )
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return text


def run(tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit status and output of pytest on `tests`, in a fork that imports the kernels for itself."""
    import pytest

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = int(pytest.main([*tests, "-x", "-q", "--tb=line", "-p", "no:cacheprovider", "--assert=plain"]))
        with os.fdopen(writer, "w") as pipe:
            pipe.write(output.getvalue()[-2000:])
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def main(root: Path) -> None:
    """Print, as JSON, how the tests end on the unbroken copy (under ``""``) and on each mutant, by name."""
    sys.path.insert(0, str(root))
    os.chdir(root)
    import hypothesis  # noqa: F401  # these are for the forks
    import torch  # noqa: F401
    import triton  # noqa: F401

    ends = {"": [run(tests) for tests in dict.fromkeys(mutant.tests for mutant in MUTANTS)]}
    for mutant in MUTANTS:
        before = apply(mutant, root)
        ends[mutant.name] = [run(mutant.tests)]
        (root / mutant.file).write_text(before, encoding="utf-8")
    print(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
