"""The gate on machine code: what it asserts, and a sample of the kernels through it, in a process without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.aot import failures, read_finished
from benchmarks.harness import ROOT
from benchmarks.tables import aot_table

GREEN = {
    "kernel": "_row_shrink_kernel",
    "architecture": "sm_90",
    "dtype": "bfloat16",
    "aligned": True,
    "why": "lora",
    "constants": {"BLOCK_M": 64},
    "reads_floats": True,
    "reads_bits": False,
    "registers": 64,
    "threads": 128,
    "shared": 49152,
    "dots": 1,
    **dict.fromkeys(("spills", "stack", "local", "local_loads", "local_stores", "atomics", "loads_16", "loads_8"), 0),
    "hmma": 0,
    "hgmma": 4,
    "tcgen05": 0,
    "wide_loads": 24,
    "sqrt": ["sqrt.rn.f32"],
    "div": ["div.rn.f32"],
}


def test_good_machine_code_has_no_failures():
    assert failures(GREEN) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 3}, "spills = 3, must be 0"),
        ({"stack": 8}, "stack = 8, must be 0"),
        ({"local_loads": 1}, "local_loads = 1, must be 0"),
        ({"atomics": 1}, "atomics = 1, must be 0"),
        ({"shared": 240 * 1024}, "shared memory 245760 bytes, the limit is 232448"),
        ({"architecture": "sm_86", "hgmma": 0, "hmma": 8, "shared": 102400}, "shared memory 102400 bytes, the limit is 101376"),
        ({"registers": 255, "threads": 512}, "255 registers x 512 threads exceed 65536"),
        ({"hgmma": 0}, "multiplies 16-bit matrices without tensor cores"),
        ({"hgmma": 0, "hmma": 8}, "no HGMMA on sm_90"),
        ({"wide_loads": 0}, "no 128-bit load, though all is aligned"),
        ({"loads_16": 2}, "2 loads of 16 bits, though all is aligned"),
        ({"loads_8": 2}, "2 loads of 8 bits, though all is aligned and there is no mask"),
        ({"sqrt": ["sqrt.approx.ftz.f32"]}, "sqrt.approx.ftz.f32 is not rounded to nearest"),
        ({"div": ["div.full.f32"]}, "div.full.f32 is not rounded to nearest"),
        ({"error": "OutOfResources"}, "does not compile: OutOfResources"),
    ],
)
def test_each_fault_is_named(change, message):
    assert message in failures(GREEN | change)


@pytest.mark.parametrize(
    "change",
    [
        {"aligned": False, "wide_loads": 0, "loads_16": 9},
        {"reads_bits": True, "loads_8": 4},
        {"reads_floats": False, "wide_loads": 0},
        {"dtype": "float32", "hgmma": 0},
        {"kernel": "_expand_kernel", "hgmma": 0, "hmma": 8},
        {"architecture": "gfx942", "spills": 5},
    ],
)
def test_what_is_meant_to_be_so_is_none(change):
    assert failures(GREEN | change) == []


def test_the_table_shows_the_worst_of_a_kernels_variants():
    text = aot_table([GREEN, GREEN | {"registers": 99, "hgmma": 2, "error": "x"}, GREEN | {"registers": 80, "wide_loads": 6}])
    row = text.splitlines()[1].split()
    assert row[:5] == ["_row_shrink_kernel", "sm_90", "bfloat16", "3", "80"]
    assert text.splitlines()[1].endswith("1 do not compile")
    assert len(aot_table([GREEN, GREEN], long=True).splitlines()) == 3


def test_foreign_files_are_refused(tmp_path: Path):
    path = tmp_path / "aot.json"
    assert read_finished(path) == {}
    path.write_text('{"suite": "steps"}')
    with pytest.raises(ValueError, match=r"is not a result file of benchmarks\.aot .*suite 'steps'.*choose another"):
        read_finished(path)
    path.write_text(json.dumps({"suite": "aot", "variants": {"a": {"x": 1}, "b": {"error": "failed"}}}))
    assert read_finished(path) == {"a": {"x": 1}}, "what failed is tried again"


def test_a_sample_of_the_kernels_passes_and_is_not_compiled_twice(tmp_path: Path):
    output = tmp_path / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--arch", "sm_80", "sm_90", "--sample", "12", "--output", str(output)]
    first = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "0 failed assertions" in first.stdout
    entries = json.loads(output.read_text())["variants"]
    assert len(entries) >= 12
    assert any(entry["hgmma"] for entry in entries.values())
    before = output.stat().st_mtime_ns
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert json.loads(output.read_text())["variants"] == entries
    assert output.stat().st_mtime_ns > before
