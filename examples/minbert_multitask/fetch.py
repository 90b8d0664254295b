"""Public data from the hub, in the layout that `load_task` reads.

From three dataset repositories that hold JSON lines (no parquet reader is needed), over plain https:

* `SetFit/sst5`  -> ids-sst-{train,dev,test-student}.csv   (`text`, `label`)
* `SetFit/qqp`   -> quora-{train,dev,test-student}.csv     (`text1`, `text2`, `label`: GLUE's QQP)
* `SetFit/stsb`  -> sts-{train,dev,test-student}.csv       (`text1`, `text2`, `label`: GLUE's STS-B)

The splits of QQP and STS-B are GLUE's, not the course's: scores are not comparable digit by digit. Test files are
written without labels. CFIMDB is on no hub in this form; the course's starter repository has it.

A finished file is not downloaded again, and each is written under another name and renamed when whole, so that an
interrupted run is continued by the same command.
"""

import argparse
import csv
import http.client
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from examples.minbert_multitask.files import DATA_FILES, TASKS

ENDPOINT = "https://huggingface.co"
TIMEOUT = 60  # seconds without a byte before a connection is given up
# How dataset repositories name the file of each of our splits, in order of preference
STEMS = {"train": ("train",), "dev": ("dev", "validation", "val"), "test-student": ("test",)}


class Source(NamedTuple):
    """A dataset repository, its text fields, and the terms under which its data may be used."""

    repository: str
    texts: tuple[str, ...]
    terms: str


SOURCES = {
    "sst": Source(
        "SetFit/sst5",
        ("text",),
        "Stanford Sentiment Treebank: no licence is stated; cite Socher et al. (2013), EMNLP, "
        '"Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank"',
    ),
    "quora": Source("SetFit/qqp", ("text1", "text2"), "Quora Question Pairs: Quora's terms, non-commercial use"),
    "sts": Source("SetFit/stsb", ("text1", "text2"), "STS Benchmark: scores CC BY-SA 4.0, texts under their own terms"),
}


class FetchError(RuntimeError):
    """A download that failed; the message says of what, why, and what to do."""


def fetch(folder: str | Path, *, tasks: tuple[str, ...] = tuple(SOURCES), endpoint: str = ENDPOINT) -> list[Path]:
    """Download `tasks` into `folder` and return the files written now; those already there are left alone.

    Raises:
        ValueError: a task that has no source.
        FetchError: no connection, a repository without the expected files, a row without the expected fields.
    """
    if unknown := [task for task in tasks if task not in SOURCES]:
        raise ValueError(f"no source for the task {', '.join(unknown)}; public data exist for {', '.join(SOURCES)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for task in tasks:
        todo = {split: folder / name for split, name in DATA_FILES[task].items() if not (folder / name).is_file()}
        if not todo:
            print(f"{task}: all files are there already")
            continue
        urls = _locate(SOURCES[task].repository, tuple(todo), endpoint.rstrip("/"))
        for split, path in todo.items():
            _convert(urls[split], task, split, path)
            written.append(path)
    return written


def _open(url: str) -> Any:
    """The open response of a GET on `url`.

    Raises:
        FetchError: any failure, with the address.
    """
    if urllib.parse.urlparse(url).scheme not in ("http", "https"):
        raise FetchError(f"{url} is not an http(s) address; give --endpoint as in {ENDPOINT}")
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers={"User-Agent": "peftlite"}), timeout=TIMEOUT)
    except (OSError, http.client.HTTPException) as error:  # URLError and HTTPError are OSErrors
        raise FetchError(f"cannot download {url}: {error}; run the same command again") from error


def _locate(repository: str, splits: tuple[str, ...], endpoint: str) -> dict[str, str]:
    """The address of each split's file, pinned to the commit that the repository is at now.

    Raises:
        FetchError: the listing cannot be read, or lacks a split.
    """
    listing = f"{endpoint}/api/datasets/{repository}"
    with _open(listing) as response:
        try:
            found = json.loads(response.read())
            names, commit = [file["rfilename"] for file in found["siblings"]], found.get("sha") or "main"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FetchError(f"{listing} did not answer with a list of files; is the endpoint a hub?") from error
    urls = {}
    for split in splits:
        wanted = [f"{stem}.jsonl" for stem in STEMS[split]]
        name = next((name for name in wanted if name in names), None)
        if name is None:
            raise FetchError(f"{repository} has no {' or '.join(wanted)} (found: {', '.join(names) or 'no file'})")
        urls[split] = f"{endpoint}/datasets/{repository}/resolve/{commit}/{name}"
    return urls


def _lines(url: str, title: str) -> Iterator[bytes]:
    """The lines of `url`, with a progress bar.

    Raises:
        FetchError: the connection broke, or fewer bytes came than were announced.
    """
    with _open(url) as response:
        total = int(response.headers.get("Content-Length") or 0)
        received = 0
        with tqdm(total=total or None, unit="B", unit_scale=True, desc=title, file=sys.stderr) as bar:
            while True:
                try:
                    line = response.readline()
                except (OSError, http.client.HTTPException) as error:
                    raise FetchError(f"the download of {url} broke off: {error}; run the same command again") from error
                if not line:
                    break
                received += len(line)
                bar.update(len(line))
                yield line
        if received < total:
            raise FetchError(f"{url} broke off after {received} of {total} bytes; run the same command again")


def _convert(url: str, task: str, split: str, path: Path) -> None:
    """Write the JSON lines at `url` as `path`, whole or not at all.

    Raises:
        FetchError: see `_lines`; also a row that is not JSON or lacks a field.
    """
    texts, columns = SOURCES[task].texts, TASKS[task]
    labelled = split != "test-student"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
            writer.writerow(["", "id", *columns.sentences, *([columns.label] if labelled else [])])
            for number, line in enumerate(_lines(url, path.name)):
                try:
                    row = json.loads(line)
                    # one line per row: tabs and line ends inside a sentence become blanks
                    fields = [" ".join(str(row[name]).split()) for name in texts]
                    label = [row["label"]] if labelled else []
                except (ValueError, KeyError, TypeError) as error:
                    raise FetchError(
                        f"{url}, line {number + 1}: expected JSON with {', '.join(texts)} and label ({error!r}); "
                        "the repository has changed"
                    ) from error
                writer.writerow([number, f"{task}-{split}-{number}", *fields, *label])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fetch` on the command line."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write")
    parser.add_argument("--tasks", nargs="+", choices=tuple(SOURCES), default=tuple(SOURCES), help="default: all")
    parser.add_argument(
        "--endpoint", default=os.environ.get("HF_ENDPOINT") or ENDPOINT, help=f"a mirror of the hub; default {ENDPOINT}"
    )


def run(options: argparse.Namespace) -> int:
    """Fetch, then print what was written and the data's terms; the exit status is 1 after a failure."""
    try:
        written = fetch(options.folder, tasks=tuple(options.tasks), endpoint=options.endpoint)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(f"wrote {path}")
    print("The data come under these terms:")
    for task in options.tasks:
        print(f"  {SOURCES[task].terms}")
    return 0
