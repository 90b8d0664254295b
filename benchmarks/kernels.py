"""What one operation costs: ours by every implementation, `torch.compile` of the reference, and the peers' formulas.

    python -m benchmarks.kernels                 # MiniLM, BERT-base, 4096 and 8192 features, fp32 and bf16, r = 8 and 64
    python -m benchmarks.kernels --models MiniLM # its layers alone; what else the result file holds is kept
    python -m benchmarks.kernels --small         # one small layer: whether everything runs

Operations are `lora_linear` and `dora_linear`, forward and with the backward pass, and `row_norm`. All candidates of a case
take turns in one process; times are medians with 20 and 80 % quantiles, ratios are formed within a round. Nothing is timed
before outputs and all gradients of every candidate have been compared with fp64: where one of ours is off, the suite stops;
where one of the others is, it is left out and named. Compilation is over before the first round. Of
compiled code time alone is told: the meters see ATen calls. A case that asks for too large a share of the memory, or for too
many seconds at the speed of a product that is tried first, is left out, and the result says so.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.cells import Cell, exit_status, measure_cells
from benchmarks.gpu_layers import Case, Tensors, tensors
from benchmarks.harness import RESULTS, ResultFile, interleaved, machine, ratios, require_green, spread
from benchmarks.kernel_candidates import COMPILED, DTYPES, OURS, Forward, KernelSettings, candidates, gate, leave_out_inexact
from benchmarks.training_step import MIB
from peftlite.analysis.meters import flops, saved_for_backward, transient_bytes

OPERATIONS = ("lora", "dora", "row_norm")
SHAPES = {  # in, out
    "MiniLM": ((384, 384), (384, 1536), (1536, 384)),
    "BERT-base": ((768, 768), (768, 3072), (3072, 768)),
    "4096": ((4096, 4096),),
    "8192": ((8192, 8192),),
}
SMALL = {"small": ((48, 80),)}
RANKS = (8, 64)
UNITS = {"gflop": "GFLOP", "saved_mib": "MiB saved", "forward_peak_mib": "MiB forward peak"}


class Timed:
    """Milliseconds of the forward pass, and of both passes together where there is a backward pass."""

    def __init__(self, case: Case, t: Tensors, forward: Forward) -> None:
        self.case, self.t, self.forward = case, t, forward
        self.trained = list(t.trained().values())

    def both(self) -> None:
        """Forward and backward."""
        y = self.forward(self.case, self.t)
        if y.requires_grad:
            torch.autograd.grad(y, self.trained, self.t.upstream.to(y.dtype))

    def __call__(self) -> dict[str, float]:
        start = self._now()
        y = self.forward(self.case, self.t)
        middle = self._now()
        if not y.requires_grad:
            return {"forward": 1e3 * (middle - start)}
        torch.autograd.grad(y, self.trained, self.t.upstream.to(y.dtype))
        return {"forward": 1e3 * (middle - start), "both": 1e3 * (self._now() - start)}

    def _now(self) -> float:
        if self.t.x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def meter(case: Case, t: Tensors, timed: Timed) -> dict[str, float]:
    """FLOPs, bytes saved for the backward pass and peak of the forward pass, none of which a clock enters."""
    given = [tensor for tensor in vars(t).values() if tensor is not None]

    def forward() -> Tensor:
        return timed.forward(case, t)

    return {
        "gflop": flops(timed.both) / 1e9,
        "saved_mib": saved_for_backward(forward, exclude=given).bytes / MIB,
        "forward_peak_mib": transient_bytes(forward).peak / MIB,
    }


def measure(settings: KernelSettings, no_compiler: str | None, tick: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Check, meter and time every candidate of one cell.

    Raises:
        RedGateError: the reference or one of ours computes something else than it should.
    """
    case = settings.case
    t = tensors(case, torch.device(settings.device), settings.seed)
    found, absent = here = candidates(settings, no_compiler)
    checked = gate(case, t, found)
    leave_out_inexact(here, checked, settings.operation)
    checks = [check for of_one in checked.values() for check in of_one]
    require_green(checks)
    timed = {name: Timed(case, t, forward) for name, forward in found.items()}
    rows: dict[str, dict[str, Any]] = {n: {} if n == COMPILED else meter(case, t, each) for n, each in timed.items()}
    samples = interleaved(timed, rounds=settings.rounds, warmup=settings.warmup, tick=tick)
    for name, taken in samples.items():
        of = {phase: [sample[phase] for sample in taken] for phase in taken[0]}
        rows[name]["ms"] = {phase: spread(values) for phase, values in of.items()}
        rows[name]["relative"] = {
            phase: ratios(values, [sample[phase] for sample in samples[OURS]]) for phase, values in of.items()
        }
    return {"checks": len(checks), "baseline": OURS, "candidates": rows, "absent": absent}


def compiler_obstacle(device: str) -> str | None:
    """Why `torch.compile` cannot make code here, or None: a tiny function is tried."""
    try:
        made = torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # whatever the backend, the C++ compiler or the linker have to say
        return f"torch.compile fails here: {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    return None if made.shape == (8,) else "torch.compile gives another shape"


def speed(device: str, dtype: torch.dtype) -> float:
    """FLOPs in a second of a product of 1024 x 1024 in `dtype`."""
    a = torch.ones(1024, 1024, device=device, dtype=dtype)
    (a @ a).sum().item()
    start = time.perf_counter()
    (a @ a).sum().item()
    return 2 * 1024**3 / (time.perf_counter() - start)


def too_much(settings: KernelSettings, *, ram: float, seconds: float, rate: float) -> str | None:
    """Why a cell is left out, or None.

    Args:
        settings: of the cell.
        ram: bytes that it may take; the gate's fp64 reference holds some six matrices of the weight's size.
        seconds: that it may take.
        rate: FLOPs in a second.
    """
    size = settings.in_features * settings.out_features
    asks = 8 * (6 * size + 8 * settings.rows * (settings.in_features + settings.out_features))
    if asks > ram:
        return f"asks for {asks / 2**30:.1f} GiB, and {ram / 2**30:.1f} are allowed"
    rows = settings.rank if settings.operation == "row_norm" else 3 * settings.rows
    takes = 6 * (settings.rounds + settings.warmup + 6) * 2 * rows * size / rate
    if takes > seconds:
        return f"would take some {takes:.0f} s, and {seconds:.0f} are allowed"
    return None


def table(cell: Mapping[str, Any]) -> str:
    """A cell as text."""
    figures = cell["figures"]
    if "left_out" in figures:
        return f"  left out: {figures['left_out']}"
    lines = [f"  {figures['checks']} checks green"]
    for name, row in figures["candidates"].items():
        times = []
        for phase, label in (("forward", "forward"), ("both", "with backward")):
            if phase in row["ms"]:
                median, low, high = row["ms"][phase]
                times.append(f"{label} {median:9.3f} ms ({low:.3f}..{high:.3f}), x {row['relative'][phase][0]:.2f}")
        counts = ", ".join(f"{row[k]:.2f} {unit}" for k, unit in UNITS.items() if k in row)
        lines.append(f"  {name:24} {'; '.join(times)}; {counts or 'not metered'}")
    lines += [f"  {name:24} absent: {reason}" for name, reason in figures["absent"].items()]
    return "\n".join(lines)


def cells(options: argparse.Namespace) -> Iterator[KernelSettings]:
    """Operations by shapes, ranks and dtypes, small shapes first."""
    shapes, ranks = (SMALL, RANKS[:1]) if options.small else (SHAPES, RANKS)
    how = (options.rounds, options.warmup, options.device, options.threads, options.compile)
    rows = options.rows or (16 if options.small else 512)
    for model, sizes in shapes.items():
        for width, out in sizes if options.models is None or model in options.models else ():
            for operation in OPERATIONS:
                for rank in ranks:
                    for dtype in DTYPES:
                        yield KernelSettings(operation, model, rows, width, out, rank, dtype, *how)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; the exit status."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description="Time and meter one operation, all implementations and the peers' formulas interleaved.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    which = command.add_mutually_exclusive_group()
    which.add_argument("--small", action="store_true", help="one small layer, rank 8")
    which.add_argument("--models", nargs="+", choices=list(SHAPES), metavar="MODEL", help=f"only these of {', '.join(SHAPES)}")
    add("--rows", type=int, help="rows of the input; 512, or 16 with --small")
    add("--rounds", type=int, default=15, help="timed rounds; each candidate runs once in each")
    add("--warmup", type=int, default=3, help="rounds before them")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the tensors are")
    add("--threads", type=int, default=2, help="CPU threads of torch")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--ram-share", type=float, default=0.25, help="share of the machine's memory that a case may ask for")
    add("--seconds", type=float, default=240, help="that a case may take, compilation apart")
    add("--output", type=Path, default=RESULTS / "kernels.json", help="result file; finished cells are kept")
    add("--fresh", action="store_true", help="measure finished cells again")
    options = command.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        command.error("--device cuda was asked for, and torch finds no GPU; leave it out for the CPU")
    torch.set_num_threads(options.threads)
    no_compiler = compiler_obstacle(options.device) if options.compile else "left out by --no-compile"
    ram = options.ram_share * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rates = {name: speed(options.device, dtype) for name, dtype in DTYPES.items()}

    def one(settings: KernelSettings) -> dict[str, Any]:
        if left := too_much(settings, ram=ram, seconds=options.seconds, rate=rates[settings.dtype]):
            return {"left_out": left}
        with tqdm(unit="run", desc=settings.key) as bar:
            return measure(settings, no_compiler, bar.update)

    def run() -> bool:
        planned = [Cell(settings.key, asdict(settings), functools.partial(one, settings)) for settings in cells(options)]
        facts, results = machine(options.device), ResultFile(options.output, "kernels")
        measure_cells(planned, results, facts, table, fresh=options.fresh)
        return True

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
