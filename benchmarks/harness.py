"""What every suite shares: interleaved rounds, robust statistics, machine facts, result files, the correctness gate.

A figure is worth what its circumstances are worth. Candidates therefore take turns in one process, ratios are formed
within a round, each result carries machine and commit, and nothing is timed before it has been checked.
"""

import hashlib
import json
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from peftlite.kernels.native_library import instruction_set

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Sample = TypeVar("Sample")


class Spread(NamedTuple):
    """Median of a sample with its 20 % and 80 % quantiles, which bound the middle three fifths."""

    median: float
    q20: float
    q80: float


def spread(values: Iterable[float]) -> Spread:
    """Median and 20/80 quantiles of `values`, interpolated linearly between order statistics.

    Raises:
        ValueError: there are no values.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("spread of no values asked; measure at least one round")

    def quantile(share: float) -> float:
        position = share * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    return Spread(statistics.median(ordered), quantile(0.2), quantile(0.8))


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of `numerator[i] / denominator[i]`: each pair comes from one round, so that slow spells cancel.

    Raises:
        ValueError: the two were not measured in the same rounds.
    """
    if len(numerator) != len(denominator):
        raise ValueError(
            f"ratios need pairs from the same rounds, found {len(numerator)} and {len(denominator)} samples; "
            "measure both candidates with `interleaved`"
        )
    return spread(a / b for a, b in zip(numerator, denominator, strict=True))


def order(names: Sequence[str], index: int) -> list[str]:
    """The order of round `index`: rotated by one each round, and backwards in every other cycle.

    Rotation alone would leave each candidate behind the same neighbour in nearly all rounds, with what that one left in
    the caches and the allocator.
    """
    start = index % len(names)
    rotated = [*names[start:], *names[:start]]
    return rotated[::-1] if index // len(names) % 2 else rotated


def interleaved(
    candidates: Mapping[str, Callable[[], Sample]],
    *,
    rounds: int,
    warmup: int = 2,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[Sample]]:
    """Samples of every candidate, one per round, all candidates once in each round; name -> `rounds` samples.

    Args:
        candidates: name -> a function that does the work once and returns what it measured.
        rounds: how many rounds count.
        warmup: rounds before them, over all candidates, that do not count.
        tick: called after each piece of work, for a progress bar.

    Raises:
        ValueError: no candidates, or no rounds.
    """
    if not candidates or rounds < 1:
        raise ValueError(f"{len(candidates)} candidates over {rounds} rounds asked; at least one of each is needed")
    samples: dict[str, list[Sample]] = {name: [] for name in candidates}
    for index in range(-warmup, rounds):
        for name in order(list(candidates), index):
            sample = candidates[name]()
            if index >= 0:
                samples[name].append(sample)
            tick()
    return samples


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode(errors="replace")


def _source() -> dict[str, Any]:
    """Commit, dirty flag, and a digest of what differs from the commit; results do not make their own tree dirty."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None, "changes": None}
    here = ("--", ".", ":(exclude)benchmarks/results")
    changes = _git("diff", "HEAD", *here) or ""
    for name in (_git("ls-files", "--others", "--exclude-standard", "-z", *here) or "").split("\0")[:-1]:
        changes += f"{name}\n{hashlib.sha256((ROOT / name).read_bytes()).hexdigest()}\n"
    digest = hashlib.sha256(changes.encode()).hexdigest()[:12] if changes else None
    return {"commit": commit.strip(), "dirty": bool(changes), "changes": digest}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def moment() -> dict[str, Any]:
    """The facts that pass: the date, and how busy the machine is."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": now, "load_average": round(os.getloadavg()[0], 2)}


def machine(device: str = "cpu") -> dict[str, Any]:
    """Facts that a figure needs beside it: hardware, versions, commit, and how busy the machine was at the start."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native": instruction_set(),
        **_source(),
        **moment(),
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    return facts


def write_result(path: Path, payload: Mapping[str, Any]) -> None:
    """Write `payload` as JSON to `path` in one step: a reader, or a crash, sees the old file or the new one.

    Raises:
        ValueError: a figure is not finite.
    """
    text = json.dumps(payload, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class ResultFile:
    """The finished cells of one suite in one JSON file, written after each cell: an interruption loses one at most.

    Every cell holds its own machine facts and settings; a cell is skipped only where both agree with today's.

    Raises:
        ValueError: the file is not JSON, or belongs to another suite.
    """

    _PASSING = ("date", "load_average")  # facts of the moment, which do not make a figure another figure

    def __init__(self, path: Path, suite: str) -> None:
        self.path, self.suite = path, suite
        self.cells: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            payload = json.loads(path.read_text(encoding="utf-8"))
            found, self.cells = payload["suite"], payload["cells"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result file ({error!r}); move it away or choose another path") from error
        if found != suite:
            raise ValueError(f"{path} holds results of suite {found!r}, not {suite!r}; choose another path")

    def difference(self, key: str, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
        """Why cell `key` must be measured (again), in words; None where it need not be."""
        if key not in self.cells:
            return "not measured yet"
        cell = self.cells[key]
        for part, now in (("machine", facts), ("settings", settings)):
            then, now = cell[part], json.loads(json.dumps(dict(now)))  # tuples read back as lists
            for name in {**then, **now}:
                if name not in self._PASSING and then.get(name) != now.get(name):
                    return f"{part}: {name} was {then.get(name)!r}, is {now.get(name)!r}"
        return None

    def add(self, key: str, facts: Mapping[str, Any], settings: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        """Set cell `key` and write the file."""
        self.cells[key] = {"machine": dict(facts), "settings": dict(settings), "figures": dict(figures)}
        write_result(self.path, {"suite": self.suite, "cells": self.cells})


class Check(NamedTuple):
    """One comparison of the gate: green when `error <= budget`; a NaN is never green."""

    name: str
    error: float
    budget: float

    @property
    def green(self) -> bool:
        """Whether the error is within its budget."""
        return self.error <= self.budget

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3g}, budget {self.budget:.3g}"


def compare(
    name: str,
    actual: Tensor,
    plain: Tensor,
    oracle: Tensor,
    *,
    dtype: torch.dtype | None = None,
    terms: Tensor | None = None,
) -> Check:
    """Check that `actual` is as near to the fp64 `oracle` as plain eager is, within a factor of two.

    The budget is `2 (max|plain - oracle| + eps(dtype) max terms)`: it comes from the data, nobody tunes it.

    Args:
        name: what is compared, for the message.
        actual: the result under test.
        plain: the same result by plain torch operations, in the same precision.
        oracle: the same result in fp64.
        dtype: the precision of the computation, where autocast made it lower than that of `actual`.
        terms: `Σ |term|` for each element that is a sum whose terms may cancel: they are rounded, and what is left of them is
            not. `|oracle|` without it.
    """
    if actual.shape != oracle.shape:
        raise ValueError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}")
    if not oracle.numel():
        return Check(name, 0.0, 0.0)
    eps = torch.finfo(dtype or actual.dtype).eps
    error = (actual.double() - oracle).abs().max().item()
    plain_error = (plain.double() - oracle).abs().max().item()
    return Check(name, error, 2 * (plain_error + eps * (oracle if terms is None else terms).abs().max().item()))


class RedGateError(RuntimeError):
    """What was to be timed is wrong, so its time means nothing."""


def require_green(checks: Sequence[Check]) -> None:
    """Return if every check holds.

    Raises:
        RedGateError: naming the checks that fail; or there is no check at all.
    """
    if not checks:
        raise RedGateError("refusing to print figures: nothing was checked; give the gate at least one candidate")
    red = [check for check in checks if not check.green]
    if red:
        listed = "\n".join(f"  {check}" for check in red)
        raise RedGateError(
            f"refusing to print figures: {len(red)} of {len(checks)} checks fail; correct these first:\n{listed}"
        )
