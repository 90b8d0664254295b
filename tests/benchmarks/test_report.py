"""The report, of committed, made-up and no results: well-formed, whole, and without a reference to anything outside."""

import importlib.util
import re
import shlex
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_cells
from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.contests import verdict
from benchmarks.harness import RESULTS, ROOT
from benchmarks.page import blocks, inline, table
from benchmarks.plots import methods, quality, steps
from benchmarks.plots.style import COLOURS, svg
from benchmarks.sections.results import digests, read
from benchmarks.sections.steps import closing_note, full_verdict, peer_rows, standing

VOID = {"meta", "br", "img", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that elements close in order, and collects ids, references and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.marked = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "data", "action")]
        self.marked += found.get("class") == "marked"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(text: str) -> Page:
    """The page, which is well-formed, has no id twice, and refers to nothing but its own parts."""
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert [one for one in page.references if not (one.startswith("#") and one[1:] in page.ids)] == []
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in page.ids}
    assert not re.search(r"@import|<script|<link|https?://", text)
    return page


@pytest.fixture(scope="module")
def made_up() -> dict:
    return report_cells.everything()


@pytest.fixture(scope="module")
def full_page(made_up: dict) -> str:
    return report.page(made_up, "sources", committed=True)


def test_a_page_of_everything_is_whole(full_page: str) -> None:
    page = check(full_page)
    missing = re.findall(r"Not measured here yet: <code>([^<]*)</code>", full_page)
    assert missing == ["python -m benchmarks.layer", "python -m benchmarks.minbert RUN ...", "python -m benchmarks.aot"]
    assert page.marked > 0
    assert full_page.count("<figure>") == 15
    assert "A processor &amp; more, 2 thread(s), Python 3.11, torch 2.13; commit 0123456789" in full_page
    assert "nan" not in full_page.lower().replace("finance", "")


def test_the_page_says_what_the_cells_say(full_page: str) -> None:
    assert "1 of 2 estimates within 10 %, the worst off by 20.0%." in full_page
    assert "1 of 2 fp32 curves within 1e-04 of PEFT's over the first 10 steps, the farthest 1.0e-03 away." in full_page
    assert "than PEFT's formula in 0, level in 0, slower in 2" in full_page
    assert "Ours is slower in layers of at most 768 features alone" in full_page
    assert full_page.count("there is no GPU") == 1
    assert "not timed, since it is off" in full_page
    assert "PEFT's formula is ahead" in full_page
    assert "asks for 9 GiB" in full_page
    assert "paper, 5 members: above the mean single model, +2.0 (+1.0..+3.0) points overall" in full_page
    assert "The base takes 0.125 of its dense bytes" in full_page
    assert "melora: 20.0 ↓" in full_page


def test_a_page_of_nothing_names_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--results", str(tmp_path)]) == 0
    assert f"written to {tmp_path / 'report.html'}" in capsys.readouterr().out
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    check(text)
    assert text.count("Not measured here yet") == len(report.SECTIONS)
    assert "not the committed results" in text
    assert "Made from no result file by" in text
    for module in sorted(set(re.findall(r"<code>python -m ([\w.]+)", text))):
        assert importlib.util.find_spec(module) is not None, module


def test_the_page_of_the_committed_results(tmp_path: Path) -> None:
    text = report.page(read(RESULTS), digests(RESULTS), committed=True)
    check(text)
    assert "not the committed results" not in text


def test_the_committed_page_is_of_the_committed_results() -> None:
    assert digests(RESULTS) in report.REPORT.read_text(encoding="utf-8"), "run: python -m benchmarks.report"


def test_results_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "steps.json").write_text("{")
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "steps.json is not JSON" in capsys.readouterr().err
    (tmp_path / "steps.json").write_text("[]")
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "steps.json is not a result file: it holds a list; move it away" in capsys.readouterr().err


def test_a_peer_that_is_ahead_is_marked_and_explained(made_up: dict) -> None:
    rows = peer_rows(made_up["steps"]["cells"])
    ahead = [row for _, _, row in rows if verdict(row, "step")]
    assert ahead
    assert closing_note(rows).count(" is ahead") == len(ahead) + 1  # and the heading
    level = {"peer": "peft", "step": [1.1, 1.05, 1.2], "saved_mib": 1.0, "gflop": 1.0}
    assert closing_note([("fp32", "peft LoRA / ours", level)]) == "No peer is ahead in time in any cell, by the medians."
    behind = level | {"step": [0.9, 0.8, 0.95]}
    assert "fp32: **peft is ahead** in time (peft LoRA / ours 0.90 (0.80..0.95)), with 1.00 of our FLOPs" in closing_note(
        [("fp32", "peft LoRA / ours", behind)]
    )


def test_bytes_are_told_beside_both_kinds_of_full_fine_tuning() -> None:
    """LoRA keeps h besides what frozen embeddings leave to keep, and less than where the embeddings train."""

    def cell(amp: str, saved: float, whole: float | None) -> dict:
        row = {"step": [0.7, 0.6, 0.8], "saved_mib": saved / 10, "sides": {"saved_mib": ["lora", "full-frozen-embeddings"]}}
        candidates = {"lora": {"saved_mib": saved}} | ({} if whole is None else {"full": {"saved_mib": whole}})
        settings = {"amp": amp, "targets": "all-linear"}
        return {"settings": settings, "figures": {"ratios": {"ours LoRA / full": row}, "candidates": candidates}}

    found = {"a": cell("off", 10.1, 10.2), "b": cell("off", 10.1, 10.05), "c": cell("bf16", 5.0, None)}
    assert full_verdict(found) == (
        "LoRA in fp32: faster in 2 of 2 cells, leaner in 0 (1 where the embeddings train too); "
        "LoRA in bf16 autocast: faster in 1 of 1 cell, leaner in 1."
    )


def test_standing_is_decided_by_the_quantiles() -> None:
    times = {
        "above": [1.2, 1.1, 1.3],
        "below": [0.9, 0.8, 0.99],
        "both": [1.2, 0.9, 1.3],
        "more": 1.2,
        "same": 1.001,
        "less": 0.9,
    }
    found = {name: standing(times, name) for name in times}
    assert found == {"above": "ours", "below": "theirs", "both": "equal", "more": "ours", "same": "equal", "less": "theirs"}


WORDS = [  # of the axes and marks of every figure
    "ratio of step times (no unit)", "ratio of bytes (no unit)", "fp32, width 384", "loralib LoRA", "full, autocast alone",
    "step, ms", "saved for backward, MiB", "sequence length, tokens", "batch, sequences", "width, features", ">rank<",
    "trained parameters, with the head", "dev accuracy, %", ">xgblora<", "saved file, bytes", "KiB",
    "share of lora", "MiB; exact", "bytes (logarithmic)", "share of the leading directions, %", "7 of 40",
    "rank (logarithmic)", "full fine-tuning<", "Pearson r, × 100", "overall score, × 100", ">single models<",
    "ratio of times (no unit, logarithmic)", "autocast alone: DoRA, attn", "% of it; band: ±10 %",
    "relative difference (no unit)", "optimizer step", "limit 0.0001", "time over ours (no unit, logarithmic)",
]  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_every_figure_names_its_axes_and_units(full_page: str, word: str) -> None:
    assert any(word in drawn for drawn in re.findall(r"<svg.*?</svg>", full_page, re.DOTALL))


def test_colours_of_figures_are_those_of_the_page(full_page: str) -> None:
    drawn = " ".join(re.findall(r"<svg.*?</svg>", full_page, re.DOTALL))
    assert not re.search("|".join(light for light, _ in COLOURS.values()), drawn)
    assert set(re.findall(r"var\(--(\w+)\)", drawn)) <= set(COLOURS)


def test_figures_of_the_other_suites() -> None:
    layer = {"k": {"settings": {"amp": True, "dropout": 0.1}, "figures": {"candidates": {"lora": {"forward_peak_mib": 3.0}}}}}
    first, second = (svg(steps.layer(layer), "x") for _ in range(2))
    assert first == second  # the same page from the same files
    assert "peak, MiB" in first
    assert "lora, autocast, dropout 0.1" in first
    curves = svg(steps.curves([{"name": "a", "curve": [{"step": 0, "score": 0.5}, {"step": 9, "score": 0.6}]}]), "x")
    assert "optimizer steps" in curves
    assert "overall dev score" in curves


def texts(figure: Figure) -> str:
    """All words of a figure."""
    return svg(figure, "x")


def test_one_seed_and_missing_parts_are_drawn() -> None:
    alone = quality.Interval(50.0, float("-inf"), float("inf"))
    found = texts(quality.rank_scores({"SST": quality.RankCurve({1: alone}, alone), "STS": quality.RankCurve({}, None)},
                                      {"SST": "%", "STS": "r"}))  # fmt: skip
    assert "nan" not in found
    assert steps.scaling({}, "off") is None
    assert "No limit" not in texts(quality.deviations({"a": [0.0]}, None, 1))
    assert methods.floor([1.0, 50.0, 51.0, 52.0, 53.0]) == 50.0
    assert methods.floor([1.0, 50.0]) == 1.0


def test_lists_become_html() -> None:
    assert blocks("Note `x`:\n\n* one\n* two\n\n<table></table>") == (
        '<p class="note">Note <code>x</code>:</p>\n<ul class="note"><li>one</li><li>two</li></ul>\n<table></table>'
    )


def test_text_becomes_html() -> None:
    assert inline("a < b & **c** ``d`` `e`") == "a &lt; b &amp; <strong>c</strong> <code>d</code> <code>e</code>"
    made = table(["", "met"], [["x", "**no**"], ["y", "yes"], ["z", "peft is ahead"], ["1.5 MiB", "no"]])
    assert made.count("<tr class=marked>") == 3
    assert "<td class=number>1.5 MiB</td>" in made
    assert blocks(f"note\n\n{made}\n\nend") == f'<p class="note">note</p>\n{made}\n<p class="note">end</p>'


COMMANDS = re.findall(r"-m (benchmarks\.[^;}|]*)", subprocess.run(
    ["make", "-n", "--no-print-directory", "bench", "bench-full"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout)  # fmt: skip


def test_make_runs_every_suite() -> None:
    modules = {command.split()[0].removeprefix("benchmarks.") for command in COMMANDS}
    assert modules == {"steps", "layer", "kernels", "parity", "memory", "methods", "quality", "aot", "report"}
    suites = {re.search(r"--suite (\w+)", command)[1] for command in COMMANDS if "--suite" in command}
    assert suites == {"cost", "accuracy", "intruders", "qlora"}


@pytest.mark.parametrize("module", sorted({command.split()[0] for command in COMMANDS}))
def test_options_of_make_are_known(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {word for command in COMMANDS for word in shlex.split(command) if command.split()[0] == module and word[:2] == "--"}
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main(["--help"])
    assert end.value.code == 0
    assert given <= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
