"""SST accuracy of every recipe under one protocol, with its training time: `python -m benchmarks.methods --suite accuracy`.

The protocol: MiniLM, mean pooling and a linear head, AdamW, equal epochs over all of train, one seed. Before that the
learning rate is searched on train alone: short runs on a part of it, judged by the cross-entropy on another part that
they do not see, at the recipe's usual rate, at a third and at three times that; where an end of the grid is best the
grid grows by a step there. Dev is scored once, after the last step.
"""

import fcntl
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftlite
from benchmarks.harness import RESULTS, ResultFile, machine, write_result
from benchmarks.protocol import TASK, Protocol, Splits, load_splits
from benchmarks.recipes import RANKS, RECIPES, Recipe
from examples.minbert_multitask.controllers import saving
from examples.minbert_multitask.data import TaskData, collate
from examples.minbert_multitask.evaluate import autocast, task_outputs
from examples.minbert_multitask.network import MultitaskBert, parameter_counts
from examples.minbert_multitask.progress import Progress
from examples.minbert_multitask.schedule import lr_factor
from examples.minbert_multitask.settings import Settings
from examples.minbert_multitask.tasks import task_loss
from examples.minbert_multitask.trainer import BatchStream
from peftlite.methods.dylora import set_rank

RESULT = RESULTS / "methods_accuracy.json"
SPACING = 3.0  # between neighbouring learning rates


class Training(NamedTuple):
    """A trained network in evaluation mode, its settings, and what it took."""

    network: MultitaskBert
    settings: Settings
    counts: dict[str, float]
    seconds: float
    cpu_seconds: float
    steps: int
    loss: float  # mean over the last tenth of the steps


def train(
    recipe: Recipe,
    settings: Settings,
    data: TaskData,
    *,
    save: Path | None = None,
    quiet: bool = False,
    wrap: Callable[[MultitaskBert], nn.Module] = lambda network: network,
    share: Callable[[list[int]], list[int]] = lambda index: index,
) -> Training:
    """Train `recipe` on `data`.

    Args:
        recipe: the way to train.
        settings: from `Recipe.resolved`.
        data: examples to train on.
        save: file for what was trained.
        quiet: no progress.
        wrap: what is called in place of the network, such as a ``DistributedDataParallel`` around it.
        share: which of a batch's examples this process takes.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    torch.manual_seed(settings.seed)
    network = recipe.build(settings)
    optimizer = recipe.optimizer(network, settings)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    stream = BatchStream(data, settings)
    total = settings.epochs * stream.per_pass
    counts = parameter_counts(network, trained)
    controller = recipe.controller(network, optimizer, settings, total)
    forward, progress = wrap(network), Progress(total, 0, quiet=quiet)
    losses: list[Tensor] = []
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        for step in range(total):
            batch = collate(data, share(stream[step]), max_length=settings.max_length)
            with autocast(settings):
                logits = forward(TASK, batch)
            loss = task_loss(TASK, logits, batch.labels)
            loss.backward()
            factor = lr_factor(step, total, warmup=settings.warmup, schedule=settings.lr_schedule)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            torch.nn.utils.clip_grad_norm_(trained, settings.clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            progress.step()
    finally:
        progress.close()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    last = float(torch.stack(losses[-max(1, total // 10) :]).mean())
    if not math.isfinite(last):
        raise FloatingPointError(f"{recipe.name} at {recipe.tuned} {getattr(settings, recipe.tuned):g}: the loss is {last}")
    network.eval()
    with controller or nullcontext(), saving(controller):
        if save is not None:
            save.parent.mkdir(parents=True, exist_ok=True)
            peftlite.save_adapters(network, save)
    return Training(network, settings, counts, wall, cpu, total, last)


def search(recipe: Recipe, protocol: Protocol, base: Settings, splits: Splits, *, quiet: bool = False) -> dict[str, Any]:
    """The learning rate with the least cross-entropy on the held part, and every one that was tried."""
    tried: dict[float, dict[str, float]] = {}

    def try_rate(rate: float) -> None:
        settings = recipe.resolved(base, **{recipe.tuned: rate, "epochs": 1})
        try:
            network = train(recipe, settings, splits.search, quiet=True).network
            logits = task_outputs(network, splits.held, settings)
            loss = float(F.cross_entropy(logits, splits.held.labels))
            accuracy = float((logits.argmax(-1) == splits.held.labels).float().mean())
        except FloatingPointError:
            loss, accuracy = math.inf, 0.0
        tried[rate] = {"loss": loss if math.isfinite(loss) else 1e9, "accuracy": accuracy}
        if not quiet:
            print(f"  {recipe.name}: {recipe.tuned} {rate:.2g}, held loss {loss:.4f}, accuracy {accuracy:.3f}", flush=True)

    for k in range(protocol.grid):
        try_rate(recipe.lr * SPACING ** (k - protocol.grid // 2))
    for _ in range(protocol.grow):
        best = min(tried, key=lambda rate: tried[rate]["loss"])
        if min(tried) < best < max(tried):
            break
        try_rate(best / SPACING if best == min(tried) else best * SPACING)
    best = min(tried, key=lambda rate: tried[rate]["loss"])
    return {"best": best, "tried": [{"lr": rate, **tried[rate]} for rate in sorted(tried)]}


def judge(training: Training, data: TaskData) -> tuple[float, str]:
    """Accuracy, and right or wrong for each example in the file's order, as a string of 1 and 0."""
    logits = task_outputs(training.network, data, training.settings)
    right = logits.argmax(-1) == data.labels
    return float(right.double().mean()), "".join("1" if r else "0" for r in right.tolist())


def measure(
    recipe: Recipe, protocol: Protocol, data: str, splits: Splits, output: Path, *, quiet: bool = False
) -> dict[str, Any]:
    """Search, train, score: the figures of one cell. The trained tensors go to ``output/<name>.safetensors``."""
    base = protocol.settings(data)
    start = time.perf_counter()
    found = search(recipe, protocol, base, splits, quiet=quiet)
    settings = recipe.resolved(base, **{recipe.tuned: found["best"]})
    searched = time.perf_counter() - start
    file = output / f"{recipe.name}.safetensors"
    training = train(recipe, settings, splits.train, save=file, quiet=quiet)
    accuracy, right = judge(training, splits.dev)
    figures = {
        "dev": accuracy,
        "right": right,
        "lr": found["best"],
        "search": found["tried"],
        "search_seconds": searched,
        "seconds": training.seconds,
        "cpu_seconds": training.cpu_seconds,
        "steps": training.steps,
        "loss": training.loss,
        "trained": training.counts["trained_backbone"],
        "share": training.counts["trained_share"],
        "heads": training.counts["heads"],
        "bytes": file.stat().st_size,
    }
    if recipe.method == "dylora":
        figures["ranks"] = {}
        for rank in RANKS:
            set_rank(training.network, rank)
            accuracy, right = judge(training, splits.dev)
            figures["ranks"][str(rank)] = {"dev": accuracy, "right": right}
    return figures


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone has `path` for the block; the system releases it even if the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def run(names: list[str], protocol: Protocol, data: str, output: Path, result: Path, *, fresh: bool = False) -> None:
    """Measure the recipes that are not measured yet; several processes may do so at once, with one `output`."""
    torch.set_num_threads(protocol.threads)
    splits = load_splits(protocol, data, output / "token-cache")
    for count, name in enumerate(names, start=1):
        recipe, place = RECIPES[name], f"[{count}/{len(names)}] {name}"
        settings = {**protocol.record(), **recipe.record(), "examples": [len(s) for s in splits]}
        with claimed(output / "cells" / f"{name}.lock") as mine:
            cells = ResultFile(output / "cells" / f"{name}.json", "accuracy")
            # What a cell does not name is younger than the cell, and was what is now the default
            before = {**asdict(Protocol()), **cells.cells[name]["settings"]} if name in cells.cells else None
            known = before == json.loads(json.dumps(settings))
            if not mine or (known and not fresh):
                print(f"{place}: {'finished before' if mine else 'another process is at it'}", flush=True)
                continue
            print(place, flush=True)
            facts = machine()
            figures = measure(recipe, protocol, data, splits, output)
            cells.add(name, facts, settings, figures)
            seconds = f"{figures['seconds']:.0f} s, on the CPU {figures['cpu_seconds']:.0f} s"
            print(f"  {name}: dev {figures['dev']:.4f}, {seconds}", flush=True)
            collect(output, result)
    collect(output, result)  # all may have been finished before


def collect(output: Path, result: Path) -> None:
    """Write the finished cells of `output` into one result file, in the order of the recipes."""
    cells = {}
    for name in RECIPES:
        cells |= ResultFile(output / "cells" / f"{name}.json", "accuracy").cells
    if cells:
        write_result(result, {"suite": "accuracy", "cells": cells})
    print(f"{len(cells)} of {len(RECIPES)} recipes are in {result.name}", flush=True)
