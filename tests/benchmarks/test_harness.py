"""Rounds, statistics, machine facts, result files, comparison and gate."""

import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import harness
from benchmarks.harness import (
    Check,
    RedGateError,
    ResultFile,
    Spread,
    compare,
    interleaved,
    machine,
    order,
    ratios,
    require_green,
    spread,
    write_result,
)


def test_every_candidate_runs_once_per_round_in_rotated_order():
    calls, ticks = [], []
    candidates = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}
    samples = interleaved(candidates, rounds=7, warmup=2, tick=lambda: ticks.append(1))
    rounds = ["".join(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert rounds[2:] == ["abc", "bca", "cab", "cba", "acb", "bac", "abc"]
    assert len(ticks) == len(calls) == 27
    assert samples["a"] == [7, 12, 14, 18, 19, 23, 25]  # the third round's calls are numbers 7 to 9


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_order_is_balanced_in_position_and_neighbour(count):
    names = [str(number) for number in range(count)]
    rounds = [order(names, index) for index in range(2 * count)]
    assert all(sorted(each) == names for each in rounds)
    positions = Counter((name, position) for each in rounds for position, name in enumerate(each))
    assert set(positions.values()) == {2}
    before = Counter(pair for each in rounds for pair in pairwise(each))
    assert all(before[a, b] == before[b, a] for a, b in before)


def test_every_candidate_warms_up_before_any_counts():
    calls = []
    interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=1, warmup=1)
    assert Counter(calls[:2]) == Counter(calls[2:]) == Counter("ab")


@pytest.mark.parametrize(("candidates", "rounds"), [({}, 3), ({"a": int}, 0)])
def test_nothing_to_measure_is_an_error(candidates, rounds):
    with pytest.raises(ValueError, match=f"{len(candidates)} candidates over {rounds} rounds asked; at least one"):
        interleaved(candidates, rounds=rounds)


def test_spread_interpolates_between_order_statistics():
    assert spread([7.0]) == Spread(7, 7, 7)
    assert spread([30, 10, 20, 50, 40, 0]) == Spread(25, 10, 40)
    assert spread([1, 2]) == pytest.approx((1.5, 1.2, 1.8))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_spread_agrees_with_torch(values):
    expected = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    # Both round a few times at the scale of the largest value.
    budget = 8 * torch.finfo(torch.float64).eps * max(map(abs, values))
    assert spread(values) == pytest.approx(expected.tolist(), rel=0, abs=budget)


def test_spread_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="spread of no values asked; measure at least one round"):
        spread([])


def test_ratios_are_formed_pair_by_pair():
    # A slow spell doubles both in the last two rounds; the ratio of medians would be 0.5 · 4 / 3.
    assert ratios([1, 1, 4], [2, 2, 8]) == Spread(0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"pairs from the same rounds, found 1 and 2 samples; measure both"):
        ratios([1], [1, 2])


def test_machine_names_what_a_figure_depends_on():
    facts = machine()
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert facts["threads"] == torch.get_num_threads()
    assert facts["ram_gib"] > 0
    assert facts["torch"] == torch.__version__
    assert facts["python"].count(".") == 2
    assert facts["date"].startswith("20")
    json.dumps(facts)


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    for key in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(key, raising=False)
    (tmp_path / "code.py").write_text("1\n")
    assert harness._git("init", "-q") is not None
    who = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    assert harness._git("add", ".") is not None
    assert harness._git(*who, "commit", "-qm", "start", "--no-verify") is not None
    return tmp_path


def test_machine_tells_changes_from_commits(repository):
    clean = machine()
    assert len(clean["commit"]) == 40
    assert (clean["dirty"], clean["changes"]) == (False, None)
    (repository / "benchmarks" / "results").mkdir(parents=True)
    (repository / "benchmarks" / "results" / "steps.json").write_text("{}")
    assert machine()["dirty"] is False  # a result does not make its own tree dirty
    seen = {None}
    for name, text in (("code.py", "2\n"), ("code.py", "3\n"), ("new.py", "1\n"), ("new.py", "2\n")):
        (repository / name).write_text(text)
        facts = machine()
        assert facts["dirty"] is True
        assert facts["commit"] == clean["commit"]
        assert facts["changes"] not in seen
        seen.add(facts["changes"])


def test_machine_without_a_repository_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert {key: machine()[key] for key in ("commit", "dirty", "changes")} == dict.fromkeys(("commit", "dirty", "changes"))


def test_write_result_replaces_the_file_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.json"
    write_result(path, {"a": 1})
    write_result(path, {"a": [2, "é"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [2, "é"]}
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]

    def broken(source, target):
        assert json.loads(Path(source).read_text()) == {"a": 3}  # complete before it takes the name
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        write_result(path, {"a": 3})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [2, "é"]}
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]


def test_a_figure_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_result(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


FACTS = {"cpu": "c", "commit": "one", "date": "monday", "load_average": 0.5}
SETTINGS = {"rounds": 3, "candidates": ("a", "b")}


def test_finished_cells_are_skipped_only_where_machine_commit_and_settings_agree(tmp_path):
    results = ResultFile(tmp_path / "x.json", "steps")
    assert results.difference("cell", FACTS, SETTINGS) == "not measured yet"
    results.add("cell", FACTS, SETTINGS, {"ms": Spread(1.0, 0.5, 2.0)})

    again = ResultFile(tmp_path / "x.json", "steps")
    assert again.difference("cell", {**FACTS, "date": "tuesday", "load_average": 3.0}, SETTINGS) is None
    assert again.cells["cell"]["figures"] == {"ms": [1.0, 0.5, 2.0]}
    assert again.difference("other cell", FACTS, SETTINGS) == "not measured yet"
    for facts, settings, reason in (
        ({**FACTS, "commit": "two"}, SETTINGS, "machine: commit was 'one', is 'two'"),
        ({**FACTS, "gpu": "g"}, SETTINGS, "machine: gpu was None, is 'g'"),
        (FACTS, {**SETTINGS, "rounds": 4}, "settings: rounds was 3, is 4"),
        (FACTS, {"rounds": 3}, "settings: candidates was ['a', 'b'], is None"),
    ):
        assert again.difference("cell", facts, settings) == reason


def test_a_cell_is_on_disk_as_soon_as_it_is_finished(tmp_path):
    results = ResultFile(tmp_path / "x.json", "steps")
    for key in ("a", "b"):
        results.add(key, FACTS, SETTINGS, {})
        assert key in ResultFile(tmp_path / "x.json", "steps").cells


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"suite": "steps"', r"x\.json is not a result file \(JSONDecodeError.*move it away"),
        ("[]", r"x\.json is not a result file"),
        ('{"suite": "kernels", "cells": {}}', r"x\.json holds results of suite 'kernels', not 'steps'"),
    ],
)
def test_a_foreign_or_broken_result_file_is_an_error(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ResultFile(tmp_path / "x.json", "steps")
    assert (tmp_path / "x.json").read_text() == content


def test_compare_takes_its_budget_from_plain_eager():
    oracle = torch.tensor([1.0, -4.0], dtype=torch.float64)
    plain = torch.tensor([1.0, -4.5])
    budget = 2 * (0.5 + torch.finfo(torch.float32).eps * 4)
    assert compare("x", torch.tensor([2.0, -4.0]), plain, oracle) == Check("x", 1.0, budget)
    assert compare("x", plain, plain, oracle, dtype=torch.bfloat16).budget == 2 * (0.5 + 4 * 2**-7)
    assert compare("x", plain, plain, oracle, terms=torch.tensor([9.0, 5.0])).budget == 2 * (0.5 + 9 * 2**-23)
    with pytest.raises(ValueError, match=r"x: shape \(2, 1\), expected \(2,\)"):
        compare("x", torch.ones(2, 1), plain, oracle)


def test_a_green_gate_opens_and_a_red_one_names_what_fails():
    good = Check("good", 1.0, 1.0)
    require_green([good])
    with pytest.raises(RedGateError, match=r"refusing to print figures: 1 of 2 checks fail.*\n  bad: error 2, budget 1$"):
        require_green([good, Check("bad", 2.0, 1.0)])
    with pytest.raises(RedGateError, match="bad: error nan"):
        require_green([Check("bad", float("nan"), 1.0)])
    with pytest.raises(RedGateError, match="nothing was checked"):
        require_green([])
