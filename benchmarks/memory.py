"""Whether `estimate_memory` is right: the bytes that it foretells for a training step beside those that the step then takes.

    python -m benchmarks.memory              # BERT-base width with 2 and 4 layers, minBERT; all methods; minutes
    python -m benchmarks.memory --small      # a tiny BERT: whether everything runs

On CPU the step's peak is that of the storages alive at once, followed as real tensors are made and dropped; on CUDA it is the
allocator's. An estimate that errs by 10 % or more, as a whole or in what the step adds to what is there between two steps,
makes the exit status 1. Beside it stands how far the resident set of a fresh process grows, which is not judged: the system
counts pages, and what operations and libraries take for themselves.
"""

import argparse
import ctypes
import functools
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftlite
from benchmarks.cells import Cell, exit_status, measure_cells
from benchmarks.harness import RESULTS, ResultFile, machine
from examples.minbert_multitask.model import BertConfig, BertModel
from peftlite.analysis.step import MIB, Step, mean_square

TARGETS = ("query", "key", "value", "dense")
METHODS = ("full", "lora", "dora", "nf4-lora")
SIZES = {  # width, layers, heads, vocabulary
    "BERT-base width, 2 layers": (768, 2, 12, 30522),
    "BERT-base width, 4 layers": (768, 4, 12, 30522),
    "minBERT": (384, 6, 12, 30522),  # the sizes of MiniLM-L6
}
SMALL = {"tiny": (64, 2, 4, 1000)}
LIMIT = 0.1
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@dataclass(frozen=True)
class MemorySettings:
    """Everything that a cell's figures depend on, besides the commit and the versions."""

    model: str
    method: str
    dropout: float
    amp: bool
    rows: int
    length: int
    rank: int = 8
    device: str = "cpu"
    threads: int = 1
    seed: int = 0

    @property
    def key(self) -> str:
        """The cell's name in the result file."""
        precision = "bf16 autocast" if self.amp else "fp32"
        return f"{self.device}, {self.model}, {self.rows}x{self.length}, {self.method}, {precision}, dropout={self.dropout:g}"

    @property
    def autocast(self) -> torch.dtype | None:
        """What the forward pass autocasts to."""
        return torch.bfloat16 if self.amp else None


def build(settings: MemorySettings) -> nn.Module:
    """The model, as it is to be trained; dropout is that of the backbone and of the adapters."""
    width, layers, heads, vocabulary = (SIZES | SMALL)[settings.model]
    torch.manual_seed(settings.seed)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
    )
    model = BertModel(config).to(settings.device)
    if settings.method == "nf4-lora":
        peftlite.quantize_base(model, TARGETS)
    if settings.method != "full":
        method = settings.method.removeprefix("nf4-")
        peftlite.inject_adapters(model, TARGETS, settings.rank, method=method, dropout=settings.dropout, seed=settings.seed)
    return model


def batch(settings: MemorySettings) -> tuple[Tensor, Tensor]:
    """Token ids `(rows, length)` and their mask without padding."""
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(1, 1000, (settings.rows, settings.length), generator=generator).to(settings.device)
    return ids, torch.ones_like(ids)


def growth(settings: MemorySettings) -> int | None:
    """By how many bytes the resident set of this process grows, at its largest, over three training steps; None where the
    system does not say."""
    torch.set_num_threads(settings.threads)
    _return_memory()
    tiny = MemorySettings(next(iter(SMALL)), settings.method, settings.dropout, settings.amp, 2, 8)
    _step(tiny)()  # code pages and caches of the libraries
    step = _step(settings)
    before = _resident("VmRSS")
    if before is None:
        return None
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the largest so far becomes the present one
    for _ in range(3):
        step()
    largest = _resident("VmHWM")
    return None if largest is None else largest - before


def _return_memory() -> None:
    """Have glibc give freed tensors back to the system, and not keep them in a heap that only grows."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)


def _step(settings: MemorySettings) -> Step:
    model = build(settings).train()
    return Step(model, batch(settings), mean_square, torch.optim.AdamW, torch.device(settings.device), settings.autocast)


def _resident(name: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def measure(settings: MemorySettings, *, fresh_process: bool = True) -> dict[str, Any]:
    """The estimate of one cell, the step's own figures, and how far they lie apart."""
    model, inputs = build(settings), batch(settings)
    start = time.perf_counter()
    estimate = peftlite.estimate_memory(model, inputs, autocast=settings.autocast)
    seconds = time.perf_counter() - start
    if settings.device == "cuda":
        _wake_libraries()
    cost = peftlite.benchmark_step(
        model, inputs, candidates={"as it is": lambda model: model}, autocast=settings.autocast, rounds=1, warmup=2
    )["as it is"]
    total = (estimate.total - estimate.batch) / MIB  # the batch was there before the measurement began
    added = (estimate.total - estimate.resident) / MIB
    measured_added = cost.peak_mib - cost.resident_mib
    grown = None
    if fresh_process and settings.device == "cpu":
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            grown = pool.submit(growth, settings).result()
    parts = {name: getattr(estimate, name) / MIB for name in ("parameters", "buffers", "optimizer_state", "other", "saved")}
    return {
        "estimate_mib": total,
        "measured_mib": cost.peak_mib,
        "error": total / cost.peak_mib - 1,
        "estimate_added_mib": added,
        "measured_added_mib": measured_added,
        "added_error": added / measured_added - 1,
        "estimate_growth_mib": added + parts["optimizer_state"] + parts["other"],
        "rss_growth_mib": None if grown is None else grown / MIB,
        "seconds": seconds,
        "peak_phase": estimate.peak_phase,
        "parts_mib": parts,
        "phases_mib": {phase: {k: size / MIB for k, size in asdict(peak).items()} for phase, peak in estimate.phases.items()},
    }


def _wake_libraries() -> None:
    """Have cuBLAS take its workspaces, of both threads, before anything is measured."""
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(64, 64, device="cuda", dtype=dtype, requires_grad=True)
        (matrix @ matrix).sum().backward()
    torch.cuda.synchronize()


def met(figures: Mapping[str, Any]) -> bool:
    """Whether the estimate lies within the limit."""
    return abs(figures["error"]) < LIMIT and abs(figures["added_error"]) < LIMIT


def line(cell: Mapping[str, Any]) -> str:
    """A cell in one line."""
    figures = cell["figures"]
    grown = figures["rss_growth_mib"]
    rss = "" if grown is None else f"; growth {figures['estimate_growth_mib']:.1f}, of the resident set {grown:.1f}"
    return (
        f"estimate {figures['estimate_mib']:.1f} MiB, measured {figures['measured_mib']:.1f} ({figures['error']:+.2%}); "
        f"added by the step {figures['estimate_added_mib']:.1f}, measured {figures['measured_added_mib']:.1f} "
        f"({figures['added_error']:+.2%}){rss}; estimated in {figures['seconds']:.1f} s" + ("" if met(figures) else " [!! off]")
    )


def cells(*, small: bool, device: str, threads: int) -> Iterator[MemorySettings]:
    """Every model by every method, precision and dropout."""
    rows, length = (4, 32) if small else (8, 64)
    for model in SMALL if small else SIZES:
        for method in METHODS:
            for amp in (False, True):
                for dropout in (0.1,) if small else (0.0, 0.1):
                    yield MemorySettings(model, method, dropout, amp, rows, length, device=device, threads=threads)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; the exit status is 1 if an estimate is off."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description="Compare the estimated peak memory of training steps with the measured one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("--small", action="store_true", help="a tiny model only")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the model is")
    add("--threads", type=int, default=1, help="CPU threads of torch")
    add("--no-rss", action="store_true", help="leave out the fresh process of each cell")
    add("--output", type=Path, default=RESULTS / "memory.json", help="result file; finished cells are kept")
    add("--fresh", action="store_true", help="measure finished cells again")
    options = command.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        command.error("--device cuda was asked for, and torch finds no GPU; leave it out for the CPU")
    torch.set_num_threads(options.threads)
    asked = cells(small=options.small, device=options.device, threads=options.threads)

    def run() -> bool:
        planned = [
            Cell(settings.key, asdict(settings), functools.partial(measure, settings, fresh_process=not options.no_rss))
            for settings in asked
        ]
        facts, results = machine(options.device), ResultFile(options.output, "memory")
        found = measure_cells(planned, results, facts, line, fresh=options.fresh)
        good = sum(map(met, found))
        print(f"{good} of {len(found)} estimates lie within {LIMIT:.0%}")
        return good == len(found)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
