"""The memory suite on a tiny BERT: every estimate lies within the limit, and one that does not is seen."""

import dataclasses
import json

import pytest
import torch

import peftlite
from benchmarks import memory
from peftlite.analysis.step import MIB


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("method", "amp", "dropout"), [("full", False, 0.1), ("lora", True, 0.0), ("dora", True, 0.1), ("nf4-lora", False, 0.0)]
)
def test_every_estimate_lies_within_ten_percent(method, amp, dropout):
    settings = memory.MemorySettings("tiny", method, dropout, amp, 2, 8)
    figures = memory.measure(settings, fresh_process=False)
    assert memory.LIMIT == 0.1
    assert memory.met(figures)
    assert figures["added_error"] == 0  # the step itself to the byte; the whole but for what layers keep
    assert figures["measured_mib"] > figures["measured_added_mib"] > 0
    assert figures["rss_growth_mib"] is None


def test_the_cells_are_models_by_methods_precisions_and_dropouts():
    asked = list(memory.cells(small=False, device="cpu", threads=1))
    assert len({cell.key for cell in asked}) == len(asked) == len(memory.SIZES) * len(memory.METHODS) * 4


def test_the_resident_set_is_read_from_the_system():
    assert memory._resident("VmHWM") is None or memory._resident("VmHWM") >= memory._resident("VmRSS") > MIB
    assert memory._resident("VmNothing") is None


def test_the_suite_runs_from_the_command_line_and_its_status_tells(tmp_path, capsys, monkeypatch):
    one = memory.MemorySettings("tiny", "lora", 0.0, False, 2, 8)
    monkeypatch.setattr(memory, "cells", lambda **_: [one])
    command = ["--small", "--no-rss", "--output"]
    assert memory.main([*command, str(tmp_path / "memory.json")]) == 0
    assert "1 of 1 estimates lie within 10%" in capsys.readouterr().out
    found = json.loads((tmp_path / "memory.json").read_text())
    assert (found["suite"], len(found["cells"])) == ("memory", 1)
    right = peftlite.estimate_memory
    monkeypatch.setattr(memory, "measure", lambda *_: pytest.fail("measured a finished cell"))
    assert memory.main([*command, str(tmp_path / "memory.json")]) == 0
    monkeypatch.undo()
    monkeypatch.setattr(memory, "cells", lambda **_: [one])

    def wrong(*arguments, **options):
        estimate = right(*arguments, **options)
        return dataclasses.replace(estimate, parameters=estimate.parameters * 2)

    monkeypatch.setattr(peftlite, "estimate_memory", wrong)
    assert memory.main([*command, str(tmp_path / "wrong.json")]) == 1
    shown = capsys.readouterr().out
    assert shown.count("[!! off]") == 1
    assert "0 of 1 estimates lie within 10%" in shown
