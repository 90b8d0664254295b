"""A method from outside the library, the one that the page "adding a method" shows, under the whole contract."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from nets import CLASSES, use_method_file

ROOT = Path(__file__).resolve().parents[1]


def shown() -> str:
    """The method as the page shows it."""
    page = (ROOT / "docs" / "adding_a_method.rst").read_text(encoding="utf-8")
    match = re.search(r"^\.\. testcode::\n\n((?:   .*\n|\n)+)", page, re.MULTILINE)
    assert match is not None
    return textwrap.dedent(match[1])


def contract(folder: Path, source: str, chosen: str = "not processes") -> subprocess.CompletedProcess[str]:
    """Run the contract over a file that holds `source`."""
    path = folder / "toy_method.py"
    path.write_text(source, encoding="utf-8")
    files = ["tests/test_contract.py", "tests/test_lifecycle.py"]
    command = [sys.executable, "-m", "pytest", *files, "--method-file", str(path), "-k", chosen, "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_the_contract_runs_over_a_file_from_outside(tmp_path: Path) -> None:
    done = contract(tmp_path, shown())
    assert done.returncode == 0, done.stdout[-3000:]
    source = (ROOT / "tests" / "test_contract.py").read_text(encoding="utf-8")
    names = set(re.findall(r"^def (test_\w+)", source, re.MULTILINE))
    assert names
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted is not None
    assert int(counted[1]) > 2 * len(names)  # each over the method itself, and over each of its options


def test_a_method_that_breaks_the_contract_is_found(tmp_path: Path) -> None:
    forward = "    def adapted_forward(self, x: Tensor) -> Tensor:\n        return super().adapted_forward(1.01 * x)\n\n"
    before = "    def config(self)"
    assert before in shown()
    done = contract(tmp_path, shown().replace(before, forward + before), "effective_weight")
    assert done.returncode == 1
    assert "test_output_and_gradients_are_those_of_the_effective_weight[hira]" in done.stdout


def test_a_file_without_a_method_or_a_count_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy_without_count.py"
    path.write_text(shown().split("def closed_formula")[0], encoding="utf-8")
    before = dict(CLASSES)
    with pytest.raises(pytest.UsageError, match=r"and a function closed_formula\(in_features, .* it holds \['HiRALinear'\]"):
        use_method_file(path)
    assert before == CLASSES
