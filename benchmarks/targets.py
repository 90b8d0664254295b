"""The figures to reproduce, in ``paper.json``, beside ours: judged from the cells of the suite `quality` alone."""

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peftlite
from benchmarks.rank_claim import rows, seeds_of
from examples.minbert_multitask.model import BertConfig

PAPER: dict[str, Any] = json.loads((Path(__file__).parent / "paper.json").read_text(encoding="utf-8"))
FORMS: dict[str, Callable[[float], str]] = {
    "count": lambda value: f"{value:,.0f}",
    "ratio": lambda value: f"{value:.2f}",
    "score": lambda value: f"{value:.3f}",
    "points": lambda value: f"{100 * value:+.1f}",
}
Cells = Mapping[str, Any]


class Measured(NamedTuple):
    """A figure, with bounds where it has them."""

    value: float
    low: float | None = None
    high: float | None = None


class Judged(NamedTuple):
    """A row of the table: what, claimed, the authors' raw figure, ours, whether it is met, and what differs."""

    what: str
    claimed: str
    authors: str
    ours: str
    met: str
    note: str


def layer_parameters(method: str, rank: int, *, every: bool) -> int:
    """Adapter parameters of BERT-base in query, key and value, or in `every` linear layer of its encoder."""
    config = BertConfig()
    wide, inner = config.hidden_size, config.intermediate_size
    shapes = [(wide, wide)] * 3 + ([(wide, wide), (wide, inner), (inner, wide)] if every else [])
    cls = peftlite.METHODS[method]
    layers = [cls(into, out, rank, device="meta") for into, out in shapes]
    return config.num_hidden_layers * sum(p.numel() for layer in layers for p in layer.adapter_parameters().values())


def _effect(cells: Cells, cell: str, title: str, measure: str) -> Measured | None:
    row = cells.get(cell, {}).get("figures", {}).get("effects", {}).get(title, {})
    if measure not in row:
        return None
    return Measured(*row[measure]) if isinstance(row[measure], list) else Measured(row[measure])


def _rank(cells: Cells, task: str) -> Measured | None:
    gaps = [row.gap for row in rows(cells) if row.task == task and row.rank == 1 and row.gap is not None]
    return Measured(gaps[0].mean, gaps[0].low, gaps[0].high) if gaps else None


def _rank_time(cells: Cells) -> Measured | None:
    times = [[cell["figures"]["cpu_seconds"] for cell in seeds_of(cells, "sst", f"lora-r{rank}").values()] for rank in (16, 1)]
    return Measured(statistics.fmean(times[0]) / statistics.fmean(times[1])) if all(times) else None


def _ensemble(cells: Cells, name: str, over: str | None = None) -> Measured | None:
    figures = cells.get("C/paper/ensemble", {}).get("figures")
    if figures is None:
        return None
    return Measured(*figures["gains"][over][name][:3]) if over else Measured(figures["ensemble"][name])


def measured(cells: Cells) -> dict[str, Measured | None]:
    """Our figure for each target by its id; None where it is not measured."""
    lora, dora = (layer_parameters(method, 1, every=True) for method in ("lora", "dora"))
    found = {
        "parameters": Measured(layer_parameters("lora", 1, every=False)),
        "parameters-all": Measured(lora),
        "parameters-dora": Measured(dora - lora),
        "memory-attn": _effect(cells, "A/sst/memory", "LoRA alone: attn, fp32", "peak_mib"),
        "memory-all": _effect(cells, "A/sst/memory", "LoRA alone: all-linear, fp32", "peak_mib"),
        "memory-dora": _effect(cells, "A/sst/memory", "DoRA / LoRA: attn, fp32", "peak_mib"),
        "time-attn": _effect(cells, "A/sst/cost", "LoRA alone: attn, fp32", "step"),
        "time-all": _effect(cells, "A/sst/cost", "LoRA alone: all-linear, fp32", "step"),
        "time-dora": _effect(cells, "A/sst/cost", "DoRA / LoRA: attn, fp32", "step"),
        "time-rank": _rank_time(cells),
        "autocast": _effect(cells, "A/sst/cost", "autocast alone: full", "step"),
        "gain": _ensemble(cells, "overall", "best single"),
        "gain-mean": _ensemble(cells, "overall", "mean single"),
    }
    found |= {f"rank-{task}": _rank(cells, task) for task in ("sst", "quora", "sts")}
    return found | {f"ensemble-{name}": _ensemble(cells, name) for name in ("sst", "quora", "sts", "overall")}


def met(figure: Measured, rule: str, limit: float) -> str:
    """Whether a figure keeps to ``rule limit``: with bounds, "yes" or "no" only where all between them agrees."""
    keeps = {"=": lambda x: x == limit, "<=": lambda x: x <= limit, ">=": lambda x: x >= limit}[rule]
    if figure.low is None or figure.high is None:
        return "yes" if keeps(figure.value) else "no"
    both = {keeps(figure.low), keeps(figure.high)}
    return "not decided within the interval" if len(both) == 2 else ("yes" if both == {True} else "no")


def _text(figure: Measured, form: Callable[[float], str]) -> str:
    if figure.low is None or figure.high is None:
        return form(figure.value)
    return f"{form(figure.value)} ({form(figure.low)}..{form(figure.high)})"


def judge(cells: Cells) -> list[Judged]:
    """Every target beside our figure."""
    ours, judged = measured(cells), []
    for target in PAPER["targets"]:
        figure, form = ours[target["id"]], FORMS[target["form"]]
        texts = ("not measured", "–") if figure is None else (_text(figure, form), met(figure, target["rule"], target["limit"]))
        judged.append(Judged(target["what"], target["claimed"], target["authors"], *texts, target["note"]))
    return judged
