"""Claim C, that an ensemble of small multitask models is the best of them: adapters on one shared frozen backbone.

The paper's architecture (Frees, Bhagirath and Bolling 2025, arXiv:2508.17586): one backbone for sentiment and one for pairs,
the features ``[u, v, |u - v|, u * v, cos]``, conv heads, ``1 - r`` as the loss of similarity; beside it the example's own
default. Both backbones start as the same pretrained weights and stay frozen, so that all members of an ensemble share one
copy of them. Members differ in their seed alone. Every member takes the same number of steps, the tasks in turn, and its
last step counts: dev chooses nothing.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peftlite
from benchmarks.intervals import Interval, percentiles, resample, resampled_scores
from benchmarks.jobs import Figures, Job
from benchmarks.study import TASKS, Study, key, trained_weight
from examples.minbert_multitask.ensemble import mean_logits, member_networks
from examples.minbert_multitask.evaluate import scores, task_outputs
from examples.minbert_multitask.run_folder import BEST
from examples.minbert_multitask.settings import Settings
from examples.minbert_multitask.tasks import leaderboard_score, predictions
from examples.minbert_multitask.trainer import Trainer

RESAMPLES = 2000
OVERALL = "overall"
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"backbones": 2, "head": "conv", "sts_loss": "pearson"},
    "one-backbone": {"backbones": 1, "head": "linear", "sts_loss": "mse"},
}


def member_settings(study: Study, variant: str, seed: int) -> Settings:
    """The example's settings for one member."""
    steps = study.options.member_steps
    return Settings(
        output=str(member_folder(study, variant, seed)),
        data=study.data,
        tasks=",".join(TASKS),
        weights=study.options.weights,
        backbone_dropout=0.0,
        amp="bf16",
        sampling="round-robin",
        steps=steps,
        eval_every=steps,
        eval_limit=2,  # the trainer's own evaluations would let dev choose the step, and cost more than the training
        save_every=steps,
        batch_size=study.options.batch_size,
        seed=seed,
        device="cpu",
        threads=study.options.threads,
        **VARIANTS[variant],
    )


def member_folder(study: Study, variant: str, seed: int) -> Path:
    """The run folder of one member."""
    return study.output / f"C-{variant}-seed{seed}"


def _record(study: Study, variant: str, seed: int) -> dict[str, Any]:
    options = study.options
    shared = {"rank": Settings.rank, "member_steps": options.member_steps, "batch_size": options.batch_size, "amp": "bf16"}
    weights = Path(options.weights).name
    return {**VARIANTS[variant], **shared, "weights": weights, "threads": options.threads, "seed": seed, "data": study.digest()}


def member_job(study: Study, variant: str, seed: int) -> Job:
    """The training of one member; an interrupted one starts anew."""

    def measure(_: Mapping[str, Figures]) -> Figures:
        settings = member_settings(study, variant, seed)
        shutil.rmtree(settings.output, ignore_errors=True)
        trainer = Trainer(settings, quiet=True)  # its scores of two examples mean nothing
        trainer.run()
        file = trainer.folder / BEST
        peftlite.save_adapters(trainer.network, file)  # the last step, whatever the few examples above said
        counts = trainer.parameters
        return {
            "seconds": sum(trainer.seconds.values()),
            "task_seconds": dict(trainer.seconds),
            "bytes": file.stat().st_size,
            "adapters": counts["trained_backbone"],
            "heads": counts["heads"],
            "backbone": counts["backbone"] // settings.backbones,
            "backbones": settings.backbones,
        }

    weight = study.options.member_steps * sum(map(trained_weight, TASKS)) / len(TASKS)
    return Job(
        member_key(variant, seed),
        _record(study, variant, seed),
        measure,
        weight=weight,
        summary=lambda found: f"{found['seconds']:.0f} s, {found['bytes'] / 2**20:.1f} MiB saved",
    )


def member_key(variant: str, seed: int) -> str:
    """The cell of a member."""
    return key("C", variant, f"seed{seed}")


def ensemble_job(study: Study, variant: str) -> Job:
    """The scores of all members and of the mean of their logits, all on one backbone in memory."""
    needs = tuple(member_key(variant, seed) for seed in range(study.members))

    def measure(members: Mapping[str, Figures]) -> Figures:
        dev = {task: study.splits(task).dev for task in TASKS}
        runs = [member_folder(study, variant, seed) for seed in range(study.members)]
        logits: dict[str, list[Tensor]] = {task: [] for task in TASKS}
        # The same folder's paths and weights, wherever it was trained
        for network, settings, _ in member_networks(runs, data=study.data, weights=study.options.weights):
            for task in TASKS:
                logits[task].append(task_outputs(network, dev[task], settings))
        labels = {task: data.labels for task, data in dev.items()}
        return {**judged(logits, labels), "bytes": sizes([members[key] for key in needs])}

    settings = {**_record(study, variant, 0), "members": study.members, "resamples": RESAMPLES}
    del settings["seed"]
    options = study.options
    weight = study.members * (2000 + (options.quora_dev or 20_000)) / (6 * options.batch_size)  # forward alone
    return Job(key("C", variant, "ensemble"), settings, measure, needs, weight, summary=_summary)


def _summary(found: Figures) -> str:
    gain = found["gains"]["mean single"][OVERALL]
    return f"overall {found['ensemble'][OVERALL]:.4f}, {gain[0]:+.4f} ({gain[1]:+.4f}..{gain[2]:+.4f}) over the mean single"


def sizes(members: list[Figures]) -> dict[str, int]:
    """Bytes of the ensemble as saved beside one backbone, and of as many full models, each with its own, in fp32."""
    backbone = 4 * members[0]["backbone"]
    return {
        "backbone": backbone,
        "members": sum(member["bytes"] for member in members),
        "adapters": 4 * sum(member["adapters"] for member in members),
        "heads": 4 * sum(member["heads"] for member in members),
        "shared": backbone + sum(member["bytes"] for member in members),
        "full": sum(member["backbones"] * backbone + 4 * member["heads"] for member in members),
    }


def judged(logits: Mapping[str, list[Tensor]], labels: Mapping[str, Tensor], *, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Scores of each member and the ensemble, and the ensemble's gains with bootstrap intervals over the dev examples.

    Gains are over the mean of the members and over the best of them, which dev itself chose: this favours the single. All
    are judged on the same resampled examples, so that hard and easy draws cancel. The seeds are held fixed.

    Args:
        logits: by task, of each member `(N, outputs)`.
        labels: by task `(N,)`.
        resamples: draws of the bootstrap.
    """
    answers = {task: [predictions(task, one) for one in (*members, mean_logits(members))] for task, members in logits.items()}
    count = len(next(iter(answers.values()))) - 1
    members = [scores({task: found[index] for task, found in logits.items()}, dict(labels)) for index in range(count)]
    together = scores({task: mean_logits(found) for task, found in logits.items()}, dict(labels))
    for row in (*members, together):
        row[OVERALL] = leaderboard_score(row)
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, Tensor] = {}  # by task and overall: (members + 1, resamples), the ensemble last
    for task, found in answers.items():
        counts = resample(len(labels[task]), resamples, generator)
        drawn[task] = torch.stack([resampled_scores(task, each, labels[task], counts) for each in found])
    drawn[OVERALL] = leaderboard_score(dict(drawn))
    gains: dict[str, dict[str, Interval]] = {"mean single": {}, "best single": {}}
    for name, samples in drawn.items():
        single = [row[name] for row in members]
        best = max(range(count), key=single.__getitem__)
        gains["mean single"][name] = percentiles(together[name] - sum(single) / count, samples[-1] - samples[:-1].mean(0))
        gains["best single"][name] = percentiles(together[name] - single[best], samples[-1] - samples[best])
    return {
        "members": members,
        "ensemble": together,
        "gains": gains,
        "examples": {task: len(found) for task, found in labels.items()},
    }


def jobs(study: Study) -> list[Job]:
    """The members of each variant, each set followed by its ensemble."""
    found = []
    for variant in VARIANTS:
        found += [member_job(study, variant, seed) for seed in range(study.members)]
        found.append(ensemble_job(study, variant))
    return found
