"""The tests of the native passes are worth something: each fails where a line of C is wrong, and passes where none is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from peftlite.kernels import native_library

ROOT = Path(__file__).resolve().parents[2]
TESTS = tuple(f"tests/kernels/test_native{part}.py" for part in ("", "_details", "_product"))
PRODUCT = "native_product.h"
pytestmark = pytest.mark.skipif(
    native_library.library() is None or not shutil.which("gcc"), reason="no C compiler, or built without the native passes"
)


class Mutant(NamedTuple):
    """One broken line: `old` stands in the file exactly once; `test` must notice."""

    name: str
    old: str
    new: str
    test: str
    file: str = "native_passes.h"


MUTANTS = (
    Mutant(
        "an unwritten tail",
        "else for (int k = 0; k < count; ++k) target[k] = value[k];",
        "else for (int k = 0; k < count - 1; ++k) target[k] = value[k];",
        "adapt_output",
    ),
    Mutant("a lost remainder", "if (count) NAME(shrunk_step)", "if (count > 15) NAME(shrunk_step)", "adapt_output"),
    Mutant("a missing scale", "p->scale * total[3 + q][c]", "total[3 + q][c]", "output_gradients", "native.c"),
    Mutant("a mask of eight bits", "(first ? mask[2] : 0) << 16", "0", "input_gradients", "native.c"),
    Mutant("rounding to zero", "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "bits >> 16", "rounding_to_bf16"),
    Mutant("a wrong stride", "(i + k) * stride + q", "(i + k) * columns + q", "adapt_output"),
    Mutant("a bias inside the gain", "(1.0f - gain) * NAME(load)", "(V){0} * NAME(load)", "adapt_output"),
    Mutant("columns out of order", "k / 8 * 4 + k % 4 + k % 8 / 4 * 16", "k", "output_gradients", "native_dot.h"),
    Mutant("an unwritten column", "half_lanes(p->columns - c);", "half_lanes(p->columns - c - 1);", "output", PRODUCT),
    Mutant("a rank left out", "(p->rank + 1) / 2, panel);", "p->rank / 2, panel);", "output", PRODUCT),
    Mutant("rows left over", "if (i < stop) product_rest", "if (i > stop) product_rest", "output", PRODUCT),
    Mutant("the panel of other columns", "if (at == first || !part)", "if (at == first)", "bit", PRODUCT),
    Mutant("the gain of another row", "t->magnitude[i + 1] / t->norm[i + 1]", "low", "input_gradients", PRODUCT),
    Mutant("dropout forgotten", "sums[r][k] = kept[r][k];", "sums[r][k] += 0 * kept[r][k];", "input_gradients", PRODUCT),
    Mutant("a gain left out of u", "adapts ? gain : NULL, 1, rows", "NULL, 1, rows", "output_gradients", "native.c"),
)


def run(copy: Path, test: str) -> int:
    """Compile the copy's sources in a hurry and run one test of them; pytest's exit status."""
    library = copy / "kernels" / Path(native_library.library()._name).name
    command = ["gcc", "-O1", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi", "-o", str(library), str(copy / "kernels/native.c")]
    subprocess.run([*command, "-lm"], check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS, "-k", test]
    return subprocess.run(command, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True).returncode


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tests of the passes need, and nothing that leads back to the repository."""
    folder = tmp_path_factory.mktemp("native")
    for name in ("peftlite", "kernels", "tests/kernels"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("mutant", [None, *MUTANTS], ids=lambda mutant: mutant.name if mutant else "as it is")
def test_a_broken_line_is_noticed(copy: Path, mutant: Mutant | None) -> None:
    if mutant is None:
        assert run(copy, "not threads") == pytest.ExitCode.OK
        return
    if mutant.file in ("native_dot.h", PRODUCT) and native_library.instruction_set() != native_library.INSTRUCTION_SETS[-1]:
        pytest.skip("this processor has no dot products of bf16")
    file, source = copy / "kernels" / mutant.file, (ROOT / "kernels" / mutant.file).read_text()
    assert source.count(mutant.old) == 1, f"{mutant.name}: write the mutant anew"
    try:
        file.write_text(source.replace(mutant.old, mutant.new))
        assert run(copy, mutant.test) == pytest.ExitCode.TESTS_FAILED
    finally:
        file.write_text(source)
