"""Collect finished minBERT runs into one result file: `python -m benchmarks.minbert RUN [RUN ...]`.

The runs come from `python -m examples.minbert_multitask.train`; each keeps its own settings, machine, versions and commit.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, write_result

NAME = "minbert.json"
LOCAL = ("data", "output", "device")  # settings that speak of one machine's folders


def collect(folder: Path) -> dict[str, Any]:
    """What `minbert.json` keeps of a run folder.

    Raises:
        FileNotFoundError: the run has not finished.
    """
    path = folder / "result.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no result.json: the run has not finished; go on with it by --resume")
    found = json.loads(path.read_text(encoding="utf-8"))
    settings = {name: value for name, value in found["settings"].items() if name not in LOCAL}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    adapted = settings["method"] not in ("full", "linear-probe", "bitfit")
    return {
        "name": folder.name,
        "method": settings["method"],
        "rank": settings["rank"] if adapted else None,
        "dev": {**found["scores"], "overall": found["leaderboard"]},
        "trained": found["parameters"]["trained_backbone"],
        "share": found["parameters"]["trained_share"],
        "heads": found["parameters"]["heads"],
        "steps": found["steps"],
        "best_step": found["best_step"],
        "seconds": found["train_seconds"],
        "memory": found["memory"],
        "curve": [{key: row[key] for key in ("step", "scores", "score", "seconds")} for row in rows if row["kind"] == "dev"],
        "settings": settings,
        "environment": found["environment"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write `minbert.json` from run folders; the exit status is 1 if one of them has not finished."""
    parser = argparse.ArgumentParser(description="Collect finished minBERT runs into one result file.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--note", default="", help="what a reader of the figures must know about how the runs were made")
    parser.add_argument("--output", type=Path, default=RESULTS / NAME, help="the file to write")
    options = parser.parse_args(arguments)
    try:
        runs = [collect(folder) for folder in options.runs]
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    write_result(options.output, {"note": options.note, "runs": runs})
    print(f"wrote {len(runs)} runs to {options.output.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
