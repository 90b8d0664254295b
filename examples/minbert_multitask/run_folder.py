"""The folder of a run, written so that a kill at any moment leaves every file whole.

Files are written beside their place, synced and renamed; `metrics.jsonl` grows by whole lines, and a torn last line is
dropped when it is read. Tensors are stored as safetensors, everything else as JSON: nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SETTINGS, METRICS, STATE, BEST = "settings.json", "metrics.jsonl", "state.safetensors", "best.safetensors"
RESULT, OUTPUTS, REPORT = "result.json", "dev_outputs.safetensors", "report.html"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`, on an error remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":  # the rename itself lies in the folder, which must reach the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one piece: it is the old one or the new one, never half of it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one piece; a NaN or an infinity is a ValueError, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in one piece."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata=metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


class RunFolder:
    """A run's folder: its paths, and how its files are read and written."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def check_free(self) -> None:
        """Make sure that a new run can start here.

        Raises:
            FileExistsError: If the folder already holds a run or anything else.
        """
        if (self / SETTINGS).exists():
            raise FileExistsError(
                f"{self.path} already holds a run; add --resume to go on with it, or choose another --output"
            )
        if self.path.exists() and any(not _is_leftover(p) for p in self.path.iterdir()):
            raise FileExistsError(f"{self.path} is not empty and holds no run; choose another --output")

    def create(self, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        """Start a new run here; FileExistsError if the folder is not free."""
        self.check_free()
        write_json(self / SETTINGS, {"settings": settings, "environment": environment})

    def remove_leftovers(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote them."""
        for path in self.path.iterdir():
            if _is_leftover(path):
                path.unlink()

    def read_settings(self) -> dict[str, Any]:
        """The settings that the run was started with.

        Raises:
            FileNotFoundError: If there is no run here.
        """
        return self.read_json(SETTINGS)["settings"]

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; FileNotFoundError that says what is missing."""
        if not (self / SETTINGS).exists():
            raise FileNotFoundError(f"{self.path} holds no run: it has no {SETTINGS}")
        if not (self / name).exists():
            raise FileNotFoundError(f"{self.path} has no {name}: the run has not finished; go on with it by --resume")
        return json.loads((self / name).read_text(encoding="utf-8"))

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        with (self / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines of `metrics.jsonl`; a last line torn by a kill is dropped."""
        if not (self / METRICS).exists():
            return []
        lines = (self / METRICS).read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is torn, or empty

    def truncate_metrics(self, rows: int) -> None:
        """Keep the first `rows` lines: what a run wrote after the state that it goes on from is written again."""
        kept = self.read_metrics()[:rows]
        write_text(self / METRICS, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))

    def save_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Write the state that `--resume` goes on from, in one file, so that its parts always belong together."""
        write_tensors(self / STATE, tensors, {"values": json.dumps(values, allow_nan=False)})

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last state written, or None before the first."""
        if not (self / STATE).exists():
            return None
        tensors, metadata = read_tensors(self / STATE)
        return tensors, json.loads(metadata["values"])
