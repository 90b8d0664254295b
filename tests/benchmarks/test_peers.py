"""The comparison with other libraries: all candidates build and pass the gate, and the gate sees wrong ones of each."""

import copy

import peft
import pytest
import torch

import peftlite
from benchmarks import candidates, layer, steps
from benchmarks.candidates import CANDIDATES, build, check, default_candidates, missing
from benchmarks.harness import Check
from benchmarks.peers import LIBRARIES, PEERS, versions
from benchmarks.presets import PRESETS

SIZES = ["--width", "32", "--layers", "1", "--batch", "2x8", "--rank", "4"]


@pytest.fixture(autouse=True)
def _small_vocabulary(monkeypatch):
    """Embeddings of 30,522 words would take most of the tests' time."""
    small = steps.BertConfig
    monkeypatch.setattr(steps, "VOCABULARY", 50)
    monkeypatch.setattr(steps, "BertConfig", lambda **sizes: small(vocab_size=50, **sizes))


def cell(*options: str) -> steps.Settings:
    (only,) = steps.cells(vars(steps.parser().parse_args([*SIZES, *options])))
    return only


def gate(name: str, settings: steps.Settings, spoil=lambda model: None) -> list[str]:
    """Names of the red checks of a candidate, after something was done to it."""
    base, plan, precision = steps.base_model(settings), settings.plan(), settings.precision(name)
    model = build(name, copy.deepcopy(base), plan, precision)
    spoil(model)
    checks = check(name, model, base, steps.batch(settings, 2, 8), plan, precision)
    return [each.name for each in checks if not each.error <= each.budget]


@pytest.mark.parametrize(
    ("targets", "amp", "dropout"), [("all-linear", "off", "0"), ("all-linear", "bf16", "0.05"), ("qv", "off", "0.05")]
)
def test_every_candidate_is_built_and_right(targets, amp, dropout):
    settings = cell("--amp", amp, "--dropout", dropout, "--targets", targets)
    assert settings.candidates == default_candidates(amp)
    assert {CANDIDATES[name.partition("@")[0]].library for name in settings.candidates} == {None, "ours", "peft", "loralib"}
    for name in settings.candidates:
        assert gate(name, settings) == []


@pytest.mark.parametrize("name", ["lora", "lora-grouped", "peft-lora", "loralib-lora"])
def test_the_gate_sees_fewer_layers_and_another_setting(name):
    settings = cell("--candidates", name)
    other = cell("--candidates", name, "--dropout", "0.1", "--targets", "qv")
    base = steps.base_model(settings)
    model = build(name, copy.deepcopy(base), other.plan(), other.precision(name))
    checks = check(name, model, base, steps.batch(settings, 2, 8), settings.plan(), settings.precision(name))
    (red,) = [each for each in checks if not each.error <= each.budget]
    assert red.name.startswith(f"{name}: layers, rank, scale and dropout as asked ['encoder.layer.0.attention.output.dense'")
    assert red.error == 4 + 2  # four linears without an adapter, two with another dropout


@pytest.mark.parametrize("name", ["lora-grouped", "peft-lora", "peft-dora", "loralib-lora"])
def test_the_gate_sees_a_wrong_layer_of_each_library(name, monkeypatch):
    settings = cell("--candidates", name)
    library = LIBRARIES[CANDIDATES[name].library]

    def spoil(model):
        kind = type(library.layers(model)["encoder.layer.0.attention.self.key"])
        right = kind.forward
        # At birth B is zero, and so is the error.
        monkeypatch.setattr(kind, "forward", lambda self, x: right(self, x) + library.formula(self).tensors["lora_b"].sum())

    red = gate(name, settings, spoil)
    assert f"{name}: encoder.layer.0.intermediate.dense: output" in red
    assert f"{name}: encoder.layer.0.intermediate.dense: d lora_b" in red
    assert f"{name}: output of the adapted model" in red
    assert f"{name}: output at birth against the base model" not in red


def test_the_gate_sees_outputs_of_a_group_that_are_swapped(monkeypatch):
    cls = peftlite.LoRALinear
    fused = cls.fused_forward.__func__
    monkeypatch.setattr(cls, "fused_forward", classmethod(lambda own, layers, x: fused(own, layers, x)[::-1]))
    red = gate("lora-grouped", cell())
    assert "lora-grouped: encoder.layer.0.attention.self.query: output" in red
    assert "lora-grouped: encoder.layer.0.attention.self.value: d lora_a" in red
    assert gate("lora", cell()) == []  # one layer alone is its own reverse


def test_the_gate_sees_a_wrong_magnitude_of_peft():
    def spoil(model):
        with torch.no_grad():
            for module in LIBRARIES["peft"].layers(model).values():
                module.lora_magnitude_vector["default"].weight.mul_(1.01)

    assert gate("peft-dora", cell(), spoil) == ["peft-dora: output at birth against the base model"]


def test_precisions_hold_what_they_say():
    settings = cell("--amp", "bf16")
    base = steps.base_model(settings)
    assert all(torch.equal(p, p.bfloat16().float()) for p in base.parameters())
    for name, key, dtype in [
        ("peft-lora@bf16-model", "base_layer.weight", torch.bfloat16),
        ("peft-lora@bf16-model", "lora_A.default.weight", torch.float32),
        ("peft-lora@bf16-all", "lora_A.default.weight", torch.bfloat16),
        ("peft-lora", "base_layer.weight", torch.float32),
        ("lora-grouped@bf16-base", "weight", torch.bfloat16),
        ("lora-grouped@bf16-model", "lora_a", torch.float32),
    ]:
        model = build(name, copy.deepcopy(base), settings.plan(), settings.precision(name))
        assert model.get_parameter(f"encoder.layer.0.attention.self.query.{key}").dtype == dtype
        whole = torch.bfloat16 if name.endswith(("model", "all")) else torch.float32
        assert model.embeddings.word_embeddings.weight.dtype == whole
    assert settings.precision("full@fp32").amp is False
    assert settings.precision("lora").amp is True
    assert cell("--base-dtype", "bf16").precision("lora").base == torch.bfloat16
    assert cell("--base-dtype", "bf16").precision("peft-lora").base is None


def test_peers_that_are_not_there_are_named(monkeypatch, capsys):
    assert versions()["peft"] == peft.__version__
    assert missing(CANDIDATES) == []
    absent = LIBRARIES["loralib"]._replace(package="loralib-that-is-not-there")
    monkeypatch.setitem(candidates.LIBRARIES, "loralib", absent)
    assert missing(["lora", "peft-lora"]) == []
    with pytest.raises(SystemExit):
        steps.main(SIZES)
    assert "loralib-that-is-not-there is not installed: pip install 'peftlite[bench]'" in capsys.readouterr().err
    assert PEERS == ["peft", "loralib"]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_cells_of_a_preset_are_distinct_and_complete(preset):
    cells = list(steps.cells(vars(steps.parser().parse_args(["--preset", preset]))))
    assert len({each.key for each in cells}) == len(cells)
    assert {each.candidates for each in cells} == {default_candidates("off"), default_candidates("bf16")}
    if preset == "peers":
        shapes = {(each.rows, each.length, each.width, each.targets) for each in cells}
        linears = "all-linear"
        assert shapes == {(8, 64, 768, linears), (16, 128, 768, linears), (8, 64, 384, linears), (8, 64, 768, "qv")}
        assert len(cells) == 4 * len(shapes)


def test_the_layer_suite_meters_and_resumes(tmp_path, capsys, monkeypatch):
    arguments = ["--width", "48", "--tokens", "40", "--rank", "4", "--output", str(tmp_path / "layer.json")]
    assert layer.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.count("not measured yet") == 4
    assert "ours DoRA / ours LoRA: forward peak MiB" in shown
    monkeypatch.setattr(layer, "measure", lambda *_: pytest.fail("measured a finished cell"))
    assert layer.main(arguments) == 0
    assert capsys.readouterr().out.count("finished before") == 4


def test_the_layer_suite_stops_at_a_red_gate(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(layer, "check", lambda name, *_: [Check(f"{name}: made up", 2.0, 1.0)])
    assert layer.main(["--width", "48", "--tokens", "8", "--rank", "4", "--output", str(tmp_path / "layer.json")]) == 1
    assert "peft-dora: made up: error 2, budget 1" in capsys.readouterr().err
    assert not (tmp_path / "layer.json").exists()
