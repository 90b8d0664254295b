"""The settings of a run: one dataclass, of which the command line, the checks and the record are made."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from dataclasses import dataclass, field

import torch

import peftlite
from examples.minbert_multitask.heads import HEADS
from examples.minbert_multitask.schedule import LR_SCHEDULES, SAMPLINGS
from examples.minbert_multitask.tasks import SST_LOSSES, STS_LOSSES, find_task
from peftlite.fusion import can_fuse

ATTENTION = ("query", "key", "value")
# Patterns rather than "all-linear", since that would take in a pooler; the pooler and the heads are never adapted.
ALL_LINEAR = (
    *ATTENTION,
    "*.attention.output.dense",
    "*.intermediate.dense",
    "*.layer.*.output.dense",
)
PLAIN_METHODS = ("full", "linear-probe", "bitfit", "lisa")  # those without adapters
STEP_METHODS = {"reflora": "lora"}  # those that step the adapters of another method in their own way
DEFAULT_LR = {
    **{"full": 1e-4, "lisa": 1e-4, "linear-probe": 1e-3},
    **{"vera": 1e-2, "ia3": 3e-3, "tt_lora": 5e-3},  # vectors and products of many factors: the rates of their authors
}  # other adapters 1e-3: they learn too little at 1e-4
CHOICES = {
    "amp": ("off", "bf16", "fp16"),
    "base_dtype": ("auto", "fp32", "bf16"),
    "optimizer": ("adamw", "adamax"),
    "lr_schedule": LR_SCHEDULES,
    "sampling": SAMPLINGS,
    "unfreeze": ("none", "progressive"),
    "pooling": ("mean", "cls"),
    "head": HEADS,
    "sst_loss": SST_LOSSES,
    "sts_loss": STS_LOSSES,
    "device": ("auto", "cpu", "cuda"),
    "backbones": (1, 2),
}
MAY_CHANGE = ("output", "save_every")  # settings that do not touch the result, so that a resumed run may change them


def _option(default: object, text: str) -> typing.Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Everything that fixes a run. `None` means "chosen from the other settings" and is filled in by `resolved()`."""

    output: str = _option("runs/minbert", "folder of the run")
    data: str = _option("sample", "folder with the data files, or 'sample' for the embedded sample")
    tasks: str = _option("sst,quora,sts", "tasks to train, from sst, cfimdb, quora, sts")
    weights: str = _option("minilm", "pretrained BERT: 'minilm', a local folder or a hub name")
    method: str = _option("lora", "full, linear-probe, bitfit, lisa, reflora, or an adapter method of peftlite.METHODS")
    rank: int = _option(8, "rank of the adapters")
    alpha: float | None = _option(None, "scale of the adapters is alpha / rank; default: rank")
    targets: str = _option("all-linear", "attn (query, key, value), all-linear (the six of each layer), or names")
    dropout: float = _option(0.0, "dropout before the adapters")
    backbone_dropout: float | None = _option(None, "dropout inside the BERT; default: that of its config.json")
    backbones: int = _option(1, "1: one BERT for all tasks; 2: one for sentiment, one for pairs")
    pooling: str = _option("mean", "sentence vector: mean over tokens, or the first token (cls)")
    cross_encoder: bool = _option(False, "read both sentences of a pair as one sequence")
    head: str = _option("linear", "heads: linear, nonlinear or conv")
    head_dropout: float = _option(0.1, "dropout before the heads")
    sst_loss: str = _option("cross-entropy", "cross-entropy, or ordinal (cumulative link)")
    sts_loss: str = _option("mse", "mse, or pearson (1 - r over the batch)")
    amp: str = _option("off", "autocast of the backbone: off, bf16 or fp16 (CUDA only)")
    base_dtype: str = _option("auto", "frozen weights under adapters: fp32, bf16, or auto: bf16 with --amp bf16")
    optimizer: str = _option("adamw", "adamw or adamax")
    lr: float | None = _option(None, "peak learning rate; default: that of the method, 1e-3 for LoRA and 1e-4 for full")
    head_lr: float | None = _option(None, "peak learning rate of the heads; default: 1e-3")
    unfreeze_lr: float = _option(5e-5, "peak learning rate of what progressive unfreezing releases beside adapters")
    weight_decay: float = _option(0.01, "weight decay of matrices")
    warmup: float = _option(0.06, "share of the steps that warm up")
    lr_schedule: str = _option("linear", "decay after the warm-up: linear, cosine, or constant")
    clip: float = _option(1.0, "largest norm of the gradient; 0: no clipping")
    sampling: str = _option("proportional", "order of the tasks: sequential, round-robin, proportional or annealed")
    lr_multiplier: str = _option("", "learning rate factors of single tasks, such as sst=2,quora=0.5")
    unfreeze: str = _option("none", "progressive: release the unadapted layers from the top, a quarter per epoch")
    accumulate: int = _option(1, "batches per optimizer step")
    epochs: int = _option(3, "epochs, unless --steps is given")
    steps: int | None = _option(None, "optimizer steps, in place of --epochs")
    batch_size: int = _option(32, "examples per batch")
    max_length: int = _option(128, "longest sequence, in tokens")
    patience: int = _option(0, "stop after so many evaluations without a better score; 0: never")
    eval_every: int | None = _option(None, "steps between evaluations; default: one epoch")
    eval_limit: int = _option(0, "dev examples per task in the evaluations during training; 0: all")
    save_every: int = _option(100, "steps between saves of the state that --resume goes on from")
    log_every: int = _option(25, "steps between training losses in metrics.jsonl")
    seed: int = _option(0, "seed of heads, adapters, order of the data and dropout")
    device: str = _option("auto", "auto, cpu or cuda")
    threads: int | None = _option(None, "CPU threads; default: torch's choice")

    def task_names(self) -> list[str]:
        """The tasks as a list, in the order given."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    def target_names(self) -> list[str]:
        """What `peftlite.inject_adapters` is asked to adapt."""
        shorthand = {"attn": ATTENTION, "all-linear": ALL_LINEAR}
        return list(shorthand.get(self.targets) or [name.strip() for name in self.targets.split(",") if name.strip()])

    def multipliers(self) -> dict[str, float]:
        """Learning rate factor of every task."""
        factors = dict.fromkeys(self.task_names(), 1.0)
        for part in filter(None, (p.strip() for p in self.lr_multiplier.split(","))):
            task, _, value = part.partition("=")
            if task not in factors:
                raise ValueError(
                    f"lr-multiplier names task {task!r}, which is not trained; trained: {', '.join(factors)}"
                )
            try:
                factors[task] = float(value)
            except ValueError:
                raise ValueError(f"lr-multiplier {part!r} is not of the form task=number") from None
        return factors

    def has_adapters(self) -> bool:
        """Whether the method injects adapters."""
        return self.method not in PLAIN_METHODS

    def layer_method(self) -> str:
        """The method of the adapted layers, of `peftlite.METHODS`."""
        return STEP_METHODS.get(self.method, self.method)

    def fused_names(self) -> list[tuple[str, ...]]:
        """Adapted layers that read the same input, and that `peftlite.inject_adapters` is asked to run together."""
        names = tuple(name for name in ATTENTION if name in self.target_names())
        if len(names) < 2 or not self.has_adapters():
            return []
        return [names] if can_fuse(peftlite.METHODS[self.layer_method()]) else []

    def resolved(self) -> Settings:
        """These settings, checked, with every default filled in.

        Raises:
            ValueError: With the setting, its value and the choices, for the first setting that is wrong.
        """
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{_flag(name)} {getattr(self, name)!r} is unknown; choose one of {', '.join(map(str, choices))}"
                )
        if not self.task_names():
            raise ValueError("tasks is empty; choose from sst, cfimdb, quora, sts")
        for name in self.task_names():
            find_task(name)
        if len(set(self.task_names())) < len(self.task_names()):
            raise ValueError(f"tasks {self.tasks!r} names a task twice")
        methods = (*PLAIN_METHODS, *STEP_METHODS, *peftlite.METHODS)
        if self.method not in methods:
            raise ValueError(f"method {self.method!r} is unknown; choose one of {', '.join(methods)}")
        if self.method in ("linear-probe", "bitfit") and self.unfreeze == "progressive":
            raise ValueError(
                f"unfreeze 'progressive' contradicts method {self.method!r}, which trains no layer; use 'full'"
            )
        if self.method == "lisa" and self.unfreeze == "progressive":
            raise ValueError(
                "unfreeze 'progressive' contradicts method 'lisa', which draws the layers that train; use 'full'"
            )
        self.multipliers()
        for name in ("rank", "accumulate", "epochs", "steps", "batch_size", "max_length", "eval_every", "save_every",
                     "log_every", "threads"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{_flag(name)} must be at least 1, got {value}")
        for name in ("lr", "head_lr", "unfreeze_lr", "alpha"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{_flag(name)} must be above 0, got {value}")
        for name in ("dropout", "head_dropout", "backbone_dropout", "warmup"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{_flag(name)} must be in [0, 1), got {value}")
        for name in ("patience", "eval_limit", "clip", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{_flag(name)} must not be negative, got {getattr(self, name)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, and torch finds no CUDA device here; use 'cpu' or 'auto'")
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        if self.amp == "fp16" and device == "cpu":
            raise ValueError(
                "amp 'fp16' needs a CUDA device (its gradients underflow without loss scaling); use 'bf16'"
            )
        return dataclasses.replace(
            self,
            lr=self.lr if self.lr is not None else DEFAULT_LR.get(self.method, 1e-3),
            head_lr=self.head_lr if self.head_lr is not None else 1e-3,
            # Autocast would round the frozen weights to bf16 in every step; held in bf16 they are rounded once
            base_dtype=("bf16" if self.amp == "bf16" else "fp32") if self.base_dtype == "auto" else self.base_dtype,
            device=device,
            threads=self.threads if self.threads is not None else torch.get_num_threads(),
        )


def _flag(name: str) -> str:
    return name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option per field of `Settings`; options that are not given are left out of the namespace."""
    types = typing.get_type_hints(Settings)
    for spec in dataclasses.fields(Settings):
        text = spec.metadata["help"].replace("%", "%%")
        if "default" not in text and types[spec.name] is not bool:
            text += f" (default: {spec.default})" if spec.default != "" else ""
        flag = f"--{_flag(spec.name)}"
        if types[spec.name] is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        kind = next(t for t in (typing.get_args(types[spec.name]) or (types[spec.name],)) if t is not type(None))
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text, metavar=spec.name.upper())


def differing(saved: dict[str, object], asked: dict[str, object]) -> str | None:
    """A sentence naming the first setting in `asked` that is not what the run was started with, or None."""
    for name, value in asked.items():
        if name not in MAY_CHANGE and saved.get(name) != value:
            return f"{_flag(name)} is {saved.get(name)!r} in the run and {value!r} now"
    return None
