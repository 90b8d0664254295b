"""Claim B, that rank 1 costs next to nothing: LoRA at five ranks beside full fine-tuning, on each task, over several seeds.

Frees, Bhagirath and Bolling 2025 (arXiv:2508.17586) claim negligible deficits at rank 1. Here every recipe has its own
learning rate, found with an equal budget: so many rates, a factor of three apart around the recipe's usual one, each for
one short pass over a part of train, judged by the loss on another part; then whole trainings with seed 0 at the best of them
and at a third of it, judged by the loss of their last tenth, since a whole training may not bear what a short one does. The
other seeds take the rate of seed 0, so that the intervals hold the spread of trainings, not that of searches.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.accuracy import search, settled, summary
from benchmarks.intervals import Interval, difference, not_worse, t_interval
from benchmarks.jobs import Figures, Job
from benchmarks.recipes import RECIPES, Recipe
from benchmarks.study import TASKS, Study, key, trained_weight

FULL = "full"
MARGIN = 0.015  # what the claim calls negligible: 1.5 points


def recipes(ranks: Sequence[int]) -> list[Recipe]:
    """Full fine-tuning, and LoRA in all linear layers at each rank."""
    return [RECIPES[FULL], *(Recipe(f"lora-r{rank}", "lora", rank=rank) for rank in ranks)]


def search_job(study: Study, task: str, recipe: Recipe) -> Job:
    """The search for a recipe's learning rate."""
    protocol = study.protocol(task)

    def measure(_: Mapping[str, Figures]) -> Figures:
        return search(recipe, protocol, study.settings(task), study.splits(task))

    settings = {**protocol.record(), **recipe.record(), "data": study.digest()}
    weight = trained_weight(task) * study.options.grid * (study.options.search_examples / study.options.batch_size)
    return Job(
        search_key(task, recipe.name), settings, measure, weight=weight, summary=lambda found: f"best rate {found['best']:.2g}"
    )


def search_key(task: str, name: str) -> str:
    """The cell of a recipe's search."""
    return key("B", task, name, "search")


def first_key(task: str, name: str) -> str:
    """The cell of a recipe's training with seed 0, which settles the learning rate."""
    return key("B", task, name, "seed0")


def training_job(study: Study, cell: str, task: str, recipe: Recipe, seed: int, rated: str, *, amp: str = "bf16") -> Job:
    """A training at the learning rate of the recipe `rated`, and its score on dev; that recipe's first one settles it."""
    protocol, settles = study.protocol(task, seed, amp=amp), cell == first_key(task, rated)
    needed = search_key(task, rated) if settles else first_key(task, rated)
    file = study.output / "trained" / f"{cell.replace('/', '-')}.safetensors"

    def measure(found: Mapping[str, Figures]) -> Figures:
        rate, repeats = (found[needed]["best"], protocol.descend) if settles else (found[needed]["lr"], 0)
        splits = study.splits(task)
        figures = settled(recipe, study.settings(task, seed, amp=amp), splits, file, rate, repeats)
        file.unlink()  # nothing reads it again, and a whole model is large
        del figures["right"]  # the seeds carry the interval, and ten thousand digits would be most of the file
        return {**figures, "examples": {"train": len(splits.train), "dev": len(splits.dev)}}

    settings = {**protocol.record(), **recipe.record(), "rated": rated, "data": study.digest()}
    steps = study.options.steps or 200 * study.options.epochs
    times = (2.0 if amp == "off" else 1.0) * (1 + protocol.descend if settles else 1)
    return Job(cell, settings, measure, (needed,), trained_weight(task) * times * (steps + 20), summary)


def jobs(study: Study) -> list[Job]:
    """All searches, then all trainings of the first seed, of the second, ..."""
    every = [(task, recipe) for task in TASKS for recipe in recipes(study.ranks)]
    found = [search_job(study, task, recipe) for task, recipe in every]
    for seed in range(study.seeds):
        for task, recipe in every:
            found.append(
                training_job(study, key("B", task, recipe.name, f"seed{seed}"), task, recipe, seed, rated=recipe.name)
            )
    return found


class Row(NamedTuple):
    """One recipe on one task.

    Attributes:
        task, recipe: which.
        rank: of the adapters, None for full fine-tuning.
        scores: mean over the seeds with its interval.
        gap: mean paired difference to full fine-tuning with its interval; None for full itself, or without pairs.
        verdict: whether the recipe is within `MARGIN` of full fine-tuning; empty where there is no gap.
        lr: learning rate that was settled on.
        trained: parameters of the backbone that train.
        bytes: size of what a training saved.
        edge: that rate was the least or the greatest of all that were tried.
    """

    task: str
    recipe: str
    rank: int | None
    scores: Interval
    gap: Interval | None
    verdict: str
    lr: float
    trained: int
    bytes: int
    edge: bool


def seeds_of(cells: Mapping[str, Any], task: str, name: str) -> dict[int, Mapping[str, Any]]:
    """The trainings of a recipe by seed."""
    start = key("B", task, name, "seed")
    return {int(cell.removeprefix(start)): found for cell, found in cells.items() if cell.startswith(start)}


def rows(cells: Mapping[str, Any], margin: float = MARGIN) -> list[Row]:
    """What the cells of a result file say of the claim, by task and rank; full fine-tuning first."""
    found = []
    names = {tuple(cell.split("/")[1:3]) for cell in cells if cell.startswith("B/") and not cell.endswith("/search")}
    for task in TASKS:
        full = {seed: cell["figures"]["dev"] for seed, cell in seeds_of(cells, task, FULL).items()}
        own = []
        for name in (name for of, name in names if of == task):
            trainings = seeds_of(cells, task, name)
            scores = {seed: cell["figures"]["dev"] for seed, cell in trainings.items()}
            both = sorted(set(scores) & set(full))
            gap = None
            if name != FULL and both:
                gap = difference([scores[seed] for seed in both], [full[seed] for seed in both])
            first = trainings[0]
            figures = first["figures"]
            tried = [row["lr"] for row in cells[search_key(task, name)]["figures"]["tried"] + figures["trainings"]]
            own.append(
                Row(
                    task,
                    name,
                    None if name == FULL else first["settings"]["rank"],
                    t_interval(list(scores.values())),
                    gap,
                    "" if gap is None else not_worse(gap, margin),
                    figures["lr"],
                    figures["trained"],
                    figures["bytes"],
                    figures["lr"] in (min(tried), max(tried)),
                )
            )
        found += sorted(own, key=lambda row: row.rank or 0)
    return found
