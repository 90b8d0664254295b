"""Suites whose cells one process measures in turn, as timings must be; `benchmarks.jobs` is for what several can share.

What is finished is skipped where machine, commit and settings are the same, so that the same command goes on.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.harness import RedGateError, ResultFile


class Cell(NamedTuple):
    """One cell to measure.

    Attributes:
        key: its name in the result file.
        settings: all that its figures depend on besides machine and commit.
        measure: makes the figures.
    """

    key: str
    settings: Mapping[str, Any]
    measure: Callable[[], Mapping[str, Any]]


def measure_cells(
    cells: Sequence[Cell],
    results: ResultFile,
    facts: Mapping[str, Any],
    show: Callable[[Mapping[str, Any]], str],
    *,
    fresh: bool = False,
) -> list[Mapping[str, Any]]:
    """Measure the cells that are not finished, each written at once.

    Args:
        cells: in their order.
        results: where they are kept.
        facts: of the machine and the versions.
        show: a cell of the result file as text.
        fresh: measure finished cells again.

    Returns:
        The figures of all of them.
    """
    for count, (key, settings, measure) in enumerate(cells, start=1):
        reason = "asked again" if fresh else results.difference(key, facts, settings)
        print(f"\n[{count}/{len(cells)}] {key}: {reason or 'finished before'}", flush=True)
        if reason:
            results.add(key, facts, settings, measure())
        print(show(results.cells[key]), flush=True)
    print(f"\nwritten to {results.path}")
    return [results.cells[cell.key]["figures"] for cell in cells]


def exit_status(run: Callable[[], bool]) -> int:
    """The exit status of a suite: 0 or 1 as `run` says whether all is well, 1 with a message, 130 where it is interrupted."""
    try:
        return 0 if run() else 1
    except KeyboardInterrupt:
        print("\ninterrupted: what is finished is kept; the same command goes on", file=sys.stderr)
        return 130
    except (RedGateError, FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
