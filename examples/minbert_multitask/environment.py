"""Where a run was made: versions, machine, commit. Recorded with every result."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

import peftlite


def environment() -> dict[str, str | int | None]:
    """Versions of Python, torch and peftlite, the processor, its cores, the GPU, and the commit of the sources."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peftlite": peftlite.__version__,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def peak_memory_mb() -> dict[str, float]:
    """Largest resident memory of this process so far and, on CUDA, of torch on the device, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    found = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    if torch.cuda.is_available():
        found["peak_cuda_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the working tree that this file lies in, marked where there are changes; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
