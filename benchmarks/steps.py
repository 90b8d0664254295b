"""How long a training step takes, and what it costs, with all parameters training and with adapters.

    python -m benchmarks.steps                                  # BERT-base width, 4 layers, batch 8 x 64, fp32
    python -m benchmarks.steps --amp bf16 --batch 8x64,16x128   # several cells; finished ones are not measured again

A step is forward, loss (mean of squares of the last hidden state), backward, `AdamW.step`, `zero_grad`. The model is
the example's BERT with random weights and no dropout of its own, the token ids are random and fixed. In an adapter
model nothing below the first adapter trains, so that the output of the embeddings needs no gradient, as in
`full-frozen-embeddings`. Times are medians over interleaved rounds with their 20 and 80 % quantiles; FLOPs, bytes and
operation counts are exact.
"""

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import peftlite
from benchmarks.gate import check_adapters, check_candidate
from benchmarks.harness import (
    RESULTS,
    RedGateError,
    ResultFile,
    Spread,
    interleaved,
    machine,
    ratios,
    require_green,
    spread,
)
from benchmarks.tables import steps_table
from benchmarks.training_step import TrainingStep, meter
from examples.minbert_multitask.model import BertConfig, BertModel

VOCABULARY = BertConfig().vocab_size
BASELINE = "full-frozen-embeddings"
PAIRS = (("dora", "lora"),)  # ratios worth a line of their own: numerator, denominator
TARGETS = {"qv": ["query", "value"], "all-linear": ["query", "key", "value", "dense"]}
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

    def autocast(self) -> torch.autocast:
        """The precision of the forward pass."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.amp == "bf16")

    def compute_dtype(self) -> torch.dtype:
        """The lowest precision in the forward pass, which sets the gate's budget."""
        return torch.bfloat16 if self.amp == "bf16" else DTYPES[self.base_dtype]


Builder = Callable[[BertModel, Settings], nn.Module]


def _full(model: BertModel, settings: Settings) -> nn.Module:
    return model


def _full_frozen_embeddings(model: BertModel, settings: Settings) -> nn.Module:
    model.embeddings.requires_grad_(False)
    return model


def _adapters(method: str, model: BertModel, settings: Settings) -> nn.Module:
    return peftlite.inject_adapters(
        model,
        TARGETS[settings.targets],
        settings.rank,
        method=method,
        alpha=2 * settings.rank,
        dropout=settings.dropout,
        base_dtype=None if settings.base_dtype == "fp32" else DTYPES[settings.base_dtype],
        seed=settings.seed,
    )


# Name -> builder: it gets its own copy of the base model and returns the model to train, with `requires_grad` set.
CANDIDATES: dict[str, Builder] = {
    "full": _full,
    BASELINE: _full_frozen_embeddings,
    "lora": functools.partial(_adapters, "lora"),
    "dora": functools.partial(_adapters, "dora"),
}


def base_model(settings: Settings) -> BertModel:
    """The model that every candidate starts from, with weights that `base_dtype` represents exactly."""
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
            elif isinstance(module, nn.Linear):
                module.weight.copy_(module.weight.to(DTYPES[settings.base_dtype]))
                module.bias.copy_(module.bias.to(DTYPES[settings.base_dtype]))
    return model.to(settings.device)


def batch(settings: Settings, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Random token ids `(rows, length)`, the same in every call, and their mask without padding."""
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator).to(settings.device)
    return ids, torch.ones_like(ids)


def measure(settings: Settings, candidates: Mapping[str, Builder]) -> dict[str, Any]:
    """Check, meter and time every candidate of one cell.

    Raises:
        RedGateError: a candidate computes something else than it should.
    """
    base = base_model(settings)
    models = {name: candidates[name](copy.deepcopy(base), settings) for name in settings.candidates}
    gate = {"dtype": settings.compute_dtype(), "autocast": settings.autocast}
    few = batch(settings, 2, min(8, settings.length))
    checks = []
    for name, model in models.items():
        checks += check_candidate(name, model, base, few, **gate)
        checks += check_adapters(name, peftlite.adapters(model), seed=settings.seed, **gate)
    require_green(checks)

    inputs = batch(settings, settings.rows, settings.length)
    steps = {
        name: TrainingStep(model, inputs, autocast=settings.autocast, adamw=ADAMW[settings.adamw])
        for name, model in models.items()
    }
    figures = {name: meter(step) for name, step in steps.items()}
    total = len(steps) * (settings.warmup + settings.rounds)
    with tqdm(total=total, unit="step", desc=f"{settings.rows}x{settings.length}") as bar:
        samples = interleaved(steps, rounds=settings.rounds, warmup=settings.warmup, tick=bar.update)

    for name, taken in samples.items():
        figures[name]["ms"] = {phase: spread(sample[phase] for sample in taken) for phase in taken[0]}

    def paired(a: str, b: str, phase: str) -> Spread:
        return ratios([sample[phase] for sample in samples[a]], [sample[phase] for sample in samples[b]])

    if BASELINE in samples:
        for name in samples:
            figures[name]["relative"] = {phase: paired(name, BASELINE, phase) for phase in ("step", "cpu")}
    compared = {
        f"{a} / {b}": {
            **{phase: paired(a, b, phase) for phase in ("step", "cpu")},
            **{unit: figures[a][unit] / figures[b][unit] for unit in ("gflop", "saved_mib", "forward_peak_mib")},
        }
        for a, b in PAIRS
        if a in samples and b in samples
    }
    return {"checks": len(checks), "baseline": BASELINE, "candidates": figures, "ratios": compared}


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
    if unknown := [name for name in names if name not in CANDIDATES]:
        raise argparse.ArgumentTypeError(f"no candidate {', '.join(unknown)}; there are {', '.join(CANDIDATES)}")
    return names


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.steps",
        description="Time and meter one training step, all candidates interleaved in one process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--batch", type=_shapes, default="8x64", metavar="BxT,...", help="rows x tokens; each is one cell")
    add("--candidates", type=_names, default=",".join(CANDIDATES), metavar="NAME,...", help="what to compare")
    add("--width", type=int, default=768, help="hidden features; the feed-forward block has four times as many")
    add("--layers", type=int, default=4, help="transformer layers")
    add("--targets", choices=TARGETS, default="all-linear", help="linears that get an adapter")
    add("--rank", type=int, default=8, help="rank of the adapters; alpha is twice that")
    add("--dropout", type=float, default=0.0, help="dropout of the adapters")
    add("--amp", choices=["off", "bf16"], default="off", help="autocast of the forward pass")
    add("--base-dtype", choices=DTYPES, default="fp32", help="dtype of the adapted frozen weights")
    add("--adamw", choices=ADAMW, default="default", help="implementation of the optimizer, the same for all")
    add("--rounds", type=int, default=20, help="timed rounds; each candidate takes one step in each")
    add("--warmup", type=int, default=3, help="rounds before them")
    add("--threads", type=int, default=2, help="CPU threads of torch")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the model is")
    add("--seed", type=int, default=0, help="of weights, adapters and token ids")
    add("--output", type=Path, default=RESULTS / "steps.json", help="result file; finished cells are kept")
    add("--fresh", action="store_true", help="measure finished cells again")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; the exit status."""
    options = vars(parser().parse_args(arguments))
    shapes, output, fresh = (options.pop(name) for name in ("batch", "output", "fresh"))
    torch.set_num_threads(options["threads"])
    facts = machine(options["device"])
    results = ResultFile(output, "steps")
    for index, (rows, length) in enumerate(shapes):
        settings = Settings(rows=rows, length=length, **options)
        reason = results.difference(settings.key, facts, asdict(settings))
        print(f"\n{settings.key}: {(reason or 'asked again') if reason or fresh else 'finished before'}", flush=True)
        if reason or fresh:
            try:
                results.add(settings.key, facts, asdict(settings), measure(settings, CANDIDATES))
            except RedGateError as error:
                print(error, file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print(
                    f"\ninterrupted: {index} of {len(shapes)} cells are in {output}; run again to go on",
                    file=sys.stderr,
                )
                return 130
        print(steps_table(results.cells[settings.key]))
    print(f"\nwritten to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
