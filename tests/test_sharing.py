"""Shared tensors: one Parameter in several layers, whatever happens to the model; counted once, saved once."""

import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nets import VARIANTS, Block, net, perturb, refused, variant_id
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peftlite import (
    ShareLoRALinear,
    adapters,
    inject_adapters,
    load_adapters,
    merge_adapters,
    param_groups,
    remove_adapters,
    save_adapters,
    summary,
)
from peftlite.sharing import SharedPool, SharedTensor, group_of

Variant = tuple[str, dict[str, Any]]
def injected(variant: Variant, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """A perturbed net with shared adapters, in evaluation mode."""
    options = {"targets": "all-linear", "rank": 2, "seed": 0, **options}
    model = inject_adapters(net() if model is None else model, method=variant[0], **options, **variant[1])
    perturb(model)
    return model.eval()


def ties(model: nn.Module) -> list[list[str]]:
    """The groups of names under which the layers of `model` hold one and the same tensor."""
    names: dict[int, list[str]] = {}
    for name, layer in adapters(model).items():
        for module_name, module in layer.named_modules():
            if isinstance(module, SharedTensor):
                names.setdefault(id(module.tensor), []).append(f"{name}.{module_name}")
    return sorted(group for group in names.values() if len(group) > 1)


SHARING = [v for v in VARIANTS if ties(inject_adapters(net(), "all-linear", 2, method=v[0], **v[1]))]
every_variant = pytest.mark.parametrize("variant", SHARING, ids=variant_id)


def pickled(model: nn.Module) -> nn.Module:
    """`model`, written and read."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assigned(model: nn.Module) -> nn.Module:
    """`model` with every tensor of its state replaced."""
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    return model


def swapped(model: nn.Module) -> nn.Module:
    """`model` cast with torch's other way of converting parameters."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "dtype": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "overwriting": swapped,
    "meta": lambda model: model.to("meta"),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "meta and back": lambda model: model.to("meta").to_empty(device="cpu"),
    "share_memory": lambda model: model.share_memory(),
    "one layer": lambda model: (model.encoder[0].query.double(), model)[1],
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "load_state_dict": lambda model: (model.load_state_dict(injected_like(model).state_dict()), model)[1],
    "assign": assigned,
}


def injected_like(model: nn.Module) -> nn.Module:
    """A model like `model` with other values."""
    other = copy.deepcopy(model)
    perturb(other, 5)
    return other


@every_variant
@pytest.mark.parametrize("change", CHANGES)
def test_shared_tensors_stay_shared(variant: Variant, change: str) -> None:
    """Invariant §4: the tied A is one Parameter after moves, deepcopy and reload.
    Invariant §11: what is shared stays so through moves, saving and loading.
    """
    model = injected(variant)
    expected = ties(model)
    assert expected
    changed = CHANGES[change](model)
    assert ties(changed) == expected
    tensors = [t for layer in adapters(changed).values() for t in layer.adapter_parameters().values()]
    assert {id(t) for t in tensors} == {id(p) for n, p in changed.named_parameters() if p.requires_grad}


@every_variant
def test_shared_parameters_are_counted_once(variant: Variant) -> None:
    """Invariant §11: counts of the three variants."""
    model = injected(variant)
    trained = {id(p): p.numel() for layer in adapters(model).values() for p in layer.adapter_parameters().values()}
    held = sum(p.numel() for layer in adapters(model).values() for p in layer.adapter_parameters().values())
    found = summary(model)
    assert found.trained == sum(trained.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(int(row[-1].replace(",", "")) for row in found.rows) == found.trained
    grouped = [p for group in param_groups(model, 1e-3) for p in group["params"]]
    assert sorted(id(p) for p in grouped) == sorted(trained)
    assert held >= found.trained


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_tensors_are_saved_once_and_shared_after_a_load(variant: Variant, dtype: torch.dtype, tmp_path: Path) -> None:
    """Invariant §4: the tied A is one Parameter after moves, deepcopy and reload.
    Invariant §11: what is shared stays so through moves, saving and loading.
    Invariant §20: files hold adapters alone, shared tensors once, and what does not fit is refused.
    """
    model = injected(variant, net().to(dtype), rank_pattern={"1.up": 3})
    save_adapters(model, tmp_path / "f")
    state = {f"{n}.{key}": t for n, layer in adapters(model).items() for key, t in layer.state_dict(keep_vars=True).items()}
    own = {key: t for key, t in state.items() if not key.endswith((".weight", ".bias"))}
    with safe_open(tmp_path / "f", "pt") as file:
        saved = set(file.keys())
        size = sum(file.get_tensor(key).numel() for key in saved)
    assert saved <= set(own)
    assert {id(own[key]) for key in saved} == {id(t) for t in own.values()}
    assert size == sum(t.numel() for t in {id(t): t for t in own.values()}.values())
    loaded = load_adapters(net().to(dtype), tmp_path / "f").eval()
    assert ties(loaded) == ties(model)
    x = torch.randn(3, 8).to(dtype)
    assert torch.equal(loaded(x), model(x))
    again = load_adapters(injected(variant, net().to(dtype), rank_pattern={"1.up": 3}), tmp_path / "f")
    assert ties(again) == ties(model)
    assert torch.equal(again(x), model(x))


def untied(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every layer has its own copy of what it shared."""
    model = copy.deepcopy(model)
    for name, layer in adapters(model).items():
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, copy.deepcopy(layer))
    assert not ties(model)
    return model


@every_variant
def test_the_gradient_of_a_shared_tensor_is_the_sum_over_its_layers(variant: Variant) -> None:
    """Invariant §4: the tied gradient is the sum of those of an untied copy.
    Invariant §11: the shared gradient is the sum of those of an untied copy.
    """
    linears = [OrderedDict(query=nn.Linear(8, 8), value=nn.Linear(8, 8, bias=False)) for _ in range(2)]
    tied = injected(variant, nn.Sequential(*(nn.Sequential(block) for block in linears)).double())
    with torch.no_grad():  # small integers, so that every sum is exact in any order
        for tensor in tied.state_dict().values():
            tensor.copy_((5 * torch.rand_like(tensor) - 2).trunc())
        for layer in adapters(tied).values():
            layer.scale = 2.0
    apart, x = untied(tied), torch.arange(48.0, dtype=torch.float64).view(6, 8) % 5
    for model in (tied, apart):
        model(x).sum().backward()
    parts: dict[int, list[nn.Parameter]] = {}
    for name, layer in adapters(tied).items():
        for key, parameter in layer.adapter_parameters().items():
            parts.setdefault(id(parameter), [parameter]).append(adapters(apart)[name].adapter_parameters()[key])
    for total, *own in parts.values():
        assert torch.equal(total.grad, sum(p.grad for p in own))
    assert any(total.grad.any() for total, *_ in parts.values())


@every_variant
def test_merge_and_remove(variant: Variant) -> None:
    model, x = injected(variant, net().double()), torch.randn(3, 8, dtype=torch.float64)
    expected = {name: layer.effective_weight().detach() for name, layer in adapters(model).items()}
    merged = copy.deepcopy(model)
    merge_adapters(merged)
    for name, weight in expected.items():
        assert torch.equal(merged.get_submodule(name).weight, weight)
    assert torch.equal(remove_adapters(model)(x), net().double().eval()(x))


@every_variant
def test_training_keeps_the_tie(variant: Variant) -> None:
    model = injected(variant)
    expected, before = ties(model), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(param_groups(model, 0.05), fused=True)
    model.train()(torch.randn(8, 8)).square().sum().backward()
    optimizer.step()
    assert ties(model) == expected
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    names = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert names <= moved or variant[1].get("phase") == "between"  # between two tasks SD-LoRA trains nothing


def test_a_layer_of_another_dtype_or_device_cannot_share() -> None:
    model = nn.Sequential(*(nn.ModuleDict({"q": nn.Linear(4, 4, dtype=dtype)}) for dtype in (torch.float32, torch.float64)))
    with refused(model, r"'1.q' cannot share 'lora_a' with '0.q': it needs 2 x 4 float64 on cpu, .* tensor is 2 x 4 float32"):
        inject_adapters(model, "q", 2, method="sharelora")
    inject_adapters(model, "q", 2, method="sharelora", adapter_dtype="float32")
    pool = SharedPool()
    ShareLoRALinear(4, 4, 2, pool=pool, name="0.q")
    with pytest.raises(ValueError, match=r"it needs 2 x 4 float32 on meta.* Give all of them one adapter_dtype and one device"):
        ShareLoRALinear(4, 4, 2, pool=pool, name="1.q", device="meta")


@pytest.mark.parametrize(
    ("name", "scope", "group"),
    [
        ("encoder.0.query", "type", "encoder.*.query"),
        ("encoder.10.query", "qkv", "encoder.*.qkv"),
        ("h.3.attn.v_proj", "qkv", "h.*.attn.qkv"),
        ("h.3.attn.to_k", "qkv", "h.*.attn.qkv"),
        ("h.3.attn.wq", "qkv", "h.*.attn.qkv"),
        ("h.3.attn.out_proj", "qkv", "h.*.attn.out_proj"),
        ("h.3.mlp.0", "type", "h.*.mlp.*"),
        ("layer3.up", "type", "layer3.up"),
        ("anything.at.all", "shape", "*"),
        ("", "type", ""),
    ],
)
def test_groups(name: str, scope: str, group: str) -> None:
    assert group_of(name, scope) == group


def test_an_unknown_scope_and_one_that_finds_nothing() -> None:
    with refused(model := net(), r"scope must be one of 'type', 'qkv', 'shape', got 'all'"):
        inject_adapters(model, "query", 2, method="sharelora", scope="all")
    with refused(model, r"scope='qkv' finds no query, key or value projection among .* end in: down, up. Use scope='type'"):
        inject_adapters(model, ["up", "down"], 2, method="sharelora", scope="qkv")


def test_a_file_whose_layers_share_otherwise_than_the_model(tmp_path: Path) -> None:
    class Own(nn.Module):
        """A model of one's own, whose layers share if they are given one pool."""

        def __init__(self, pool: SharedPool | None) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.blocks = nn.Sequential(
                    *(ShareLoRALinear(4, 4, 2, pool=pool, name=f"blocks.{i}", share="ab") for i in range(2))
                )

    shared, apart = Own(SharedPool()), Own(None)
    assert (len(ties(shared)), len(ties(apart))) == (2, 0)
    apart.blocks[1].weight, apart.blocks[1].bias = shared.blocks[1].weight, shared.blocks[1].bias
    save_adapters(shared, tmp_path / "shared")
    save_adapters(apart, tmp_path / "apart")
    with refused(apart, r"'blocks.1.factor_a.lora_a' and 'blocks.0.factor_a.lora_a' are one tensor in the file and two in the"):
        load_adapters(apart, tmp_path / "shared")
    with refused(shared, r"are two tensors in the file and one in the model: .* Call remove_adapters first"):
        load_adapters(shared, tmp_path / "apart")
    load_adapters(Own(SharedPool()), tmp_path / "shared", check_base=False)


@pytest.mark.parametrize("variant", [v for v in SHARING if not v[1]], ids=variant_id)
def test_fsdp_of_the_module_that_holds_all_layers(variant: Variant) -> None:
    plain, x = injected(variant, net().double(), exclude="head.*"), torch.randn(3, 8, dtype=torch.float64)
    sharded = copy.deepcopy(plain)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        assert ties(sharded) == ties(plain)
        for model in (plain, sharded):
            model(x).square().sum().backward()
        for (name, parameter), expected in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            if expected.requires_grad:
                assert torch.equal(parameter.grad.full_tensor(), expected.grad), name
    finally:
        dist.destroy_process_group()


def test_shared_modules_are_named_in_print() -> None:
    assert "(factor_a): SharedTensor(lora_a, (2, 8))" in str(inject_adapters(Block(8), "query", 2, method="sharelora"))
