"""Every way to train minBERT that is compared: the methods, what they are compared with, and LoRA's relatives."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import optim

import peftlite
from examples.minbert_multitask.controllers import make_controller
from examples.minbert_multitask.model import BertModel
from examples.minbert_multitask.network import MultitaskBert, build_network, prepare_training
from examples.minbert_multitask.optimizer import make_optimizer
from examples.minbert_multitask.settings import ALL_LINEAR, Settings
from peftlite.methods.xgblora import XGBLoRA

RANK = 8
RANKS = tuple(range(1, RANK + 1))  # at which DyLoRA's one training is compared with a training for each
XGB_ROUNDS = 8  # boosters of rank 1, for the size of LoRA's adapter
TOP = 3  # layers of MiniLM's six


@dataclass(frozen=True)
class Recipe:
    """One way to train, apart from the protocol that all share.

    Attributes:
        name: key of the result.
        method: as in the example's settings: an adapter method, ``full``, ``linear-probe``, ``bitfit``, ``lisa``, ``reflora``.
        rank: rank of the adapters; where a method means something else by it, what gives it about LoRA's size.
        lr: usual learning rate, the middle of the grid; of the heads where nothing else trains.
        options: of the method, for `peftlite.inject_adapters`.
        control: options of DyLoRA's controller.
        settings: of the example, where they differ from the protocol's.
        base: code in which the frozen base is held (``nf4``, ``int8``), or None.
        top: adapt the last layers alone, so many.
        lora_plus_ratio: see `peftlite.param_groups`.
    """

    name: str
    method: str
    rank: int = RANK
    lr: float = 1e-3
    options: Mapping[str, Any] = field(default_factory=dict)
    control: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    top: int | None = None
    lora_plus_ratio: float = 1.0

    @property
    def tuned(self) -> str:
        """The setting that the search is over."""
        return "head_lr" if self.method == "linear-probe" else "lr"

    def record(self) -> dict[str, Any]:
        """What the result file says of the recipe."""
        return {
            "method": self.method,
            "rank": self.rank,
            "lr": self.lr,
            "options": dict(self.options),
            "changes": dict(self.settings),
            "base": self.base,
            "top": self.top,
            "lora_plus_ratio": self.lora_plus_ratio,
            **({"control": dict(self.control)} if self.control else {}),
        }

    def resolved(self, settings: Settings, **changes: Any) -> Settings:
        """`settings` of the protocol for this recipe, with `changes`."""
        own = {"method": self.method, "rank": self.rank, **self.settings, **changes}
        if self.base is not None:
            own["base_dtype"] = "fp32"  # codes and scales have dtypes of their own
        return Settings(**{**vars(settings), **own}).resolved()

    def build(self, settings: Settings, bert: BertModel | None = None) -> MultitaskBert:
        """The network, ready to be trained, on the pretrained weights or on `bert`, which it takes for itself."""
        network = build_network(settings)[0] if bert is None else MultitaskBert(bert, settings)
        backbones = network.backbones
        if self.base is not None:
            peftlite.quantize_base(backbones, settings.target_names(), self.base)
        targets = None if self.top is None else peftlite.top_layers(backbones, ALL_LINEAR, self.top)
        prepare_training(network, settings, targets=targets, options=self.options)
        return network.to(settings.device).train()

    def optimizer(self, network: MultitaskBert, settings: Settings) -> optim.Optimizer:
        """The example's optimizer, LoRA+'s ratio added."""
        return make_optimizer(network, settings, lora_plus_ratio=self.lora_plus_ratio)

    def controller(
        self, network: MultitaskBert, optimizer: optim.Optimizer, settings: Settings, steps: int
    ) -> peftlite.Controller | None:
        """The method's controller for a run of `steps` optimizer steps; None if it has none."""
        if self.method == "xgblora":
            length = math.ceil(steps / XGB_ROUNDS)
            return XGBLoRA(network.backbones, optimizer, steps_per_round=length, rounds=XGB_ROUNDS, seed=settings.seed)
        if self.control:
            return peftlite.DyLoRA(network.backbones, optimizer, seed=settings.seed, **self.control)
        return make_controller(network.backbones, optimizer, settings, steps)


def _recipes() -> dict[str, Recipe]:
    plain = [
        Recipe("full", "full", lr=1e-4),
        Recipe("linear-probe", "linear-probe"),
        Recipe("bitfit", "bitfit"),
        Recipe("lisa", "lisa", lr=1e-4),
    ]
    own = {  # where neither LoRA's rank nor its learning rate is the usual one
        "lora_fa": {"lr": 3e-3},
        "tt_lora": {"lr": 3e-3},
        "paca": {"rank": 16, "lr": 3e-4},
        "pissa": {"lr": 3e-4},
        "olora": {"lr": 3e-4},
        "ia3": {"rank": 1, "lr": 1e-2},
        "xgblora": {"rank": 1, "lr": 3e-3},
        "loha": {"rank": 4, "lr": 3e-3},
        "lokr": {"lr": 3e-3},
        "vera": {"rank": 256, "lr": 1e-2},
        "tied_lora": {"lr": 3e-3},
    }
    adapters = [Recipe(name, name, **own.get(name, {})) for name in peftlite.METHODS]
    relatives = [
        Recipe("dylora-full", "dylora", control={"update": "full"}),
        Recipe("reflora", "reflora"),
        Recipe("rslora", "lora", options={"rslora": True}),
        Recipe("lora-plus", "lora", lr=3e-4, lora_plus_ratio=16.0),
        Recipe(f"lora-top{TOP}", "lora", top=TOP),
        Recipe("qlora", "lora", base="nf4"),
        Recipe("lora-fp32", "lora", settings={"amp": "off"}),
        Recipe("lora-r64", "lora", rank=64),
        *(Recipe(f"lora-r{rank}", "lora", rank=rank) for rank in RANKS if rank != RANK),
    ]
    return {recipe.name: recipe for recipe in (*plain, *adapters, *relatives)}


RECIPES = _recipes()
