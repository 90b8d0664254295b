"""The suite is worth something: it fails where a line of a kernel is wrong, and passes where none is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kernel_mutants as mutants
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str]]]:
    """Exit statuses and output of the runs, by the name of the mutant; ``""`` for the sources as they are."""
    copy = tmp_path_factory.mktemp("mutants")
    for name in ("peftlite", "kernels", "tests", "benchmarks", "examples"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    command = [sys.executable, mutants.__file__, str(copy)]
    # Without byte code: a file that is changed twice in a second and keeps its size would be taken for the old one.
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_sources_as_they_are_pass(ends) -> None:
    for status, output in ends[""]:
        assert status == pytest.ExitCode.OK, output


@pytest.mark.parametrize("name", [mutant.name for mutant in mutants.MUTANTS])
def test_a_broken_line_is_noticed(ends, name: str) -> None:
    ((status, output),) = ends[name]
    assert status == pytest.ExitCode.TESTS_FAILED, f"{name}: exit status {status}\n{output}"


def test_a_mutant_out_of_date_is_noticed(tmp_path: Path) -> None:
    mutant = mutants.MUTANTS[0]
    file = tmp_path / mutant.file
    file.parent.mkdir()
    file.write_text("something else")
    with pytest.raises(ValueError, match=r"wants to replace .* which holds it 0 times, not once; write the mutant anew"):
        mutants.apply(mutant, tmp_path)
