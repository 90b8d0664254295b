"""summary: the table and its totals."""

import torch
from nets import net
from torch import nn

from peftlite import inject_adapters, load_adapters, merge_adapters, save_adapters, summary


def test_table_in_a_terminal() -> None:
    model = inject_adapters(net(), ["query", "up"], 2, method="dora", alpha=4, trainable="head.2", rank_pattern={"0.up": 8})
    lines = str(summary(model)).splitlines()
    assert lines[0].split() == ["layer", "method", "shape", "rank", "scale", "dtype", "trained"]
    assert [line.split() for line in lines[2:8]] == [
        ["encoder.0.query", "dora", "8", "->", "8", "2", "2", "float32", "40"],
        ["encoder.0.up", "dora", "8", "->", "16", "8", "0.5", "float32", "208"],
        ["encoder.1.query", "dora", "8", "->", "8", "2", "2", "float32", "40"],
        ["encoder.1.up", "dora", "8", "->", "16", "2", "2", "float32", "64"],
        ["head.2.weight", "-", "8", "->", "3", "-", "-", "float32", "24"],
        ["head.2.bias", "-", "3", "-", "-", "float32", "3"],
    ]
    total = sum(p.numel() for p in model.parameters())
    assert lines[8] == f"379 of {total:,} parameters train ({379 / total:.3%})"
    assert len({len(line) for line in lines[:2]}) == 1


def test_totals_are_those_of_the_parameters() -> None:
    model = inject_adapters(net(), "all-linear", 2, trainable=["head", "norm"])
    found = summary(model)
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.trained == sum(int(row[-1].replace(",", "")) for row in found.rows)
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.share == found.trained / found.total


def test_shared_layers_and_tied_parameters_count_once() -> None:
    model = nn.Sequential(shared := nn.Linear(4, 4), shared, nn.Linear(4, 4))
    model[2].weight = shared.weight
    inject_adapters(model, "0", 2)
    found = summary(model)
    assert (found.trained, found.total) == (16, 16 + 16 + 4 + 4)
    assert [row[0] for row in found.rows] == ["0"]


def test_html_in_a_notebook_is_escaped() -> None:
    model = nn.Sequential()
    model.add_module("<b>", nn.Linear(4, 4))
    page = summary(inject_adapters(model, "all-linear", 2))._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("<tr>") == page.count("</tr>") == 2
    assert "16 of 36 parameters train" in page


def test_frozen_adapters_mixed_dtypes_and_no_adapters(tmp_path: object) -> None:
    model = inject_adapters(net(), "query", 2, method="dora").bfloat16()
    assert summary(model).rows[0][5] == "bfloat16/float32"
    model.requires_grad_(False)
    assert [row[-1] for row in summary(model).rows] == ["0", "0"]
    assert summary(model).trained == 0
    assert summary(nn.Sequential()).share == 0.0
    assert str(summary(nn.Sequential())).endswith("0 of 0 parameters train (0.000%)")


def test_after_loading_and_after_merging(tmp_path: object) -> None:
    model = inject_adapters(net(), "query", 2, trainable="head")
    save_adapters(model, f"{tmp_path}/f")
    assert summary(load_adapters(net(), f"{tmp_path}/f")) == summary(model)
    merge_adapters(model)
    assert all(row[1] == "-" for row in summary(model).rows)
    assert summary(model).total == sum(p.numel() for p in net().parameters())
    assert isinstance(summary(model).rows, tuple)
    assert torch.is_grad_enabled()
