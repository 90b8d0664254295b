"""What runs on a machine with a GPU runs here in the interpreter, whole, with tiny sizes."""

import json

import pytest
import torch

from benchmarks import gpu
from peftlite import tune
from peftlite.kernels import configs


def test_the_gpu_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PEFTLITE_IMPL", "triton")
    output = tmp_path / "gpu.json"
    assert gpu.main(["--rehearse", "--output", str(output)]) == 0, capsys.readouterr().err
    result = json.loads(output.read_text())
    assert result["machine"]["rehearsal"] is True
    assert result["figures"]["checks"] > 50
    cell = next(cell for name, cell in result["figures"]["layers"].items() if name.startswith("dora"))
    assert set(cell["ms"]) == {"triton", "torch", "reference", "compiled reference", "peft"}
    assert any("_expand_kernel" in name for name in cell["kernels"])
    assert "times of a rehearsal mean nothing" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("main", [gpu.main, tune.main])
def test_without_a_gpu_they_say_so(main, capsys):
    assert main([]) == 2
    assert "--rehearse" in capsys.readouterr().err


def test_tuning_writes_a_table_that_is_used(tmp_path, monkeypatch):
    output = tmp_path / "mine.json"
    assert tune.main(["--rehearse", "--output", str(output)]) == 0
    table = configs.read(output)
    assert set(table) == set(tune.KERNELS)
    assert all(table.values())
    (entry,) = table["expand"]
    monkeypatch.setenv(configs.VARIABLE, str(output))
    when = {**entry["when"], "dtype": torch.float32}
    assert configs.config("expand", **when) == entry["use"]


def test_the_best_tile_is_the_quickest_of_those_that_fit():
    tiles = [{"BLOCK": size} for size in (16, 32, 64, 128)]
    assert tune.best(tiles, lambda tile: {16: 3.0, 32: 1.0, 64: 2.0}.get(tile["BLOCK"])) == ({"BLOCK": 32}, 1.0)
    assert tune.best(tiles, lambda tile: None) is None


def test_neighbours_stay_within_what_compiles():
    tile = {"BLOCK_M": 16, "SPLIT": 1, "num_warps": 8, "num_stages": 1}
    found = list(tune.neighbours(tile))
    assert found[0] == tile
    assert len(found) == len({tuple(other.values()) for other in found})
    assert all(o["BLOCK_M"] >= 16 and o["SPLIT"] >= 1 and o["num_warps"] <= 8 and o["num_stages"] >= 1 for o in found)
