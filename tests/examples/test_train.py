"""Settings, the network, the optimizer and the training step; the command lines' errors."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peftlite
from examples.minbert_multitask import ensemble, evaluate, predict, report, train
from examples.minbert_multitask.data import collate
from examples.minbert_multitask.network import MultitaskBert, build_network, parameter_counts, prepare_training
from examples.minbert_multitask.optimizer import make_optimizer
from examples.minbert_multitask.run_folder import RunFolder
from examples.minbert_multitask.settings import Settings
from examples.minbert_multitask.trainer import Trainer
from peftlite.analysis.meters import saved_for_backward

ROOT = Path(__file__).parents[2]

ERRORS = {
    "method": ({"method": "lore"}, "method 'lore' is unknown; choose one of full, linear-probe, bitfit, lisa, reflora, lora"),
    "task": ({"tasks": "sst,stss"}, "task 'stss' is unknown; choose from sst, cfimdb, quora, sts"),
    "no task": ({"tasks": ","}, "tasks is empty; choose from sst, cfimdb, quora, sts"),
    "task twice": ({"tasks": "sst,sst"}, "tasks 'sst,sst' names a task twice"),
    "amp": ({"amp": "bf8"}, "amp 'bf8' is unknown; choose one of off, bf16, fp16"),
    "fp16 on a CPU": ({"amp": "fp16", "device": "cpu"}, "amp 'fp16' needs a CUDA device"),
    "optimizer": ({"optimizer": "sgd"}, "optimizer 'sgd' is unknown; choose one of adamw, adamax"),
    "backbones": ({"backbones": 3}, "backbones 3 is unknown; choose one of 1, 2"),
    "rank": ({"rank": 0}, "rank must be at least 1, got 0"),
    "lr": ({"lr": 0.0}, "lr must be above 0, got 0.0"),
    "dropout": ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    "clip": ({"clip": -1.0}, "clip must not be negative, got -1.0"),
    "multiplier": ({"lr_multiplier": "sst=fast"}, "lr-multiplier 'sst=fast' is not of the form task=number"),
    "its task": ({"tasks": "sst", "lr_multiplier": "sts=2"}, "lr-multiplier names task 'sts', which is not trained"),
    "unfreeze": (
        {"method": "linear-probe", "unfreeze": "progressive"},
        "unfreeze 'progressive' contradicts method 'linear-probe', which trains no layer; use 'full'",
    ),
    "lisa": (
        {"method": "lisa", "unfreeze": "progressive"},
        "unfreeze 'progressive' contradicts method 'lisa', which draws the layers that train; use 'full'",
    ),
}


@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_settings_are_errors_that_name_the_choices(tiny, capsys, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes).resolved()
    line = [part for k, v in changes.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    with pytest.raises(SystemExit, match="2"):
        train.main(line)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error: ") or ": error: " in error


def test_cuda_without_cuda(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' was asked for, and torch finds no CUDA device here"):
        tiny(device="cuda").resolved()


def test_command_line_errors_are_one_line(tiny, tables, tiny_bert, tmp_path, capsys):
    base = ["--data", str(tables), "--weights", str(tiny_bert), "--output", str(tmp_path / "run")]
    cases = [
        ([*base, "--targets", "querry"], "'querry' matches no"),
        ([*base, "--data", str(tmp_path)], "ids-sst-train.csv"),
        ([*base, "--resume"], "holds no run"),
        ([*base, "--rank", "two"], "--rank: invalid int value: 'two'"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit, match="2"):
            train.main(arguments)
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error
    assert not (tmp_path / "run").exists()  # what failed leaves nothing behind
    for program in (evaluate, predict, ensemble, report):
        with pytest.raises(SystemExit, match="2"):
            program.main([str(tmp_path / "none")])
        assert "holds no run" in capsys.readouterr().err.splitlines()[-1]


def test_defaults_depend_on_the_method_and_are_recorded():
    assert Settings(method="full").resolved().lr == 1e-4
    assert Settings(method="lora").resolved().lr == 1e-3
    assert Settings(method="linear-probe").resolved().lr == 1e-3
    assert Settings(method="vera").resolved().lr == 1e-2
    assert Settings(method="full", lr=3e-5).resolved().lr == 3e-5


def test_base_dtype_follows_amp_and_only_under_adapters(tiny):
    settings = tiny(amp="bf16", targets="attn").resolved()
    network, _ = build_network(settings)
    prepare_training(network, settings)
    layer = network.backbones["shared"].encoder.layer[0]
    assert layer.attention.self.query.weight.dtype == torch.bfloat16
    assert layer.output.dense.weight.dtype == torch.float32
    assert Settings(amp="bf16", base_dtype="fp32").resolved().base_dtype == "fp32"
    assert Settings().resolved().base_dtype == "fp32"


def test_targets():
    assert Settings(targets="attn").target_names() == ["query", "key", "value"]
    assert Settings(targets="query, value").target_names() == ["query", "value"]


@pytest.mark.parametrize(
    ("method", "targets", "together"),
    [
        ("lora", "all-linear", {"query", "key", "value"}),
        ("dora", "query,value,*.intermediate.dense", {"query", "value"}),
        ("lora", "query", set()),
        ("vera", "attn", set()),  # has no form for layers that run together
    ],
)
def test_layers_that_read_the_same_input_run_together(tiny, method, targets, together):
    settings = tiny(method=method, targets=targets).resolved()
    network, _ = build_network(settings)
    prepare_training(network, settings)
    grouped = {name.rpartition(".")[2] for name, layer in peftlite.adapters(network).items() if layer.group is not None}
    assert grouped == together


def test_dora_keeps_no_output_that_nothing_else_keeps(tiny):
    saved, elements = {}, {}
    for method in ("lora", "dora"):
        settings = tiny(method=method).resolved()
        network, _ = build_network(settings)
        prepare_training(network, settings)
        bert = network.train().backbones["shared"]
        ids = torch.ones(3, 17, dtype=torch.int64)
        saved[method] = saved_for_backward(functools.partial(bert, ids, torch.ones_like(ids)), exclude=[network, ids])
        elements[method] = sum(layer.out_features for layer in peftlite.adapters(network).values())
    norms = saved["dora"].bytes - saved["lora"].bytes
    assert 0 < norms <= 2 * 4 * elements["dora"]  # n, and nothing of the size of an output


@pytest.mark.parametrize("backbones", [1, 2])
@pytest.mark.parametrize(("targets", "per_layer"), [("attn", 3), ("all-linear", 6)])
def test_injection_adapts_the_encoder_only(tiny, backbones, targets, per_layer):
    settings = tiny(targets=targets, backbones=backbones).resolved()
    network, _ = build_network(settings)
    prepare_training(network, settings)
    layers = peftlite.adapters(network)
    assert len(layers) == per_layer * 2 * backbones
    assert all(name.startswith("backbones.") and ".encoder.layer." in name for name in layers)
    trained = [p for p in network.parameters() if p.requires_grad]
    counts = parameter_counts(network, trained)
    adapter_size = sum(p.numel() for a in layers.values() for p in a.adapter_parameters().values())
    assert counts["trained_backbone"] == adapter_size
    plain, _ = build_network(settings)
    assert counts["backbone"] == sum(p.numel() for p in plain.backbones.parameters())
    assert sum(p.numel() for p in trained) == adapter_size + counts["heads"]


@pytest.mark.parametrize("method", ["full", "linear-probe", "bitfit", *peftlite.METHODS])
def test_what_trains(tiny, method):
    trainer = Trainer(tiny(method=method, epochs=1), quiet=True)
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    trainer.run()
    changed = {name for name, p in trainer.network.named_parameters() if not torch.equal(p, before[name])}
    own = {id(p) for a in peftlite.adapters(trainer.network).values() for p in a.adapter_parameters().values()}
    adapters = {name for name, p in trainer.network.named_parameters() if id(p) in own}  # shared ones under one name
    heads = {name for name in before if name.startswith("heads.")}
    if method == "full":
        unused = {name for name in before if "token_type" in name or "position" in name}
        assert set(before) - unused <= changed | {n for n in before if n.endswith("key.bias")}
    elif method == "bitfit":
        biases = {n for n in before if n.endswith(".bias")}
        assert heads | {n for n in biases if "LayerNorm" in n} <= changed <= heads | biases
    else:
        pruned = {n for n, p in trainer.network.named_parameters() if n.endswith("lora_e") and not p.any()}  # as at birth
        assert changed == (adapters | heads) - pruned


def test_boosters_reach_the_rank_in_rounds(tiny):
    trainer = Trainer(tiny(method="xgblora", rank=6), quiet=True)
    trainer.run()
    assert trainer.controller.round == 3
    layers = peftlite.adapters(trainer.network).values()
    assert {(layer.rank, layer.boosters_a.shape[0]) for layer in layers} == {(2, 6)}


def test_progressive_unfreezing_with_adapters_never_moves_the_base_below_them(tiny):
    trainer = Trainer(tiny(unfreeze="progressive", epochs=6, lr=1e-2), quiet=True)
    bases = {n: (a.weight.clone(), a.bias.clone()) for n, a in peftlite.adapters(trainer.network).items()}
    norm = trainer.network.backbones["shared"].encoder.layer[0].output.LayerNorm.weight
    before = norm.detach().clone()
    trainer.run()
    for name, layer in peftlite.adapters(trainer.network).items():
        assert torch.equal(layer.weight, bases[name][0])
        assert torch.equal(layer.bias, bases[name][1])
        assert not layer.weight.requires_grad
    assert not torch.equal(norm, before)


def test_optimizer_groups(tiny):
    settings = tiny(head_lr=0.03, unfreeze="progressive").resolved()
    network, _ = build_network(settings)
    prepare_training(network, settings)
    rates = {id(p): g["peak_lr"] for g in make_optimizer(network, settings).param_groups for p in g["params"]}
    layer = network.backbones["shared"].encoder.layer[0]
    assert rates[id(layer.attention.self.query.lora_a)] == 1e-3
    assert rates[id(layer.output.LayerNorm.weight)] == 5e-5
    assert rates[id(network.heads["sst"].out.weight)] == 0.03
    assert id(layer.attention.self.query.weight) not in rates


def test_learning_rate_multiplier_scales_the_rate_of_its_tasks_steps(tiny):
    trainer = Trainer(tiny(tasks="sst,sts", lr_multiplier="sts=0.25", lr_schedule="constant", warmup=0.0), quiet=True)
    for planned in trainer.plan[:6]:
        trainer._train_step()
        rates = {group["lr"] / group["peak_lr"] for group in trainer.optimizer.param_groups}
        assert rates == {0.25 if planned.task == "sts" else 1.0}


def test_accumulation_gives_the_gradient_of_one_large_batch(tiny, tmp_path):
    still = {"backbone_dropout": 0.0, "head_dropout": 0.0}
    options = {"method": "full", "tasks": "sts", "clip": 0.0, "optimizer": "adamax", **still}
    gradients = []
    for accumulate, batch_size in ((2, 10), (1, 20)):
        settings = tiny(**options, accumulate=accumulate, batch_size=batch_size, output=str(tmp_path / str(batch_size)))
        trainer = Trainer(settings, quiet=True)
        trainer.optimizer.zero_grad = lambda: None
        trainer.network.double()
        trainer._train_step()
        gradients.append([p.grad for p in trainer.trained])
    eps = torch.finfo(torch.float32).eps  # in fp64 the two differ by rounding, far below one rounding of fp32
    scale = max(b.abs().max() for b in gradients[1])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= eps * scale


def test_a_pair_batch_is_one_forward_and_pads_nothing_into_the_mean(tiny):
    trainer = Trainer(tiny(tasks="sts"), quiet=True)
    network, data = trainer.network.eval().double(), trainer.train_data["sts"]
    calls = []
    network.backbones["shared"].register_forward_hook(lambda module, args, out: calls.append(out.shape))
    both = network("sts", collate(data, [0, 1, 2]))
    assert len(calls) == 1
    assert calls[0][0] == 6
    alone = torch.cat([network("sts", collate(data, [i])) for i in range(3)])
    # In fp64 the two differ by rounding, far below one rounding of fp32; a padded token in the mean would show
    assert (both - alone).abs().max() <= torch.finfo(torch.float32).eps * both.abs().max()


def test_heads_depend_on_seed_and_task_alone(tiny):
    bert = build_network(tiny().resolved())[0].backbones["shared"]
    first = MultitaskBert(bert, tiny(tasks="sst,sts").resolved()).heads["sst"].out.weight
    torch.rand(5)
    again = MultitaskBert(bert, tiny(tasks="quora,sst").resolved()).heads["sst"].out.weight
    other = MultitaskBert(bert, tiny(tasks="sst", seed=1).resolved()).heads["sst"].out.weight
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_loss_that_is_not_finite_ends_the_run(tiny):
    trainer = Trainer(tiny(tasks="sst"), quiet=True)
    with torch.no_grad():
        trainer.network.heads["sst"].out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the training loss of task 'sst' is nan after step 2; lower --lr"):
        trainer.run()


def test_patience_stops_early(tiny):
    trainer = Trainer(tiny(epochs=50, patience=2, eval_every=2, lr=1e-12, head_lr=1e-12), quiet=True)
    trainer.run()
    assert trainer.step == 4  # evaluations at steps 0 (best), 2 and 4
    assert trainer.best_step == 0


def test_training_learns(tiny):
    result = train.train(tiny(tasks="sst,quora", method="full", epochs=30, lr=3e-3, eval_every=1000), quiet=True)
    rows = [r for r in RunFolder(tiny().output).read_metrics() if r["kind"] == "train"]
    assert rows[-1]["loss"]["quora"] < 0.5 * rows[0]["loss"]["quora"]
    assert result["steps"] == 180


def test_command_line_end_to_end(tiny, tables, tiny_bert, tmp_path, capsys):
    line = ["--data", str(tables), "--weights", str(tiny_bert), "--output", str(tmp_path / "cli"), "--rank", "2"]
    assert train.main([*line, "--epochs", "1", "--tasks", "sst,cfimdb,sts", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "of the backbone" in printed
    assert f"report: {tmp_path / 'cli' / 'report.html'}" in printed
    assert train.main(["--output", str(tmp_path / "cli"), "--resume"]) == 0
    assert "has finished already" in capsys.readouterr().out
    record = json.loads((tmp_path / "cli" / "settings.json").read_text())
    assert record["settings"]["rank"] == 2
    assert {"torch", "cpu", "cores", "commit"} <= record["environment"].keys()


def test_help_lists_every_setting():
    done = subprocess.run(
        [sys.executable, "-m", "examples.minbert_multitask.train", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    for field in dataclasses.fields(Settings):
        assert f"--{field.name.replace('_', '-')}" in done.stdout


def test_readme_table_is_the_settings():
    text = (ROOT / "examples/minbert_multitask/README.md").read_text()
    for field in dataclasses.fields(Settings):
        default = "" if field.default in (None, "") else "off" if field.default is False else f"`{field.default}`"
        assert f"| `--{field.name.replace('_', '-')}` | {default} | {field.metadata['help']} |\n" in text
