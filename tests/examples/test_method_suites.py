"""`benchmarks.methods` on a tiny BERT: what it measures, what it leaves behind, and that it goes on."""

import fcntl
import json
import shutil
from pathlib import Path

import pytest
import torch

import peftlite
from benchmarks import accuracy, methods, qlora
from benchmarks.method_cost import CostSettings, compared, measure, table
from benchmarks.protocol import Protocol, load_splits
from benchmarks.recipes import RANKS, RECIPES
from docs import method_tables
from docs.generate import rst_table
from examples.minbert_multitask.network import build_network

SHORT = ["--epochs", "1", "--batch-size", "4", "--search-examples", "8", "--held-examples", "8", "--grid", "1", "--grow", "1"]
NO_RESULT = "No result is committed yet."


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_bert, tables) -> tuple[Path, list[str], dict]:
    """Output of the accuracy suite over some recipes, its command line, and its result."""
    output = tmp_path_factory.mktemp("suite")
    command = ["--suite", "accuracy", "--data", str(tables), "--weights", str(tiny_bert), "--output", str(output), *SHORT]
    names = "lora,full,linear-probe,dylora,xgblora,lisa,qlora,lora-fp32,lora-plus,lora-r1"
    assert methods.main([*command, "--methods", names, "--result", str(output / "all.json")]) == 0
    return output, command, json.loads((output / "all.json").read_text())


def test_every_method_has_a_recipe_that_trains_it() -> None:
    trained = {recipe.method for recipe in RECIPES.values()}
    assert set(peftlite.METHODS) <= trained
    assert {"full", "linear-probe", "bitfit", "lisa", "reflora"} <= trained
    assert {RECIPES[f"lora-r{rank}" if rank != 8 else "lora"].rank for rank in RANKS} == set(RANKS)


def test_a_cell_holds_what_the_tables_need_and_no_folder(folder) -> None:
    output, command, found = folder
    text = json.dumps(found)
    assert str(output) not in text
    assert command[3] not in text
    for name, cell in found["cells"].items():
        figures = cell["figures"]
        assert figures["right"].count("1") == round(figures["dev"] * 12), name
        assert len(figures["right"]) == 12
        assert figures["trainings"][0]["lr"] == min(figures["search"], key=lambda row: row["loss"])["lr"]
        assert figures["lr"] == min(figures["trainings"], key=lambda row: row["loss"])["lr"]
        assert figures["bytes"] == (output / f"{name}.safetensors").stat().st_size
    rows = {name: cell["figures"] for name, cell in found["cells"].items()}
    assert rows["linear-probe"]["trained"] == 0
    assert rows["lora-r1"]["trained"] * 8 == rows["lora"]["trained"] == rows["qlora"]["trained"]
    assert set(rows["dylora"]["ranks"]) == {str(rank) for rank in RANKS}
    assert rows["dylora"]["ranks"]["8"]["right"] == rows["dylora"]["right"]


def test_the_grid_grows_where_its_end_is_best(folder) -> None:
    _, _, found = folder
    for cell in found["cells"].values():  # one rate at first, which is both ends
        assert len(cell["figures"]["search"]) == 2


@pytest.mark.parametrize(
    ("losses", "rates", "chosen"),
    [
        ({3e-3: 1.0, 1e-3: 1.2}, [3e-3, 1e-3], 3e-3),
        ({3e-3: 1.5, 1e-3: 1.2, 1e-3 / 3: 1.3}, [3e-3, 1e-3, 1e-3 / 3], 1e-3),
        ({3e-3: None, 1e-3: None, 1e-3 / 3: 1.3}, [3e-3, 1e-3, 1e-3 / 3], 1e-3 / 3),
        ({3e-3: None, 1e-3: None, 1e-3 / 3: None}, [3e-3, 1e-3, 1e-3 / 3], None),
    ],
)
def test_whole_trainings_go_down_to_the_rate_that_suits_them(losses, rates, chosen, monkeypatch, tmp_path) -> None:
    def whole(recipe, settings, splits, file, *, quiet) -> dict:
        loss = losses[min(losses, key=lambda rate: abs(rate - settings.lr))]
        if loss is None:
            raise FloatingPointError(f"the loss at {settings.lr:g} is nan")
        file.write_text(f"{settings.lr:g}")
        return {"loss": loss, "seconds": 1.0}

    monkeypatch.setattr(accuracy, "search", lambda *_, **__: {"best": 3e-3, "tried": []})
    monkeypatch.setattr(accuracy, "whole", whole)
    arguments = (RECIPES["lora"], Protocol(), "sample", None, tmp_path)
    if chosen is None:
        with pytest.raises(FloatingPointError, match=r"0.003 is nan; .*0.001 is nan; .*0.000333"):
            accuracy.measure(*arguments)
        return
    figures = accuracy.measure(*arguments)
    assert figures["lr"] == pytest.approx(chosen)
    assert [training["lr"] for training in figures["trainings"]] == pytest.approx(rates)
    assert (tmp_path / "lora.safetensors").read_text() == f"{chosen:g}"
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_goes_on_where_it_was(folder, capsys, monkeypatch, tmp_path) -> None:
    output, command, found = folder
    again = [*command, "--methods", "lora,full", "--result", str(output / "again.json")]
    with (output / "cells" / "full.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(accuracy, "measure", lambda *a, **k: pytest.fail("measured again"))
        assert methods.main(again) == 0
    shown = capsys.readouterr().out
    assert "lora: finished before" in shown
    assert "full: another process is at it" in shown
    assert json.loads((output / "again.json").read_text())["cells"] == found["cells"]
    shutil.copytree(output / "cells", tmp_path / "cells")
    monkeypatch.setattr(accuracy, "measure", lambda *a, **k: {"dev": 0.5, "seconds": 1.0, "cpu_seconds": 1.0})
    elsewhere = ["--output", str(tmp_path), "--result", str(tmp_path / "x.json")]
    assert methods.main([*again, *elsewhere, "--seed", "1", "--methods", "lora"]) == 0
    assert "lora: dev 0.5000" in capsys.readouterr().out  # another seed is another cell


def test_the_file_holds_the_trained_model(folder, tiny_bert, tables) -> None:
    output, _, found = folder
    protocol = Protocol(weights=str(tiny_bert), batch_size=4, search_examples=8, held_examples=8)
    splits = load_splits(protocol, str(tables), output / "token-cache")
    settings = RECIPES["xgblora"].resolved(protocol.settings(str(tables)))
    network, _ = build_network(settings)
    peftlite.load_adapters(network, output / "xgblora.safetensors")
    trained = accuracy.Training(network.eval(), settings, {}, 0.0, 0.0, 0, 0.0)
    assert accuracy.judge(trained, splits.dev)[1] == found["cells"]["xgblora"]["figures"]["right"]


def test_search_and_judgement_see_disjoint_parts_of_train(tables, tiny_bert, tmp_path) -> None:
    protocol = Protocol(weights=str(tiny_bert), search_examples=9, held_examples=7)
    splits = load_splits(protocol, str(tables), tmp_path)
    assert (len(splits.search), len(splits.held)) == (9, 7)
    assert not set(splits.search.ids) & set(splits.held.ids)
    assert set(splits.search.ids) | set(splits.held.ids) <= set(splits.train.ids)
    place = splits.train.ids.index(splits.held.ids[3])
    assert (splits.held.first[3], splits.held.labels[3]) == (splits.train.first[place], splits.train.labels[place])
    with pytest.raises(ValueError, match=r"train has 20 examples, the search needs 1512; lower --search-examples"):
        load_splits(Protocol(weights=str(tiny_bert)), str(tables), tmp_path)


def test_a_loss_that_is_not_finite_is_no_candidate(tables, tiny_bert, tmp_path) -> None:
    protocol = Protocol(weights=str(tiny_bert), search_examples=12, held_examples=8, grid=1, grow=0, batch_size=4)
    splits = load_splits(protocol, str(tables), tmp_path)
    settings = RECIPES["lora"].resolved(protocol.settings(str(tables)), lr=1e30, epochs=1)
    with pytest.raises(FloatingPointError, match=r"lora at lr 1e\+30: the loss is (nan|inf)"):
        accuracy.train(RECIPES["lora"], settings, splits.search, quiet=True)


def test_intruders_of_the_trained_models(folder, capsys) -> None:
    output, command, _ = folder
    weights = command[5]
    result = output / "intruders.json"
    assert methods.main(["--suite", "intruders", "--weights", weights, "--output", str(output), "--result", str(result)]) == 0
    assert "lora-r64: not trained yet, left out" in capsys.readouterr().out
    found = json.loads(result.read_text())
    assert list(found["cells"]) == ["full", "lora-r1", "lora"]
    figures = {name: cell["figures"] for name, cell in found["cells"].items()}
    for row in figures.values():
        assert row["matrices"] + row["unchanged"] == 12
        assert row["intruders"]["0.3"] <= row["intruders"]["0.5"] <= row["intruders"]["0.7"]
    assert figures["lora-r1"]["effective_rank"] == pytest.approx(1, abs=1e-2)
    assert 1 < figures["lora"]["effective_rank"] < 8.1 < figures["full"]["effective_rank"]
    assert "| full" in method_tables.intruders(found, _pipes)
    empty = output / "empty"
    assert methods.main(["--suite", "intruders", "--output", str(empty), "--result", str(empty / "i.json")]) == 1
    assert "empty holds no trained model; run --suite accuracy with the same --output first" in capsys.readouterr().err


def test_two_processes_train_qlora_as_one_does(tiny_bert, tables, tmp_path) -> None:
    short = qlora.Short(examples=16, batch_size=4, weights=str(tiny_bert))
    qlora.run(short, str(tables), tmp_path, tmp_path / "q.json")
    found = json.loads((tmp_path / "q.json").read_text())
    figures = found["cells"]["qlora"]["figures"]
    assert figures["ranks_equal"]
    assert figures["difference"] < 0.01
    assert figures["base"]["numbers"] == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    # 4 bits, a scale in 8 bits for 64, and for each matrix an offset and one scale of scales (a matrix has one block of them)
    assert figures["base"]["bytes"] == figures["base"]["numbers"] * (4 + 8 / 64) / 8 + 12 * 8
    assert str(tiny_bert) not in json.dumps(found)
    assert "| trained tensors of the 2 processes | equal bit for bit" in method_tables.qlora(found, _pipes)
    uneven = qlora.Short(examples=10, batch_size=4, weights=str(tiny_bert))
    with pytest.raises(ValueError, match=r"10 examples in batches of 4 do not go evenly into 1 processes"):
        qlora.short_run(uneven, str(tables), tmp_path, tmp_path / "x")


def test_cost_of_recipes() -> None:
    size = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = ["full", "dora", "adalora", "qlora", "linear-probe", "lora-fp32", "lora-top3"]
    assert [r.name for r in compared(names, 2)] == ["lora", "full", "dora", "adalora", "qlora"]
    assert [r.name for r in compared(["lora-top3"], 6)] == ["lora", "lora-top3"]
    torch.set_num_threads(1)
    found = measure(names, size, CostSettings(rows=2, length=8, rounds=2, warmup=1))
    assert found["checks"] > 0
    rows = found["candidates"]
    assert list(rows) == ["lora", "full", "dora", "adalora", "qlora"]
    outputs = 2 * (4 * 24 + 24 + 96)
    assert rows["dora"]["trained"] == rows["lora"]["trained"] + outputs
    assert rows["lora"]["relative"]["step"] == pytest.approx([1, 1, 1])
    assert rows["full"]["checkpoint_bytes"] > rows["dora"]["checkpoint_bytes"] > rows["lora"]["checkpoint_bytes"]
    assert rows["qlora"]["saved_mib"] == pytest.approx(rows["lora"]["saved_mib"], rel=0.1)  # packed matrices are the base's
    assert rows["qlora"]["gflop"] == rows["lora"]["gflop"] < rows["dora"]["gflop"]
    assert len(table({"figures": found}).splitlines()) == 6


def test_tables(folder) -> None:
    _, _, found = folder
    text = method_tables.accuracy(found, _pipes)
    assert "MiniLM on SST-5, 20 sentences to train on, 12 in dev; epochs 1, batch size 4" in text
    assert text.count("\n| ") == 1 + len(found["cells"])
    assert "LoRA: 2 trainings" in method_tables.ranks(found, _pipes)  # of ranks 1 and 8
    assert "lora-fp32" in method_tables.qlora_accuracy(found, _pipes)
    some = {"cells": {"full": found["cells"]["full"]}}
    assert method_tables.ranks(some, rst_table) == NO_RESULT
    assert method_tables.qlora_accuracy(some, rst_table) == NO_RESULT
    assert "     - –" in method_tables.accuracy(some, rst_table)  # no LoRA to stand beside


def test_paired_difference() -> None:
    mean, error = method_tables.paired("1110", "1001")
    assert mean == pytest.approx(0.25)
    assert error == pytest.approx((sum((d - 0.25) ** 2 for d in (0, 1, 1, -1)) / 3 / 4) ** 0.5)
    assert method_tables.points("1111", "1111") == "+0.0 ± 0.0"


def test_options_of_another_suite_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        methods.main(["--suite", "cost", "--epochs", "3"])
    shown = capsys.readouterr().err
    assert "suite cost has no option --epochs; its own are length, rounds, rows, seed, threads, warmup" in shown
    with pytest.raises(SystemExit):
        methods.main(["--methods", "lora,lorra"])
    assert "no recipe lorra; there are full, linear-probe" in capsys.readouterr().err


def _pipes(header, rows) -> str:
    return "\n".join("| " + " | ".join(row) for row in (header, *rows))
