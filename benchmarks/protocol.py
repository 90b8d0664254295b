"""What all trainings on SST share: the settings, and the parts of the data."""

import dataclasses
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from examples.minbert_multitask.data import TaskData
from examples.minbert_multitask.evaluate import load_data
from examples.minbert_multitask.network import build_network
from examples.minbert_multitask.settings import Settings

TASK = "sst"


@dataclass(frozen=True)
class Protocol:
    """What all recipes share, and a figure depends on."""

    epochs: int = 2
    batch_size: int = 32
    search_examples: int = 1600
    held_examples: int = 512
    grid: int = 3  # learning rates tried at first
    grow: int = 2  # and at most so many more
    amp: str = "bf16"
    seed: int = 0
    threads: int = 1
    weights: str = "minilm"

    def record(self) -> dict[str, Any]:
        """What the result file says of the protocol; no folder of this machine."""
        return {**asdict(self), "weights": Path(self.weights).name}

    def settings(self, data: str) -> Settings:
        """The example's settings; dropout in the backbone is off, as in the example's recorded runs."""
        return Settings(
            data=data,
            tasks=TASK,
            epochs=self.epochs,
            batch_size=self.batch_size,
            amp=self.amp,
            seed=self.seed,
            threads=self.threads,
            weights=self.weights,
            backbone_dropout=0.0,
            device="cpu",
        )


class Splits(NamedTuple):
    """All of train, dev, and two disjoint parts of train: to search on, and to judge the search by."""

    train: TaskData
    dev: TaskData
    search: TaskData
    held: TaskData


def part(data: TaskData, index: list[int]) -> TaskData:
    """The examples of `data` at `index`; a single sentence each."""
    return dataclasses.replace(
        data,
        ids=[data.ids[i] for i in index],
        first=[data.first[i] for i in index],
        labels=data.labels[index],
    )


def load_splits(protocol: Protocol, data: str, cache: Path) -> Splits:
    """The data, tokenised.

    Raises:
        ValueError: train is too small for the parts that the search needs.
    """
    settings = protocol.settings(data).resolved()
    _, tokenizer = build_network(settings)
    train, dev = (load_data(settings, split, tokenizer, cache)[TASK] for split in ("train", "dev"))
    order = list(range(len(train)))
    random.Random(f"{protocol.seed}/search").shuffle(order)
    needed = protocol.search_examples + protocol.held_examples
    if needed > len(order):
        raise ValueError(
            f"train has {len(order)} examples, the search needs {needed}; lower --search-examples or --held-examples"
        )
    held = protocol.held_examples
    return Splits(train, dev, part(train, order[held:needed]), part(train, order[:held]))
