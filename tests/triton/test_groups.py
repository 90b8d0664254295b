"""Layers that read the same x, run together in the Triton path: values, gradients, launches, and what cannot run together."""

import pytest
import torch
from oracles import assert_within_budget, dora, lora
from torch import nn

import peftlite
from peftlite.kernels.dora_linear import dora_linears
from peftlite.kernels.dropout_triton import keep_mask_reference
from peftlite.kernels.group_triton import alike, stacked
from peftlite.kernels.launch_triton import observing
from peftlite.kernels.lora_linear import lora_linears
from peftlite.kernels.low_rank import LoRAArguments
from peftlite.kernels.prepared_triton import Layer, Prepared, offer, prepare
from peftlite.kernels.weight_decomposed import DoRAArguments
from peftlite.training import StepCache

pytestmark = pytest.mark.usefixtures("poisoned")
HALF, FULL, FP16 = torch.bfloat16, torch.float32, torch.float16
DROPOUT = 0.25  # a multiple of 2⁻¹⁶, so that the oracle divides by the same probability
SCALE = 0.7
PREPARING = ("pack", "row_norm")


def make_layers(is_dora, outs, *, inner=24, ranks=3, scales=SCALE, dtype=FULL, biases=True, trained=("a", "b", "m", "bias")):
    """Arguments of layers with `outs` features; the other options are one for all, or a list."""

    def each(option):
        return option if isinstance(option, list) else [option] * len(outs)

    layers = []
    for out, rank, scale, bias in zip(outs, each(ranks), each(scales), each(biases), strict=True):
        weight, a = torch.randn(out, inner) / inner**0.5, torch.randn(rank, inner) / inner**0.5
        b = torch.randn(out, rank) / (2 * rank**0.5)
        offset = torch.randn(out).to(dtype).requires_grad_("bias" in trained) if bias else None
        own = [weight.to(dtype), offset, a.requires_grad_("a" in trained), b.requires_grad_("b" in trained)]
        magnitude = (1 + 0.3 * torch.randn(out)).requires_grad_("m" in trained)
        layers.append(DoRAArguments(*own, magnitude, scale) if is_dora else LoRAArguments(*own, scale))
    return layers


def leaves(x, layers):
    return [t for t in (x, *(t for layer in layers for t in layer)) if isinstance(t, torch.Tensor) and t.requires_grad]


def outputs(x, layers, **options):
    run = dora_linears if isinstance(layers[0], DoRAArguments) else lora_linears
    return run(x, layers, impl="triton", **options)


def by_definition(x, layers, dtype, mask=None, norm_grad=False):
    options = {"mask": mask, "keep": 1.0 if mask is None else 1 - DROPOUT, "dtype": dtype, "dense": dtype == torch.float64}
    if isinstance(layers[0], DoRAArguments):
        return [dora(x, *layer, mode="lowrank", norm_grad=norm_grad, **options) for layer in layers]
    return [lora(x, *layer, **options) for layer in layers]


def check(x, layers, used=None, *, dropout=0.0, norm_grad=False):
    """Outputs and every gradient of the layers together, against fp64; the loss sees the outputs `used`."""
    used = range(len(layers)) if used is None else used
    upstream = [torch.randn(len(x), len(layer.weight)).to(x.dtype) for layer in layers]
    mask = None
    if dropout:
        torch.manual_seed(5)
        mask = keep_mask_reference(torch.randint(2**62, (1,)).item(), *x.shape, dropout)

    def graded(run, x, layers):
        ys = run(x, layers)
        loss = sum((ys[k] * upstream[k].to(ys[k].dtype)).sum(dtype=torch.promote_types(FULL, ys[k].dtype)) for k in used)
        return [*ys, *torch.autograd.grad(loss, leaves(x, layers), allow_unused=True)]

    def copied(tensor, dtype):
        return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) if isinstance(tensor, torch.Tensor) else tensor

    torch.manual_seed(5)
    options = {"dropout": dropout} | ({"norm_grad": norm_grad} if isinstance(layers[0], DoRAArguments) else {})
    actual = graded(lambda x, layers: outputs(x, layers, **options), x, layers)
    eager = graded(lambda x, layers: by_definition(x, layers, x.dtype, mask, norm_grad), x, layers)
    wide = [type(layer)(*(copied(t, torch.float64) for t in layer)) for layer in layers]
    exact = [copied(x, torch.float64), wide]
    oracle = graded(lambda x, layers: by_definition(x, layers, torch.float64, mask, norm_grad), *exact)
    # The gradient of a bias is a sum whose rounding grows with its terms, though they cancel.
    terms = {id(layer.bias): dy.abs().sum(0) for layer, dy in zip(layers, upstream, strict=True)}
    sizes = [None] * len(layers) + [terms.get(id(leaf)) for leaf in leaves(x, layers)]
    for place, (value, plain, best, size) in enumerate(zip(actual, eager, oracle, sizes, strict=True)):
        assert (value is None) == (best is None), place
        if value is not None:
            eps = max(torch.finfo(dtype).eps for dtype in (x.dtype, value.dtype))
            assert_within_budget(value.detach(), plain.detach(), best.detach(), eps, str(place), size)


def kernels_of(run, *, preparing=False):
    """The kernels that `run` starts, by name, and what it returns."""
    names = []
    with observing(lambda event: names.append(event.name)):
        result = run()
    return [name for name in names if preparing or not any(part in name for part in PREPARING)], result


@pytest.mark.parametrize("is_dora", [False, True])
@pytest.mark.parametrize(
    ("rows", "outs", "rank", "dtype"),
    [
        *((13, [40, 40, 40], 3, dtype) for dtype in (FULL, FP16, HALF)),
        (33, [72, 9], 17, HALF),
        (5, [16, 24, 8, 40], 40, FULL),
    ],
)
def test_against_fp64(is_dora, dtype, rows, outs, rank):
    torch.manual_seed(0)
    x = torch.randn(rows, 24).to(dtype).requires_grad_()
    check(x, make_layers(is_dora, outs, ranks=rank, dtype=dtype))


@pytest.mark.parametrize("is_dora", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"ranks": [3, 17, 12]},
        {"ranks": 100},
        {"scales": [0.7, 0.5, 0.7]},
        {"biases": [True, False, True]},
        {"biases": False},
        {"trained": ("a",)},
        {"trained": ("b", "m")},
        {"trained": ("bias",)},
        {"outs": [8, 40, 24, 16, 8]},
    ],
    ids=str,
)
def test_what_differs_is_split(is_dora, options):
    torch.manual_seed(1)
    x = torch.randn(13, 24, requires_grad=True)
    check(x, make_layers(is_dora, **({"outs": [40, 8, 24]} | options)))


@pytest.mark.parametrize("is_dora", [False, True])
@pytest.mark.parametrize("used", [[0], [1], [0, 2]], ids=str)
def test_outputs_without_a_gradient(is_dora, used):
    torch.manual_seed(2)
    check(torch.randn(13, 24, requires_grad=True), make_layers(is_dora, [40, 8, 24], ranks=5), used)


@pytest.mark.parametrize("is_dora", [False, True])
@pytest.mark.parametrize("ranks", [5, [5, 17, 5]], ids=str)
def test_one_mask_serves_all(is_dora, ranks):
    """Layers of two padded ranks run apart, and still share the mask."""
    torch.manual_seed(3)
    x = torch.randn(33, 24, requires_grad=True)
    check(x, make_layers(is_dora, [40, 8, 24], ranks=ranks), dropout=DROPOUT)


def test_an_exact_norm_and_an_x_without_gradient():
    torch.manual_seed(4)
    check(torch.randn(13, 24, requires_grad=True), make_layers(True, [40, 8, 24]), norm_grad=True)
    for is_dora in (False, True):
        check(torch.randn(13, 24), make_layers(is_dora, [40, 8, 24]))


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("is_dora", [False, True])
def test_an_empty_batch(is_dora, dropout):
    x, layers = torch.randn(0, 24, requires_grad=True), make_layers(is_dora, [40, 8, 24])
    ys = outputs(x, layers, dropout=dropout)
    assert [y.shape for y in ys] == [(0, 40), (0, 8), (0, 24)]
    for tensor, grad in zip(leaves(x, layers), torch.autograd.grad(sum(y.sum() for y in ys), leaves(x, layers)), strict=True):
        assert grad.shape == tensor.shape
        assert not grad.count_nonzero()


def test_together_equals_one_by_one_bit_for_bit():
    """All but the gradient of x, a sum over the layers: the kernels add up in one order, alone or in a group."""
    torch.manual_seed(6)
    x, layers = torch.randn(33, 24).to(HALF).requires_grad_(), make_layers(True, [40, 8, 24], dtype=HALF)
    together, alone = outputs(x, layers), [outputs(x, [layer])[0] for layer in layers]
    upstream = [torch.randn_like(y) for y in alone]
    for one, other in zip(*(torch.autograd.grad(ys, leaves(x, layers), upstream)[1:] for ys in (together, alone)), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_large_gains_and_lost_columns_in_a_group():
    torch.manual_seed(7)
    layers = make_layers(True, [40, 8], dtype=HALF)
    with torch.no_grad():
        layers[0].magnitude[:7] = 0
        layers[1].magnitude[1] = 1e-6
        layers[1].bias[4:] = 1000
    check(torch.randn(33, 24).to(HALF).requires_grad_(), layers)


@pytest.mark.parametrize(
    ("is_dora", "forward", "backward"),
    [
        (False, ["row_shrink", "expand"], ["row_shrink", *["col_shrink", "finish_factors"] * 2]),
        (
            True,
            ["row_shrink", "expand"],
            ["col_shrink", "finish_columns", "row_shrink", "expand", "col_shrink", "finish_factors"],
        ),
    ],
)
def test_three_modules_take_five_launches_forward_and_nine_backward(is_dora, forward, backward):
    """Kernels beside the three base products of each pass, and LoRA's product of u with all A."""
    x, layers = torch.randn(13, 24, requires_grad=True), make_layers(is_dora, [40, 8, 24], trained=("a", "b", "m"))
    names, ys = kernels_of(lambda: outputs(x, layers))
    assert names == [f"_{name}_kernel" for name in forward]
    names, _ = kernels_of(lambda: torch.autograd.backward(ys, [torch.ones_like(y) for y in ys]))
    names = [name.strip("_").removesuffix("_kernel") for name in names]
    assert sorted(names) == sorted(backward)
    products = {False: 3 + 1, True: 3}[is_dora]
    assert len(forward) + 3 == 5
    assert len(names) + products == 9


def test_who_runs_together():
    layers = make_layers(True, [8] * 7, ranks=[3, 17, 5, 16, 3, 3, 3], biases=[True] * 5 + [False, True])
    assert alike(layers) == [[0, 2, 3, 4], [6], [1], [5]]
    layers[4].lora_a.requires_grad_(False)
    assert alike(layers) == [[0, 2, 3, 6], [1], [4], [5]]


def test_what_lies_side_by_side_is_not_copied():
    both = torch.randn(3, 16, 8)
    assert stacked(list(both)).data_ptr() == both.data_ptr()
    assert torch.equal(stacked(list(both[1:])), both[1:].flatten(0, 1))
    apart = stacked([both[2], both[0]])
    assert torch.equal(apart, torch.cat([both[2], both[0]]))
    assert apart.untyped_storage().data_ptr() != both.untyped_storage().data_ptr()


@pytest.mark.parametrize("is_dora", [False, True])
def test_prepared_factors_of_a_group_lie_side_by_side(is_dora):
    layers = make_layers(is_dora, [40, 8, 24])
    norms = [(layer.weight, layer.magnitude) if is_dora else () for layer in layers]
    held = Prepared(
        [Layer(layer.lora_a, layer.lora_b, layer.scale, *norm) for layer, norm in zip(layers, norms, strict=True)], HALF
    )
    held.refresh()
    own = prepare(layers, HALF)
    offer(held)
    names, (a, bs, gains) = kernels_of(lambda: prepare(layers, HALF), preparing=True)
    assert not names
    assert a.data_ptr() == held.modules[0].packed_a.data_ptr()
    for one, other in zip((a, *bs, *gains), (own[0], *own[1], *own[2]), strict=True):
        assert torch.equal(one, other)


class Attention(nn.Module):
    """Three layers of one input, in another order than the one in which they run."""

    def __init__(self):
        super().__init__()
        self.value, self.other, self.query, self.key = (nn.Linear(24, out) for out in (8, 24, 40, 40))

    def forward(self, x):
        x = self.other(x)
        return torch.cat([self.query(x), self.key(x), self.value(x)], dim=-1)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_step_cache_serves_groups(method, monkeypatch):
    concatenate, copies = torch.cat, []
    monkeypatch.setenv("PEFTLITE_IMPL", "triton")
    monkeypatch.setattr(torch, "cat", lambda parts, dim=0: copies.append(dim) or concatenate(parts, dim))
    torch.manual_seed(8)
    model, names = Attention(), ("query", "key", "value")
    peftlite.inject_adapters(model, [*names, "other"], rank=3, method=method, fuse=[names])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    x = torch.randn(5, 24)
    with StepCache(model, optimizer, dtype=FULL) as cache:
        for _ in range(2):
            copies.clear()
            started, y = kernels_of(lambda: model(x), preparing=True)
            assert not any(part in name for name in started for part in PREPARING)
            assert len(started) == {"lora": 1 + 2, "dora": 2 + 2}[method]
            assert copies == [-1], "the outputs alone: A of the group lies side by side"
            cache.invalidate()
            assert torch.equal(model(x), y)
            cache.refresh()
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
