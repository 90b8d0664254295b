"""Claim A, that LoRA and DoRA with autocast train faster: each effect alone, on the paper's tasks.

Frees, Bhagirath and Bolling 2025 (arXiv:2508.17586) compare full fine-tuning in fp32 with LoRA and DoRA at rank 1 under
mixed precision, so that two effects are in one figure, and time the tokenising as well. Here full fine-tuning, LoRA and DoRA
each run in both precisions, the adapters in the attention's or in all linear layers, on batches that are made before the
clock starts. An epoch is not run: a pass over a few of its batches, of evenly spaced lengths, is timed in interleaved rounds,
and scaled to the number of the epoch's steps.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, optim
from tqdm import tqdm

import peftlite
from benchmarks.gate import check_adapters
from benchmarks.harness import interleaved, ratios, require_green, spread
from benchmarks.jobs import Figures, Job
from benchmarks.rank_claim import first_key, recipes, search_job, training_job
from benchmarks.recipes import RECIPES, Recipe
from benchmarks.study import TASKS, Study, key, trained_weight
from benchmarks.training_step import MIB, TrainingStep, meter
from examples.minbert_multitask.data import Batch, TaskData, batches, collate
from examples.minbert_multitask.evaluate import AMP_DTYPES, autocast
from examples.minbert_multitask.network import MultitaskBert, parameter_counts
from examples.minbert_multitask.settings import Settings
from examples.minbert_multitask.tasks import task_loss
from peftlite.analysis.meters import transient_bytes

RANK = 1  # of the paper's final comparison
AMPS = {"fp32": "off", "bf16": "bf16"}
TARGETS = ("attn", "all-linear")
METHODS = ("lora", "dora")
IN_MEMORY = (  # of the authors' own figures, in fp32
    "full-fp32", "lora-fp32-attn", "lora-fp32-all-linear", "dora-fp32-attn",
)


class Candidate(NamedTuple):
    """One way to train: a recipe in one precision."""

    name: str
    recipe: Recipe
    amp: str

    @property
    def rated(self) -> str:
        """The recipe of claim B whose learning rate it takes."""
        return "full" if self.recipe.method == "full" else f"lora-r{RANK}"


def candidates() -> dict[str, Candidate]:
    """Full fine-tuning, which has no targets, and both methods on both targets, each in both precisions."""
    found = []
    for precision, amp in AMPS.items():
        found.append(Candidate(f"full-{precision}", RECIPES["full"], amp))
        for method in METHODS:
            for targets in TARGETS:
                name = f"{method}-{precision}-{targets}"
                found.append(Candidate(name, Recipe(name, method, rank=RANK, settings={"targets": targets}), amp))
    return {candidate.name: candidate for candidate in found}


def effects() -> dict[str, tuple[str, str]]:
    """Ratios that show one change each, and last the paper's comparison, which shows two: title -> (over, under)."""
    found = {"autocast alone: full": ("full-bf16", "full-fp32")}
    for method in METHODS:
        title = {"lora": "LoRA", "dora": "DoRA"}[method]
        for targets in TARGETS:
            found[f"autocast alone: {title}, {targets}"] = (f"{method}-bf16-{targets}", f"{method}-fp32-{targets}")
        for precision in AMPS:
            for targets in TARGETS:
                found[f"{title} alone: {targets}, {precision}"] = (f"{method}-{precision}-{targets}", f"full-{precision}")
            found[f"targets alone: {title}, {precision}, attn / all-linear"] = tuple(
                f"{method}-{precision}-{targets}" for targets in TARGETS
            )
    for precision in AMPS:
        for targets in TARGETS:
            found[f"DoRA / LoRA: {targets}, {precision}"] = (f"dora-{precision}-{targets}", f"lora-{precision}-{targets}")
    for method in METHODS:
        title = {"lora": "LoRA", "dora": "DoRA"}[method]
        found[f"both at once, as the paper compares: {title}"] = (f"{method}-bf16-all-linear", "full-fp32")
    return found


class TaskStep(TrainingStep):
    """A training step of a task's network on one of several batches; `over` takes one step on each of them.

    Args:
        network: ready to be trained.
        optimizer: over all that trains.
        settings: precision and losses.
        task: whose loss.
        batches: prepared beforehand.
    """

    def __init__(
        self, network: MultitaskBert, optimizer: optim.Optimizer, settings: Settings, task: str, batches: Sequence[Batch]
    ) -> None:
        self.model, self.optimizer, self.settings, self.task, self.batches = network, optimizer, settings, task, batches
        self.trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.take(batches[0])

    def take(self, batch: Batch) -> None:
        """Let the next step be on `batch`."""
        self.current = batch
        self.batch = (batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.labels)

    def forward(self) -> Tensor:
        """The task's loss."""
        with autocast(self.settings):
            logits = self.model(self.task, self.current)
        return task_loss(self.task, logits, self.current.labels, sts_loss=self.settings.sts_loss)

    def over(self) -> dict[str, float]:
        """Milliseconds of one pass over the batches, by phase."""
        total: dict[str, float] = {}
        for batch in self.batches:
            self.take(batch)
            for phase, taken in self().items():
                total[phase] = total.get(phase, 0.0) + taken
        return total


def pick(data: TaskData, batch_size: int, count: int) -> tuple[list[list[int]], int]:
    """Of an epoch's batches `count` whose lengths are evenly spaced by rank, the longest last; and how many there are."""

    def length(index: list[int]) -> int:
        sides = [data.first] if data.second is None else [data.first, data.second]
        return max(len(side[i]) for side in sides for i in index)

    order = sorted(batches(data, batch_size, seed=0, epoch=0), key=length)
    return [order[int((k + 0.5) * len(order) / count)] for k in range(count)], len(order)


def memory(step: TaskStep) -> dict[str, float]:
    """MiB held between steps (weights, optimizer) and at the peak of a step, by the meters."""

    def whole() -> None:
        step.forward().backward()
        step.update()

    state = [value for entry in step.optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    resident = sum(t.numel() * t.element_size() for t in [*step.model.parameters(), *step.model.buffers(), *state])
    return {"resident_mib": resident / MIB, "peak_mib": (resident + transient_bytes(whole).peak) / MIB}


def measure(study: Study, task: str, names: Sequence[str], *, batch_size: int, rounds: int) -> dict[str, Any]:
    """Check and meter the candidates `names` on the longest of a pass's batches, and time `rounds` passes.

    Raises:
        RedGateError: an adapter computes something else than its specification.
    """
    data, every = study.splits(task).train, candidates()
    chosen, epoch = pick(data, batch_size, study.options.pass_batches)
    limit = study.settings(task).max_length
    passed = [collate(data, index, max_length=limit) for index in chosen]
    checks, figures, steps = [], {}, {}
    for name in tqdm(names, desc=f"{task}: check and meter", unit="candidate"):
        candidate = every[name]
        settings = candidate.recipe.resolved(study.settings(task, amp=candidate.amp))
        torch.manual_seed(0)
        network = candidate.recipe.build(settings)
        dtype = AMP_DTYPES.get(candidate.amp, torch.float32)
        context = functools.partial(autocast, settings)
        checks += check_adapters(name, peftlite.adapters(network.backbones), dtype=dtype, autocast=context, seed=0)
        optimizer = candidate.recipe.optimizer(network, settings)
        step = steps[name] = TaskStep(network, optimizer, settings, task, passed)
        step.take(passed[-1])
        figures[name] = meter(step) | memory(step)
        figures[name]["trained"] = parameter_counts(network, step.trained)["trained_backbone"]
    require_green(checks)
    found = {
        "checks": len(checks),
        "batch_size": batch_size,
        "epoch_steps": epoch,
        "widths": [batch.input_ids.shape[1] for batch in passed],
        "candidates": figures,
        "effects": {title: {"sides": list(sides)} for title, sides in effects().items() if set(sides) <= set(names)},
    }
    samples: dict[str, list[dict[str, float]]] = {}
    if rounds:
        with tqdm(total=len(steps) * (1 + rounds), unit="pass", desc=f"{task}: time") as bar:
            passes = {name: step.over for name, step in steps.items()}
            samples = interleaved(passes, rounds=rounds, warmup=1, tick=bar.update)
    for name, taken in samples.items():
        scale = epoch / len(passed) / 1000
        figures[name]["epoch_seconds"] = spread(scale * sample["step"] for sample in taken)
        figures[name]["epoch_cpu_seconds"] = spread(scale * sample["cpu"] for sample in taken)
    for row in found["effects"].values():
        over, under = row["sides"]
        for measured in ("step", "cpu") if samples else ():
            row[measured] = ratios([s[measured] for s in samples[over]], [s[measured] for s in samples[under]])
        for measured in ("saved_mib", "peak_mib", "gflop"):
            row[measured] = figures[over][measured] / figures[under][measured]
    return found


def _cost_job(study: Study, cell: str, task: str, names: Sequence[str], batch_size: int, rounds: int) -> Job:
    settings = {
        "candidates": list(names), "rank": RANK, "batch_size": batch_size, "rounds": rounds, "data": study.digest(),
        "pass_batches": study.options.pass_batches, "threads": study.options.threads, "weights": study.record()["weights"],
    }  # fmt: skip

    def run(_: Mapping[str, Figures]) -> Figures:
        return measure(study, task, names, batch_size=batch_size, rounds=rounds)

    weight = trained_weight(task) * 1.8 * len(names) * ((1 + rounds) * study.options.pass_batches * batch_size / 32 + 5)
    return Job(cell, settings, run, weight=weight, summary=lambda found: f"{found['checks']} checks green")


def score_cell(task: str, candidate: Candidate) -> str:
    """The cell with a candidate's dev score: claim B's, where that trained the same."""
    same = {"full-bf16": "full", "lora-bf16-all-linear": f"lora-r{RANK}"}
    if candidate.name in same:
        return first_key(task, same[candidate.name])
    return key("A", task, candidate.name, "seed0")


def jobs(study: Study) -> list[Job]:
    """The costs, which want a quiet machine, then the trainings for the dev scores: in bf16 first, and all-linear first."""
    every = candidates()
    found = [
        _cost_job(study, key("A", task, "cost"), task, list(every), study.options.batch_size, study.options.rounds)
        for task in TASKS
    ]
    found.append(_cost_job(study, key("A", "sst", "memory"), "sst", IN_MEMORY, study.options.memory_batch, 0))
    rank_recipes = {recipe.name: recipe for recipe in recipes((RANK,))}
    found += [search_job(study, task, recipe) for task in TASKS for recipe in rank_recipes.values()]
    for candidate in sorted(every.values(), key=lambda each: (each.amp == "off", "attn" in each.name)):
        for task in TASKS:
            cell = score_cell(task, candidate)
            recipe = rank_recipes[cell.split("/")[2]] if cell.startswith("B/") else candidate.recipe
            found.append(training_job(study, cell, task, recipe, 0, candidate.rated, amp=candidate.amp))
    return found
