"""The training-step suite: its gate, its command line, and the figures that no clock enters."""

import copy
import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import peftlite
from benchmarks import gate, steps
from benchmarks.candidates import build
from benchmarks.gate import check_adapted_model, check_adapters, check_candidate
from benchmarks.harness import ROOT, RedGateError, require_green
from benchmarks.training_step import TrainingStep, meter
from peftlite.analysis.meters import flops, saved_for_backward

TINY = ["--width", "32", "--layers", "1", "--batch", "2x8", "--rounds", "2", "--warmup", "1", "--threads", "1"]
SETTINGS = {"dtype": torch.float32, "autocast": nullcontext}


def names(checks) -> list[str]:
    return [check.name for check in checks if not check.error <= check.budget]


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12))


def adapted(base: nn.Module, method: str = "dora") -> nn.Module:
    twin = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12))
    twin.load_state_dict(base.state_dict())
    return peftlite.inject_adapters(twin, "all-linear", 4, method=method, alpha=8)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_gate_is_green_for_what_is_right(base, method):
    model = adapted(base, method)
    checks = check_candidate("x", model, base, (torch.randn(3, 12),), **SETTINGS)
    checks += check_adapters("x", peftlite.adapters(model), seed=0, **SETTINGS)
    assert len(checks) == 2 + 2 * (4 if method == "lora" else 5)  # two shapes; the output, d x, and one per tensor
    checks += check_adapted_model("x", model, base, (torch.randn(3, 12),), peftlite.adapters(model), seed=0, **SETTINGS)
    assert checks[-1].name == "x: output of the adapted model"
    require_green(checks)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("tensor", ["lora_a", "lora_b", "magnitude"])
def test_the_gate_sees_a_wrong_gradient_of_each_tensor(base, tensor, monkeypatch):
    right = peftlite.DoRALinear.adapted_forward

    def wrong(layer, x):
        # The value stays, the gradient of one tensor doubles.
        parameter = getattr(layer, tensor)
        y = right(layer, x)
        return y + 1e-3 * (parameter - parameter.detach()).sum()

    monkeypatch.setattr(peftlite.DoRALinear, "adapted_forward", wrong)
    checks = check_adapters("x", peftlite.adapters(adapted(base)), seed=0, **SETTINGS)
    assert names(checks) == [f"x: {layer}: d {tensor}" for layer in ("0", "2")]


def test_the_budget_of_a_gradient_counts_the_parts_of_all_rows(base):
    layers = [copy.deepcopy(layer).double() for layer in peftlite.adapters(adapted(base)).values()][:1] * 2
    for layer in layers:
        nn.init.normal_(layer.lora_b)
    x, upstreams = torch.randn(2, 3, 12).double(), [torch.randn(2, 3, 20).double() for _ in layers]
    terms = gate._terms([gate.own_formula(layer) for layer in layers], x, upstreams)
    assert list(terms) == [f"{index} d {name}" for index in (0, 1) for name in ("lora_a", "lora_b", "magnitude")]
    for name, total in terms.items():
        parameter = layers[0].get_parameter(name.split()[-1])
        rows = [(row, sum(dy)) for row, *dy in zip(x.flatten(0, 1), *(each.flatten(0, 1) for each in upstreams), strict=True)]
        parts = [torch.autograd.grad((layers[0](row) * dy).sum(), parameter)[0] for row, dy in rows]
        torch.testing.assert_close(total, torch.stack(parts).abs().sum(0))
        assert (total > 1.01 * torch.stack(parts).sum(0).abs()).any()


def test_the_gate_sees_a_wrong_forward_that_is_right_at_birth(base, monkeypatch):
    right = peftlite.LoRALinear.adapted_forward
    monkeypatch.setattr(peftlite.LoRALinear, "adapted_forward", lambda layer, x: right(layer, x) + layer.lora_b.sum())
    model = adapted(base, "lora")
    assert not names(check_candidate("x", model, base, (torch.randn(3, 12),), **SETTINGS))
    assert "x: 0: output" in names(check_adapters("x", peftlite.adapters(model), seed=0, **SETTINGS))


def test_the_gate_sees_a_candidate_that_starts_elsewhere(base):
    model = adapted(base)
    with torch.no_grad():
        model[0].magnitude.mul_(1.001)
    assert names(check_candidate("x", model, base, (torch.randn(3, 12),), **SETTINGS)) == [
        "x: output at birth against the base model"
    ]


def test_the_gate_sees_parameters_that_train_in_name_only(base):
    x = (torch.randn(3, 12),)
    twin = adapted(base)
    twin.register_parameter("idle", nn.Parameter(torch.zeros(1)))
    assert names(check_candidate("x", twin, base, x, **SETTINGS)) == ["x: gradients where they belong ['idle']"]
    frozen = adapted(base).requires_grad_(False)
    assert names(check_candidate("x", frozen, base, x, **SETTINGS)) == ["x: gradients where they belong ['none trains']"]


def test_a_step_trains_what_requires_a_gradient_and_reports_its_phases(base):
    model = adapted(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = TrainingStep(model, (torch.randn(3, 12),), autocast=nullcontext, adamw={})
    times = step()
    assert times["step"] == pytest.approx(times["forward"] + times["backward"] + times["optimizer"])
    assert min(times.values()) >= 0
    assert all(parameter.grad is None for parameter in model.parameters())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # B is zero at birth and blocks the gradient of A, which weight decay moves none the less.
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} == trained


def test_the_meter_on_a_model_counted_by_hand():
    model = nn.Linear(5, 6)
    figures = meter(TrainingStep(model, (torch.randn(4, 5),), autocast=nullcontext, adamw={"fused": True}))
    assert figures["gflop"] == 2 * (2 * 4 * 5 * 6) / 1e9  # forward and dW; the input needs no gradient
    assert figures["saved_mib"] * 2**20 == 4 * 4 * 6  # the square keeps the output; the linear its input, which is given
    assert figures["forward_peak_mib"] * 2**20 == 2 * 4 * 4 * 6 + 4  # output, its square, their mean
    assert figures["trained"] == 36
    assert figures["operations"]["forward"] == 3  # addmm, pow, mean


def test_the_suite_runs_from_the_command_line_and_keeps_finished_cells(tmp_path):
    output = tmp_path / "steps.json"
    names = "full-frozen-embeddings,lora,dora"
    command = [sys.executable, "-m", "benchmarks.steps", *TINY, "--candidates", names, "--output", str(output)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert first.returncode == 0, first.stderr
    assert "2x8: not measured yet" in first.stdout
    assert "ours DoRA / ours LoRA: time" in first.stdout
    assert "step/s" in first.stderr  # the progress bar
    ((key, cell),) = json.loads(output.read_text(encoding="utf-8"))["cells"].items()
    assert key.endswith("2x8")
    assert list(cell["figures"]["candidates"]) == names.split(",")
    assert cell["machine"]["commit"]
    for row in cell["figures"]["candidates"].values():
        median, low, high = row["ms"]["step"]
        assert 0 < low <= median <= high
        assert row["gflop"] > 0
        assert row["saved_mib"] > 0
        assert row["relative"]["step"][0] > 0
    assert cell["figures"]["candidates"][steps.BASELINE]["relative"]["step"] == [1.0, 1.0, 1.0]


@pytest.fixture
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_threads")
def test_finished_cells_are_shown_not_measured(tmp_path, capsys, monkeypatch):
    arguments = [*TINY, "--candidates", "lora,dora", "--output", str(tmp_path / "x.json")]
    assert steps.main(arguments) == 0
    shown = capsys.readouterr().out
    monkeypatch.setattr(steps, "measure", lambda *_: pytest.fail("measured a finished cell"))
    assert steps.main(arguments) == 0
    again = capsys.readouterr().out
    assert "finished before" in again
    assert again.splitlines()[2:] == shown.splitlines()[2:]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "measure", interrupted)
    assert steps.main([*arguments, "--batch", "2x8,3x8"]) == 130
    shown = capsys.readouterr()
    assert "[2/2]" in shown.out
    assert "interrupted: what is finished is kept" in shown.err
    assert len(json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["cells"]) == 1


@pytest.mark.usefixtures("_threads")
def test_a_red_gate_prints_no_figure_and_writes_none(tmp_path, capsys, monkeypatch):
    right = peftlite.DoRALinear.adapted_forward
    monkeypatch.setattr(peftlite.DoRALinear, "adapted_forward", lambda layer, x: 1.01 * right(layer, x))
    assert steps.main([*TINY, "--candidates", "lora,dora", "--output", str(tmp_path / "x.json")]) == 1
    shown = capsys.readouterr()
    assert "refusing to print figures" in shown.err
    assert "dora: output at birth against the base model" in shown.err
    assert "lora: " not in shown.err
    assert "GFLOP" not in shown.out
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "8"], "'8' is not a list of batches; write ROWSxLENGTH, as in 8x64,16x128"),
        (["--batch", "8x64,0x2"], "'8x64,0x2' is not a list of batches"),
        (["--candidates", "lora,lorra"], "no candidate lorra; there are full, full-frozen-embeddings, lora, dora, lora-gr"),
        (["--candidates", "lora,lora"], "'lora,lora' names a candidate twice"),
        (["--candidates", "lora@fp8"], "lora@fp8: no precision fp8; there are fp32, amp, bf16-base, bf16-model, bf16-all"),
        (["--candidates", "full@bf16-model"], "full@bf16-model: full fine-tuning trains fp32 weights; take @amp or @fp32"),
        (["--candidates", "peft-lora@bf16-base"], "peft-lora@bf16-base: only our layers hold their base in a dtype of its own"),
        (["--preset", "peers", "--width", "384"], "--preset peers sets --width itself; leave one of the two out"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        steps.main(arguments)
    assert message in capsys.readouterr().err


def settings(*arguments: str) -> steps.Settings:
    (only,) = steps.cells(vars(steps.parser().parse_args(arguments)))
    return only


def test_adapters_keep_to_their_budget_of_flops_and_saved_bytes():
    """At BERT-base width, 8 x 64 tokens: DoRA saves at most 1.6 of LoRA's bytes, and takes 1.03 of its FLOPs."""
    wide = settings("--layers", "1")
    base, batch = steps.base_model(wide), steps.batch(wide, 8, 64)
    saved, flop = {}, {}
    for name in ("full", "lora", "dora"):
        model = build(name, copy.deepcopy(base), wide.plan(), wide.precision(name))
        step = TrainingStep(model, batch, autocast=nullcontext, adamw={})
        saved[name] = saved_for_backward(step.forward, exclude=[model, *batch]).bytes
        flop[name] = flops(lambda step=step: step.forward().backward())
    assert saved["dora"] <= 1.6 * saved["lora"]
    assert flop["dora"] <= 1.03 * flop["lora"]
    # LoRA saves what plain linears save and its M x r products: six linears, 512 rows, rank 8, 4 bytes.
    assert saved["lora"] <= saved["full"] + 6 * 512 * 8 * 4


def test_the_suite_checks_what_it_times(monkeypatch):
    def deaf(layer, x):
        return x @ layer.base_weight().T + 0 * (layer.lora_a.sum() + layer.lora_b.sum())  # right at birth: biases are zero

    monkeypatch.setattr(peftlite.LoRALinear, "adapted_forward", deaf)
    with pytest.raises(RedGateError, match=r"lora: encoder\.layer\.0\.[a-z.]+: output: error"):
        steps.measure(settings(*TINY, "--candidates", "lora"))
