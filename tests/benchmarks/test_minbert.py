"""The collector of minBERT runs keeps what the tables need, and nothing of the machine's folders."""

import json

import pytest

from benchmarks.minbert import main
from docs.generate import minbert


def run_folder(path, method):
    path.mkdir()
    result = {
        "scores": {"sst": 0.4, "quora": 0.8, "sts": 0.9},
        "leaderboard": 0.7167,
        "parameters": {"trained_backbone": 12, "trained_share": 0.01, "heads": 3},
        "steps": 20,
        "best_step": 10,
        "train_seconds": 90.0,
        "memory": {"peak_rss_mb": 1.0},
        "settings": {"method": method, "rank": 8, "threads": 1, "amp": "bf16", "data": "/home/me/data", "output": "/home/me/r"},
        "environment": {"cpu": "a CPU", "gpu": None, "python": "3.11", "torch": "2.13", "commit": "0123456789ab"},
    }
    (path / "result.json").write_text(json.dumps(result))
    rows = [
        {"kind": "train", "step": 5, "loss": {"sst": 1.0}, "seconds": 1.0},
        {"kind": "dev", "step": 10, "scores": {"sst": 0.4}, "score": 0.4, "seconds": 2.0},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_collects_runs_and_leaves_local_paths_out(tmp_path):
    output = tmp_path / "minbert.json"
    folders = [run_folder(tmp_path / method, method) for method in ("lora", "full")]
    assert main([*folders, "--note", "made by hand", "--output", str(output)]) == 0
    text = output.read_text()
    assert "/home/me" not in text
    assert json.loads(text)["note"] == "made by hand"
    lora, full = json.loads(text)["runs"]
    assert (lora["name"], lora["rank"], full["rank"]) == ("lora", 8, None)
    assert lora["dev"] == {"sst": 0.4, "quora": 0.8, "sts": 0.9, "overall": 0.7167}
    assert [row["step"] for row in lora["curve"]] == [10]
    table = minbert(json.loads(text))
    assert "| lora | lora | 8 | 0.400 | 0.800 | 0.900 | 0.717 | 1.00% | 2 |" in table
    assert "a CPU, 1 thread(s), autocast bf16, Python 3.11, torch 2.13; commit `0123456789`" in table


def test_names_a_run_that_has_not_finished(tmp_path, capsys):
    (tmp_path / "half").mkdir()
    assert main([str(tmp_path / "half"), "--output", str(tmp_path / "out.json")]) == 1
    assert "half holds no result.json: the run has not finished" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
    with pytest.raises(SystemExit):
        main([])
