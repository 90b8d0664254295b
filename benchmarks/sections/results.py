"""Result files of a folder, and what every section says of them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from docs.method_tables import place

Results = Mapping[str, Mapping[str, Any]]


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Content of every result file of `folder` by its name without suffix.

    Raises:
        ValueError: one of them is not a JSON object; the message names it.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); measure it again, or move it away") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not a result file: it holds a {type(content).__name__}; move it away")
        found[path.stem] = content
    return found


def digests(folder: Path) -> str:
    """Name and digest of every result file of `folder`, which tell a page that is out of date."""
    paths = sorted(folder.glob("*.json"))
    return ", ".join(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}" for path in paths) or "no result file"


def cells(results: Results, suite: str) -> Mapping[str, Any]:
    """The cells of a suite, none where its file is missing."""
    found: Mapping[str, Any] = results.get(suite, {}).get("cells", {})
    return found


def where(found: Iterable[Mapping[str, Any]]) -> str:
    """Machines, versions and commits of cells, each once."""
    return "; ".join(sorted({place(cell["machine"]) for cell in found}))


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: 1 cell, 2 cells."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
