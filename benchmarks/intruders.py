"""Intruder dimensions of the trained models: `python -m benchmarks.methods --suite intruders`.

Reads what the accuracy suite left in --output, and compares full fine-tuning with LoRA at rank 1, 8 and 64 as Shuttleworth
et al. 2024 (arXiv:2410.21228) do: the ten leading left singular vectors of each adapted matrix, cosine below a threshold.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import peftlite
from benchmarks.harness import RESULTS, ResultFile, machine
from benchmarks.protocol import Protocol
from benchmarks.recipes import RECIPES, Recipe
from examples.minbert_multitask.network import build_network
from examples.minbert_multitask.settings import ALL_LINEAR
from peftlite.analysis.intruders import intruder_report

RESULT = RESULTS / "methods_intruders.json"
NAMES = ("full", "lora-r1", "lora", "lora-r64")
TOP, THRESHOLDS = 10, (0.3, 0.5, 0.7)
MEANS = ("effective_rank", "stable_rank", "relative_norm", "relative_spectral_norm")


def measure(recipe: Recipe, protocol: Protocol, trained: Path, cache: dict[str, Any]) -> dict[str, Any]:
    """Counts at each threshold, and means over the adapted matrices, of the model saved in `trained`."""
    settings = recipe.resolved(protocol.settings("sample"))
    base, _ = build_network(settings)
    tuned, _ = build_network(settings)
    peftlite.load_adapters(tuned, trained)
    adapted = bool(peftlite.adapters(tuned))
    before = None if adapted else base.backbones
    # Adapters may stand on a base rounded to 16 bits, whose singular vectors are not those of the other one.
    report = intruder_report(
        tuned.backbones, before, names=ALL_LINEAR, top=TOP, thresholds=THRESHOLDS, cache=None if adapted else cache
    )
    rotations = sum(
        sum(cosine < 0.5 <= window for cosine, window in zip(matrix.cosines, matrix.window_cosines, strict=True))
        for matrix in report.matrices
    )
    cosines = sorted(cosine for matrix in report.matrices for cosine in matrix.cosines)
    return {
        "matrices": len(report.matrices),
        "unchanged": len(report.unchanged),
        "top": TOP,
        "intruders": {str(threshold): report.total(threshold) for threshold in THRESHOLDS},
        "rotations": rotations,  # of those below 0.5, how many the base's neighbouring directions explain
        "least_cosine": cosines[0],
        "median_cosine": cosines[len(cosines) // 2],
        **{name: report.mean(name) for name in MEANS},
    }


def run(names: Sequence[str], protocol: Protocol, output: Path, result: Path) -> None:
    """Report on each of `names` that the accuracy suite has trained.

    Raises:
        FileNotFoundError: there is none.
    """
    torch.set_num_threads(protocol.threads)
    facts, cells, cache = machine(), ResultFile(result, "intruders"), {}
    for name in names:
        trained, record = output / f"{name}.safetensors", output / "cells" / f"{name}.json"
        if not (trained.is_file() and record.is_file()):
            print(f"{name}: not trained yet, left out", flush=True)
            continue
        cell = json.loads(record.read_text(encoding="utf-8"))["cells"][name]
        figures = measure(RECIPES[name], protocol, trained, cache)
        figures |= {key: cell["figures"][key] for key in ("dev", "lr")}
        cells.add(name, facts, cell["settings"], figures)
        counts = ", ".join(f"{count} below {threshold}" for threshold, count in figures["intruders"].items())
        print(f"{name}: {counts}, of {TOP * (figures['matrices'] + figures['unchanged'])} directions", flush=True)
    if not cells.cells:
        raise FileNotFoundError(f"{output.name} holds no trained model; run --suite accuracy with the same --output first")
    print(f"written to {result}")
