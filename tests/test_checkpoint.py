"""save_adapters and load_adapters: bit-equal round trips, and an error for everything that does not fit."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import VARIANTS, net, perturb, refused, variant_id
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import peftlite.checkpoint
from peftlite import LoRALinear, adapters, inject_adapters, load_adapters, param_groups, save_adapters
from peftlite.checkpoint import checksum, fingerprint

Edit = Callable[[dict[str, Tensor], dict[str, Any]], None]
JSON = ("adapters", "heads", "base")


def trained_net(method: str = "lora", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A net with perturbed adapters and a head that has seen data."""
    model = net().to(dtype)
    inject_adapters(model, ["query", "up"], 2, method=method, trainable="head", seed=0, **options)
    perturb(model)
    model(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).to(dtype))  # batch norm's statistics move
    return model


def rewrite(path: Path, edit: Edit, *, valid: bool = True) -> None:
    """Change the content of a file, by default with the checksum that fits."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    content = {key: json.loads(value) if key in JSON else value for key, value in metadata.items()}
    edit(tensors, content)
    metadata = {key: json.dumps(value) if key in JSON else value for key, value in content.items()}
    if valid:
        metadata["checksum"] = checksum(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The file of a `trained_net`."""
    save_adapters(trained_net(), tmp_path / "adapters.safetensors")
    return tmp_path / "adapters.safetensors"


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_round_trip_is_bit_equal(variant: tuple[str, dict[str, Any]], dtype: torch.dtype, tmp_path: Path) -> None:
    """Invariant §1: saved and loaded bit for bit."""
    path = tmp_path / "new" / "adapters.safetensors"
    model = trained_net(variant[0], dtype, **variant[1])
    save_adapters(model, path)
    loaded = net().to(dtype)
    assert load_adapters(loaded, path) is loaded
    x = torch.randn(5, 8).to(dtype)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    state = loaded.state_dict()
    for key, value in model.state_dict().items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value), key
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == flags
    assert {n: layer.config() for n, layer in adapters(loaded).items()} == {n: v.config() for n, v in adapters(model).items()}


def test_saves_what_trains_and_nothing_else(saved: Path) -> None:
    """Invariant §20: files hold adapters alone, shared tensors once, and what does not fit is refused."""
    with safe_open(saved, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    own = {f"encoder.{i}.{name}.lora_{factor}" for i in (0, 1) for name in ("query", "up") for factor in "ab"}
    heads = {key for key in net().state_dict() if key.startswith("head.")}
    assert {"head.1.running_mean", "head.1.num_batches_tracked"} <= heads
    assert keys == own | heads
    assert (metadata["format"], metadata["version"]) == ("peftlite", "1")
    assert json.loads(metadata["heads"])["head.1.running_var"] is False


def test_single_trained_parameters_are_saved_too(tmp_path: Path) -> None:
    model = inject_adapters(net(), "query", 2, trainable=["norm", "0.down.bias"])
    perturb(model)
    save_adapters(model, tmp_path / "f")
    loaded = load_adapters(net(), tmp_path / "f")
    assert torch.equal(loaded.encoder[0].down.bias, model.encoder[0].down.bias)
    assert torch.equal(loaded.encoder[1].norm.weight, model.encoder[1].norm.weight)
    assert loaded.encoder[0].down.bias.requires_grad
    assert not loaded.encoder[1].down.bias.requires_grad


@pytest.mark.parametrize("probe", [False, True])
def test_without_adapters(probe: bool, tmp_path: Path) -> None:
    model = net().requires_grad_(not probe)
    model.head.requires_grad_(True)
    model(torch.randn(16, 8))
    perturb(model)
    save_adapters(model, tmp_path / "f")
    loaded, x = load_adapters(net(), tmp_path / "f"), torch.randn(3, 8)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_training_goes_on_after_a_load_as_if_nothing_had_happened(saved: Path) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(12, 8), torch.randn(12, 3)
    models = [trained_net(), load_adapters(net(), saved)]
    for model in models:
        optimizer = torch.optim.AdamW(param_groups(model, 1e-2))
        for _ in range(3):
            F.mse_loss(model(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    for first, second in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(first, second)


class OwnModel(nn.Module):
    """A model whose own code uses the layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = LoRALinear(8, 5, 2, **options)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.inner(x)))


def test_dropin_layers_in_a_model_of_ones_own(tmp_path: Path) -> None:
    model, fresh = OwnModel(), OwnModel()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    perturb(model)
    save_adapters(model, tmp_path / "f")
    with refused(fresh, r"the base weight of 'inner' is not the one that this adapter was trained on"):
        load_adapters(fresh, tmp_path / "f")
    fresh.load_state_dict(base)
    load_adapters(fresh, tmp_path / "f")
    x = torch.randn(3, 8)
    assert torch.equal(fresh(x), model(x))
    assert all(p.requires_grad for p in fresh.inner.adapter_parameters().values())
    with refused(other := OwnModel(alpha=7), r"'inner' is already a LoRALinear with other settings than the file's .*remove"):
        load_adapters(other, tmp_path / "f")


def test_the_same_base_in_bf16_has_the_same_fingerprint(saved: Path) -> None:
    layers = adapters(inject_adapters(net(), "all-linear", 2))
    halves = adapters(inject_adapters(net().bfloat16(), "all-linear", 2))
    assert [fingerprint(layer) for layer in layers.values()] == [fingerprint(layer) for layer in halves.values()]
    assert len({fingerprint(layer)["hash"] for layer in layers.values()}) == len(layers)
    load_adapters(net().bfloat16(), saved)


def test_a_base_held_in_another_dtype_is_rebuilt_so(tmp_path: Path) -> None:
    model = trained_net("dora", base_dtype="bfloat16")
    save_adapters(model, tmp_path / "f")
    loaded, x = load_adapters(net(), tmp_path / "f"), torch.randn(3, 8)
    assert adapters(loaded)["encoder.0.up"].weight.dtype == torch.bfloat16
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    model = net()
    model.alias = nn.Linear(8, 8)
    model.alias.weight = model.encoder[0].query.weight
    with refused(model, r"encoder.0.query.weight is tied to alias.weight: holding it in another dtype would change"):
        load_adapters(model, tmp_path / "f")


def test_another_base(saved: Path) -> None:
    with refused(model := net(1), r"the base weight of 'encoder.0.query' is not the one that .*check_base=False"):
        load_adapters(model, saved)
    load_adapters(model, saved, check_base=False)
    assert torch.equal(model.encoder[0].query.lora_b, trained_net().encoder[0].query.lora_b)


def rename(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Adapt a layer that no model has."""
    content["adapters"]["encoder.9.query"] = content["adapters"].pop("encoder.0.query")


def retype(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Adapt a layer norm."""
    content["adapters"]["encoder.0.norm"] = content["adapters"].pop("encoder.0.query")


EDITS: list[tuple[Edit, str]] = [
    (lambda t, c: c.update(format="other"), r"a safetensors file, but not one from save_adapters"),
    (lambda t, c: c.pop("format"), r"not one from save_adapters \(no 'peftlite' in its metadata\)"),
    (lambda t, c: c.update(version="2"), r"written in version '2' of the format; this peftlite reads version '1'"),
    (lambda t, c: c.pop("heads"), r"corrupted metadata \(KeyError\('heads'\)\)"),
    (lambda t, c: c["adapters"]["encoder.0.query"].update(method="lara"), r"'encoder.0.query' cannot .* unknown method 'lara'"),
    (lambda t, c: c["adapters"]["encoder.0.query"].update(gate=1), r"cannot be rebuilt here: LoRALinear has no option 'gate'"),
    (lambda t, c: c["adapters"]["encoder.0.query"].update(rank=99), r"cannot be rebuilt here: rank must be an integer from 1"),
    (lambda t, c: c["adapters"]["encoder.0.query"].update(rank=1), r"'encoder.0.query.lora_a' has shape \(2, 8\) in the file"),
    (lambda t, c: t.pop("encoder.1.up.lora_b"), r"the tensor 'encoder.1.up.lora_b' is missing from the file"),
    (lambda t, c: t.pop("head.1.running_var"), r"the tensor 'head.1.running_var' is missing from the file"),
    (lambda t, c: t.update(extra=torch.ones(1)), r"the tensor 'extra' is left over: no layer or head of the file claims it"),
    (lambda t, c: t.update({"head.2.bias": torch.ones(4)}), r"'head.2.bias' has shape \(4,\) in the file and \(3,\) in the m"),
    (lambda t, c: c["heads"].update({"tail.weight": True}), r"the file holds 'tail.weight', but Net has no such tensor"),
    (rename, r"the file adapts 'encoder.9.query', but Net has no such module"),
    (retype, r"the file adapts 'encoder.0.norm' as an nn.Linear, but there it is LayerNorm"),
    (lambda t, c: c["base"].pop("encoder.0.query"), r"the base weight of 'encoder.0.query' is not the one"),
]


@pytest.mark.parametrize(("edit", "match"), EDITS)
def test_a_file_that_does_not_fit(edit: Edit, match: str, saved: Path) -> None:
    """Invariant §20: files hold adapters alone, shared tensors once, and what does not fit is refused."""
    rewrite(saved, edit)
    with refused(model := net(), rf"adapters.safetensors: .*{match}|adapters.safetensors: {match}"):
        load_adapters(model, saved)
    with refused(model := trained_net(), r"adapters.safetensors: "):  # also where the layers are in place
        load_adapters(model, saved)


def test_an_adapter_that_the_file_does_not_know(saved: Path) -> None:
    model = inject_adapters(net(), ["query", "up", "down"], 2)
    with refused(model, r"the model carries an adapter at 'encoder.0.down' that the file does not know; .*remove_adapters"):
        load_adapters(model, saved)


def test_no_file(tmp_path: Path) -> None:
    with refused(model := net(), r"nowhere: there is no such file to load adapters from", FileNotFoundError):
        load_adapters(model, tmp_path / "nowhere")
    with refused(model, r"there is no such file", FileNotFoundError):
        load_adapters(model, tmp_path)


def test_nothing_to_save(tmp_path: Path) -> None:
    with refused(model := net().requires_grad_(False), r"nothing to save: Net carries no adapters and no parameter of it"):
        save_adapters(model, tmp_path / "f")
    assert not list(tmp_path.iterdir())


DAMAGED = r"truncated or corrupted|not one from save_adapters|in version .* of the format|corrupted: its content"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "adapters.safetensors"
    save_adapters(trained_net(), path)
    return path


@given(share=st.floats(0, 1, exclude_max=True), extra=st.binary(max_size=9))
def test_truncated_anywhere(whole: Path, share: float, extra: bytes) -> None:
    content = whole.read_bytes()
    damaged = whole.with_name("damaged")
    damaged.write_bytes(content[: int(share * len(content))] + extra[: len(content) - int(share * len(content)) - 1])
    with refused(model := net(), DAMAGED):
        load_adapters(model, damaged)


@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), in_header=st.booleans())
def test_a_flipped_bit_anywhere(whole: Path, share: float, bit: int, in_header: bool) -> None:
    content = bytearray(whole.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little") if in_header else len(content)
    content[int(share * length)] ^= 1 << bit
    damaged = whole.with_name("flipped")
    damaged.write_bytes(content)
    with refused(model := net(), DAMAGED):
        load_adapters(model, damaged)


@pytest.mark.parametrize("step", ["save_file", "os.replace", "os.fsync"])
def test_a_crash_while_writing_leaves_the_old_file(step: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any) -> None:
        if step == "save_file":  # half a file is there by then
            Path(args[1]).write_bytes(b"half")
        raise OSError("disk full")

    before = saved.read_bytes()
    monkeypatch.setattr(peftlite.checkpoint if step == "save_file" else os, step.removeprefix("os."), crash)
    with pytest.raises(OSError, match="disk full"):
        save_adapters(trained_net("dora"), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_others_may_read_the_file_as_any_other(saved: Path) -> None:
    plain = saved.with_name("plain")
    plain.write_bytes(b"")
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    save_adapters(trained_net("dora"), saved)  # over the old one
    assert {layer.method for layer in adapters(load_adapters(net(), saved)).values()} == {"dora"}
