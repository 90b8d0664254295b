"""What a finished run gives: scores again, prediction files, ensembles, the report."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.minbert_multitask import evaluate, predict, report
from examples.minbert_multitask.ensemble import ensemble, mean_logits, member_networks, vote
from examples.minbert_multitask.plots import smooth
from examples.minbert_multitask.predict import write_predictions
from examples.minbert_multitask.run_folder import RunFolder, read_tensors, write_json
from examples.minbert_multitask.tasks import predictions
from examples.minbert_multitask.train import train


@pytest.fixture(scope="module")
def runs(tiny_bert, tables, tmp_path_factory) -> dict[str, Path]:
    """Finished runs of several methods over all four tasks."""
    from examples.minbert_multitask.settings import Settings

    folder = tmp_path_factory.mktemp("runs")
    base = Settings(
        data=str(tables), weights=str(tiny_bert), tasks="sst,cfimdb,quora,sts", rank=2, batch_size=8, epochs=2,
        threads=1, device="cpu", lr=3e-3, log_every=2,
    )  # fmt: skip
    variants = {
        "lora": {},
        "dora": {"method": "dora", "seed": 1, "head": "nonlinear"},
        "full": {"method": "full", "seed": 2, "tasks": "sst,sts"},
        "bf16": {"amp": "bf16", "backbones": 2, "seed": 3},
    }
    for name, changes in variants.items():
        train(replace(base, output=str(folder / name), **changes), quiet=True)
    return {name: folder / name for name in variants}


@pytest.mark.parametrize("name", ["lora", "dora", "full", "bf16"])
def test_evaluate_gives_the_recorded_scores_exactly(runs, name):
    recorded = RunFolder(runs[name]).read_json("result.json")
    found = evaluate.evaluate(runs[name])
    assert found.pop("leaderboard") == recorded["leaderboard"]
    assert found == recorded["scores"]
    best = [row for row in RunFolder(runs[name]).read_metrics() if row["kind"] == "dev" and row["best"]][-1]
    assert best["scores"] == recorded["scores"]  # and so did the network in training, before it was saved


def test_evaluate_prints_json_and_refuses_a_split_without_labels(runs, capsys):
    evaluate.main([str(runs["full"]), "--split", "train"])
    assert json.loads(capsys.readouterr().out).keys() == {"sst", "sts", "leaderboard"}
    with pytest.raises(ValueError, match="split 'test-student' of task 'sst' has no labels to score against; use predi"):
        evaluate.evaluate(runs["full"], split="test-student")


def test_an_unfinished_run_says_so(runs, tmp_path):
    write_json(tmp_path / "settings.json", {"settings": RunFolder(runs["lora"]).read_settings(), "environment": {}})
    with pytest.raises(FileNotFoundError, match=r"has no best\.safetensors: the run was stopped before its first eval"):
        evaluate.evaluate(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no result\.json: the run has not finished; go on with it by --re"):
        RunFolder(tmp_path).read_json("result.json")


def test_predictions_are_in_the_courses_format(runs, capsys):
    predict.main([str(runs["lora"])])
    printed = capsys.readouterr().out.split()
    names = {Path(path).name for path in printed}
    assert names == {f"{t}-{s}-output.csv" for t in ("sst", "cfimdb", "para", "sts") for s in ("dev", "test")}
    folder = runs["lora"] / "predictions"
    lines = (folder / "sst-test-output.csv").read_text().split("\n")
    assert lines[0] == "id \t Predicted_Sentiment "
    assert re.fullmatch(r"ids-sst-test-student-0 , [0-4] ", lines[1])
    assert len(lines) == 1 + 5 + 1
    assert re.match(r"id \t Predicted_Is_Paraphrase \nquora-dev-0 , [01]\.0 \n", (folder / "para-dev-output.csv").read_text())
    sts = (folder / "sts-dev-output.csv").read_text().splitlines()
    assert sts[0] == "id \t Predicted_Similiary "
    float(sts[1].split(" , ")[1])
    with pytest.raises(SystemExit, match="2"):
        predict.main([str(runs["lora"]), "--split", "exam"])
    assert "exam" in capsys.readouterr().err
    with pytest.raises(ValueError, match="task 'sst': 1 answers for 2 ids"):
        write_predictions(folder, "sst", "dev", ["a", "b"], torch.zeros(1, 5))


@pytest.mark.parametrize("majority", [False, True])
@pytest.mark.parametrize("name", ["lora", "full", "bf16"])
def test_an_ensemble_of_one_is_that_run(runs, tmp_path, name, majority):
    found = ensemble([runs[name]], majority=majority, output=tmp_path)
    recorded = RunFolder(runs[name]).read_json("result.json")
    assert found == {**recorded["scores"], "leaderboard": recorded["leaderboard"]}
    ours, theirs = tmp_path / "predictions", runs[name] / "predictions"
    for path in ours.iterdir():
        assert path.read_bytes() == (theirs / path.name).read_bytes()


def test_an_ensemble_is_the_mean_of_its_members_and_shares_their_base(runs):
    members = [runs["lora"], runs["full"], runs["dora"], runs["lora"]]
    bases = []
    for network, settings, _ in member_networks(members):
        bases.append((settings.method, id(network.backbones["shared"])))
    assert bases[0][1] == bases[2][1] == bases[3][1] != bases[1][1]
    found = ensemble(members)
    tensors = [read_tensors(path / "dev_outputs.safetensors")[0] for path in members]
    for task in ("sst", "quora"):
        logits = mean_logits([t[f"logits.{task}"] for t in tensors if f"logits.{task}" in t])
        labels = tensors[0][f"labels.{task}"]
        assert found[task] == (predictions(task, logits) == labels).double().mean().item()


def test_vote_by_hand():
    a, b = torch.tensor([[3.0, 0, 0, 0, 0]]), torch.tensor([[0.0, 1, 0, 0, 0]])
    assert predictions("sst", mean_logits([a, b, b])).tolist() == [0]
    assert predictions("sst", vote("sst", [a, b, b])).tolist() == [1]
    assert predictions("sst", vote("sst", [a, b])).tolist() == [0]  # one each: the mean logits decide
    yes, no = torch.tensor([[5.0]]), torch.tensor([[-1.0]])
    assert predictions("quora", vote("quora", [yes, no, no])).tolist() == [0]
    assert predictions("quora", vote("quora", [yes, no])).tolist() == [1]
    assert vote("sts", [torch.tensor([[1.0]]), torch.tensor([[2.0]])]).tolist() == [[1.5]]


def test_ensemble_errors(runs, tmp_path, tables):
    with pytest.raises(ValueError, match="an ensemble needs at least one run"):
        ensemble([])
    # A run on the same task in another data folder, one of whose rows is gone
    other = tmp_path / "data"
    other.mkdir()
    for path in tables.glob("*.csv"):
        (other / path.name).write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    settings = RunFolder(runs["full"]).read_settings()
    moved = tmp_path / "moved"
    write_json(moved / "settings.json", {"settings": {**settings, "data": str(other)}, "environment": {}})
    (moved / "best.safetensors").write_bytes((runs["full"] / "best.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"reads other examples of task 'sst' than .*; give one --data for all"):
        ensemble([runs["full"], moved])


def test_report_is_one_whole_file(runs):
    page = (runs["lora"] / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 5  # curves, two confusions, histogram, scatter
    assert all(base64.b64decode(image).startswith(b"\x89PNG\r\n") for image in images)
    result = RunFolder(runs["lora"]).read_json("result.json")
    for value in (*result["scores"].values(), result["leaderboard"]):
        assert f"{value:.4f}" in page
    assert f"{result['parameters']['trained_backbone']:,}" in page
    assert "peak memory" in page


def test_report_can_be_written_again(runs, capsys):
    before = (runs["full"] / "report.html").read_bytes()
    (runs["full"] / "report.html").unlink()
    report.main([str(runs["full"])])
    assert capsys.readouterr().out.strip() == str(runs["full"] / "report.html")
    assert (runs["full"] / "report.html").read_bytes() == before


def test_names_in_the_report_are_escaped(runs):
    result = RunFolder(runs["lora"]).read_json("result.json")
    page = report.render("<b>&", result, {})
    assert "<title>&lt;b&gt;&amp;</title>" in page


def test_smooth_is_a_centred_mean():
    assert smooth([1.0, 2.0, 6.0], share=1.0).tolist() == [1.5, 3.0, 4.0]
    assert smooth([1.0, 2.0], share=0.05).tolist() == [1.0, 2.0]
