"""Every method beside the others: accuracy, cost, intruder dimensions, quantised bases.

    python -m benchmarks.methods --suite accuracy --data DIR --output DIR      # hours; go on with the same command

Start the accuracy suite as often as there are cores, each with --threads 1 and the same --output: the processes share the
recipes out among themselves. Each finished recipe is in a file of its own at once, and all of them in the result.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks import accuracy
from benchmarks.recipes import RECIPES

SUITES = ("accuracy",)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in RECIPES]:
        raise argparse.ArgumentTypeError(f"no recipe {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    return names


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description="Compare the methods.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--suite", choices=SUITES, default=SUITES[0], help="what to measure")
    add("--methods", type=_names, default=",".join(RECIPES), metavar="NAME,...", help="recipes, in this order")
    add("--data", default="sample", help="folder with the SST files of the example, or 'sample'")
    add("--output", type=Path, default=Path("runs/methods"), help="folder for cells, trained tensors and token cache")
    add("--result", type=Path, help="result file; by default that of the suite in benchmarks/results")
    add("--fresh", action="store_true", help="measure finished cells again")
    for spec in fields(accuracy.Protocol):
        flag = f"--{spec.name.replace('_', '-')}"
        add(flag, type=type(spec.default), default=spec.default, help="of the accuracy protocol", metavar="VALUE")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a suite; the exit status."""
    options = parser().parse_args(arguments)
    protocol = accuracy.Protocol(**{spec.name: getattr(options, spec.name) for spec in fields(accuracy.Protocol)})
    try:
        result = options.result or accuracy.RESULT
        accuracy.run(options.methods, protocol, options.data, options.output, result, fresh=options.fresh)
    except KeyboardInterrupt:
        print("\ninterrupted: what is finished is kept; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
