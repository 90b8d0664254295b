"""A task description in, an adapter out: the worked example of LoRA-Gen on a tiny BERT."""

from pathlib import Path
from typing import Any

import pytest
import torch

import peftlite
from examples.minbert_multitask.describe import DESCRIPTIONS, main, prepare, train, write
from examples.minbert_multitask.evaluate import load_data, task_outputs
from examples.minbert_multitask.network import build_network
from examples.minbert_multitask.settings import Settings


@pytest.fixture
def settings(tiny: Any) -> Settings:
    """Three tasks on the tiny BERT."""
    return tiny(tasks=",".join(DESCRIPTIONS), lr=1e-2).resolved()


def test_the_written_adapter_is_what_was_generated(settings: Settings, tmp_path: Path) -> None:
    network, describer, folder = prepare(settings, experts=3)
    data = load_data(settings, "dev", folder, None)["sst"]
    write(network, describer, DESCRIPTIONS["sst"][0], tmp_path / "sst.safetensors")
    expected = task_outputs(network, data, settings)
    write(network, describer, DESCRIPTIONS["sts"][0], tmp_path / "sts.safetensors")
    assert not torch.equal(task_outputs(network, data, settings), expected)  # other words, another adapter
    fresh, _ = build_network(settings)
    peftlite.load_adapters(fresh, tmp_path / "sst.safetensors")
    assert torch.equal(task_outputs(fresh, data, settings), expected)
    assert {layer.method for layer in peftlite.adapters(fresh).values()} == {"lora"}
    assert len(peftlite.adapters(fresh)) == 4  # two layers of two products each


def test_training_moves_what_it_should(settings: Settings) -> None:
    network, describer, folder = prepare(settings, experts=3)
    frozen = {name: p.clone() for name, p in network.named_parameters() if not name.startswith("heads")}
    reader = {name: t.clone() for name, t in describer.bert.state_dict().items()}
    before = {name: p.clone() for name, p in describer.named_parameters() if p.requires_grad}
    losses = train(network, describer, load_data(settings, "train", folder, None), settings, steps=150)
    after = dict(network.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all(torch.equal(t, reader[name]) for name, t in describer.bert.state_dict().items())
    moved = {name for name, p in describer.named_parameters() if p.requires_grad and not torch.equal(p, before[name])}
    assert moved == set(before)
    assert sum(losses[-30:]) < 0.9 * sum(losses[:30])
    assert "meta" in moved


def test_command_line(tiny_bert: Path, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = main([
        "--output", str(tmp_path / "out"), "--data", str(tables), "--weights", str(tiny_bert), "--steps", "6", "--rank", "2",
        "--description", "how good is the film",
    ])  # fmt: skip
    assert set(found) == set(DESCRIPTIONS)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "described.safetensors", "quora.safetensors", "sst.safetensors", "sts.safetensors",
    ]  # fmt: skip
    assert "sts: dev score" in capsys.readouterr().out
