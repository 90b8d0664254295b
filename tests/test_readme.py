"""The readme and the pages: their code runs, their commands exist, their generated blocks are up to date."""

import importlib
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import peftlite
from benchmarks.claims import CLAIMS
from docs import generate

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = "examples.minbert_multitask"
PAGES = ["README.md", "docs/minbert.rst", "examples/minbert_multitask/README.md"]


class MyModel(nn.Module):
    """A model with the layers that the readme adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.query(x) * self.key(x) + self.value(x)


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words after ``python -m`` of every command of the example, with continued lines joined and comments cut."""
    lines = text.replace("\\\n", " ").splitlines()
    found = (re.match(rf"\s*`*python -m ({re.escape(EXAMPLE)}\.[^`]*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


COMMANDS = [command for page in PAGES for command in commands((ROOT / page).read_text(encoding="utf-8"))]


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert blocks
    scope = {"MyModel": MyModel}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    model = scope["model"]
    assert "512 of 1,328 parameters train" in capsys.readouterr().out
    assert not peftlite.adapters(model)
    assert type(model.query) is nn.Linear
    fresh = peftlite.load_adapters(MyModel(), "adapters.safetensors", check_base=False)
    assert list(peftlite.adapters(fresh)) == ["query", "value"]


def test_pages_show_commands() -> None:
    shown = {command[0].removeprefix(f"{EXAMPLE}.") for command in COMMANDS}
    assert shown == {"data", "train", "evaluate", "predict", "ensemble", "report"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_parse(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module, *words = command
    if module.endswith(".train") and "--resume" not in words:
        _, settings, _ = importlib.import_module(module).parse(words)
        assert settings.method in words or "--method" not in words
        return
    options = {word for word in words if word.startswith("--")}
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main(["--help"])
    assert end.value.code == 0
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert options <= known


@pytest.mark.parametrize("path", [ROOT / name for name in generate.BLOCKS], ids=lambda path: path.name)
def test_generated_blocks_are_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == generate.generated()[path], "run: python -m docs.generate"


def test_fill_refuses_lost_marks() -> None:
    with pytest.raises(ValueError, match=r"found \['methods'\], expected \['methods', 'results'\]; put the missing ones back"):
        generate.fill("<!-- generated: methods -->\n<!-- end -->\n", {"methods": str, "results": str}, ".md")


def test_fill_is_idempotent() -> None:
    once = generate.fill("a\n<!-- generated: x -->\n<!-- end -->\nb\n", {"x": lambda: "new"}, ".md")
    assert once == "a\n<!-- generated: x -->\n\nnew\n\n<!-- end -->\nb\n"
    assert generate.fill(once, {"x": lambda: "new"}, ".md") == once


def test_describe_asks_for_formula_and_source(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(peftlite.AdapterLinear):
        """Nothing that a table could show."""

    monkeypatch.setitem(peftlite.METHODS, "bare", Bare)
    with pytest.raises(ValueError, match="docstring of method 'bare' must begin 'Compute ``formula``'"):
        generate.describe("bare")


def test_minbert_table_from_a_result_file() -> None:
    def run(name: str, overall: float, **changes: object) -> dict[str, object]:
        dev = {"sst": 0.4704, "quora": 0.8312, "sts": 0.8721, "overall": overall}
        figures = {"name": name, "method": "lora", "rank": 8, "dev": dev, "share": 0.0147, "seconds": 1500, **changes}
        place = {"cpu": "A processor", "gpu": None, "python": "3.11", "torch": "2.13.0", "commit": None}
        return {**figures, "environment": place, "settings": {"threads": 2, "amp": "off"}}

    runs = [run("worse", 0.70), run("better", 0.74, method="full", rank=None)]
    text = generate.minbert({"note": "Mind the gap.", "runs": runs})
    assert "in their own training. Mind the gap.\n" in text
    assert text.count("A processor, 2 thread(s), autocast off, Python 3.11, torch 2.13.0; commit `none`") == 1
    assert text.index("better") < text.index("worse")
    assert "| better | full | – | 0.470 | 0.831 | 0.872 | 0.740 | 1.47% | 25 |" in text


def test_missing_results_are_said_to_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    assert generate.results().count("No result is committed yet.") == 2
    assert generate.results().count("| not measured |") == len(CLAIMS)


def test_choices_take_what_was_measured_and_do_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    assert "No measured result is committed yet" in (without := generate.choices())
    assert without.count("* - :ref:") == len(peftlite.METHODS)
    cost = {"trained": 1234, "relative": {"step": [1.254, 1.2, 1.3]}, "saved_mib": 12.34}
    cells = {"minBERT": {"figures": {"candidates": {"dora": cost}}}}
    (tmp_path / "methods_cost.json").write_text(json.dumps({"cells": cells}))
    (tmp_path / "methods_accuracy.json").write_text(json.dumps({"cells": {"dora": {"figures": {"dev": 0.4876}}}}))
    table = [" ".join(row.split()) for row in generate.choices().split("* - ")]
    assert table[1].endswith("- controller - trained, minBERT - step, × LoRA - saved, MiB - SST acc.")
    dora = next(row for row in table if "method-dora" in row)
    assert dora.endswith("13,056 - 1.062 - full - merged only - – - 1,234 - 1.25 - 12.3 - 0.488")
    assert next(row for row in table if "method-vera" in row).endswith("- – - – - – - – - –")


@pytest.mark.parametrize("method", peftlite.METHODS)
def test_the_page_of_a_method_is_whole(method: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{method}.rst").read_text(encoding="utf-8")
    docstring = peftlite.METHODS[method].__doc__ or ""
    missing = [part for part in ("**When to use it.**", "**Cost.** Trained", "**What to tune.**", ">>> ") if part not in page]
    missing += [part for part in ("Compute ``", "Args:", "Source: ", "Example:") if part not in docstring]
    assert missing == []
    assert "differ" in page + docstring


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_help_names_the_public_targets() -> None:
    # Inside `make test` a second make would also say which folder it enters.
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = ["demo", "test", "aot", "bench", "bench-full", "docs", "clean"]
    assert [line.split()[1] for line in done.stdout.splitlines()] == names


def test_ci_runs_the_gate() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "exec make test" in script.read_text(encoding="utf-8")
