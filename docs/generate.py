"""Write the generated blocks of README.md and the pages: `python -m docs.generate`.

A block stands between a line `generated: NAME` and a line `end`, in a comment of the file's own kind. The methods come
from `peftlite.METHODS`, the figures from `benchmarks/results/*.json`; nobody types either.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peftlite
from docs import method_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKS = {  # by suffix: how a block opens, with its name, and how it closes
    ".md": (r"<!-- generated: (\w+) -->\n", "<!-- end -->"),
    ".rst": (r"\.\. generated: (\w+)\n", ".. end"),
}
WIDTH, RANK = 768, 8  # the layer of which the table counts the parameters

Cells = Sequence[str]


def markdown_table(header: Cells, rows: Sequence[Cells]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def rst_table(header: Cells, rows: Sequence[Cells]) -> str:
    """A reStructuredText list table."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (header, *rows):
        lines += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
    return "\n".join(lines)


def describe(name: str) -> tuple[str, str]:
    """What a method computes and where it comes from, out of the docstring of its class.

    Raises:
        ValueError: the docstring does not begin ``Compute ``formula```` or has no ``Source:`` line.
    """
    doc = peftlite.METHODS[name].__doc__ or ""
    formula = re.match(r"Compute ``(.+?)``", doc)
    source = re.search(r"^ *Source: (.+?), \"(.+?)\",\s+(arXiv:[\w.]+|.+?)\.$", doc, re.MULTILINE | re.DOTALL)
    if formula is None or source is None:
        raise ValueError(
            f"the docstring of method {name!r} must begin 'Compute ``formula``' and hold a line "
            "'Source: Authors year, \"Title\", arXiv:id.'"
        )
    return formula[1], f"{source[1]}, {source[3]}"


def methods(table: Callable[[Cells, Sequence[Cells]], str], code: str) -> str:
    """A row for each method: name, class, formula, parameters of one layer, source."""
    rows = []
    for name, cls in peftlite.METHODS.items():
        formula, source = describe(name)
        trained = sum(p.numel() for p in cls(WIDTH, WIDTH, RANK).adapter_parameters().values())
        rows.append([f'{code}"{name}"{code}', f"{code}{cls.__name__}{code}", f"{code}{formula}{code}", f"{trained:,}", source])
    header = [f"{code}method={code}", "class", "computes", f"trained, {WIDTH} → {WIDTH}, r = {RANK}", "source"]
    return table(header, rows)


def sections() -> str:
    """A section for each method: its class, and the text in `docs/methods/<name>.rst` where there is one."""
    parts = []
    for name, cls in peftlite.METHODS.items():
        title = cls.__name__.removesuffix("Linear")
        lines = [f".. _method-{name}:", "", title, "-" * len(title), ""]
        if (ROOT / "docs" / "methods" / f"{name}.rst").is_file():
            lines += [f".. include:: methods/{name}.rst", ""]
        parts.append("\n".join([*lines, f".. autoclass:: peftlite.{cls.__name__}", "   :members: effective_weight, config"]))
    return "\n\n".join(parts)


def results() -> str:
    """The committed figures: training steps, then minBERT."""
    return "\n\n".join(
        [
            "Training steps (`python -m benchmarks.steps`):",
            _read("steps.json", steps),
            "minBERT on real data (dev scores; see [the tutorial](docs/minbert.rst)):",
            _read("minbert.json", minbert),
        ]
    )


def steps(found: Mapping[str, Any]) -> str:
    """A table for each cell of the step suite."""
    parts = []
    for key, cell in found["cells"].items():
        facts, figures = cell["machine"], cell["figures"]
        rows = []
        for name, row in figures["candidates"].items():
            relative = f"{row['relative']['step'][0]:.2f}" if "relative" in row else ""
            time, saved = f"{row['ms']['step'][0]:.1f}", f"{row['saved_mib']:.1f}"
            rows.append([name, time, relative, saved, f"{row['gflop']:.2f}", f"{row['trained']:,}"])
        header = ["", "step, ms", f"share of {figures['baseline']}", "saved for backward, MiB", "GFLOP", "trained"]
        pairs = [
            f"{name}: time {row['step'][0]:.3f}, saved {row['saved_mib']:.3f}, FLOPs {row['gflop']:.3f}"
            for name, row in figures["ratios"].items()
        ]
        state = " with changes" if facts["dirty"] else ""
        versions = f"Python {facts['python']}, torch {facts['torch']}"
        where = f"{facts.get('gpu') or facts['cpu']}, {facts['threads']} threads, {versions}"
        note = f"{key}. {where}; commit `{(facts['commit'] or 'none')[:10]}`{state}. Medians of interleaved rounds."
        parts += [note, markdown_table(header, rows), *([f"Ratios: {'; '.join(pairs)}."] if pairs else [])]
    return "\n\n".join(parts)


def minbert(found: Mapping[str, Any]) -> str:
    """A table of the runs of the example, best overall score first."""
    scores = ("sst", "quora", "sts", "overall")
    rows = []
    for run in sorted(found["runs"], key=lambda run: -run["dev"]["overall"]):
        rank = str(run["rank"]) if run["rank"] else "–"
        dev = [f"{run['dev'][name]:.3f}" for name in scores]
        rows.append([run["name"], run["method"], rank, *dev, f"{run['share']:.2%}", f"{run['seconds'] / 60:.0f}"])
    header = ["run", "method", "rank", "SST acc.", "Quora acc.", "STS r", "overall", "trained", "minutes"]
    places = {_place(run) for run in found["runs"]}
    note = (
        f"{'; '.join(sorted(places))}. Overall is (SST + Quora + (r + 1) / 2) / 3; minutes are of training alone. Quora is "
        "trained on a 16 % subset, and the weights had Quora questions in their own training."
    )
    return f"{' '.join(filter(None, [note, found['note']]))}\n\n{markdown_table(header, rows)}"


def _place(run: Mapping[str, Any]) -> str:
    facts, settings = run["environment"], run["settings"]
    where = f"{facts.get('gpu') or facts['cpu']}, {settings['threads']} thread(s), autocast {settings['amp']}"
    return f"{where}, Python {facts['python']}, torch {facts['torch']}; commit `{(facts['commit'] or 'none')[:10]}`"


def _read(name: str, render: Callable[[Mapping[str, Any]], str]) -> str:
    path = RESULTS / name
    return render(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else "No result is committed yet."


def _method_table(suite: str, render: Callable[[Mapping[str, Any], method_tables.Table], str]) -> str:
    return _read(f"methods_{suite}.json", lambda found: render(found, rst_table))


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"methods": lambda: methods(markdown_table, "`"), "results": results},
    "examples/minbert_multitask/README.md": {"minbert": lambda: _read("minbert.json", minbert)},
    "docs/methods.rst": {"methods": lambda: methods(rst_table, "``"), "sections": sections},
    "docs/measurements.rst": {
        "accuracy": lambda: _method_table("accuracy", method_tables.accuracy),
        "ranks": lambda: _method_table("accuracy", method_tables.ranks),
        "cost": lambda: _method_table("cost", method_tables.cost),
        "intruders": lambda: _method_table("intruders", method_tables.intruders),
        "qlora_accuracy": lambda: _method_table("accuracy", method_tables.qlora_accuracy),
        "qlora": lambda: _method_table("qlora", method_tables.qlora),
    },
}


def fill(text: str, blocks: Mapping[str, Callable[[], str]], suffix: str) -> str:
    """`text` with the content of each of `blocks` between its marks.

    Raises:
        ValueError: the marks in the text are not those of `blocks`.
    """
    opening, closing = MARKS[suffix]
    pattern = re.compile(f"({opening})(.*?)^{re.escape(closing)}$", re.MULTILINE | re.DOTALL)
    found = [match[2] for match in pattern.finditer(text)]
    if sorted(found) != sorted(blocks):
        raise ValueError(f"marks of generated blocks: found {found}, expected {list(blocks)}; put the missing ones back")
    return pattern.sub(lambda match: f"{match[1]}\n{blocks[match[2]]()}\n\n{closing}", text)


def generated() -> dict[Path, str]:
    """Every file with generated blocks, as it should read now."""
    return {
        ROOT / name: fill((ROOT / name).read_text(encoding="utf-8"), blocks, Path(name).suffix)
        for name, blocks in BLOCKS.items()
    }


def main() -> None:
    """Rewrite the files that are out of date, and name them."""
    for path, text in generated().items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"rewrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
