"""Write the generated blocks of README.md and the pages: `python -m docs.generate`.

A block stands between a line `generated: NAME` and a line `end`, in a comment of the file's own kind. The methods come
from `peftlite.METHODS`, the figures from `benchmarks/results/*.json`; nobody types either.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import peftlite
from docs import kernel_tables, method_tables, quality_tables, step_tables, suite_tables
from docs.invariants import coverage, marked_tests
from docs.invariants import sections as invariant_sections

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKS = {  # by suffix: how a block opens, with its name, and how it closes
    ".md": (r"<!-- generated: (\w+) -->\n", "<!-- end -->"),
    ".rst": (r"\.\. generated: (\w+)\n", ".. end"),
}
WIDTH, RANK = 768, 8  # the layer of which the table counts the parameters
SMALL = 128  # one large enough for the rank of its update
CONTROLLERS = (peftlite.AdaLoRA, peftlite.DyLoRA, peftlite.XGBLoRA)  # those of one method's layers

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
            "Training steps: what was promised and what came (`python -m benchmarks.steps --preset peers`; all cells in "
            "[the comparison](docs/steps.rst)):",
            step_tables.claims(step_results(), markdown_table),
            "One cell of them:",
            _read("steps.json", lambda found: step_tables.headline(found, markdown_table, "`")),
            "minBERT on real data (dev scores; see [the tutorial](docs/minbert.rst)):",
            _read("minbert.json", minbert),
        ]
    )


def step_results() -> dict[str, Any]:
    """The content of the step suites' files, those that are there."""
    paths = {suite: RESULTS / f"{suite}.json" for suite in ("steps", "layer")}
    return {suite: json.loads(path.read_text(encoding="utf-8")) for suite, path in paths.items() if path.is_file()}


def minbert(found: Mapping[str, Any], table: Callable[[Cells, Sequence[Cells]], str] = markdown_table) -> str:
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
    return f"{' '.join(filter(None, [note, found['note']]))}\n\n{table(header, rows)}"


def _place(run: Mapping[str, Any]) -> str:
    facts, settings = run["environment"], run["settings"]
    where = f"{facts.get('gpu') or facts['cpu']}, {settings['threads']} thread(s), autocast {settings['amp']}"
    return f"{where}, Python {facts['python']}, torch {facts['torch']}; commit `{(facts['commit'] or 'none')[:10]}`"


def invariants() -> str:
    """A table for each section of the list: what must hold, and the tests that show it."""
    listed = invariant_sections()
    tests = coverage(listed, list(marked_tests(ROOT / "tests"))).tests
    parts = []
    for number, section in listed.items():
        title = f"§{number} {section['title']}"
        own = {text: of for (section_number, text), of in tests.items() if section_number == number}
        rows = [[text, ", ".join(f"``{test}``" for test in of)] for text, of in own.items()]
        parts += [f"{title}\n{'-' * len(title)}", *filter(None, [section["source"]]), rst_table(["invariant", "tests"], rows)]
    return "\n\n".join(parts)


def choices() -> str:
    """What each method trains, costs and exports to, from the code, and what was measured on minBERT.

    The measurements are those of `benchmarks.methods`: of ``methods_cost.json`` the cell ``minBERT``, of
    ``methods_accuracy.json`` the cell of each method. Without a file its columns are left out; a method that it lacks has a
    dash.
    """
    cost = _cells("methods_cost.json").get("minBERT", {"figures": {"candidates": {}}})["figures"]["candidates"]
    accuracy = {name: cell["figures"]["dev"] for name, cell in _cells("methods_accuracy.json").items()}
    measured: dict[str, dict[str, str]] = {}
    if cost:
        measured["trained, minBERT"] = {name: f"{row['trained']:,}" for name, row in cost.items()}
        measured["step, × LoRA"] = {name: f"{row['relative']['step'][0]:.2f}" for name, row in cost.items()}
        measured["saved, MiB"] = {name: f"{row['saved_mib']:.1f}" for name, row in cost.items()}
    if accuracy:
        measured["SST acc."] = {name: f"{value:.3f}" for name, value in accuracy.items()}
    controllers = {method: cls.__name__ for cls in CONTROLLERS for method in cls.methods}
    rows = []
    for name in peftlite.METHODS:
        own = [column.get(name, "–") for column in measured.values()]
        rows.append([f":ref:`{name} <method-{name}>`", *layer_facts(name), controllers.get(name, "–"), *own])
    header = ["method", f"trained, {WIDTH} → {WIDTH}, r = {RANK}", "share of LoRA", "rank of ΔW", "as plain LoRA", "controller"]
    table = rst_table([*header, *measured], rows)
    note = "Of minBERT: ``python -m benchmarks.methods``." if measured else "No measured result is committed yet."
    return f"{note}\n\n{table}"


def layer_facts(name: str) -> list[str]:
    """Of one layer of a method, with values drawn for what trains: trained parameters, these relative to LoRA's, the rank that
    its update has, and whether it exports as LoRA."""
    cls = peftlite.METHODS[name]
    trained = sum(p.numel() for p in cls(WIDTH, WIDTH, RANK).adapter_parameters().values())
    generator = torch.Generator().manual_seed(0)
    layer = cls(SMALL, SMALL, RANK, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        for parameter in layer.adapter_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        rank = int(torch.linalg.matrix_rank(layer.effective_weight() - layer.base_weight(), rtol=1e-10))
    try:
        export = f"rank {layer.to_lora()[0].shape[0]}"
    except ValueError:
        export = "merged only"
    return [f"{trained:,}", f"{trained / (RANK * 2 * WIDTH):.3f}", "full" if rank == SMALL else str(rank), export]


def _cells(name: str) -> dict[str, Any]:
    path = RESULTS / name
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else {}
    return found


def _read(name: str, render: Callable[[Mapping[str, Any]], str]) -> str:
    path = RESULTS / name
    return render(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else "No result is committed yet."


def _method_table(suite: str, render: Callable[[Mapping[str, Any], method_tables.Table], str]) -> str:
    return _read(f"methods_{suite}.json", lambda found: render(found, rst_table))


def _quality_table(render: Callable[[Mapping[str, Any], quality_tables.Table], str]) -> str:
    return _read("quality.json", lambda found: render(found, rst_table))


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"methods": lambda: methods(markdown_table, "`"), "results": results},
    "examples/minbert_multitask/README.md": {"minbert": lambda: _read("minbert.json", minbert)},
    "docs/steps.rst": {
        "claims": lambda: step_tables.claims(step_results(), rst_table),
        "parity": lambda: _read("peers.json", lambda found: suite_tables.parity(found, rst_table)),
        "kernels": lambda: _read("kernels.json", lambda found: suite_tables.kernels(found, rst_table)),
        "layers": lambda: _read("layer.json", lambda found: step_tables.layers(found["cells"], rst_table, "``")),
        "cells": lambda: _read("steps.json", lambda found: step_tables.cells(found["cells"], rst_table, "``")),
    },
    "docs/memory.rst": {"memory": lambda: _read("memory.json", lambda found: suite_tables.memory(found, rst_table))},
    "docs/choosing_a_method.rst": {"choices": choices},
    "docs/invariants.rst": {"invariants": invariants},
    "docs/kernels.rst": {
        "machine_code": lambda: _read("aot.json", lambda found: kernel_tables.machine_code(found, rst_table)),
    },
    "docs/methods.rst": {"methods": lambda: methods(rst_table, "``"), "sections": sections},
    "docs/paper.rst": {
        name: functools.partial(_quality_table, render) for name, render in quality_tables.BLOCKS.items()
    },
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
