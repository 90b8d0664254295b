"""What the suite `quality` shares among its claims: its options, the protocol of each task, the data, the names of cells."""

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import write_result
from benchmarks.protocol import Protocol, Splits, load_splits
from examples.minbert_multitask.data import DATA_FILES, DEFAULT_FOLDER
from examples.minbert_multitask.settings import Settings

SUITE = "quality"
TASKS = ("sst", "quora", "sts")


@dataclass(frozen=True)
class Options:
    """Everything that a figure depends on besides the data, the machine and the commit; every field is an option."""

    weights: str = "minilm"
    threads: int = 1
    batch_size: int = 32
    epochs: int = 1  # of every training of claims A and B
    steps: int = 0  # in place of the epochs where not 0
    search_examples: int = 1440  # one pass over them for each learning rate
    held_examples: int = 512  # that judge it
    grid: int = 3  # learning rates, the same number for every recipe
    quora_train: int = 4000  # pairs drawn from train; 0: all
    quora_dev: int = 2000
    member_steps: int = 300  # of every member of the ensembles of claim C, the tasks in turn
    rounds: int = 12  # of claim A's timing
    pass_batches: int = 4  # batches that stand for an epoch in it
    memory_batch: int = 64  # of its figures beside the authors' own


SMALL = Options(
    batch_size=8, steps=4, search_examples=16, held_examples=16, grid=2, quora_train=64, quora_dev=32, member_steps=6,
    rounds=2, pass_batches=1, memory_batch=16,
)  # fmt: skip


@dataclass(frozen=True)
class Study:
    """One folder of cells: the options, the data, where things lie, and how much is asked for.

    Attributes:
        options: see `Options`.
        data: folder with the data files, or ``sample``.
        output: folder of cells, token cache and trained tensors.
        seeds: trainings for each recipe of claim B.
        ranks: of claim B.
        members: of each ensemble of claim C.
    """

    options: Options
    data: str
    output: Path
    seeds: int = 3
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)
    members: int = 5

    @property
    def cache(self) -> Path:
        """Folder of tokenised data."""
        return self.output / "token-cache"

    def protocol(self, task: str, seed: int = 0, *, amp: str = "bf16") -> Protocol:
        """The protocol of the trainings of one task."""
        options, quora = self.options, task == "quora"
        return Protocol(
            task=task,
            epochs=options.epochs,
            steps=options.steps,
            batch_size=options.batch_size,
            search_examples=options.search_examples,
            held_examples=options.held_examples,
            train_examples=options.quora_train if quora else 0,
            dev_examples=options.quora_dev if quora else 0,
            grid=options.grid,
            grow=0,  # or the recipes would not have equal budgets
            descend=1,
            amp=amp,
            seed=seed,
            threads=options.threads,
            weights=options.weights,
        )

    def settings(self, task: str, seed: int = 0, *, amp: str = "bf16") -> Settings:
        """The example's settings for one of those trainings."""
        return self.protocol(task, seed, amp=amp).settings(self.data)

    def splits(self, task: str) -> Splits:
        """The data of a task, the same for all seeds and recipes."""
        return _splits(self.protocol(task), self.data, self.cache)

    def record(self) -> dict[str, Any]:
        """What all cells of the folder have in common."""
        weights = Path(self.options.weights).name
        return {**asdict(self.options), "weights": weights, "data": self.digest()}

    def digest(self) -> str:
        """sha256, shortened, of the files of train and dev."""
        return _digest(self.data)

    def claim_folder(self) -> None:
        """Make the folder this study's own.

        Raises:
            ValueError: it holds cells that were measured with other options or on other data.
        """
        path = self.output / "study.json"
        if not path.exists():
            write_result(path, self.record())
        found, asked = json.loads(path.read_text(encoding="utf-8")), self.record()
        if wrong := [name for name in asked if found.get(name, asked[name]) != asked[name]]:
            name = wrong[0]
            raise ValueError(
                f"{self.output} holds cells of another study: {name} was {found[name]!r}, is {asked[name]!r}; "
                "give the same options or choose another --output"
            )


@functools.lru_cache(maxsize=8)
def _splits(protocol: Protocol, data: str, cache: Path) -> Splits:
    return load_splits(protocol, data, cache)


@functools.lru_cache(maxsize=8)
def _digest(data: str) -> str:
    folder = DEFAULT_FOLDER if data == "sample" else Path(data)
    digest = hashlib.sha256()
    for task in TASKS:
        for split in ("train", "dev"):
            path = folder / DATA_FILES[task][split]
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path.name} is missing from {folder}; the suite needs SST, Quora and STS, "
                    "which `python -m examples.minbert_multitask.data fetch DIR` downloads"
                )
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def trained_weight(task: str) -> float:
    """Expected cost of a step beside that of one on SST, for the time left: pairs are two sentences."""
    return 1.0 if task == "sst" else 1.3


def key(*parts: object) -> str:
    """Name of a cell."""
    return "/".join(map(str, parts))
