"""The four tasks of the CS224N default project: files to token ids, token ids to batches.

Sentences are tokenised once, by `load_task`; `collate` adds [CLS], [SEP] and padding; `batches` says which examples go
together. How the files are read is in files.py.

    python -m examples.minbert_multitask.data check DIR      counts rows and malformed rows
    python -m examples.minbert_multitask.data fetch DIR      downloads public data (see fetch.py)
"""

import argparse
import hashlib
import itertools
import json
import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.minbert_multitask.cache import read_cache, write_cache
from examples.minbert_multitask.files import DATA_FILES, SPLITS, TASKS, Problem, data_path, describe_problems, read_rows

__all__ = [
    "DATA_FILES", "DEFAULT_FOLDER", "SPLITS", "TASKS", "Batch", "Problem", "SpecialTokens", "TaskData",
    "batches", "collate", "describe_problems", "load_task",
]  # fmt: skip

logger = logging.getLogger(__name__)

DEFAULT_FOLDER = Path(__file__).parent / "sample"
POOL = 50  # batches whose examples are sorted by length together: enough for little padding, few enough to stay random
CACHE_FORMAT = "1"  # part of a cached file's name; raise it when reading or tokenising changes


class SpecialTokens(NamedTuple):
    """Token ids that `collate` adds."""

    pad: int
    cls: int
    sep: int


@dataclass(frozen=True)
class TaskData:
    """One split of one task, tokenised. Ids of `first` and `second` come without [CLS] and [SEP].

    `labels` `(N,)` are int64 classes for sst and cfimdb, float32 for quora (0 or 1) and sts (0 to 5, never truncated),
    None where the file has none.
    """

    task: str
    split: str
    ids: list[str]
    first: list[list[int]]
    second: list[list[int]] | None
    labels: Tensor | None
    special: SpecialTokens
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


def load_task(
    task: str, split: str, folder: str | Path, tokenizer: Tokenizer, *, cache: str | Path | None = None
) -> TaskData:
    """Token ids and labels of one split; malformed rows are skipped, logged and listed in `TaskData.problems`.

    Args:
        task: "sst", "cfimdb", "quora" or "sts".
        split: "train", "dev" or "test-student".
        folder: where the files of `DATA_FILES` are.
        tokenizer: see `load_tokenizer`.
        cache: folder for tokenised files, named by the content of the file and of the tokenizer. Default: none.

    Raises:
        ValueError: unknown task or split, a missing column (named), no usable row, or not a BERT tokenizer.
        FileNotFoundError: the file is missing (named).
    """
    path = data_path(task, split, folder)
    special = [tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]")]
    if None in special:
        raise ValueError("the tokenizer lacks [PAD], [CLS] or [SEP]; a BERT vocabulary has them")
    data, cached = None, None
    if cache is not None:
        key = (CACHE_FORMAT, task, split, hashlib.sha256(path.read_bytes()).hexdigest(), tokenizer.to_str())
        digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:20]
        cached = Path(cache) / f"{task}-{split}-{digest}.safetensors"
        if (stored := read_cache(cached)) is not None:
            data = _unpack(task, split, SpecialTokens(*special), *stored)
    if data is None:
        rows, problems = read_rows(task, split, folder)
        tokens = []
        for k in range(len(TASKS[task].sentences)):
            encodings = tokenizer.encode_batch([row.sentences[k] for row in rows], add_special_tokens=False)
            tokens.append([encoding.ids for encoding in encodings])
        data = TaskData(
            task=task,
            split=split,
            ids=[row.id for row in rows],
            first=tokens[0],
            second=tokens[1] if len(tokens) == 2 else None,
            labels=None if rows[0].label is None else torch.tensor([r.label for r in rows]).to(TASKS[task].dtype),
            special=SpecialTokens(*special),
            problems=tuple(problems),
        )
        if cached is not None:
            write_cache(cached, *_pack(data))
    if data.problems:
        logger.warning("%s %s: %s", task, split, describe_problems(data.problems))
    return data


def _pack(data: TaskData) -> tuple[dict[str, Tensor], str]:
    """`data` as tensors and text for the cache; `_unpack` is its inverse."""
    tensors = {} if data.labels is None else {"labels": data.labels}
    for name, sentences in (("first", data.first), ("second", data.second)):
        if sentences is not None:
            tensors[name] = torch.tensor([token for sentence in sentences for token in sentence], dtype=torch.int32)
            tensors[f"{name}_lengths"] = torch.tensor([len(sentence) for sentence in sentences], dtype=torch.int32)
    return tensors, json.dumps({"ids": data.ids, "problems": data.problems})


def _unpack(task: str, split: str, special: SpecialTokens, tensors: dict[str, Tensor], text: str) -> TaskData:
    """The split that `_pack` took apart."""
    sides = {
        name: [part.tolist() for part in tensors[name].split(tensors[f"{name}_lengths"].tolist())]
        for name in ("first", "second")
        if name in tensors
    }
    stored = json.loads(text)
    return TaskData(
        task=task,
        split=split,
        ids=stored["ids"],
        first=sides["first"],
        second=sides.get("second"),
        labels=tensors.get("labels"),
        special=special,
        problems=tuple(Problem(*problem) for problem in stored["problems"]),
    )


@dataclass
class Batch:
    """B padded examples. `S` is B, or 2B for pairs read one by one (bi-encoder).

    A bi-encoder's pairs are stacked: rows `0..B-1` of the inputs are the first sentences, rows `B..2B-1` the second, so
    that one forward pass reads both; `split` takes features apart again.
    """

    input_ids: Tensor  # (S, T) int64
    attention_mask: Tensor  # (S, T) bool, true where there is a token
    token_type_ids: Tensor  # (S, T) int64
    labels: Tensor | None  # (B,)
    index: list[int]  # positions in the TaskData, B of them
    stacked: bool

    def __len__(self) -> int:
        return len(self.index)

    def split(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """`(S, ...)` -> features of the first sentences `(B, ...)` and of the second, None if there is one input."""
        return (features[: len(self)], features[len(self) :]) if self.stacked else (features, None)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on `device`."""
        inputs = (t.to(device, non_blocking=True) for t in (self.input_ids, self.attention_mask, self.token_type_ids))
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return Batch(*inputs, labels, self.index, self.stacked)


def collate(data: TaskData, index: Sequence[int], *, cross_encoder: bool = False, max_length: int = 128) -> Batch:
    """Examples `index` of `data` as padded tensors, at most `max_length` tokens wide.

    Args:
        data: from `load_task`.
        index: which examples, B of them.
        cross_encoder: pairs as one input `[CLS] a [SEP] b [SEP]`, token types 0 and 1, the longer sentence cut first;
            otherwise as two inputs `[CLS] a [SEP]` and `[CLS] b [SEP]`, stacked.
        max_length: cut longer inputs to this many tokens, [CLS] and [SEP] included.

    Raises:
        ValueError: nothing to collate, or `max_length` leaves no room for a token of each sentence.
    """
    pad, cls, sep = data.special
    joined = cross_encoder and data.second is not None
    if not len(index):
        raise ValueError("cannot collate an empty batch; index names no example")
    if max_length < (5 if joined else 3):
        raise ValueError(f"max_length {max_length} leaves no room for text between the special tokens; ask for more")
    if joined:
        rows, types = [], []
        for i in index:
            a, b = _fit(data.first[i], data.second[i], max_length - 3)
            rows.append([cls, *a, sep, *b, sep])
            types.append([0] * (len(a) + 2) + [1] * (len(b) + 1))
    else:
        sides = (data.first,) if data.second is None else (data.first, data.second)
        rows = [[cls, *side[i][: max_length - 2], sep] for side in sides for i in index]
        types = [[0] * len(row) for row in rows]
    T = max(map(len, rows))
    return Batch(
        input_ids=torch.tensor([row + [pad] * (T - len(row)) for row in rows]),
        attention_mask=torch.tensor([[True] * len(row) + [False] * (T - len(row)) for row in rows]),
        token_type_ids=torch.tensor([row + [0] * (T - len(row)) for row in types]),
        labels=None if data.labels is None else data.labels[torch.as_tensor(index)],
        index=list(index),
        stacked=data.second is not None and not joined,
    )


def _fit(a: list[int], b: list[int], room: int) -> tuple[list[int], list[int]]:
    """`a` and `b` cut to `room` tokens together, token by token from the longer one (from `b` at a tie)."""
    if len(a) + len(b) > room:
        keep_a = max(room - len(b), min(len(a), (room + 1) // 2))
        a, b = a[:keep_a], b[: room - keep_a]
    return a, b


def batches(
    data: TaskData, batch_size: int, *, seed: int, epoch: int, shuffle: bool = True, cross_encoder: bool = False
) -> list[list[int]]:
    """Positions in `data`, batch by batch, examples of like length together; each example exactly once.

    The result is a function of `(len(data), lengths, batch_size, seed, epoch)`. Batches differ in size by one at most,
    so that no batch of a single example is left over for BatchNorm to fail on.

    Args:
        data: from `load_task`.
        batch_size: at most this many examples in a batch.
        seed: with `epoch`, decides the order.
        epoch: the pass over the data, from 0.
        shuffle: shuffle examples, sort them in pools of `POOL` batches, shuffle the batches. Otherwise sort all by
            length, longest first, so that memory runs out in the first batch if it does.
        cross_encoder: measure a pair by the sum of its lengths, not by the longer of the two.

    Raises:
        ValueError: `batch_size` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    lengths = [len(sentence) for sentence in data.first]
    if data.second is not None:
        together = sum if cross_encoder else max
        lengths = [together((n, len(sentence))) for n, sentence in zip(lengths, data.second, strict=True)]
    order = list(range(len(data)))
    count = -(-len(order) // batch_size)
    rng = random.Random(f"{seed}/{epoch}")  # a string is hashed the same way in every process
    if shuffle:
        rng.shuffle(order)
    cuts = [len(order) * k // max(count, 1) for k in range(count + 1)]
    found = []
    for start in range(0, count, POOL if shuffle else max(count, 1)):
        inside = cuts[start : start + (POOL if shuffle else count) + 1]
        pool = sorted(order[inside[0] : inside[-1]], key=lambda i: -lengths[i])
        found += [pool[lo - inside[0] : hi - inside[0]] for lo, hi in itertools.pairwise(inside)]
    if shuffle:
        rng.shuffle(found)
    return found


def check(folder: Path) -> int:
    """Print rows and malformed rows of every file of `folder`; the exit status is 1 if there is none to read."""
    status = 1
    for task, split in itertools.product(TASKS, SPLITS):
        if (folder / DATA_FILES[task][split]).is_file():
            rows, problems = read_rows(task, split, folder)
            print(f"{DATA_FILES[task][split]:<28}{len(rows):>8,} rows")
            if problems:
                print(describe_problems(problems))
            status = 0
    if status:
        print(f"{folder} holds none of the tasks' files, such as {DATA_FILES['sst']['train']}", file=sys.stderr)
    return status


def main(arguments: list[str] | None = None) -> int:
    """`check` or `fetch`, see the top of this file."""
    from examples.minbert_multitask import fetch

    parser = argparse.ArgumentParser(prog="python -m examples.minbert_multitask.data", description="The tasks' files.")
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="count rows and malformed rows")
    checking.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER, metavar="DIR")
    fetch.add_arguments(commands.add_parser("fetch", help="download public data"))
    options = parser.parse_args(arguments)
    return check(options.folder) if options.command == "check" else fetch.run(options)


if __name__ == "__main__":
    sys.exit(main())
