"""The loop over the cells of a suite that one process measures, and the exit statuses of all suites."""

import json

import pytest

from benchmarks.cells import Cell, exit_status, measure_cells
from benchmarks.harness import RedGateError, ResultFile


def show(cell) -> str:
    return f"figure {cell['figures']['value']}"


def test_each_cell_is_written_at_once_and_a_finished_one_is_only_shown(tmp_path, capsys):
    def interrupted():
        raise KeyboardInterrupt

    path, facts = tmp_path / "x.json", {"cpu": "c"}
    cells = [Cell("a", {"size": 1}, lambda: {"value": 1}), Cell("b", {"size": 2}, interrupted)]
    with pytest.raises(KeyboardInterrupt):
        measure_cells(cells, ResultFile(path, "x"), facts, show)
    assert list(json.loads(path.read_text(encoding="utf-8"))["cells"]) == ["a"]
    assert capsys.readouterr().out == "\n[1/2] a: not measured yet\nfigure 1\n\n[2/2] b: not measured yet\n"

    again = [Cell("a", {"size": 1}, interrupted), Cell("b", {"size": 2}, lambda: {"value": 2})]
    assert measure_cells(again, ResultFile(path, "x"), facts, show) == [{"value": 1}, {"value": 2}]
    assert "[1/2] a: finished before\nfigure 1\n" in capsys.readouterr().out
    anew = [Cell("a", {"size": 1}, lambda: {"value": 3})]
    assert measure_cells(anew, ResultFile(path, "x"), facts, show, fresh=True) == [{"value": 3}]
    assert list(ResultFile(path, "x").cells) == ["a", "b"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted: what is finished is kept; the same command goes on"),
        (RedGateError("the gate is red"), 1, "the gate is red"),
        (FileNotFoundError("no data there"), 1, "no data there"),
        (ValueError("another suite"), 1, "another suite"),
    ],
)
def test_what_stops_a_suite_is_said_and_told_by_the_exit_status(error, status, message, capsys):
    def run() -> bool:
        raise error

    assert exit_status(run) == status
    assert capsys.readouterr().err.strip() == message


def test_the_exit_status_tells_whether_all_is_well():
    assert (exit_status(lambda: True), exit_status(lambda: False)) == (0, 1)
    with pytest.raises(TypeError, match="a fault of the code"):
        exit_status(lambda: (_ for _ in ()).throw(TypeError("a fault of the code")))
