"""What one large adapted layer takes: peak of the bytes alive at once, bytes saved for backward, FLOPs.

    python -m benchmarks.layer                 # 4096 x 4096, 512 tokens, rank 16, bf16 base, without and with autocast

Everything is bf16 but the adapters, which are fp32. No clock enters, so that the figures are the same on any machine. The
peaks are of what the layer itself creates: its output counts, its weights, its input and the output's gradient do not.
"""

import argparse
import copy
import functools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.candidates import CANDIDATES, Precision, build, check, missing
from benchmarks.cells import Cell, exit_status, measure_cells
from benchmarks.contests import contests, hold
from benchmarks.harness import RESULTS, ResultFile, machine, require_green
from benchmarks.peers import Plan, versions
from benchmarks.tables import layer_table
from benchmarks.training_step import MIB
from peftlite.analysis.meters import flops, saved_for_backward, transient_bytes

NAMES = tuple(name for name, kind in CANDIDATES.items() if kind.library is not None and not kind.grouped)
# loralib multiplies its input by its factors as they are, which fails for bf16 and fp32 unless autocast unites them.
MIXING = tuple(name for name in NAMES if CANDIDATES[name].library != "loralib")


@dataclass(frozen=True)
class LayerSettings:
    """Everything that a cell's figures depend on, besides the commit and the versions."""

    width: int
    tokens: int
    rank: int
    dropout: float
    amp: bool
    seed: int = 0

    @property
    def key(self) -> str:
        """The cell's name in the result file."""
        return (
            f"{self.width} x {self.width}, {self.tokens} tokens, r={self.rank} dropout={self.dropout:g}, bf16 base, "
            f"autocast {'on' if self.amp else 'off'}"
        )


class OneLinear(nn.Module):
    """`x Wᵀ + b`, in a module that adapters can be put into."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(tokens, width)` to the same."""
        return self.lin(x)


def measure(settings: LayerSettings) -> dict[str, Any]:
    """Check and meter every candidate of one cell.

    Raises:
        RedGateError: a candidate computes something else than it should.
    """
    torch.manual_seed(settings.seed)
    base = OneLinear(settings.width).to(torch.bfloat16)
    x = torch.randn(settings.tokens, settings.width, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(settings.tokens, settings.width, dtype=torch.bfloat16)
    plan = Plan(["lin"], settings.rank, settings.dropout, seed=settings.seed)
    precision = Precision(amp=settings.amp, model=torch.bfloat16)
    checks, figures = [], {}
    names = NAMES if settings.amp else MIXING
    for name in names:
        model = build(name, copy.deepcopy(base), plan, precision)
        checks += check(name, model, base, (x[:4].detach(),), plan, precision)
        figures[name] = _meter(model.train(), x, upstream, amp=settings.amp)
    require_green(checks)
    held = {contest.title: hold(contest, figures, {}) for contest in contests(names, settings.amp)}
    return {"checks": len(checks), "candidates": figures, "ratios": held}


def _meter(model: nn.Module, x: Tensor, upstream: Tensor, *, amp: bool) -> dict[str, float]:
    def forward() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            return model(x)

    def both() -> None:
        y = forward()
        y.backward(upstream.to(y.dtype))

    def forget() -> None:
        x.grad = None
        model.zero_grad(set_to_none=True)

    gflop = flops(both) / 1e9
    forget()
    step_peak = transient_bytes(both).peak
    forget()
    return {
        "forward_peak_mib": transient_bytes(forward).peak / MIB,
        "step_peak_mib": step_peak / MIB,
        "saved_mib": saved_for_backward(forward, exclude=[model, x]).bytes / MIB,
        "gflop": gflop,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; the exit status."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.layer",
        description="Meter one adapted layer: bytes and FLOPs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--width", type=int, default=4096, help="input and output features")
    command.add_argument("--tokens", type=int, default=512, help="rows of the input")
    command.add_argument("--rank", type=int, default=16, help="of the adapters; alpha is twice that")
    command.add_argument("--output", type=Path, default=RESULTS / "layer.json", help="result file; finished cells are kept")
    options = command.parse_args(arguments)
    if absent := missing(NAMES):
        command.error(f"{', '.join(absent)} is not installed: pip install 'peftlite[bench]'")
    asked = [
        LayerSettings(options.width, options.tokens, options.rank, dropout, amp)
        for amp in (False, True)
        for dropout in (0.0, 0.05)
    ]

    def run() -> bool:
        planned = [Cell(settings.key, asdict(settings), functools.partial(measure, settings)) for settings in asked]
        measure_cells(planned, ResultFile(options.output, "layer"), machine() | versions(), layer_table)
        return True

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
