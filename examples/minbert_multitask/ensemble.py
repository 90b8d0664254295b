"""Several runs as one: `python -m examples.minbert_multitask.ensemble RUN RUN ... [--vote] [--output FOLDER]`.

The answer is that of the mean logits, or, with `--vote`, the answer that most runs give.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import peftlite
from examples.minbert_multitask.evaluate import load_best, load_data, load_run, run_options, scores, task_outputs, token_cache
from examples.minbert_multitask.model import BertModel
from examples.minbert_multitask.network import MultitaskBert
from examples.minbert_multitask.predict import PREDICTIONS, write_predictions
from examples.minbert_multitask.run_folder import RESULT, RunFolder, write_json
from examples.minbert_multitask.settings import Settings
from examples.minbert_multitask.tasks import TASKS, leaderboard_score, predictions
from examples.minbert_multitask.weights import load_bert


def mean_logits(members: Sequence[Tensor]) -> Tensor:
    """Mean of the runs' logits, `R × (N, outputs) -> (N, outputs)`."""
    return torch.stack(list(members)).mean(dim=0)


def vote(task: str, members: Sequence[Tensor]) -> Tensor:
    """Logits `(N, outputs)` whose answer is the one that most runs give; between equals the mean logits decide.

    Similarities are not votes: for STS this is the mean.
    """
    mean = mean_logits(members)
    if TASKS[task].metric == "pearson":
        return mean
    classes = max(2, TASKS[task].outputs)
    votes = sum(F.one_hot(predictions(task, logits), classes) for logits in members)  # (N, classes)
    preference = mean if TASKS[task].outputs > 1 else torch.cat([torch.zeros_like(mean), mean], dim=-1)
    winners = votes == votes.max(dim=-1, keepdim=True).values
    choice = preference.masked_fill(~winners, -torch.inf).argmax(dim=-1)  # (N,)
    if TASKS[task].outputs == 1:
        return (2.0 * choice - 1).unsqueeze(-1)
    return F.one_hot(choice, classes).float()


def shares_base(settings: Settings) -> bool:
    """Whether a run left the pretrained weights as they are, so that its network can use a BERT loaded for others."""
    return settings.method not in ("full", "lisa") and settings.unfreeze == "none"


def member_networks(runs: Sequence[str | Path], **changes: object) -> Iterator[tuple[MultitaskBert, Settings, Path]]:
    """The network of each run in turn; runs on the same frozen BERT share one copy of it in memory.

    A network is good until the next one is asked for, which takes its adapters off the BERT.
    """
    bases: dict[tuple[str, ...], tuple[BertModel, Path]] = {}
    for path in runs:
        settings = Settings(**{**RunFolder(path).read_settings(), **changes}).resolved()
        if not shares_base(settings):
            yield load_run(path, **changes)
            continue
        key = (settings.weights, settings.device, settings.base_dtype)
        if key not in bases:
            bases[key] = load_bert(settings.weights)
        bert, folder = bases[key]
        network = load_best(MultitaskBert(bert, settings), RunFolder(path), settings)
        yield network, settings, folder
        if peftlite.adapters(network.backbones):
            peftlite.remove_adapters(network.backbones)


def ensemble(
    runs: Sequence[str | Path],
    *,
    majority: bool = False,
    data: str | None = None,
    split: str = "dev",
    device: str | None = None,
    output: str | Path | None = None,
) -> dict[str, float]:
    """Scores of the runs' common answer on a split; `{}` for a split without labels.

    Args:
        runs: Folders of runs. A task is answered by all runs that trained it.
        majority: Vote in place of taking the mean of the logits.
        data: Another data folder.
        split: The split.
        device: Another device.
        output: Folder for `result.json` and the prediction files.

    Raises:
        ValueError: If `runs` is empty, or they read different data.
    """
    if not runs:
        raise ValueError("an ensemble needs at least one run")
    changes = {name: value for name, value in (("data", data), ("device", device)) if value is not None}
    members: dict[str, list[Tensor]] = {}
    ids: dict[str, list[str]] = {}
    labels: dict[str, Tensor] = {}
    for path, (network, settings, folder) in zip(runs, member_networks(runs, **changes), strict=True):
        torch.set_num_threads(settings.threads)
        for task, task_data in load_data(settings, split, folder, token_cache(RunFolder(path))).items():
            if ids.setdefault(task, task_data.ids) != task_data.ids:
                raise ValueError(
                    f"{path} reads other examples of task {task!r} than {runs[0]}; give one --data for all"
                )
            members.setdefault(task, []).append(task_outputs(network, task_data, settings))
            if task_data.labels is not None:
                labels[task] = task_data.labels
    outputs = {task: vote(task, parts) if majority else mean_logits(parts) for task, parts in members.items()}
    result = scores({task: outputs[task] for task in labels}, labels)
    if result:
        result["leaderboard"] = leaderboard_score(result)
    if output is not None:
        for task, logits in outputs.items():
            write_predictions(Path(output) / PREDICTIONS, task, split, ids[task], logits)
        record = {"runs": [str(path) for path in runs], "vote": majority, "split": split, "scores": result}
        write_json(Path(output) / RESULT, record)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the scores of an ensemble as JSON."""
    parser = run_options("Answer with several runs at once.")
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--vote", action="store_true", help="majority vote in place of mean logits")
    parser.add_argument("--split", default="dev", help="train, dev or test-student (default: dev)")
    parser.add_argument("--output", help="folder for result.json and the prediction files")
    options = parser.parse_args(arguments)
    try:
        result = ensemble(
            options.runs,
            majority=options.vote,
            data=options.data,
            split=options.split,
            device=options.device,
            output=options.output,
        )
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
