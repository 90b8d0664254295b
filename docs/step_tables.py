"""Tables of the step suites, out of their result files: what was promised and what came, and every cell."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.claims import BASE, CLAIMS, judge
from benchmarks.contests import verdict

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
Results = Mapping[str, Mapping[str, Any]]
NOTHING = "This cell is not measured yet."
MEASURES = {"step": "time", "saved_mib": "saved bytes", "forward_peak_mib": "peak of the forward", "gflop": "FLOPs"}
LAYER_MEASURES = {"forward_peak_mib": "peak of the forward", "step_peak_mib": "with backward"}
LAYER_MEASURES |= {"saved_mib": "saved", "gflop": "FLOPs"}


def claims(results: Results, table: Table) -> str:
    """Every claim with its limit, its figure and whether it is met; where nothing is measured, that.

    Args:
        results: the content of the result files by suite.
        table: makes the table of a header and rows.
    """
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = []
    for claim in CLAIMS:
        judged = judge(claim, results)
        rows.append([judged.where, judged.what, judged.limit, judged.figure, judged.sides, words[judged.met]])
    return table(["where", "what", "promised", "measured (20..80 %)", "candidates", "met"], rows)


def headline(found: Mapping[str, Any], table: Table, code: str) -> str:
    """The cell at BERT-base width in fp32 without dropout."""
    wanted = BASE | {"amp": "off", "dropout": 0.0}
    chosen = {key: cell for key, cell in found["cells"].items() if wanted.items() <= cell["settings"].items()}
    return cells(chosen, table, code)


def cells(found: Mapping[str, Any], table: Table, code: str) -> str:
    """Two tables for each cell of the step suite, its candidates and its ratios, with rows marked where a peer is ahead.

    Args:
        found: cells by key.
        table: makes a table of a header and rows.
        code: what stands on either side of a literal.
    """
    parts = []
    for key, cell in found.items():
        facts, figures = cell["machine"], cell["figures"]
        header = ["", "step, ms", f"share of {figures['baseline']}", "saved for backward, MiB", "GFLOP", "trained"]
        parts += [_note(key, facts, code), table(header, [_candidate(*item) for item in figures["candidates"].items()])]
        if figures["ratios"]:
            header = ["ratio (> 1: the first costs more)", *MEASURES.values(), "candidates by time", "by saved bytes", "ahead"]
            rows = []
            for title, row in figures["ratios"].items():
                sides = (" / ".join(row["sides"][key]) for key in ("step", "saved_mib"))
                rows.append([title, *_ratios(row, MEASURES), *sides, _ahead(row, MEASURES)])
            parts.append(table(header, rows))
    return "\n\n".join(parts) or NOTHING


def layers(found: Mapping[str, Any], table: Table, code: str) -> str:
    """The same for each cell of the layer suite."""
    parts = []
    for key, cell in found.items():
        figures = cell["figures"]
        rows = [[name, *(f"{row[k]:.1f}" for k in LAYER_MEASURES)] for name, row in figures["candidates"].items()]
        header = ["", *(f"{title}, {'GFLOP' if k == 'gflop' else 'MiB'}" for k, title in LAYER_MEASURES.items())]
        parts += [_note(key, cell["machine"], code, timed=False), table(header, rows)]
        rows = [[title, *_ratios(row, LAYER_MEASURES), _ahead(row, LAYER_MEASURES)] for title, row in figures["ratios"].items()]
        parts.append(table(["ratio", *LAYER_MEASURES.values(), "ahead"], rows))
    return "\n\n".join(parts) or NOTHING


def _note(key: str, facts: Mapping[str, Any], code: str, *, timed: bool = True) -> str:
    state = " with changes" if facts["dirty"] else ""
    peers = "".join(f", {name} {facts[name]}" for name in ("peft", "loralib") if facts.get(name))
    versions = f"Python {facts['python']}, torch {facts['torch']}{peers}"
    where = f"{facts.get('gpu') or facts['cpu']}, {facts['threads']} threads, {versions}"
    note = f"{key}. {where}; commit {code}{(facts['commit'] or 'none')[:10]}{code}{state}."
    return f"{note} Medians of interleaved rounds." if timed else note


def _candidate(name: str, row: Mapping[str, Any]) -> list[str]:
    share = _spread(row["relative"]["step"]) if "relative" in row else ""
    return [name, f"{row['ms']['step'][0]:.1f}", share, f"{row['saved_mib']:.1f}", f"{row['gflop']:.2f}", f"{row['trained']:,}"]


def _spread(value: Sequence[float]) -> str:
    return f"{value[0]:.2f} ({value[1]:.2f}..{value[2]:.2f})"


def _ratios(row: Mapping[str, Any], measures: Iterable[str]) -> list[str]:
    return [_spread(row[k]) if isinstance(row[k], list) else f"{row[k]:.2f}" for k in measures]


def _ahead(row: Mapping[str, Any], measures: Mapping[str, str]) -> str:
    return "; ".join(f"{title}: **{mark}**" for k, title in measures.items() if (mark := verdict(row, k)))
