"""Score a run on a labelled split: `python -m examples.minbert_multitask.evaluate RUN [--data DIR] [--split dev]`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import peftlite
from examples.minbert_multitask.data import DEFAULT_FOLDER, TaskData, batches, collate, load_task
from examples.minbert_multitask.network import MultitaskBert, build_network
from examples.minbert_multitask.run_folder import BEST, RunFolder
from examples.minbert_multitask.settings import Settings
from examples.minbert_multitask.tasks import leaderboard_score, predictions, task_score
from examples.minbert_multitask.tokenizer import load_tokenizer

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(settings: Settings) -> torch.autocast:
    """The autocast that `settings.amp` asks for; disabled for "off"."""
    return torch.autocast(settings.device, dtype=AMP_DTYPES.get(settings.amp), enabled=settings.amp != "off")


def task_outputs(
    network: MultitaskBert, data: TaskData, settings: Settings, *, on_batch: Callable[[], None] | None = None
) -> Tensor:
    """Logits `(N, outputs)` of all examples, fp32 on the CPU.

    Runs in evaluation mode without autograd, over batches of like length, and puts the network back in its mode.
    Adapters stay unmerged: a merged weight is rounded otherwise under bf16 autocast, and borderline answers would
    change.

    Args:
        network: The network, on `settings.device`.
        data: The examples.
        settings: Batch size, precision and sequence length.
        on_batch: Called after each batch; it may raise to interrupt.
    """
    cross = settings.cross_encoder
    order = batches(data, 2 * settings.batch_size, seed=0, epoch=0, shuffle=False, cross_encoder=cross)
    mode = network.training
    network.eval()
    parts = []
    try:
        with torch.inference_mode(), autocast(settings):
            for index in order:
                batch = collate(data, index, cross_encoder=cross, max_length=settings.max_length).to(settings.device)
                parts.append(network(data.task, batch).float().cpu())
                if on_batch is not None:
                    on_batch()
    finally:
        network.train(mode)
    places = torch.tensor([i for index in order for i in index])
    logits = torch.cat(parts)
    return torch.empty_like(logits).index_copy_(0, places, logits)  # in the order of the file


def first_examples(data: TaskData, count: int) -> TaskData:
    """The first `count` examples, or all for 0."""
    if not count or count >= len(data):
        return data
    return dataclasses.replace(
        data,
        ids=data.ids[:count],
        first=data.first[:count],
        second=data.second[:count] if data.second is not None else None,
        labels=data.labels[:count] if data.labels is not None else None,
    )


def scores(outputs: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
    """Every task's score, from its outputs `(N, outputs)` and labels `(N,)`."""
    return {task: task_score(task, predictions(task, logits), labels[task]) for task, logits in outputs.items()}


def load_data(
    settings: Settings, split: str, folder: Path, cache: Path | None, tasks: Sequence[str] = ()
) -> dict[str, TaskData]:
    """One split of the tasks (default: all that the run trains), tokenised.

    Args:
        settings: Where the data is, and the tasks.
        split: train, dev or test-student.
        folder: Folder with the tokenizer's files.
        cache: Folder of the token cache, or None.
        tasks: The tasks, if not all.
    """
    tokenizer = load_tokenizer(folder)
    where = DEFAULT_FOLDER if settings.data == "sample" else Path(settings.data)
    return {task: load_task(task, split, where, tokenizer, cache=cache) for task in tasks or settings.task_names()}


def token_cache(run: RunFolder) -> Path:
    """Where the runs beside this one keep their tokenised data."""
    return run.path.parent / "token-cache"


def load_run(path: str | Path, **changes: object) -> tuple[MultitaskBert, Settings, Path]:
    """The best network of a run, its settings, and the folder of its tokenizer.

    Args:
        path: The run's folder.
        changes: Settings to replace, such as `data` or `device`.

    Raises:
        FileNotFoundError: If there is no run, or it has saved no network yet.
        ValueError: From `peftlite.load_adapters`, if the base is not the one that the run was trained on.
    """
    run = RunFolder(path)
    settings = Settings(**{**run.read_settings(), **changes}).resolved()
    if not (run / BEST).exists():
        raise FileNotFoundError(
            f"{run.path} has no {BEST}: the run was stopped before its first evaluation; --resume it"
        )
    network, folder = build_network(settings)
    return load_best(network, run, settings), settings, folder


def load_best(network: MultitaskBert, run: RunFolder, settings: Settings) -> MultitaskBert:
    """Put the best adapters and heads of a run into a network without any, which computes then as it did in training."""
    peftlite.load_adapters(network, run / BEST)
    peftlite.fuse_adapters(network, settings.fused_names())  # layers that run together round otherwise than one by one
    return network.to(settings.device).eval()


def evaluate(
    path: str | Path, *, data: str | None = None, split: str = "dev", device: str | None = None
) -> dict[str, float]:
    """The scores of a run's best network on a split, and their `leaderboard` score.

    On the data and the device that it was trained with these are, exactly, the scores in its `result.json`.
    """
    changes = {name: value for name, value in (("data", data), ("device", device)) if value is not None}
    network, settings, folder = load_run(path, **changes)
    torch.set_num_threads(settings.threads)
    examples = load_data(settings, split, folder, token_cache(RunFolder(path)))
    for task, task_data in examples.items():
        if task_data.labels is None:
            raise ValueError(f"split {split!r} of task {task!r} has no labels to score against; use predict")
    outputs = {task: task_outputs(network, task_data, settings) for task, task_data in examples.items()}
    found = scores(outputs, {task: task_data.labels for task, task_data in examples.items()})
    return {**found, "leaderboard": leaderboard_score(found)}


def run_options(description: str) -> argparse.ArgumentParser:
    """A parser with the options that evaluate, predict and ensemble share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", help="folder with the data files; default: the run's own")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: that of the run")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the scores of a run as JSON."""
    parser = run_options("Score a run on a labelled split.")
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--split", default="dev", help="train or dev (default: dev)")
    options = parser.parse_args(arguments)
    try:
        found = evaluate(options.run, data=options.data, split=options.split, device=options.device)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
