"""What a model goes through: copies, casts, pickles, compilation, checkpointing, dropout, several processes."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from budgets import assert_within_budget
from nets import CLASSES, VARIANTS, assert_same, make_layer, net, options_of, outcome, perturb, variant_id
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftlite import METHODS, adapters, inject_adapters
from peftlite.sharing import SharedTensor

Variant = tuple[str, dict[str, Any]]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)


def injected(variant: Variant, **options: Any) -> nn.Module:
    """A perturbed net whose encoder is adapted, in evaluation mode."""
    method, options = CLASSES[variant[0]], {**variant[1], **options}
    model = inject_adapters(net(), "all-linear", 2, method=method, trainable="head", seed=0, **options)
    perturb(model)
    return model.eval()


def held(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters, a shared one once for each layer."""
    return [p for layer in adapters(model).values() for p in layer.adapter_parameters().values()]


@every_variant
def test_deepcopy_and_pickle(variant: Variant) -> None:
    """Invariant §20: casts, copies, meta device, autocast and compilation."""
    model, x = injected(variant), torch.randn(5, 8)
    expected = outcome(model, x)
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for other in (copy.deepcopy(model), torch.load(pickled, weights_only=False)):
        assert_same(outcome(other, x), expected)
        ids = {id(p) for p in model.parameters()}
        assert not ids & {id(p) for p in other.parameters()}
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
    assert_same(outcome(model, x), expected)


@every_variant
def test_state_dict_round_trip(variant: Variant) -> None:
    model, x = injected(variant), torch.randn(5, 8)
    other = inject_adapters(net(7), "all-linear", 2, method=CLASSES[variant[0]], trainable="head", seed=9, **variant[1]).eval()
    other.load_state_dict(model.state_dict())
    assert_same(outcome(other, x), outcome(model, x))


@every_variant
def test_to_bf16_and_back(variant: Variant) -> None:
    """Invariant §20: casts, copies, meta device, autocast and compilation."""
    model, x = injected(variant), torch.randn(5, 8)
    model.to(torch.bfloat16)
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)
    rounded = copy.deepcopy(model).float()
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    with torch.no_grad():
        assert_within_budget("y", y, rounded(x).bfloat16(), rounded.double()(x.bfloat16().double()), torch.bfloat16)


@every_variant
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(variant: Variant, reentrant: bool) -> None:
    model, x = injected(variant).train(), torch.randn(12, 8)

    def run(x: Tensor) -> Tensor:
        for block in model.encoder:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model.head(x)

    torch.manual_seed(3)
    expected = outcome(copy.deepcopy(model), x)
    torch.manual_seed(3)
    actual = outcome(model, x, run)
    if any(isinstance(m, SharedTensor) for m in model.modules()) and reentrant:
        # The backward passes of the blocks add to a shared gradient one after the other: the same sum in another order.
        torch.manual_seed(3)
        oracle = outcome(copy.deepcopy(model).double(), x.double())
        shared = [name for name, p in model.named_parameters() if sum(p is q for q in held(model)) > 1]
        for name in shared:
            assert_within_budget(name, actual.pop(name), expected.pop(name), oracle[name], torch.float32)
    assert_same(actual, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own, inside
@pytest.mark.parametrize("method", CLASSES)
@pytest.mark.parametrize("autocast", [False, True])
def test_compile_fullgraph(method: str, autocast: bool) -> None:
    """Invariant §20: casts, copies, meta device, autocast and compilation."""
    torch.compiler.reset()
    layers = nn.Sequential(make_layer((method, {}), 8, 13, 3), make_layer((method, {}), 13, 5, 2, bias=False))
    perturb(layers)
    # The default backend compiles C++ for a minute per method; what it makes of our operations the first two show.
    backend = "inductor" if method in ("lora", "dora") else "aot_eager"
    compiled = torch.compile(layers, fullgraph=True, backend=backend)
    x = torch.randn(7, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual, eager = outcome(layers, x, compiled), outcome(layers, x)
    oracle = outcome(copy.deepcopy(layers).double(), x.double())
    for key, expected in oracle.items():
        assert_within_budget(key, actual[key], eager[key], expected, torch.bfloat16 if autocast else torch.float32)


@every_variant
def test_training_mode_without_dropout_is_evaluation_mode(variant: Variant) -> None:
    off = {"dropout": 0.0} if "dropout" in options_of(variant[0]) else {}
    layer, x = make_layer((variant[0], {**variant[1], **off}), 9, 7, 3), torch.randn(5, 9)
    perturb(layer)
    assert_same(outcome(layer.train(), x), outcome(layer.eval(), x))


# Between two tasks SD-LoRA has only the directions of finished ones, and these are zero here.
DROPPING = [v for v in VARIANTS if "dropout" in options_of(v[0]) and v[1].get("phase") != "between"]


@pytest.mark.parametrize("variant", DROPPING, ids=variant_id)
def test_dropout_is_off_in_evaluation_and_unbiased_in_training(variant: Variant) -> None:
    rate, draws = 0.25, 4000
    layer = make_layer((variant[0], {**variant[1], "dropout": rate}), 9, 4, 3, dtype=torch.float64)
    plain = make_layer((variant[0], {**variant[1], "dropout": 0.0}), 9, 4, 3, dtype=torch.float64)
    perturb(layer)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 9, dtype=torch.float64)
    assert torch.equal(layer(x), plain(x))
    torch.manual_seed(0)
    samples = layer.train()(x.expand(draws, 9)).detach()
    assert samples.unique(dim=0).shape[0] > 100
    error, spread = samples.mean(0) - plain(x).detach()[0], samples.std(0) / draws**0.5
    assert (error.abs() < 5 * spread).all()  # a normal deviate beyond 5 sigma: once in two million


def one_of_each() -> nn.Module:
    """Encoders in fp64, one adapted by each method, one after the other."""
    models = [inject_adapters(net().double(), "all-linear", 2, method=method, seed=0).eval() for method in METHODS]
    chained = nn.Sequential(*(model.encoder for model in models))
    perturb(chained)
    return chained


def _train_on_a_share(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model = one_of_each()
    x = torch.linspace(-1, 1, 64, dtype=torch.float64).view(8, 8)
    parallel = nn.parallel.DistributedDataParallel(model)  # must outlive the backward pass
    parallel(x[rank::world]).square().mean().backward()
    torch.save({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    mp.spawn(_train_on_a_share, args=(2, str(tmp_path)), nprocs=2)
    model = one_of_each()
    outputs = model(torch.linspace(-1, 1, 64, dtype=torch.float64).view(8, 8))
    outputs.square().mean().backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {layer.method for layer in adapters(model).values()} == set(METHODS)
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name])
        expected = model.get_parameter(name).grad
        bound = 2 * outputs.numel() * torch.finfo(torch.float64).eps * expected.abs().max()  # a sum in another order
        assert (gradient - expected).abs().max() <= bound, name
