"""Every method beside the others: cost, accuracy, intruder dimensions, quantised bases.

    python -m benchmarks.methods                                              # cost of a step; minutes
    python -m benchmarks.methods --suite accuracy --data DIR --output DIR     # hours; the same command goes on
    python -m benchmarks.methods --suite intruders --output DIR               # of what the accuracy suite trained
    python -m benchmarks.methods --suite qlora --data DIR --output DIR        # minutes
    python -m benchmarks.methods --suite accuracy --small                     # some recipes on the embedded sample; a minute

Start the accuracy suite as often as there are cores, with the same --output: the processes share the recipes out among
themselves. Each finished recipe is in a file of its own at once, and all of them in the result file.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks import accuracy, intruders, method_cost, qlora
from benchmarks.cells import exit_status
from benchmarks.protocol import Protocol
from benchmarks.recipes import RECIPES

SETTINGS: dict[str, type[Any]] = {  # of each suite; every field is an option
    "cost": method_cost.CostSettings,
    "accuracy": Protocol,
    "intruders": Protocol,
    "qlora": qlora.Short,
}
RESULTS = {
    "cost": method_cost.RESULT,
    "accuracy": accuracy.RESULT,
    "intruders": intruders.RESULT,
    "qlora": qlora.RESULT,
}
OUTPUT, SMALL_OUTPUT = Path("runs/methods"), Path("runs/bench/methods")
_FEW = {"epochs": 1, "batch_size": 16, "search_examples": 64, "held_examples": 32, "grid": 1, "grow": 0}
SMALL: dict[str, dict[str, int]] = {  # what --small sets, where the command line does not
    "cost": {"rounds": 2, "warmup": 1},
    "accuracy": _FEW,
    "intruders": _FEW,
    "qlora": {"examples": 64, "batch_size": 16},
}
# Every kind of recipe: without adapters, with a controller, with shared tensors, on a quantised base, at other ranks.
SMALL_NAMES = ["full", "linear-probe", "lora", "dora", "vera", "dylora", "lora-fp32", "qlora", "lora-r1", "lora-r64"]


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in RECIPES]:
        raise argparse.ArgumentTypeError(f"no recipe {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    return names


def parser() -> argparse.ArgumentParser:
    """The command line; an option of a suite that is not given is left out of the namespace."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.methods", description="Compare the methods.")
    add = options.add_argument
    add("--suite", choices=SETTINGS, default="cost", help="what to measure (default: cost)")
    add("--methods", type=_names, metavar="NAME,...", help="recipes (default: all; for intruders full and LoRA at three ranks)")
    add("--data", default="sample", help="folder with the SST files, or the example's 'sample' (default)")
    add("--output", type=Path, help=f"folder for cells, trained tensors, token cache (default: {OUTPUT}, small {SMALL_OUTPUT})")
    add("--result", type=Path, help="result file (default: that of the suite in benchmarks/results; with --small in --output)")
    add("--small", action="store_true", help="few recipes, examples and rounds: whether everything runs")
    add("--fresh", action="store_true", help="measure again what is finished")
    owners: dict[str, list[str]] = {}
    specs = {}
    for suite, kind in SETTINGS.items():
        for spec in fields(kind):
            owners.setdefault(spec.name, []).append(f"{suite} {spec.default}")
            specs.setdefault(spec.name, spec)
    for name, spec in specs.items():
        text = f"default: {', '.join(owners[name])}"
        add(f"--{name.replace('_', '-')}", type=type(spec.default), default=argparse.SUPPRESS, metavar="VALUE", help=text)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a suite; the exit status."""
    options = parser()
    given = vars(options.parse_args(arguments))
    suite, names, data, output, result, small, fresh = (
        given.pop(name) for name in ("suite", "methods", "data", "output", "result", "small", "fresh")
    )
    known = {spec.name for spec in fields(SETTINGS[suite])}
    if foreign := sorted(set(given) - known):
        options.error(f"suite {suite} has no option --{foreign[0].replace('_', '-')}; its own are {', '.join(sorted(known))}")
    output = output or (SMALL_OUTPUT if small else OUTPUT)
    result = result or (output / RESULTS[suite].name if small else RESULTS[suite])  # never over the committed one
    settings = SETTINGS[suite](**({**SMALL[suite], **given} if small else given))
    names = names or (SMALL_NAMES if small and suite != "intruders" else None)

    def run() -> bool:
        if suite == "cost":
            method_cost.run(names or list(RECIPES), settings, result, fresh=fresh)
        elif suite == "accuracy":
            accuracy.run(names or list(RECIPES), settings, data, output, result, fresh=fresh)
        elif suite == "intruders":
            intruders.run(names or intruders.NAMES, settings, output, result)
        else:
            qlora.run(settings, data, output, result, fresh=fresh)
        return True

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
