"""The claims of Frees, Bhagirath and Bolling 2025 (arXiv:2508.17586) on real data: `python -m benchmarks.quality`.

    python -m benchmarks.quality --small                            # minutes, on the embedded sample: does everything run
    python -m benchmarks.quality --data DIR --claims B,C            # hours; the same command goes on where it was
    python -m benchmarks.quality --data DIR --claims B --seeds 5    # more seeds; what is finished is kept

A: what LoRA, DoRA and autocast each save; B: whether rank 1 costs accuracy; C: what an ensemble gains. Start the command
as often as there are cores, with the same --output: the processes share the trainings out among themselves. Each finished
training is in a file of its own at once, and all of them in the result file. The timings of claim A want a quiet machine.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from benchmarks import efficiency_claim, ensemble_claim, rank_claim
from benchmarks.cells import exit_status
from benchmarks.harness import RESULTS
from benchmarks.jobs import Job, collect, work
from benchmarks.study import SMALL, SUITE, Options, Study

RESULT = RESULTS / "quality.json"
NAMES = (SUITE, "paper")
CLAIMS = {"A": efficiency_claim.jobs, "B": rank_claim.jobs, "C": ensemble_claim.jobs}


def _claims(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in CLAIMS]:
        raise argparse.ArgumentTypeError(f"no claim {', '.join(unknown)}; there are {', '.join(CLAIMS)}")
    return names


def _ranks(text: str) -> tuple[int, ...]:
    try:
        ranks = tuple(int(rank) for rank in text.split(","))
    except ValueError:
        ranks = ()
    if not ranks or min(ranks) < 1 or len(set(ranks)) < len(ranks):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of ranks; write them as in 1,2,4")
    return ranks


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of trainings; at least 1 is needed")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line; a field of `Options` that is not given is left out of the namespace."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.quality", description="The paper's claims on real data.")
    add = options.add_argument
    add("--suite", choices=NAMES, default=SUITE, help="this suite, by either of its names")
    add("--claims", type=_claims, default=list(CLAIMS), metavar="NAME,...", help=f"of {','.join(CLAIMS)} (default: all)")
    add("--data", default="sample", help="folder with the files of SST, Quora and STS, or the example's 'sample' (default)")
    add("--seeds", type=_count, help="trainings for each recipe of claim B (default: 3; 2 with --small)")
    add("--ranks", type=_ranks, help="of claim B (default: 1,2,4,8,16; 1,8 with --small)")
    add("--members", type=_count, help="of each ensemble of claim C (default: 5; 2 with --small)")
    add("--small", action="store_true", help="other defaults: whether everything runs, in minutes")
    add("--output", type=Path, help="folder for cells, trained tensors, token cache (default: runs/quality, or -small)")
    add("--result", type=Path, help="result file (default: benchmarks/results/quality.json; with --small in --output)")
    add("--fresh", action="store_true", help="measure again what is finished")
    for spec in fields(Options):
        text = f"default: {spec.default}; with --small {getattr(SMALL, spec.name)}"
        add(f"--{spec.name.replace('_', '-')}", type=type(spec.default), default=argparse.SUPPRESS, metavar="VALUE", help=text)
    return options


def jobs(study: Study, claims: Sequence[str]) -> list[Job]:
    """Those of the claims, in their order; one that several claims need comes once, where it is first needed."""
    found: dict[str, Job] = {}
    for claim in claims:
        for job in CLAIMS[claim](study):
            found.setdefault(job.key, job)
    return list(found.values())


def finished_keys(study: Study, planned: Sequence[Job]) -> list[str]:
    """Cells to collect: the planned ones in order, then whatever else was measured into the same folder."""
    folder = study.output / "cells"
    there = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.json"))
    return list(dict.fromkeys([*(job.key for job in planned), *there]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; the exit status."""
    given = vars(parser().parse_args(arguments))
    del given["suite"]
    claims, fresh, small = given.pop("claims"), given.pop("fresh"), given.pop("small")
    output = given.pop("output") or Path("runs/quality-small" if small else "runs/quality")
    result = given.pop("result") or (output / "quality.json" if small else RESULT)
    seeds, ranks, members, data = (given.pop(name) for name in ("seeds", "ranks", "members", "data"))
    study = Study(
        replace(SMALL if small else Options(), **given),
        data,
        output,
        seeds=seeds or (2 if small else 3),
        ranks=ranks or ((1, 8) if small else (1, 2, 4, 8, 16)),
        members=members or (2 if small else 5),
    )

    def run() -> bool:
        study.claim_folder()
        torch.set_num_threads(study.options.threads)
        print(f"{asdict(study.options)}", flush=True)
        planned = jobs(study, claims)
        # All that the folder may hold, so that the result file keeps what another claim or more seeds have brought
        known = finished_keys(study, jobs(study, list(CLAIMS)))
        work(planned, output, SUITE, known, result, fresh=fresh)
        print(f"{collect(output, SUITE, known, result)} cells are in {result}")
        return True

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
