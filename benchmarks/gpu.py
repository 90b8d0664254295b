"""Everything that only a GPU can tell, in one run of minutes: are the kernels right, do they repeat, and how fast are they?

    python -m benchmarks.gpu                       # the first CUDA device; writes benchmarks/results/gpu.json
    TRITON_INTERPRET=1 python -m benchmarks.gpu --rehearse    # the same code on CPU with tiny sizes; its times mean nothing

In order: output and gradients against fp64; three runs bit for bit; a forward and backward pass per layer against the ATen
path, plain torch, plain torch compiled and PEFT, interleaved; bytes per second of each kernel; a training step of minBERT
from a CUDA graph. Nothing is timed before it has been checked.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from tqdm import tqdm

from benchmarks.gpu_layers import Case, correctness, determinism, dropout_correctness, ours, steps, tensors
from benchmarks.gpu_step import graph_replay
from benchmarks.harness import RESULTS, Check, RedGateError, interleaved, machine, ratios, require_green, spread, write_result
from peftlite.kernels.launch_triton import Launch, observing

HALF, FULL = torch.bfloat16, torch.float32
FLUSH = 256 * 2**20  # bytes written between timed runs, more than any second-level cache holds


class Plan(NamedTuple):
    """Sizes of a run."""

    odd: Sequence[tuple[int, int, int, int]]  # rows, in, out, rank of the checks
    timed: Sequence[tuple[int, int, int, int]]
    rounds: int
    warmup: int
    width: int
    layers: int
    batch: tuple[int, int]
    backend: str
    flush: int


REAL = Plan(
    odd=[(1, 64, 72, 3), (129, 100, 257, 16), (75, 768, 768, 8), (513, 1024, 768, 64), (256, 512, 640, 100)],
    timed=[
        (1024, 768, 768, 8),
        (4096, 768, 3072, 8),
        (4096, 3072, 768, 8),
        (8192, 4096, 4096, 16),
        (8192, 4096, 4096, 64),
        (2048, 8192, 8192, 384),
    ],
    rounds=30,
    warmup=3,
    width=768,
    layers=12,
    batch=(8, 128),
    backend="inductor",
    flush=FLUSH,
)
REHEARSED = Plan(
    odd=[(3, 40, 33, 3)],
    timed=[(16, 32, 48, 4)],
    rounds=1,
    warmup=0,
    width=32,
    layers=1,
    batch=(2, 8),
    backend="eager",
    flush=4096,
)


class Clock:
    """Milliseconds of a piece of work on `device`, each time with cold caches."""

    def __init__(self, device: torch.device, flush: int) -> None:
        self.device, self.cache = device, torch.empty(flush, dtype=torch.uint8, device=device)

    def __call__(self, work: Callable[[], object]) -> float:
        self.cache.zero_()
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def check(plan: Plan, device: torch.device) -> list[Check]:
    """Every check of the run, operations crossed with dtypes, shapes and options."""
    checks: list[Check] = []
    cases = [
        Case(operation, *shape, dtype, bias=bias)
        for operation, dtype, shape, bias in itertools.product(
            ("lora", "dora"), (HALF, torch.float16, FULL), plan.odd, (True, False)
        )
    ]
    cases += [Case("dora", *plan.odd[-1], FULL, norm_grad=True)]
    rows, in_features, out_features, rank = plan.odd[0]
    shape = (64 * rows, in_features, out_features, rank)
    dropped = [Case(operation, *shape, FULL, dropout=0.25) for operation in ("lora", "dora")]
    with tqdm(total=len(cases) + 2 * len(dropped) + 2, desc="check", unit="case") as bar:
        for case in cases:
            checks += correctness(case, device)
            bar.update()
        for case in dropped:
            checks += dropout_correctness(case, device)
            checks.append(determinism(case, device))
            bar.update(2)
        for operation in ("lora", "dora"):
            checks.append(determinism(Case(operation, *plan.odd[-1], HALF), device))
            bar.update()
    return checks


def launch_bytes(launch: Launch) -> int:
    """The bytes that a launch must move: each tensor once, and once more what it changes in place.

    The expanding kernel is the only one that changes a tensor in place, its first argument and the others of that group.
    """
    distinct = {arg.data_ptr(): arg for arg in launch.args if isinstance(arg, Tensor)}
    moved = sum(tensor.nbytes for tensor in distinct.values())
    if launch.name == "_expand_kernel":
        moved += sum(tensor.nbytes for tensor in {arg.data_ptr(): arg for arg in launch.args[:4]}.values())
    return moved


def bandwidth(case: Case, device: torch.device, clock: Clock, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds and GB/s of each kernel of a forward and backward pass, launched again on its own."""
    seen: list[Launch] = []
    t = tensors(case, device)
    with observing(seen.append):
        torch.autograd.grad(ours(case, t, "triton"), list(t.trained().values()), t.upstream)
    figures = {}
    for index, launch in enumerate(seen):

        def again(launch: Launch = launch) -> None:
            warps = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
            launch.kernel[launch.grid](*launch.args, **launch.constexprs, **warps)

        again()
        ms = statistics.median(clock(again) for _ in range(rounds))
        nbytes = launch_bytes(launch)
        figures[f"{index} {launch.name}"] = {"ms": ms, "bytes": nbytes, "gb_per_s": nbytes / ms / 1e6}
    return figures


def time_layers(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Spread of the milliseconds of each candidate per layer, its ratio to the fused one, and the kernels' bandwidth."""
    clock, figures = Clock(device, plan.flush), {}
    cases = [
        Case(operation, *shape, HALF, dropout=dropout)
        for shape in plan.timed
        for operation, dropout in (("lora", 0.0), ("lora", 0.05), ("dora", 0.0), ("dora", 0.05))
    ]
    for case in tqdm(cases, desc="time", unit="layer"):
        torch.compiler.reset()
        work = {
            name: (lambda step=step: clock(step)) for name, step in steps(case, device, backend=plan.backend).items()
        }
        samples = interleaved(work, rounds=plan.rounds, warmup=plan.warmup)
        figures[str(case)] = {
            "ms": {name: spread(taken) for name, taken in samples.items()},
            "relative to triton": {name: ratios(taken, samples["triton"]) for name, taken in samples.items()},
            "kernels": bandwidth(case, device, clock, plan.rounds),
        }
    return figures


def report(figures: dict[str, Any]) -> str:
    """The figures as text."""
    lines = []
    for case, cell in figures["layers"].items():
        lines.append(case)
        for name, ms in cell["ms"].items():
            lines.append(f"    {name:20}{ms[0]:9.3f} ms ({ms[1]:.3f}..{ms[2]:.3f}), x{cell['relative to triton'][name][0]:.2f}")
        for name, kernel in cell["kernels"].items():
            lines.append(f"    {name:32}{1e3 * kernel['ms']:9.1f} us{kernel['gb_per_s']:9.0f} GB/s")
    step = figures["graph"]
    lines.append("minBERT step, ms: " + ", ".join(f"{name} {ms[0]:.3f}" for name, ms in step["ms"].items()))
    return "\n".join(lines)


def run(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Check, then time.

    Raises:
        RedGateError: something is wrong, and nothing was timed.
    """
    checks = check(plan, device)
    graph_checks, graph_figures = graph_replay(
        device,
        width=plan.width,
        layers=plan.layers,
        batch=plan.batch,
        rounds=plan.rounds,
        warmup=plan.warmup,
        clock=Clock(device, plan.flush),
    )
    require_green([*checks, *graph_checks])
    return {"checks": len(checks) + len(graph_checks), "layers": time_layers(plan, device), "graph": graph_figures}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Check and time the kernels on a GPU.")
    options.add_argument("--rehearse", action="store_true", help="run it in the interpreter on CPU, with tiny sizes")
    options.add_argument("--output", type=Path, help="result file (benchmarks/results/gpu.json, or a temporary one)")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; the exit status."""
    options = parser().parse_args(arguments)
    if options.rehearse and not triton.knobs.runtime.interpret:
        print("--rehearse runs the kernels in the interpreter: set TRITON_INTERPRET=1 before the start", file=sys.stderr)
        return 2
    if not options.rehearse and not torch.cuda.is_available():
        print("there is no CUDA device here; --rehearse runs the same code in the interpreter", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.rehearse else "cuda")
    default = Path(tempfile.gettempdir()) / "peftlite-gpu-rehearsal.json" if options.rehearse else RESULTS / "gpu.json"
    output = options.output or default
    facts = machine(device.type) | {"triton": triton.__version__, "rehearsal": options.rehearse}
    os.environ["PEFTLITE_IMPL"] = "triton"  # also for layers so small that ATen calls would be chosen
    try:
        figures = run(REHEARSED if options.rehearse else REAL, device)
    except RedGateError as error:
        print(error, file=sys.stderr)
        return 1
    write_result(output, {"suite": "gpu", "machine": facts, "figures": figures})
    print(report(figures))
    print(f"\n{figures['checks']} checks green{', times of a rehearsal mean nothing' if options.rehearse else ''}; in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
