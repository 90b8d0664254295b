"""What all trainings that are compared share: the task, the settings, and the parts of the data."""

import dataclasses
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from examples.minbert_multitask.data import TaskData
from examples.minbert_multitask.evaluate import load_data
from examples.minbert_multitask.network import build_network
from examples.minbert_multitask.settings import Settings


@dataclass(frozen=True)
class Protocol:
    """What all recipes share, and a figure depends on."""

    task: str = "sst"
    epochs: int = 1
    steps: int = 0  # optimizer steps, in place of the epochs where not 0
    batch_size: int = 32
    search_examples: int = 1000
    held_examples: int = 512
    train_examples: int = 0  # a fixed part of train, drawn at random; 0: all of it
    dev_examples: int = 0
    grid: int = 3  # learning rates tried at first
    grow: int = 2  # and at most so many more
    descend: int = 2  # whole trainings at lower rates after the first, at most
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
            tasks=self.task,
            epochs=self.epochs,
            steps=self.steps or None,
            batch_size=self.batch_size,
            amp=self.amp,
            seed=self.seed,
            threads=self.threads,
            weights=self.weights,
            backbone_dropout=0.0,
            device="cpu",
        )


class Splits(NamedTuple):
    """What is trained on, dev, and two disjoint parts of the first: to search on, and to judge the search by."""

    train: TaskData
    dev: TaskData
    search: TaskData
    held: TaskData


def part(data: TaskData, index: list[int]) -> TaskData:
    """The examples of `data` at `index`."""
    return dataclasses.replace(
        data,
        ids=[data.ids[i] for i in index],
        first=[data.first[i] for i in index],
        second=None if data.second is None else [data.second[i] for i in index],
        labels=data.labels[index],
    )


def some(data: TaskData, count: int) -> TaskData:
    """`count` examples drawn at random, the same in every run, in the file's order; all of them for 0."""
    if not count or count >= len(data):
        return data
    return part(data, sorted(random.Random(f"{data.task}/{data.split}").sample(range(len(data)), count)))


def load_splits(protocol: Protocol, data: str, cache: Path) -> Splits:
    """The data, tokenised.

    Raises:
        ValueError: train is too small for the parts that the search needs.
    """
    settings = protocol.settings(data).resolved()
    _, tokenizer = build_network(settings)
    train, dev = (load_data(settings, split, tokenizer, cache)[protocol.task] for split in ("train", "dev"))
    train, dev = some(train, protocol.train_examples), some(dev, protocol.dev_examples)
    order = list(range(len(train)))
    random.Random(f"{protocol.seed}/search").shuffle(order)
    needed = protocol.search_examples + protocol.held_examples
    if needed > len(order):
        raise ValueError(
            f"train has {len(order)} examples, the search needs {needed}; lower --search-examples or --held-examples"
        )
    held = protocol.held_examples
    return Splits(train, dev, part(train, order[held:needed]), part(train, order[:held]))
