"""Made-up cells of every suite, in the layout that the suites write, for the tests of the report."""

import itertools
import json
import random
from typing import Any

from benchmarks import efficiency_claim, rank_claim
from benchmarks.contests import contests, hold
from benchmarks.recipes import RECIPES
from benchmarks.steps import cells as step_cells
from benchmarks.steps import parser

FACTS = {
    "cpu": "A processor & more",
    "cores": 2,
    "threads": 2,
    "ram_gib": 8.0,
    "python": "3.11",
    "torch": "2.13",
    "commit": "0123456789abc",
    "dirty": False,
    "changes": None,
    "date": "2026-01-01",
    "load_average": 0.1,
    "peft": "0.21",
    "loralib": "0.1",
}
DEV = 200


def cell(settings: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """A cell of a result file."""
    return {"machine": FACTS, "settings": settings, "figures": figures}


def three(middle: float, width: float = 0.1) -> list[float]:
    """A median with its quantiles."""
    return [middle, middle * (1 - width), middle * (1 + width)]


def steps(*presets: str) -> dict[str, Any]:
    """Cells of whole presets of the step suite; PEFT's LoRA is ahead of ours in half of them."""
    found = {}
    generator = random.Random(0)
    for preset in presets:
        for settings in step_cells(vars(parser().parse_args(["--preset", preset]))):
            if settings.dropout and settings.width != 384:
                continue  # as good as the others, and a page takes its time
            size = settings.rows * settings.length * settings.width * (1 + settings.rank / 100) / 4e5
            rows, samples = {}, {}
            for name in settings.candidates:
                own = size * (0.6 + 0.5 * generator.random()) * (2 if "dora" in name and "peft" in name else 1)
                times = [{"step": own * (0.9 + 0.2 * generator.random()), "cpu": own} for _ in range(5)]
                rows[name] = {
                    "gflop": own,
                    "saved_mib": own,
                    "forward_peak_mib": own,
                    "trained": 1000,
                    "ms": {"step": three(own), "cpu": three(own)},
                    "relative": {"step": three(1.0), "cpu": three(1.0)},
                }
                samples[name] = times
            held = {c.title: hold(c, rows, samples) for c in contests(settings.candidates, settings.amp != "off")}
            figures = {"checks": 3, "baseline": "full-frozen-embeddings", "candidates": rows, "ratios": held}
            found[settings.key] = cell(vars(settings) | {"candidates": list(settings.candidates)}, figures)
    return {"suite": "steps", "cells": found}


def accuracy() -> dict[str, Any]:
    """A cell for every recipe; one is far below the others."""
    generator, found = random.Random(1), {}
    for name, recipe in RECIPES.items():
        right = round(DEV * (0.2 if name == "melora" else 0.42 + 0.07 * generator.random()))
        figures = {
            "dev": right / DEV,
            "right": "1" * right + "0" * (DEV - right),
            "lr": 1e-3,
            "trained": generator.randint(0, 10) * 50_000,
            "heads": 1925,
            "bytes": generator.randint(8_000, 2_000_000),
            "cpu_seconds": 60.0,
        }
        if recipe.method == "dylora":
            figures["ranks"] = {"1": {"dev": right / DEV, "right": figures["right"]}}
        found[name] = cell({**recipe.record(), "examples": [8544, DEV, 10, 10], "epochs": 1}, figures)
    return {"suite": "accuracy", "cells": found}


def cost() -> dict[str, Any]:
    """Both models with every recipe."""
    generator = random.Random(2)
    candidates = {
        name: {
            "trained": 10,
            "relative": {"step": three(1.0 if name == "lora" else 0.5 + generator.random())},
            "gflop": 1.0,
            "saved_mib": 5.0 + generator.random(),
            "checkpoint_bytes": generator.randint(1000, 9_000_000),
            "ms": {"step": three(100.0)},
        }
        for name in RECIPES
    }
    figures = {"checks": 1, "baseline": "lora", "candidates": candidates}
    return {"suite": "cost", "cells": {"minBERT": cell({"rows": 8, "length": 64}, figures)}}


def intruders() -> dict[str, Any]:
    """Full fine-tuning and LoRA."""
    found = {}
    for name, count in (("full", 0), ("lora", 7)):
        figures = {
            "top": 10,
            "matrices": 3,
            "unchanged": 1,
            "intruders": {"0.3": count, "0.5": count + 2},
            "lr": 1e-3,
            "dev": 0.4,
            "rotations": 1,
            "median_cosine": 0.9,
            "effective_rank": 3.0,
            "relative_norm": 0.1,
        }
        found[name] = cell({}, figures)
    return {"suite": "intruders", "cells": found}


def qlora() -> dict[str, Any]:
    """The one cell."""
    figures = {
        "base": {"bytes_per_number": 0.5, "bytes": 4096},
        "dense_bytes_per_number": 4.0,
        "format_bits": 4.1,
        "ranks_equal": True,
        "seconds": {"1": 1.0, "2": 2.0},
        "difference": 1e-5,
        "agreement": 1.0,
    }
    return {"suite": "qlora", "cells": {"qlora": cell({"examples": 8, "batch_size": 4}, figures)}}


def quality(seeds: int = 3) -> dict[str, Any]:
    """All three claims on all tasks."""
    generator, found = random.Random(3), {}
    common = {"weights": "minilm", "steps": 4, "epochs": 1, "batch_size": 8, "amp": "bf16", "grid": 2, "search_examples": 16}
    common |= {"held_examples": 8}
    for task, recipe in itertools.product(("sst", "quora", "sts"), rank_claim.recipes((1, 4))):
        tried = [{"lr": rate, "loss": 1.0} for rate in (1e-4, 1e-3, 1e-2)]
        found[f"B/{task}/{recipe.name}/search"] = cell({**common, "task": task}, {"best": 1e-3, "tried": tried})
        for seed in range(seeds):
            figures = {
                "dev": 0.5 + 0.02 * generator.random(),
                "lr": 1e-3,
                "trainings": [{"lr": 1e-3, "loss": 1.0}],
                "trained": 7,
                "bytes": 9,
                "cpu_seconds": 1.0,
                "examples": {"train": 10, "dev": 20},
            }
            found[f"B/{task}/{recipe.name}/seed{seed}"] = cell({**common, "task": task, "rank": recipe.rank}, figures)
    names = list(efficiency_claim.candidates())
    for task in ("sst", "quora", "sts"):
        rows = {
            name: {
                "epoch_seconds": three(9.0),
                "epoch_cpu_seconds": three(9.0),
                "saved_mib": 3.0,
                "peak_mib": 4.0,
                "trained": 5,
            }
            for name in names
        }
        effects = {
            title: {
                "sides": list(sides),
                "step": three(0.5 + generator.random()),
                "cpu": three(1.0),
                "saved_mib": 0.9,
                "peak_mib": 0.5,
            }
            for title, sides in efficiency_claim.effects().items()
        }
        figures = {"checks": 1, "batch_size": 8, "epoch_steps": 40, "widths": [19], "candidates": rows, "effects": effects}
        found[f"A/{task}/cost"] = cell(common, figures)
    scores = ("sst", "quora", "sts", "overall")
    members = [{name: 0.5 + 0.1 * generator.random() for name in scores} for _ in range(5)]
    gains = {over: {name: [0.02, 0.01, 0.03, 100] for name in scores} for over in ("mean single", "best single")}
    held = {"backbone": 4000, "members": 500, "adapters": 100, "heads": 50, "shared": 4500, "full": 30_000}
    figures = {"members": members, "ensemble": dict.fromkeys(scores, 0.62), "gains": gains, "bytes": held}
    settings = common | {"backbones": 2, "head": "conv", "sts_loss": "pearson", "rank": 8, "members": 5, "member_steps": 6}
    found["C/paper/ensemble"] = cell(settings, figures)
    return {"suite": "quality", "cells": found}


def memory() -> dict[str, Any]:
    """An estimate that is right, and one that is not."""
    found = {}
    for name, off in (("near", 0.01), ("far", 0.2)):
        figures = {"estimate_mib": 10 * (1 + off), "measured_mib": 10.0, "error": off, "added_error": off}
        figures |= {"rss_growth_mib": None, "estimate_growth_mib": 1.0, "seconds": 1.0}
        found[name] = cell({}, figures)
    return {"suite": "memory", "cells": found}


def peers() -> dict[str, Any]:
    """A curve that agrees, one that does not, one that is not judged."""
    found = {}
    for name, off, limit in (("cpu, lora", 1e-7, 1e-4), ("cpu, dora", 1e-3, 1e-4), ("cpu, lora, bf16", 1e-3, None)):
        deviation = [0.0, *[off] * 9]
        figures = {
            "curves": {"ours": [1.0] * 10, "peft": [1.0] * 10},
            "deviation": deviation,
            "worst": off,
            "worst_all": off,
            "update_deviation": off,
            "limit": limit,
        }
        found[name] = cell({}, figures)
    return {"suite": "peers", "cells": found}


def kernels() -> dict[str, Any]:
    """Two operations in which the peer's formula is ahead and others are absent, and one that was left out."""
    rows = {
        name: {
            "gflop": 1.0,
            "saved_mib": 1.0,
            "forward_peak_mib": 1.0,
            "ms": {"both": three(1.0)},
            "relative": {"both": three(share)},
        }
        for name, share in (("reference", 2.0), ("torch", 1.0), ("PEFT's formula", 0.5))
    }
    settings = {"operation": "lora", "model": "BERT-base", "in_features": 768, "out_features": 768, "rank": 8, "dtype": "fp32"}
    figures = {"checks": 1, "baseline": "torch", "candidates": rows, "absent": {"triton": "there is no GPU"}}
    other = {**figures, "absent": {"triton": "there is no GPU", "compiled reference": "not timed, since it is off"}}
    every = {"a": figures, "b": other, "c": {"left_out": "asks for 9 GiB"}}
    return {"suite": "kernels", "cells": {name: cell(settings, one) for name, one in every.items()}}


def everything() -> dict[str, Any]:
    """Results of all these suites by file."""
    found = {
        "steps": steps("peers", "scaling"),
        "quality": quality(),
        "memory": memory(),
        "peers": peers(),
        "kernels": kernels(),
    }
    methods = {"accuracy": accuracy(), "cost": cost(), "intruders": intruders(), "qlora": qlora()}
    found |= {f"methods_{name}": content for name, content in methods.items()}
    return json.loads(json.dumps(found))  # as the report reads them
