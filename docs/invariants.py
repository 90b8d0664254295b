"""The invariants that the specification of each method demands, and the tests that show them.

`docs/invariants.json` lists them by section. A test names the ones that it shows in its docstring, word for word:
``Invariant §<section>: <text>``, several of one section separated by semicolons, each section on a line of its own.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "docs" / "invariants.json"


class Invariant(NamedTuple):
    """One entry of the list: its section, and what must hold."""

    section: str
    text: str


class Coverage(NamedTuple):
    """The tests of each invariant of the list, and what tests name beyond the list."""

    tests: dict[Invariant, list[str]]
    unknown: dict[Invariant, list[str]]

    @property
    def missing(self) -> list[Invariant]:
        """Invariants without a test."""
        return [invariant for invariant, tests in self.tests.items() if not tests]


def sections() -> dict[str, dict[str, Any]]:
    """The list: by section its title, its source and its invariants."""
    found: dict[str, dict[str, Any]] = json.loads(LIST.read_text(encoding="utf-8"))
    return found


def named(docstring: str) -> Iterator[Invariant]:
    """The invariants that a docstring names.

    Example:
        >>> [tuple(found) for found in named("Invariant §1: this;\\n    that.\\nInvariant §20.7: such.\\n\\nOther words.")]
        [('1', 'this'), ('1', 'that'), ('20.7', 'such')]
    """
    for paragraph in re.split(r"\n\s*\n", docstring):
        for match in re.finditer(r"Invariant §([\d.]+): (.*?)(?=Invariant §|\Z)", paragraph, re.DOTALL):
            for text in match[2].split(";"):
                yield Invariant(match[1], " ".join(text.split()).removesuffix("."))


def marked_tests(folder: Path) -> Iterator[tuple[str, Invariant]]:
    """Each test function below `folder` with each invariant that it names, read from the source."""
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for invariant in named(ast.get_docstring(node) or ""):
                    yield f"{path.relative_to(folder).as_posix()}::{node.name}", invariant


def coverage(listed: Mapping[str, Mapping[str, Any]], marked: Sequence[tuple[str, Invariant]]) -> Coverage:
    """Bring the list and the tests together.

    Raises:
        ValueError: a section lists an invariant twice.
    """
    tests: dict[Invariant, list[str]] = {}
    for number, section in listed.items():
        for text in section["invariants"]:
            if Invariant(number, text) in tests:
                raise ValueError(f"section {number} of docs/invariants.json lists {text!r} twice; keep one of them.")
            tests[Invariant(number, text)] = []
    unknown: dict[Invariant, list[str]] = {}
    for test, invariant in marked:
        (tests if invariant in tests else unknown).setdefault(invariant, []).append(test)
    return Coverage(tests, unknown)
