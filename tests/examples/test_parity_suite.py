"""Training curves of ours beside PEFT's on a tiny BERT: they agree, and the suite sees where they do not."""

import argparse
import json

import pytest
import torch

import peftlite
from benchmarks import parity
from benchmarks.harness import RedGateError
from examples.minbert_multitask.evaluate import load_data
from examples.minbert_multitask.network import build_network


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def given(tiny_bert, tables):
    how = parity.example(data=str(tables), weights=str(tiny_bert), threads=1)
    network, folder = build_network(how)
    return network, load_data(how, "train", folder, None)["sst"]


def cells(steps: int) -> dict[tuple[str, str, str], parity.ParitySettings]:
    options = argparse.Namespace(weights="bert", steps=steps, batch_size=4, rank=2, threads=1)
    return {(cell.method, cell.optimizer, cell.amp): cell for cell in parity.cells(options, 20)}


def test_every_method_of_the_peer_trains_with_both_optimizers_in_both_precisions():
    assert set(cells(1)) == {(m, o, a) for m in ("lora", "dora") for o in ("sgd", "adamw") for a in ("off", "bf16")}
    assert [cell.judged for cell in cells(1).values()] == [True] * 4 + [False] * 4


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_first_fifty_steps_agree(given, method, optimizer):
    figures = parity.measure(cells(parity.JUDGED)[method, optimizer, "off"], *given)
    assert figures["worst"] <= parity.LIMIT
    assert len(figures["deviation"]) == parity.JUDGED
    assert len(set(figures["curves"]["ours"])) == parity.JUDGED  # it trains
    assert 0 < figures["update_deviation"] < 0.01


def test_a_network_that_was_compared_is_left_as_it_was(given):
    network, data = given
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    parity.measure(cells(2)["dora", "adamw", "bf16"], network, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_the_suite_runs_from_the_command_line_and_judges_fp32_alone(tiny_bert, tables, tmp_path, capsys, monkeypatch):
    output = tmp_path / "peers.json"
    command = ["--small", "--data", str(tables), "--weights", str(tiny_bert), "--steps", "2", "--rank", "2"]
    assert parity.main([*command, "--output", str(output)]) == 0
    assert "8 of 8 cells agree" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found["suite"] == "peers"
    assert len(found["cells"]) == 8
    assert str(tables) not in output.read_text()
    for cell in found["cells"].values():
        assert cell["machine"]["peft"]
        assert {len(curve) for curve in cell["figures"]["curves"].values()} == {2}
    monkeypatch.setattr(parity, "measure", lambda *_: pytest.fail("measured a finished cell"))
    assert parity.main([*command, "--output", str(output)]) == 0
    monkeypatch.undo()

    right = peftlite.LoRALinear.adapted_forward
    monkeypatch.setattr(peftlite.LoRALinear, "adapted_forward", lambda layer, x: right(layer, x) * 1.001)
    assert parity.main([*command, "--output", str(tmp_path / "wrong.json")]) == 1
    shown = capsys.readouterr().out
    assert shown.count("[!! apart]") == 2  # LoRA in fp32, with either optimizer
    assert "6 of 8 cells agree" in shown


def test_layers_that_differ_cannot_be_compared(given):
    network, _ = given
    cell = cells(1)["lora", "sgd", "off"]
    ours, theirs = (parity.adapted(library, network, cell)[1] for library in ("ours", "peft"))
    first = next(iter(theirs))
    with pytest.raises(RedGateError, match=r"adapted layers differ: \['shared"):
        parity.copy_factors(ours, {name: layer for name, layer in theirs.items() if name != first})
    theirs[first].scaling["default"] = 3.0
    with pytest.raises(RedGateError, match=r"rank 2, scale 2 beside peft's .*, rank 2, scale 3; nothing can be compared"):
        parity.copy_factors(ours, theirs)


def test_a_curve_needs_steps(capsys):
    with pytest.raises(SystemExit):
        parity.main(["--steps", "0"])
    assert "--steps 0: a curve needs one step at least" in capsys.readouterr().err
