"""Reading the files of the CS224N default project: rows out, malformed rows reported.

Files are tab-separated with a header, despite their `.csv`. The official ones are CSV-quoted, and Quora's and CFIMDB's
sentences were quoted once more before that, so quoting is undone layer by layer (`parse_line`, then `unquote`).
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

SPLITS = ("train", "dev", "test-student")


class Columns(NamedTuple):
    """The columns of a task's files, and which labels are legal: `low..high`, whole numbers only for classes."""

    sentences: tuple[str, ...]
    label: str
    low: int
    high: int
    whole: bool
    dtype: torch.dtype


TASKS = {
    "sst": Columns(("sentence",), "sentiment", 0, 4, True, torch.long),
    "cfimdb": Columns(("sentence",), "sentiment", 0, 1, True, torch.long),
    "quora": Columns(("sentence1", "sentence2"), "is_duplicate", 0, 1, True, torch.float32),
    "sts": Columns(("sentence1", "sentence2"), "similarity", 0, 5, False, torch.float32),
}
_STEMS = {"sst": "ids-sst", "cfimdb": "ids-cfimdb", "quora": "quora", "sts": "sts"}
DATA_FILES = {task: {split: f"{stem}-{split}.csv" for split in SPLITS} for task, stem in _STEMS.items()}


class Problem(NamedTuple):
    """A row that was skipped: the file's name, its line (1 is the header) and why."""

    file: str
    line: int
    reason: str


class Row(NamedTuple):
    """One well-formed line of a file."""

    id: str
    sentences: tuple[str, ...]
    label: float | None


def describe_problems(problems: Sequence[Problem], *, limit: int = 10) -> str:
    """A report of skipped rows: how many, then file, line and reason of the first `limit`."""
    lines = [f"skipped {len(problems)} malformed row{'s' if len(problems) != 1 else ''}"]
    lines += [f"  {p.file}, line {p.line}: {p.reason}" for p in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more")
    return "\n".join(lines)


def unquote(field: str) -> str:
    """`field` without surrounding blanks and without CSV quoting that the file's own quoting was wrapped around.

    A layer is taken off where only CSV quoting explains the text: a quote at each end and inside them quotes that are
    all doubled, at least one pair of them. `"Would you like to wear your seatbelt?"` is a quotation and stays.
    """
    field = field.strip()
    while len(field) > 3 and field[0] == field[-1] == '"':
        inner = field[1:-1]
        if '""' not in inner or '"' in inner.replace('""', ""):
            break
        field = inner.replace('""', '"').strip()
    return field


def parse_line(line: str, columns: int) -> list[str]:
    """The fields of one line: CSV-quoted if that gives `columns` fields, else split at tabs and taken as they stand.

    Line by line, so that a stray quote cannot swallow the lines after it.
    """
    try:
        fields = next(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error:
        fields = []
    return fields if len(fields) == columns else line.split("\t")


def read_rows(task: str, split: str, folder: str | Path) -> tuple[list[Row], list[Problem]]:
    """The well-formed rows of a task's file, and what was wrong with the others.

    Raises:
        ValueError: unknown task or split, a missing column (named), or a file without one usable row.
        FileNotFoundError: the file is missing.
    """
    path, columns = data_path(task, split, folder), TASKS[task]
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    header = parse_line(lines[0].decode("utf-8", "replace").rstrip("\r"), -1)
    labelled = split != "test-student"
    wanted = ("id", *columns.sentences, *((columns.label,) if labelled else ()))
    if missing := [name for name in wanted if name not in header]:
        found = ", ".join(name for name in header if name) or "none"
        raise ValueError(
            f"{path} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)} (found: {found}); "
            f"the file is tab-separated and its first line names the columns {', '.join(wanted)}"
        )
    where = [header.index(name) for name in wanted]
    rows: list[Row] = []
    problems: list[Problem] = []
    for number, raw in enumerate(lines[1:], start=2):
        if number == len(lines) and not raw:
            break  # what follows the last newline
        try:
            fields = parse_line(raw.decode("utf-8").removesuffix("\r"), len(header))
            if len(fields) != len(header):
                raise ValueError(f"{len(fields)} fields where the header has {len(header)}")
            values = [unquote(fields[i]) for i in where]
            if empty := [name for name, value in zip(wanted, values, strict=True) if not value]:
                raise ValueError(f"empty {', '.join(empty)}")
            label = parse_label(values[-1], columns) if labelled else None
        except ValueError as error:  # UnicodeDecodeError is one
            problems.append(Problem(path.name, number, str(error)))
        else:
            rows.append(Row(values[0], tuple(values[1 : 1 + len(columns.sentences)]), label))
    if not rows:
        raise ValueError(f"{path} has no usable row; {describe_problems(problems)}")
    return rows, problems


def data_path(task: str, split: str, folder: str | Path) -> Path:
    """The file of a task's split, which must be there.

    Raises:
        ValueError: unknown task or split.
        FileNotFoundError: no such file; the message names it and its folder's files.
    """
    if task not in DATA_FILES:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(DATA_FILES)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    path = Path(folder) / DATA_FILES[task][split]
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in Path(folder).glob("*.csv"))) or "no .csv file"
        raise FileNotFoundError(
            f"the {split} file of {task}, {path.name}, is missing from {folder} (found: {found}); "
            "`python -m examples.minbert_multitask.data fetch DIR` downloads public data"
        )
    return path


def parse_label(text: str, columns: Columns) -> float:
    """`text` as a legal label.

    Raises:
        ValueError: not a number, not finite, out of range, or a fraction where a class is wanted.
    """
    try:
        label = float(text)
    except ValueError:
        raise ValueError(f"{columns.label} {text!r} is not a number") from None
    if not columns.low <= label <= columns.high or (columns.whole and not label.is_integer()):  # NaN is not in range
        kind = "one of" if columns.whole else "in"
        raise ValueError(f"{columns.label} {text} is not {kind} {columns.low}..{columns.high}")
    return label
