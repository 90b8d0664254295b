"""Tiles of the Triton kernels, looked up in a table that is written ahead of time; nothing is tuned when a kernel starts.

The table holds a list of entries per kernel. An entry applies where all of its `when` holds: `arch` and `dtype` (one name
or a list), and `rank`, `columns` and `rows` as upper bounds. The first that applies is used, so the narrow ones stand first::

    {"pack": [{"when": {"arch": "sm_90", "rank": 64}, "use": {"BLOCK": 512, "num_warps": 4, "num_stages": 1}},
              {"when": {}, "use": {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}}]}

``PEFTLITE_CONFIGS=<file>`` names a file of the same form whose entries go first, as measured on one's own GPU.
"""

import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftlite.kernels.dispatch import has_values

BUILT_IN = Path(__file__).with_name("configs.json")
VARIABLE = "PEFTLITE_CONFIGS"
BOUNDS = ("rank", "columns", "rows")
NAMES = ("arch", "dtype")

Table = dict[str, list[dict[str, dict[str, Any]]]]


def config(kernel: str, *, arch: str, dtype: torch.dtype, rank: int, columns: int, rows: int) -> dict[str, int]:
    """Tile sizes, ``num_warps`` and ``num_stages`` for one launch.

    Args:
        kernel: name in the table: that of the file without ``_triton.py``, and what the kernel does where a file has two.
        arch: as `launch_triton.architecture` names it.
        dtype: of the matrix that the kernel streams.
        rank: padded rank.
        columns: of that matrix.
        rows: of that matrix; rounded up to a power of two, so that batches of all sizes share a few entries.

    Raises:
        ValueError: if no entry applies, or if the file named by ``PEFTLITE_CONFIGS`` cannot be used.
    """
    name = str(dtype).partition(".")[2]
    bucket = 1 << max(rows - 1, 0).bit_length()
    return _config(kernel, arch, name, rank, columns, bucket, os.environ.get(VARIABLE))


def fitted(tile: dict[str, int], streams: Sequence[Tensor], **most: int) -> dict[str, int]:
    """`tile`, its sizes cut down to `most` where rows of one of `streams` do not start and end on 16-byte borders.

    There elements are loaded one by one, and each load keeps an address in registers: larger tiles would spill.
    """
    if all(t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0 and _starts_on_a_border(t) for t in streams):
        return tile
    return tile | {name: min(tile[name], size) for name, size in most.items()}


def _starts_on_a_border(tensor: Tensor) -> bool:
    return not has_values(tensor) or tensor.data_ptr() % 16 == 0  # allocators keep to such borders


def kernels() -> list[str]:
    """The kernels of the built-in table."""
    return list(read(BUILT_IN))


@cache
def read(path: Path) -> Table:
    """The table in a file, checked.

    Raises:
        ValueError: if the file cannot be read or its content has another form, saying what is wrong where.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the table of kernel configurations {path} cannot be read ({error}); correct it, or unset {VARIABLE}."
        ) from error
    problem = _problem(table)
    if problem:
        raise ValueError(f"the table of kernel configurations {path} does not fit: {problem}; correct it, or unset {VARIABLE}.")
    return table


@cache
def _config(kernel: str, arch: str, dtype: str, rank: int, columns: int, rows: int, override: str | None) -> dict[str, int]:
    asked = {"arch": arch, "dtype": dtype, "rank": rank, "columns": columns, "rows": rows}
    for path in ([Path(override)] if override else []) + [BUILT_IN]:
        for entry in read(path).get(kernel, []):
            if _applies(entry["when"], asked):
                return entry["use"]
    raise ValueError(
        f"no kernel configuration for {kernel} with {', '.join(f'{k}={v}' for k, v in asked.items())}; the tables know "
        f"{', '.join(kernels())}; add an entry to a file of your own and name it in {VARIABLE}."
    )


def _applies(when: dict[str, Any], asked: dict[str, Any]) -> bool:
    names = all(asked[key] in ([when[key]] if isinstance(when[key], str) else when[key]) for key in NAMES if key in when)
    return names and all(asked[key] <= when[key] for key in BOUNDS if key in when)


def _problem(table: Any) -> str | None:
    """What is wrong with a table, or None."""
    if not isinstance(table, dict):
        return "it must map kernels to lists of entries"
    for kernel, entries in table.items():
        if not isinstance(entries, list):
            return f"{kernel} must be a list of entries"
        for number, entry in enumerate(entries):
            where = f"entry {number} of {kernel}"
            whole = isinstance(entry, dict) and set(entry) == {"when", "use"}
            if not (whole and all(isinstance(part, dict) for part in entry.values())):
                return f"{where} must hold the objects 'when' and 'use'"
            unknown = set(entry["when"]) - {*BOUNDS, *NAMES}
            if unknown:
                return f"{where} asks for {', '.join(sorted(unknown))}, but 'when' knows {', '.join((*NAMES, *BOUNDS))}"
            for key, value in entry["when"].items():
                texts = [value] if isinstance(value, str) else value
                named = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
                if not (named if key in NAMES else isinstance(value, int)):
                    kind = "a name or a list of names" if key in NAMES else "a whole number"
                    return f"{where} has {key}={value!r}, which must be {kind}"
            missing = {"num_warps", "num_stages"} - set(entry["use"])
            if missing:
                return f"{where} lacks {', '.join(sorted(missing))}"
            for key, value in entry["use"].items():
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    return f"{where} has {key}={value!r}, which must be a positive whole number"
                if value & (value - 1) and key != "num_stages":
                    return f"{where} has {key}={value}, which must be a power of two"
    return None
