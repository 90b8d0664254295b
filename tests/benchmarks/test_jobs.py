"""Jobs: once each, resumable, shared among processes, in the order of what they need."""

import fcntl
import json
import threading

import pytest

from benchmarks import jobs
from benchmarks.jobs import Job, cell_path, collect, work


def job(key: str, done: list[str], *, needs: tuple[str, ...] = (), **settings: object) -> Job:
    def measure(found):
        done.append(key)
        return {"value": 1 + sum(figures["value"] for figures in found.values())}

    return Job(key, settings, measure, needs, summary=lambda figures: f"value {figures['value']}")


def test_each_job_once_and_needs_first(tmp_path, capsys) -> None:
    done: list[str] = []
    chain = [job("c/d", done, needs=("b",)), job("b", done, needs=("a",)), job("a", done)]
    result = tmp_path / "all.json"
    work(chain, tmp_path, "x", ["a", "b", "c/d", "never"], result)
    assert done == ["a", "b", "c/d"]
    found = json.loads(result.read_text())
    assert found["suite"] == "x"
    assert {key: cell["figures"]["value"] for key, cell in found["cells"].items()} == {"a": 1, "b": 2, "c/d": 3}
    assert "min left in all" in capsys.readouterr().out
    work(chain, tmp_path, "x", [], result)
    assert done == ["a", "b", "c/d"]
    assert capsys.readouterr().out.count("finished before") == 3
    work(chain, tmp_path, "x", [], result, fresh=True)
    assert done == 2 * ["a", "b", "c/d"]


def test_other_settings_are_measured_anew(tmp_path) -> None:
    done: list[str] = []
    work([job("a", done, steps=1)], tmp_path, "x", [], tmp_path / "all.json")
    work([job("a", done, steps=1, task="sst")], tmp_path, "x", [], tmp_path / "all.json", defaults={"task": "sst"})
    assert done == ["a"]
    work([job("a", done, steps=2)], tmp_path, "x", [], tmp_path / "all.json")
    assert done == ["a", "a"]


def test_an_interruption_keeps_what_is_finished(tmp_path) -> None:
    done: list[str] = []

    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work([job("a", done), Job("b", {}, interrupted)], tmp_path, "x", ["a", "b"], tmp_path / "all.json")
    assert list(json.loads((tmp_path / "all.json").read_text())["cells"]) == ["a"]
    work([job("a", done), job("b", done)], tmp_path, "x", ["a", "b"], tmp_path / "all.json")
    assert done == ["a", "b"]


def test_leaves_to_others_what_they_are_at(tmp_path, capsys) -> None:
    done: list[str] = []
    lock = cell_path(tmp_path, "a").with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        work([job("a", done), job("b", done)], tmp_path, "x", [], tmp_path / "all.json")
    assert done == ["b"]
    assert "[1/2] a: another process is at it" in capsys.readouterr().out


def test_takes_over_from_a_process_that_died(tmp_path, monkeypatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(jobs, "PAUSE", 0.01)
    lock = cell_path(tmp_path, "a").with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        chain = [job("a", done), job("b", done, needs=("a",))]
        worker = threading.Thread(target=work, args=(chain, tmp_path, "x", [], tmp_path / "all.json"))
        worker.start()
        worker.join(0.1)
        assert worker.is_alive()
        assert done == []
    worker.join(10)
    assert done == ["a", "b"]


def test_nothing_finished_writes_no_result(tmp_path) -> None:
    assert collect(tmp_path, "x", ["a"], tmp_path / "all.json") == 0
    assert not (tmp_path / "all.json").exists()
