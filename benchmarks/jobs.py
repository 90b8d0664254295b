"""Long suites as jobs, one result cell each: written at once, resumable, shared among processes by file locks.

Start the same command as often as there are cores: the processes share the jobs of one folder out among themselves. A job
may need the figures of others; it waits for them while another process is at them, and takes over from one that died.
"""

import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import ResultFile, machine, moment, write_result

PAUSE = 1.0  # seconds between looks at what others are at
Figures = Mapping[str, Any]


class Job(NamedTuple):
    """One cell to measure.

    Attributes:
        key: of the cell, ``/`` between its parts.
        settings: all that its figures depend on besides machine and commit; another value is another cell.
        measure: given the figures of `needs` by key, returns its own.
        needs: keys of other jobs.
        weight: expected cost beside that of the others, for the time left.
        summary: figures as a line for the terminal.
    """

    key: str
    settings: Mapping[str, Any]
    measure: Callable[[Mapping[str, Figures]], Figures]
    needs: tuple[str, ...] = ()
    weight: float = 1.0
    summary: Callable[[Figures], str] = lambda figures: "finished"


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone has `path` for the block; the system releases it even if the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def cell_path(output: Path, key: str) -> Path:
    """The file of the cell `key`."""
    return output / "cells" / f"{key}.json"


def read_cell(output: Path, suite: str, key: str) -> dict[str, Any] | None:
    """The cell `key` of `output`, None where there is none."""
    return ResultFile(cell_path(output, key), suite).cells.get(key)


def collect(output: Path, suite: str, keys: Sequence[str], result: Path) -> int:
    """Write those of the cells `keys` that are finished into one result file, in that order; how many they are."""
    found = {key: cell for key in keys if (cell := read_cell(output, suite, key)) is not None}
    if found:
        write_result(result, {"suite": suite, "cells": found})
    return len(found)


class _Clock:
    """The time left, from what all processes together have finished since this one started."""

    def __init__(self, jobs: Sequence[Job], finished: Callable[[Job], bool]) -> None:
        self.jobs, self.finished = jobs, finished
        self.start, self.at_first = time.monotonic(), self._open()

    def _open(self) -> float:
        return sum(job.weight for job in self.jobs if not self.finished(job))

    def left(self) -> str:
        """In words; empty before the first job is finished."""
        still = self._open()
        done = self.at_first - still
        return f", about {still / done * (time.monotonic() - self.start) / 60:.0f} min left in all" if done > 0 else ""


def work(
    jobs: Sequence[Job],
    output: Path,
    suite: str,
    keys: Sequence[str],
    result: Path,
    *,
    fresh: bool = False,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Measure the jobs that are not finished with their settings; leave to other processes what they are at.

    Args:
        jobs: in the order in which they should be done; those that others need are among them.
        output: folder of the cells and their locks, shared by the processes.
        suite: name of the suite in the result file.
        keys: cells to collect into `result` after each job.
        result: the result file.
        fresh: measure finished jobs again, each once.
        defaults: settings of cells that do not name them.
    """
    by_key = {job.key: job for job in jobs}
    places = {job.key: f"[{count}/{len(jobs)}] {job.key}" for count, job in enumerate(jobs, start=1)}
    again = set(by_key) if fresh else set()
    said: set[str] = set()

    def figures(job: Job) -> Figures | None:
        cell = None if job.key in again else read_cell(output, suite, job.key)
        if cell is None or {**(defaults or {}), **cell["settings"]} != json.loads(json.dumps(dict(job.settings))):
            return None
        return cell["figures"]

    def ready(job: Job) -> bool:
        return all(figures(by_key[key]) is not None for key in job.needs)

    loaded = machine()  # the commit of the code that runs, wherever the checkout goes meanwhile
    clock = _Clock(jobs, lambda job: figures(job) is not None)
    waiting = list(jobs)
    while waiting:
        before = len(waiting)
        for job in [job for job in waiting if ready(job)]:
            with claimed(cell_path(output, job.key).with_suffix(".lock")) as mine:
                if not mine:
                    if job.key not in said:
                        print(f"{places[job.key]}: another process is at it", flush=True)
                        said.add(job.key)
                    continue
                waiting.remove(job)
                if figures(job) is not None:
                    print(f"{places[job.key]}: finished before", flush=True)
                    continue
                print(f"{places[job.key]}{clock.left()}", flush=True)
                facts = loaded | moment()
                found = job.measure({key: figures(by_key[key]) for key in job.needs})
                ResultFile(cell_path(output, job.key), suite).add(job.key, facts, job.settings, found)
                again.discard(job.key)
                print(f"  {job.key}: {job.summary(found)}", flush=True)
                collect(output, suite, keys, result)
        if len(waiting) == before:
            if all(ready(job) for job in waiting):
                return  # others are at all that is left
            time.sleep(PAUSE)
