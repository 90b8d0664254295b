"""`benchmarks.quality` on a tiny BERT: all claims, their cells and tables, and that it goes on."""

import json
from pathlib import Path

import pytest
import torch

import peftlite
from benchmarks import accuracy, efficiency_claim, quality
from benchmarks.efficiency_claim import candidates, effects, pick
from benchmarks.ensemble_claim import sizes
from benchmarks.intervals import Interval
from benchmarks.protocol import Protocol, load_splits
from benchmarks.rank_claim import rows
from benchmarks.targets import PAPER, Measured, judge, measured, met
from docs import quality_tables
from docs.generate import rst_table
from examples.minbert_multitask.ensemble import member_networks, shares_base
from examples.minbert_multitask.evaluate import task_outputs
from examples.minbert_multitask.model import BertConfig, BertModel
from examples.minbert_multitask.settings import Settings

SHORT = ["--small", "--search-examples", "8", "--held-examples", "8", "--quora-train", "18", "--quora-dev", "10"]
SHORT += ["--batch-size", "4", "--grid", "1", "--steps", "2", "--memory-batch", "8", "--rounds", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_bert, tables) -> tuple[Path, list[str], dict]:
    """Output of the whole suite, its command line, and its result."""
    output = tmp_path_factory.mktemp("quality")
    command = ["--data", str(tables), "--weights", str(tiny_bert), "--output", str(output), *SHORT]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficiency_claim, "TASKS", ("sst",))  # of claim A one will do
        assert quality.main(command) == 0
    torch.set_num_threads(threads)
    return output, command, json.loads((output / "quality.json").read_text())


def test_cells_of_all_claims_and_no_folder(run, tables, tiny_bert) -> None:
    output, _, found = run
    text = json.dumps(found)
    assert not [place for place in (output, tables, tiny_bert.parent) if str(place) in text]
    cells = found["cells"]
    for task in ("sst", "quora", "sts"):
        for name in ("full", "lora-r1", "lora-r8"):
            best = cells[f"B/{task}/{name}/search"]["figures"]["best"]
            first, second = (cells[f"B/{task}/{name}/seed{seed}"] for seed in (0, 1))
            tried = {training["lr"]: training["loss"] for training in first["figures"]["trainings"]}
            assert list(tried) == [best, best / 3]
            settled = min(tried, key=tried.__getitem__)
            assert [training["lr"] for training in second["figures"]["trainings"]] == [settled]
            for seed, cell in enumerate((first, second)):
                assert (cell["figures"]["lr"], cell["figures"]["steps"], cell["settings"]["seed"]) == (settled, 2, seed)
    assert cells["A/sst/dora-fp32-attn/seed0"]["figures"]["lr"] == cells["B/sst/lora-r1/seed0"]["figures"]["lr"]
    assert cells["B/quora/full/seed0"]["figures"]["examples"] == {"train": 18, "dev": 10}
    assert cells["B/sst/full/seed0"]["figures"]["examples"] == {"train": 20, "dev": 12}
    assert not list((output / "trained").iterdir())
    assert len(cells["C/paper/ensemble"]["figures"]["members"]) == 2


def test_rows_of_the_rank_claim(run) -> None:
    cells = run[2]["cells"]
    found = rows(cells)
    assert [(row.task, row.rank) for row in found[:3]] == [("sst", None), ("sst", 1), ("sst", 8)]
    one = next(row for row in found if (row.task, row.rank) == ("sts", 1))
    gaps = [cells[f"B/sts/lora-r1/seed{s}"]["figures"]["dev"] - cells[f"B/sts/full/seed{s}"]["figures"]["dev"] for s in (0, 1)]
    assert one.gap.mean == pytest.approx(sum(gaps) / 2)
    assert one.scores.count == one.gap.count == 2
    assert one.edge  # of two rates each is an edge
    assert found[2].trained == 8 * found[1].trained < found[0].trained
    alone = {key: cell for key, cell in cells.items() if "seed1" not in key}
    assert next(row for row in rows(alone) if row.rank == 1).verdict == "not decided within the interval"


def test_goes_on_and_keeps_what_more_seeds_and_other_claims_brought(run, capsys, monkeypatch) -> None:
    output, command, found = run
    monkeypatch.setattr(accuracy, "train", lambda *a, **k: pytest.fail("trained again"))
    assert quality.main([*command, "--suite", "paper", "--claims", "B", "--seeds", "1"]) == 0
    assert "B/sts/lora-r8/seed0: finished before" in capsys.readouterr().out
    assert json.loads((output / "quality.json").read_text()) == found
    assert quality.main([*command, "--steps", "3"]) == 1
    message = f"{output} holds cells of another study: steps was 2, is 3; give the same options or choose another --output"
    assert message in capsys.readouterr().err


def test_members_answer_on_one_backbone_as_where_they_were_trained(run, tables, tiny_bert) -> None:
    """With two adapted copies of it as well: loaded onto one BERT in turn, each gives what it gives alone."""
    output = run[0]
    assert shares_base(Settings(backbones=2))
    assert not shares_base(Settings(method="full"))
    folders = [output / f"C-paper-seed{seed}" for seed in (0, 1)]
    changes = {"data": str(tables), "weights": str(tiny_bert)}
    dev = load_splits(Protocol(task="sts", weights=str(tiny_bert), search_examples=8, held_examples=8), str(tables), output).dev
    together = [task_outputs(network, dev, settings) for network, settings, _ in member_networks(folders, **changes)]
    for folder, logits in zip(folders, together, strict=True):
        network, settings, _ = next(member_networks([folder], **changes))
        assert torch.equal(task_outputs(network, dev, settings), logits)
        assert set(network.backbones) == {"sentiment", "pairs"}
    assert not torch.equal(*together)


def test_bytes_of_an_ensemble() -> None:
    member = {"backbone": 1000, "backbones": 2, "adapters": 10, "heads": 5, "bytes": 70}
    assert sizes([member, member]) == {
        "backbone": 4000, "members": 140, "adapters": 80, "heads": 40, "shared": 4140, "full": 2 * (8000 + 20),
    }  # fmt: skip


def test_every_effect_changes_one_thing() -> None:
    parts = {name: name.split("-", 2) for name in candidates()}
    assert len(parts) == 10
    for title, (over, under) in effects().items():
        a, b = ([*parts[side], "none"][:3] for side in (over, under))
        changed = [i for i in range(3) if a[i] != b[i] and not (i == 2 and "full" in (a[0], b[0]))]
        assert len(changed) == (2 if title.startswith("both at once") else 1), title


def test_costs_of_the_candidates(run) -> None:
    figures = run[2]["cells"]["A/sst/cost"]["figures"]
    assert figures["checks"] > 0
    rows_ = figures["candidates"]
    assert rows_["lora-fp32-attn"]["saved_mib"] < rows_["lora-fp32-all-linear"]["saved_mib"]
    assert rows_["dora-fp32-attn"]["trained"] == rows_["lora-fp32-attn"]["trained"] + 2 * 3 * 32
    assert rows_["full-fp32"]["resident_mib"] > rows_["lora-fp32-all-linear"]["resident_mib"]
    for row in rows_.values():
        assert row["peak_mib"] > row["resident_mib"]
        assert row["epoch_seconds"][1] <= row["epoch_seconds"][0] <= row["epoch_seconds"][2]
    effect = figures["effects"]["LoRA alone: attn, fp32"]
    assert effect["saved_mib"] == rows_["lora-fp32-attn"]["saved_mib"] / rows_["full-fp32"]["saved_mib"]
    assert "step" not in run[2]["cells"]["A/sst/memory"]["figures"]["effects"]["LoRA alone: attn, fp32"]


def test_picked_batches_stand_for_all_lengths(run, tables, tiny_bert) -> None:
    protocol = Protocol(task="quora", weights=str(tiny_bert), search_examples=8, held_examples=8)
    data = load_splits(protocol, str(tables), run[0]).train
    chosen, count = pick(data, 4, 5)
    assert count == 5
    assert sorted(i for index in chosen for i in index) == list(range(20))
    lengths = [max(len(side[i]) for side in (data.first, data.second) for i in index) for index in chosen]
    assert lengths == sorted(lengths)
    (middle,), _ = pick(data, 4, 1)
    assert middle == chosen[2]


def test_tables(run) -> None:
    found = run[2]
    for name, render in quality_tables.BLOCKS.items():
        text = render(found, rst_table)
        assert "the base is bert" in text, name
        nothing = render({"cells": {"other": next(iter(found["cells"].values()))}}, rst_table)
        assert nothing == quality_tables.NO_RESULT or name == "targets"
    assert "Rank 1 within 1.5 points of full fine-tuning: SST-5: " in quality_tables.rank(found, rst_table)
    assert "Quora 18 and 10" in quality_tables.rank(found, rst_table)
    assert "over the best single, points" in quality_tables.ensembles(found, rst_table)
    assert "Overall the ensemble is above the mean single: " in quality_tables.ensembles(found, rst_table)
    assert "DoRA all-linear, bf16: faster than full fine-tuning: " in quality_tables.efficiency(found, rst_table)
    minilm = {"x": {**found["cells"]["B/sst/full/seed0"], "settings": {"weights": "minilm"}}}
    assert "Quora's figures are contaminated" in quality_tables.caption(minilm)


@pytest.mark.parametrize(
    ("sst", "sts", "answer"),
    [
        ((0.8, 0.7, 0.9), (0.9, 0.8, 0.99), "yes (medians 0.80, 0.90; 80 % quantile at most 0.99)"),
        ((0.8, 0.7, 0.9), (0.9, 0.8, 1.01), "by the median of each task (medians 0.80, 0.90; 80 % quantile at most 1.01)"),
        ((0.8, 0.7, 0.9), (1.0, 0.9, 1.01), "not on every task (medians 0.80, 1.00; 80 % quantile at most 1.01)"),
        ((1.2, 1.1, 1.3), (1.1, 1.01, 1.2), "no (medians 1.20, 1.10; 80 % quantile at most 1.30)"),
    ],
)
def test_what_is_said_of_faster_training(sst, sts, answer) -> None:
    def cost(step):
        return {"figures": {"effects": {name: {"step": step, "saved_mib": 0.5} for name in effects()}}}

    for line in quality_tables.verdict({"sst": cost(sst), "sts": cost(sts)}).split("\n"):
        assert f"faster than full fine-tuning: {answer}; fewer saved bytes: yes (at most 0.50)." in line


def test_every_target_has_a_figure(run) -> None:
    cells = run[2]["cells"]
    found = measured(cells)
    assert set(found) == {target["id"] for target in PAPER["targets"]}
    assert [name for name, figure in found.items() if figure is None] == ["time-rank"]  # no rank 16 in the small run
    first = judge(cells)[0]
    assert (first.ours, first.met) == ("55,296", "yes")
    assert {row.ours for row in judge({})[3:]} == {"not measured"}


def test_trained_parameters_of_bert_base() -> None:
    """The closed count of the targets is that of the injected model."""
    with torch.device("meta"):
        model = BertModel(BertConfig(num_hidden_layers=1))
    peftlite.inject_adapters(model, Settings().target_names(), 1)
    count = sum(p.numel() for layer in peftlite.adapters(model).values() for p in layer.adapter_parameters().values())
    assert 12 * count == measured({})["parameters-all"].value


def test_targets_with_bounds_take_all_between_them() -> None:
    assert met(Measured(0.5), "<=", 0.5) == "yes"
    assert met(Measured(0.5, 0.4, 0.6), "<=", 0.5) == "not decided within the interval"
    assert met(Measured(0.5, 0.4, 0.6), ">=", 0.7) == "no"
    assert quality_tables.points(Interval(0.01, float("-inf"), float("inf"), 1)) == "+1.0 (one seed)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--claims", "B,D"], "no claim D; there are A, B, C"),
        (["--ranks", "1,x"], "'1,x' is not a list of ranks; write them as in 1,2,4"),
        (["--seeds", "0"], "'0' is not a number of trainings; at least 1 is needed"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit):
        quality.main(arguments)
    assert message in capsys.readouterr().err


def test_missing_data_are_named(tmp_path, capsys) -> None:
    assert quality.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "ids-sst-train.csv is missing from" in capsys.readouterr().err
