"""SST accuracy of every recipe under one protocol, with its training time: `python -m benchmarks.methods --suite accuracy`.

The protocol: MiniLM, mean pooling and a linear head, AdamW, equal epochs over all of train, one seed. The learning rate is
searched on train alone: short runs on a part of it, judged by the cross-entropy on another part that they do not see, at
the recipe's usual rate, at a third and at three times that; where an end of the grid is best the grid grows by a step
there. What a short run bears can be too much for a long one: the whole training is therefore run at a third of that rate
too, and at a third again, as long as that lowers the loss over its last tenth, which in one epoch is a loss on examples not
seen before. Dev chooses nothing.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import peftlite
from benchmarks.harness import RESULTS
from benchmarks.jobs import Job, collect, work
from benchmarks.protocol import Protocol, Splits, load_splits
from benchmarks.recipes import RANKS, RECIPES, Recipe
from examples.minbert_multitask.controllers import saving
from examples.minbert_multitask.data import TaskData, collate
from examples.minbert_multitask.evaluate import autocast, task_outputs
from examples.minbert_multitask.network import MultitaskBert, parameter_counts
from examples.minbert_multitask.progress import Progress
from examples.minbert_multitask.schedule import lr_factor
from examples.minbert_multitask.settings import Settings
from examples.minbert_multitask.tasks import TASKS, predictions, task_loss, task_score
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
    total = settings.steps or settings.epochs * stream.per_pass
    counts = parameter_counts(network, trained)
    controller = recipe.controller(network, optimizer, settings, total)
    forward, progress = wrap(network), Progress(total, 0, quiet=quiet)
    losses: list[Tensor] = []
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        for step in range(total):
            batch = collate(data, share(stream[step]), max_length=settings.max_length)
            with autocast(settings):
                logits = forward(data.task, batch)
            loss = task_loss(data.task, logits, batch.labels, sts_loss=settings.sts_loss)
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
    """The learning rate with the least loss on the held part after one pass over the other, and every one that was tried."""
    tried: dict[float, dict[str, float]] = {}

    def try_rate(rate: float) -> None:
        settings = recipe.resolved(base, **{recipe.tuned: rate, "epochs": 1, "steps": None})
        try:
            network = train(recipe, settings, splits.search, quiet=True).network
            logits = task_outputs(network, splits.held, settings)
            loss = float(task_loss(protocol.task, logits, splits.held.labels, sts_loss=settings.sts_loss))
            score = task_score(protocol.task, predictions(protocol.task, logits), splits.held.labels)
        except FloatingPointError:
            loss, score = math.inf, 0.0
        tried[rate] = {"loss": loss if math.isfinite(loss) else 1e9, "score": score}
        if not quiet:
            print(f"  {recipe.name}: {recipe.tuned} {rate:.2g}, held loss {loss:.4f}, score {score:.3f}", flush=True)

    for k in range(protocol.grid):
        try_rate(recipe.lr * SPACING ** (k - protocol.grid // 2))
    for _ in range(protocol.grow):
        best = min(tried, key=lambda rate: tried[rate]["loss"])
        if min(tried) < best < max(tried):
            break
        try_rate(best / SPACING if best == min(tried) else best * SPACING)
    best = min(tried, key=lambda rate: tried[rate]["loss"])
    return {"best": best, "tried": [{"lr": rate, **tried[rate]} for rate in sorted(tried)]}


def judge(training: Training, data: TaskData) -> tuple[float, str | None]:
    """The task's score and, where it is an accuracy, right or wrong for each example in the file's order, as 1 and 0."""
    answers = predictions(data.task, task_outputs(training.network, data, training.settings))
    score = task_score(data.task, answers, data.labels)
    if TASKS[data.task].metric != "accuracy":
        return score, None
    return score, "".join("1" if right else "0" for right in (answers == data.labels.long()).tolist())


def trained_figures(training: Training, file: Path, dev: TaskData) -> dict[str, Any]:
    """What a training came to and what it took; `file` is what it saved."""
    score, right = judge(training, dev)
    return {
        "dev": score,
        "right": right,
        "seconds": training.seconds,
        "cpu_seconds": training.cpu_seconds,
        "steps": training.steps,
        "loss": training.loss,
        "trained": training.counts["trained_backbone"],
        "share": training.counts["trained_share"],
        "heads": training.counts["heads"],
        "bytes": file.stat().st_size,
    }


def whole(recipe: Recipe, settings: Settings, splits: Splits, file: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Train on all of train and score on dev: the figures. The trained tensors go to `file`.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    training = train(recipe, settings, splits.train, save=file, quiet=quiet)
    figures = trained_figures(training, file, splits.dev)
    if recipe.method == "dylora":
        figures["ranks"] = {}
        for rank in RANKS:
            set_rank(training.network, rank)
            accuracy, right = judge(training, splits.dev)
            figures["ranks"][str(rank)] = {"dev": accuracy, "right": right}
    return figures


def settled(
    recipe: Recipe, base: Settings, splits: Splits, file: Path, rate: float, repeats: int, *, quiet: bool = False
) -> dict[str, Any]:
    """The figures of the whole training at `rate`, or at a third of it while that lowers the loss of its last steps.

    Args:
        recipe: the way to train.
        base: the protocol's settings.
        splits: the data.
        file: where the trained tensors go.
        rate: the first learning rate.
        repeats: trainings at lower ones, at most.
        quiet: no progress.

    Raises:
        FloatingPointError: the loss is not finite, at none of the rates.
    """
    attempt = file.with_suffix(".attempt")
    best, trainings = None, []
    for _ in range(1 + repeats):
        try:
            made = whole(recipe, recipe.resolved(base, **{recipe.tuned: rate}), splits, attempt, quiet=quiet)
        except FloatingPointError as error:
            trainings.append({"lr": rate, "failed": str(error)})
        else:
            trainings.append({"lr": rate, "loss": made["loss"], "seconds": made["seconds"]})
            if best is not None and made["loss"] >= best["loss"]:
                break
            best = {"lr": rate, **made}
            attempt.replace(file)
        rate /= SPACING
    attempt.unlink(missing_ok=True)
    if best is None:
        raise FloatingPointError("; ".join(training["failed"] for training in trainings))
    return {**best, "trainings": trainings}


def measure(
    recipe: Recipe, protocol: Protocol, data: str, splits: Splits, output: Path, *, quiet: bool = False
) -> dict[str, Any]:
    """Search, train, score: the figures of one cell. The trained tensors go to ``output/<name>.safetensors``.

    Raises:
        FloatingPointError: the loss is not finite, at none of the rates.
    """
    base = protocol.settings(data)
    start = time.perf_counter()
    found = search(recipe, protocol, base, splits, quiet=quiet)
    searched = time.perf_counter() - start
    file = output / f"{recipe.name}.safetensors"
    best = settled(recipe, base, splits, file, found["best"], protocol.descend, quiet=quiet)
    return {**best, "search": found["tried"], "search_seconds": searched}


def summary(figures: dict[str, Any]) -> str:
    """A line for the terminal."""
    return f"dev {figures['dev']:.4f}, {figures['seconds']:.0f} s, on the CPU {figures['cpu_seconds']:.0f} s"


def run(names: list[str], protocol: Protocol, data: str, output: Path, result: Path, *, fresh: bool = False) -> None:
    """Measure the recipes that are not measured yet; several processes may do so at once, with one `output`."""
    torch.set_num_threads(protocol.threads)
    splits = load_splits(protocol, data, output / "token-cache")
    shared = {**protocol.record(), "examples": [len(s) for s in splits]}

    def job(recipe: Recipe) -> Job:
        return Job(
            recipe.name,
            {**shared, **recipe.record()},
            lambda _: measure(recipe, protocol, data, splits, output),
            summary=summary,
        )

    jobs = [job(RECIPES[name]) for name in names]
    # What a cell does not name is younger than the cell, and was what is now the default
    work(jobs, output, "accuracy", list(RECIPES), result, fresh=fresh, defaults=asdict(Protocol()))
    found = collect(output, "accuracy", list(RECIPES), result)
    print(f"{found} of {len(RECIPES)} recipes are in {result.name}", flush=True)
