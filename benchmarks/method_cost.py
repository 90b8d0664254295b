"""What a training step of every recipe costs: `python -m benchmarks.methods --suite cost`.

Two models: one layer of BERT-base (its six matrices are 768 -> 768, 768 -> 3072 and 3072 -> 768) and minBERT, six layers of
MiniLM's size; both with random weights and random tokens, in fp32, targets all linear layers. A step is forward, loss
(mean of squares of the last hidden state), backward, `AdamW.step` with the method's controller, `zero_grad`. Times are
medians of interleaved rounds, as a share of LoRA's in the same round; FLOPs, saved bytes and sizes are exact.
"""

import copy
import functools
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import peftlite
from benchmarks.cells import Cell, measure_cells
from benchmarks.gate import check_adapters
from benchmarks.harness import RESULTS, ResultFile, interleaved, machine, ratios, require_green, spread
from benchmarks.recipes import RECIPES, TOP, Recipe
from benchmarks.training_step import TrainingStep, meter
from examples.minbert_multitask.controllers import saving
from examples.minbert_multitask.model import BertConfig, BertModel
from examples.minbert_multitask.settings import Settings

RESULT = RESULTS / "methods_cost.json"
BASELINE = "lora"
STEPS = 1000  # of the run that the controllers plan for
SIZES = {  # of the two models
    "one BERT-base layer": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 1, "num_attention_heads": 12},
    "minBERT": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
}


@dataclass(frozen=True)
class CostSettings:
    """What a cell's figures depend on."""

    rows: int = 8
    length: int = 64
    rounds: int = 10
    warmup: int = 2
    threads: int = 1
    seed: int = 0


def compared(names: Sequence[str], layers: int) -> list[Recipe]:
    """The recipes of `names` that cost something else than another one and fit a model of `layers` layers; LoRA first."""
    left_out = {"linear-probe", "lora-fp32", *(f"lora-r{rank}" for rank in range(2, 8))}
    chosen = [RECIPES[name] for name in dict.fromkeys((BASELINE, *names)) if name not in left_out]
    return [recipe for recipe in chosen if recipe.top is None or layers > TOP]


def random_bert(size: dict[str, int], seed: int) -> BertModel:
    """A BERT without dropout, whose norms are random too: else the loss would be constant."""
    torch.manual_seed(seed)
    model = BertModel(BertConfig(**size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.normal_(1.0, 0.1)
                module.bias.normal_(0.0, 0.1)
    return model


class Candidate:
    """One recipe's model with its training step; called, it takes a step."""

    def __init__(self, recipe: Recipe, bert: BertModel, batch: tuple[Tensor, Tensor], settings: CostSettings) -> None:
        chosen = recipe.resolved(Settings(tasks="sst", seed=settings.seed, device="cpu", backbone_dropout=0.0))
        self.network = recipe.build(chosen, copy.deepcopy(bert))
        if recipe.method == "full":  # as for adapters, no gradient goes below the first layer
            self.network.backbones["shared"].embeddings.requires_grad_(False)
        self.adapters = peftlite.adapters(self.network.backbones)
        self.step = TrainingStep(self.network.backbones["shared"], batch, autocast=nullcontext, adamw={})
        self.controller = recipe.controller(self.network, self.step.optimizer, chosen, STEPS)

    def __call__(self) -> dict[str, float]:
        return self.step()

    def figures(self) -> dict[str, Any]:
        """What no clock enters: bytes, FLOPs, parameters, the size of the saved file."""
        found = meter(self.step)
        bert = self.step.model
        found["trained"] = sum(p.numel() for p in bert.parameters() if p.requires_grad)
        with tempfile.TemporaryDirectory() as folder, saving(self.controller):
            path = Path(folder) / "adapters.safetensors"
            peftlite.save_adapters(bert, path)
            found["checkpoint_bytes"] = path.stat().st_size
        return found


def measure(names: Sequence[str], size: dict[str, int], settings: CostSettings) -> dict[str, Any]:
    """Check, meter and time the recipes on one model.

    Raises:
        RedGateError: an adapter computes something else than its specification.
    """
    bert = random_bert(size, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(1, bert.config.vocab_size, (settings.rows, settings.length), generator=generator)
    batch = (ids, torch.ones_like(ids))
    candidates: dict[str, Candidate] = {}
    checks, figures = [], {}
    for recipe in tqdm(compared(names, size["num_hidden_layers"]), desc="check and meter", unit="recipe"):
        made = candidates[recipe.name] = Candidate(recipe, bert, batch, settings)
        layers = dict(made.adapters)
        checks += check_adapters(recipe.name, layers, dtype=torch.float32, autocast=nullcontext, seed=settings.seed)
        figures[recipe.name] = made.figures()
    require_green(checks)
    total = len(candidates) * (settings.warmup + settings.rounds)
    with tqdm(total=total, unit="step", desc="time") as bar:
        samples = interleaved(candidates, rounds=settings.rounds, warmup=settings.warmup, tick=bar.update)
    for name, taken in samples.items():
        figures[name]["ms"] = {phase: spread(sample[phase] for sample in taken) for phase in taken[0]}
        figures[name]["relative"] = {
            phase: ratios([s[phase] for s in taken], [s[phase] for s in samples[BASELINE]]) for phase in ("step", "cpu")
        }
    return {"checks": len(checks), "baseline": BASELINE, "candidates": figures}


def table(cell: dict[str, Any]) -> str:
    """A cell as text for a terminal."""
    header = f"{'recipe':14}{'trained':>12}{'step ms':>10}{'x LoRA':>8}{'x CPU':>8}{'saved MiB':>11}{'file KiB':>11}"
    lines = [f"{header}{'GFLOP':>8}"]
    for name, row in cell["figures"]["candidates"].items():
        lines.append(
            f"{name:14}{row['trained']:12,d}{row['ms']['step'][0]:10.1f}{row['relative']['step'][0]:8.2f}"
            f"{row['relative']['cpu'][0]:8.2f}{row['saved_mib']:11.2f}{row['checkpoint_bytes'] / 1024:11.1f}{row['gflop']:8.2f}"
        )
    return "\n".join(lines)


def run(names: Sequence[str], settings: CostSettings, result: Path, *, fresh: bool = False) -> None:
    """Measure both models, each unless its cell is there for this machine, commit and settings."""
    torch.set_num_threads(settings.threads)
    planned = []
    for key, size in SIZES.items():
        record = {**asdict(settings), **size, "recipes": [r.record() for r in compared(names, size["num_hidden_layers"])]}
        planned.append(Cell(key, record, functools.partial(measure, names, size, settings)))
    measure_cells(planned, ResultFile(result, "cost"), machine(), table, fresh=fresh)
