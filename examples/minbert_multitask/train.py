"""Train minBERT on several tasks: `python -m examples.minbert_multitask.train --data DIR --output runs/NAME`.

Ctrl-C saves the state and stops; the same command with `--resume`, or `--output runs/NAME --resume` alone, goes on
and ends with the result that an uninterrupted run has.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Sequence
from typing import Any

from examples.minbert_multitask.environment import environment, peak_memory_mb
from examples.minbert_multitask.evaluate import load_data, load_run, scores, task_outputs, token_cache
from examples.minbert_multitask.predict import PREDICTIONS, write_predictions
from examples.minbert_multitask.report import write_report
from examples.minbert_multitask.run_folder import OUTPUTS, REPORT, RESULT, STATE, RunFolder, write_json, write_tensors
from examples.minbert_multitask.settings import Settings, add_options
from examples.minbert_multitask.tasks import leaderboard_score
from examples.minbert_multitask.trainer import Trainer, TrainingStoppedError


def train(settings: Settings, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train a run to its end and write its results; return what is in its `result.json`.

    Args:
        settings: What to do.
        resume: Go on with the run in `settings.output`; a finished one is left as it is.
        quiet: Print nothing.

    Raises:
        ValueError, FileExistsError, FileNotFoundError: See `Trainer`.
    """
    if resume and (RunFolder(settings.output) / RESULT).exists():
        return RunFolder(settings.output).read_json(RESULT)
    trainer = Trainer(settings, resume=resume, quiet=quiet)
    trainer.run()
    return finish(trainer)


def finish(trainer: Trainer) -> dict[str, Any]:
    """Score the best network on all dev examples; write result, outputs, predictions and report; drop the state.

    The network is read back from its file, so that these are the scores that `evaluate` finds.
    """
    folder = trainer.folder
    memory = peak_memory_mb()
    network, settings, tokenizer_folder = load_run(folder.path)
    data = load_data(settings, "dev", tokenizer_folder, token_cache(folder))
    outputs = {task: task_outputs(network, task_data, settings) for task, task_data in data.items()}
    labels = {task: task_data.labels for task, task_data in data.items()}
    found = scores(outputs, labels)
    for task, logits in outputs.items():
        write_predictions(folder / PREDICTIONS, task, "dev", data[task].ids, logits)
    tensors = {f"logits.{task}": value for task, value in outputs.items()}
    write_tensors(folder / OUTPUTS, tensors | {f"labels.{task}": value for task, value in labels.items()})
    result = {
        "scores": found,
        "leaderboard": leaderboard_score(found),
        "best_step": trainer.best_step,
        "steps": trainer.step,
        "parameters": trainer.parameters,
        "train_seconds": sum(trainer.seconds.values()),
        "train_seconds_per_task": trainer.seconds,
        "memory": memory,
        "settings": dataclasses.asdict(settings),
        "environment": environment(),
    }
    write_report(folder, result)
    write_json(folder / RESULT, result)  # last: where it is, the run is finished
    (folder / STATE).unlink(missing_ok=True)
    return result


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, Settings, bool]:
    """The settings that a command line asks for, and whether to resume; errors end the program with one line."""
    parser = argparse.ArgumentParser(description="Train minBERT on several tasks at once.", allow_abbrev=False)
    add_options(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume")
    try:
        settings = Settings(**given)
        if resume:
            # What is not given is taken from the run; what is given must agree with it, which Trainer checks
            settings = Settings(**{**RunFolder(settings.output).read_settings(), **given})
        return parser, settings.resolved(), resume
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and print the scores; the exit status is 130 after Ctrl-C."""
    parser, settings, resume = parse(arguments)
    folder = RunFolder(settings.output)
    if resume and (folder / RESULT).exists():
        print(f"{folder.path} has finished already")
        show(folder.read_json(RESULT), folder)
        return 0
    try:
        trainer = Trainer(settings, resume=resume)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))

    def on_signal(number: int, frame: object) -> None:
        trainer.stop()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        trainer.progress.say("stopping after this step; again to stop at once")

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    count = trainer.parameters
    print(
        f"{settings.method}: trains {count['trained_backbone']:,} parameters of the backbone "
        f"({count['trained_share']:.2%} of {count['backbone']:,}) and {count['heads']:,} of the heads; "
        f"{len(trainer.plan)} steps, {trainer.steps_per_epoch} per epoch"
        + (f"; goes on at step {trainer.step}" if resume else ""),
        flush=True,
    )
    try:
        trainer.run()
    except TrainingStoppedError:
        print(
            f"stopped at step {trainer.step} of {len(trainer.plan)}; the state is saved. Go on with\n"
            f"  python -m examples.minbert_multitask.train --output {settings.output} --resume"
        )
        return 130
    show(finish(trainer), folder)
    return 0


def show(result: dict[str, Any], folder: RunFolder) -> None:
    """Print the result of a run."""
    for task, value in result["scores"].items():
        print(f"{task:>12}  {value:.4f}")
    print(f"{'leaderboard':>12}  {result['leaderboard']:.4f}   (best at step {result['best_step']})")
    count = result["parameters"]
    print(f"trained {count['trained_share']:.2%} of the backbone in {result['train_seconds']:.0f} s")
    print(f"report: {folder / REPORT}")


if __name__ == "__main__":
    sys.exit(main())
