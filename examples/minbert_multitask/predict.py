"""Write a run's answers in the course's format: `python -m examples.minbert_multitask.predict RUN [--split dev ...]`.

One file per task and split, such as `predictions/sst-dev-output.csv`: a line `id \\t Predicted_Sentiment`, then lines
`<id> , <answer>`, as the starter code of the CS224N default project writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples.minbert_multitask.data import DATA_FILES, DEFAULT_FOLDER, TaskData
from examples.minbert_multitask.evaluate import load_data, load_run, run_options, task_outputs, token_cache
from examples.minbert_multitask.run_folder import RunFolder, write_text
from examples.minbert_multitask.tasks import TASKS, predictions

PREDICTIONS = "predictions"
SPLIT_NAMES = {"train": "train", "dev": "dev", "test-student": "test"}


def write_predictions(folder: Path, task: str, split: str, ids: Sequence[str], logits: Tensor) -> Path:
    """Write the answers to one split, in the order of its file, and return the path."""
    spec = TASKS[task]
    answers = predictions(task, logits).tolist()
    if len(ids) != len(answers):
        raise ValueError(f"task {task!r}: {len(answers)} answers for {len(ids)} ids")
    if spec.pair:  # the course writes the pairs' answers as floats: 1.0, 0.0
        answers = [float(answer) for answer in answers]
    lines = [f"id \t {spec.csv_header} \n", *(f"{i} , {answer} \n" for i, answer in zip(ids, answers, strict=True))]
    path = folder / f"{spec.csv_prefix}-{SPLIT_NAMES[split]}-output.csv"
    write_text(path, "".join(lines))
    return path


def available(tasks: Sequence[str], splits: Sequence[str], data: str) -> dict[str, list[str]]:
    """Which of the tasks have a file for each split in the folder `data`."""
    where = DEFAULT_FOLDER if data == "sample" else Path(data)
    return {split: [task for task in tasks if (where / DATA_FILES[task][split]).is_file()] for split in splits}


def predict(
    path: str | Path, *, splits: Sequence[str] | None = None, data: str | None = None, device: str | None = None
) -> list[Path]:
    """Write the answers of a run's best network to `predictions/` and return the files.

    Args:
        path: The run's folder.
        splits: Splits, whose files must be there. Default: dev and test-student, as far as the tasks have them.
        data: Another data folder.
        device: Another device.
    """
    changes = {name: value for name, value in (("data", data), ("device", device)) if value is not None}
    network, settings, folder = load_run(path, **changes)
    torch.set_num_threads(settings.threads)
    if splits is None:
        wanted = available(settings.task_names(), ("dev", "test-student"), settings.data)
    else:
        wanted = {split: settings.task_names() for split in splits}
    written = []
    for split, tasks in wanted.items():
        examples: dict[str, TaskData] = {}
        if tasks:
            examples = load_data(settings, split, folder, token_cache(RunFolder(path)), tasks)
        for task, task_data in examples.items():
            logits = task_outputs(network, task_data, settings)
            written.append(write_predictions(Path(path) / PREDICTIONS, task, split, task_data.ids, logits))
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the prediction files of a run and print their paths."""
    parser = run_options("Write a run's answers in the course's prediction format.")
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--split", action="append", help="train, dev or test-student; may be repeated")
    options = parser.parse_args(arguments)
    try:
        written = predict(options.run, splits=options.split, data=options.data, device=options.device)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
