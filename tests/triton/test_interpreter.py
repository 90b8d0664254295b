"""Runs every other test of this folder in a process of its own, where the kernels are interpreted on CPU."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def test_the_kernels_are_right_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-p", "no:cacheprovider", "--tb=short", "--durations=15"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}  # numpy multiplies small tiles
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-20000:])
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
    assert "skipped" not in done.stdout, "everything runs in the interpreter"
