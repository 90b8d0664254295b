"""How long a training step takes, and what it costs: full fine-tuning, our adapters and the peers', side by side.

    python -m benchmarks.steps --preset peers                   # the whole comparison; finished cells are not measured again
    python -m benchmarks.steps                                  # its first cell: BERT-base width, 4 layers, 8 x 64, fp32
    python -m benchmarks.steps --amp bf16 --batch 8x64,16x128   # cells of one's own

A step is forward, loss (mean of squares of the last hidden state), backward, `AdamW.step`, `zero_grad`. The model is
the example's BERT with random weights and no dropout of its own, the token ids are random and fixed. In an adapter
model nothing below the first adapter trains, so that the output of the embeddings needs no gradient, as in
`full-frozen-embeddings`. All candidates of a cell take turns in one process. Times are medians over interleaved rounds
with their 20 and 80 % quantiles; FLOPs, bytes and operation counts are exact.
"""

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.candidates import (
    BASELINE,
    GROUPS,
    PRECISIONS,
    TARGETS,
    Precision,
    build,
    check,
    default_candidates,
    missing,
    split,
)
from benchmarks.cells import Cell, exit_status, measure_cells
from benchmarks.contests import contests, hold
from benchmarks.harness import RESULTS, ResultFile, interleaved, machine, ratios, require_green, spread
from benchmarks.peers import Plan, versions
from benchmarks.presets import PRESETS
from benchmarks.tables import steps_table
from benchmarks.training_step import TrainingStep, meter
from examples.minbert_multitask.model import BertConfig, BertModel

VOCABULARY = BertConfig().vocab_size
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAMW: dict[str, dict[str, bool]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@dataclass(frozen=True)
class Settings:
    """Everything that a cell's figures depend on, besides machine and commit."""

    rows: int
    length: int
    candidates: tuple[str, ...]
    width: int
    layers: int
    targets: str
    rank: int
    dropout: float
    amp: str
    base_dtype: str
    adamw: str
    rounds: int
    warmup: int
    threads: int
    device: str
    seed: int

    @property
    def key(self) -> str:
        """The cell's name in the result file: what a reader would compare it by."""
        return (
            f"{self.device} {self.threads} threads, width {self.width}, {self.layers} layers, {self.targets} "
            f"r={self.rank} dropout={self.dropout:g}, amp={self.amp} base={self.base_dtype} adamw={self.adamw}, "
            f"{self.rows}x{self.length}"
        )

    def precision(self, candidate: str) -> Precision:
        """How `candidate` computes: as its name says, or as the cell does."""
        kind, own = split(candidate)
        if own is not None:
            return PRECISIONS[own]
        held_apart = kind.library == "ours" and self.base_dtype != "fp32"
        return Precision(self.amp == "bf16", DTYPES[self.base_dtype] if held_apart else None)

    def autocast(self, precision: Precision) -> Callable[[], torch.autocast]:
        """Makes the context of the forward pass."""
        return functools.partial(torch.autocast, self.device, torch.bfloat16, enabled=precision.amp)

    def plan(self) -> Plan:
        """What the adapters adapt, and how."""
        return Plan(TARGETS[self.targets], self.rank, self.dropout, fuse=GROUPS[self.targets], seed=self.seed)


def base_model(settings: Settings) -> BertModel:
    """The model that every candidate starts from, with weights that each candidate's dtypes represent exactly."""
    torch.manual_seed(settings.seed)
    config = BertConfig(
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        num_attention_heads=max(heads for heads in range(1, 13) if settings.width % heads == 0),
        num_hidden_layers=settings.layers,
        max_position_embeddings=max(512, settings.length),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                # With the weights at one the loss would be constant: normalised features have mean square one.
                module.weight.normal_(1.0, 0.1)
                module.bias.normal_(0.0, 0.1)
        held = {dtype for name in settings.candidates for dtype in settings.precision(name)[1:3] if dtype is not None}
        for dtype in sorted(held, key=str):
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
    return model.to(settings.device)


def batch(settings: Settings, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Random token ids `(rows, length)`, the same in every call, and their mask without padding."""
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator).to(settings.device)
    return ids, torch.ones_like(ids)


def measure(settings: Settings) -> dict[str, Any]:
    """Check, meter and time every candidate of one cell, and hold the contests among them.

    Raises:
        RedGateError: a candidate computes something else than it should.
    """
    base, plan = base_model(settings), settings.plan()
    few = batch(settings, 2, min(8, settings.length))
    inputs = batch(settings, settings.rows, settings.length)
    figures, steps, checks = {}, {}, []
    total = len(settings.candidates) * (1 + settings.warmup + settings.rounds)
    with tqdm(total=total, unit="step", desc=f"{settings.rows}x{settings.length}") as bar:
        for name in settings.candidates:
            precision = settings.precision(name)
            model = build(name, copy.deepcopy(base), plan, precision)
            checks += check(name, model, base, few, plan, precision)
            steps[name] = TrainingStep(model, inputs, autocast=settings.autocast(precision), adamw=ADAMW[settings.adamw])
            bar.update()
        require_green(checks)
        figures = {name: meter(step) for name, step in steps.items()}
        samples = interleaved(steps, rounds=settings.rounds, warmup=settings.warmup, tick=bar.update)

    for name, taken in samples.items():
        figures[name]["ms"] = {phase: spread(sample[phase] for sample in taken) for phase in taken[0]}

    if BASELINE in samples:
        for name, taken in samples.items():
            figures[name]["relative"] = {
                phase: ratios([sample[phase] for sample in taken], [sample[phase] for sample in samples[BASELINE]])
                for phase in ("step", "cpu")
            }
    held = {contest.title: hold(contest, figures, samples) for contest in contests(settings.candidates, settings.amp != "off")}
    return {"checks": len(checks), "baseline": BASELINE, "candidates": figures, "ratios": held}


def _shapes(text: str) -> list[tuple[int, int]]:
    try:
        shapes = [tuple(int(size) for size in shape.split("x")) for shape in text.split(",")]
    except ValueError:
        shapes = [()]
    if any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of batches; write ROWSxLENGTH, as in 8x64,16x128")
    return shapes


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    try:
        for name in names:
            split(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a candidate twice")
    return names


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.steps",
        description="Time and meter one training step, all candidates interleaved in one process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--preset", choices=PRESETS, help="a list of cells; it sets the options that tell them apart")
    add("--batch", type=_shapes, default="8x64", metavar="BxT,...", help="rows x tokens; each is one cell")
    add("--candidates", type=_names, metavar="NAME[@PRECISION],...", help="what to compare; by default all libraries that fit")
    add("--width", type=int, default=768, help="hidden features; the feed-forward block has four times as many")
    add("--layers", type=int, default=4, help="transformer layers")
    add("--targets", choices=TARGETS, default="all-linear", help="linears that get an adapter")
    add("--rank", type=int, default=8, help="rank of the adapters; alpha is twice that")
    add("--dropout", type=float, default=0.0, help="dropout of the adapters")
    add("--amp", choices=["off", "bf16"], default="off", help="autocast of the forward pass")
    add("--base-dtype", choices=DTYPES, default="fp32", help="dtype of our adapted frozen weights")
    add("--adamw", choices=ADAMW, default="default", help="implementation of the optimizer, the same for all")
    add("--rounds", type=int, default=20, help="timed rounds; each candidate takes one step in each")
    add("--warmup", type=int, default=3, help="rounds before them")
    add("--threads", type=int, default=2, help="CPU threads of torch")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the model is")
    add("--seed", type=int, default=0, help="of weights, adapters and token ids")
    add("--output", type=Path, default=RESULTS / "steps.json", help="result file; finished cells are kept")
    add("--fresh", action="store_true", help="measure finished cells again")
    return options


def cells(options: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Iterator[Settings]:
    """The cells that the options ask for.

    Args:
        options: the command line's, by name.
        given: of these, the ones that differ from their defaults; a preset refuses to have them overruled.

    Raises:
        ValueError: an option is given beside a preset that sets it.
    """
    rest = {name: value for name, value in options.items() if name not in ("preset", "batch", "output", "fresh")}
    for changes in PRESETS.get(options["preset"], ({},)):
        if clash := [name for name in changes if name in (given or {})]:
            option = f"--{clash[0].replace('_', '-')}"
            raise ValueError(f"--preset {options['preset']} sets {option} itself; leave one of the two out")
        one = rest | {name: value for name, value in changes.items() if name != "batch"}
        one["candidates"] = one["candidates"] or default_candidates(one["amp"])
        for rows, length in changes.get("batch", options["batch"]):
            yield Settings(rows=rows, length=length, **one)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; the exit status."""
    command = parser()
    options = vars(command.parse_args(arguments))
    defaults = vars(command.parse_args([]))
    try:
        asked = list(cells(options, {name: value for name, value in options.items() if value != defaults[name]}))
    except ValueError as error:
        command.error(str(error))
    if absent := missing(name for settings in asked for name in settings.candidates):
        command.error(f"{', '.join(absent)} is not installed: pip install 'peftlite[bench]', or leave it out of --candidates")
    torch.set_num_threads(options["threads"])

    def run() -> bool:
        facts, results = machine(options["device"]) | versions(), ResultFile(options["output"], "steps")
        planned = [Cell(settings.key, asdict(settings), functools.partial(measure, settings)) for settings in asked]
        measure_cells(planned, results, facts, steps_table, fresh=options["fresh"])
        return True

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
