"""Products with W in C, and what joins them on the way: against fp64, and in layers."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import WIDEST, assert_close, draw, draw_mask, multiplied
from oracles import NAMES, make_case

from peftlite.analysis import meters
from peftlite.kernels import low_rank, native, native_library
from peftlite.kernels.dora_linear import dora_linear, dora_linears
from peftlite.kernels.lora_linear import LoRAArguments, lora_linear, lora_linears
from peftlite.kernels.weight_decomposed import DoRAArguments

pytestmark = [
    pytest.mark.usefixtures("poisoned", "instruction_set", "three_threads"),
    pytest.mark.parametrize("instruction_set", [WIDEST], indirect=True),
]
HALF = torch.bfloat16
ROWS = st.sampled_from([0, 1, 2, 5, 6, 7, 11, 12, 13, 40, 200])
COLUMNS = st.sampled_from([1, 2, 15, 16, 17, 33, 62, 63, 64, 65, 66, 97, 130])
EVEN = st.sampled_from([2, 4, 14, 30, 32, 34, 62, 64, 66, 98, 130])
RANKS = st.sampled_from([1, 2, 3, 8, 13, 32])
DTYPES = st.sampled_from(native_library.DTYPES)


@pytest.fixture(autouse=True)
def in_c(monkeypatch):
    """Where the instructions are there they are used, whether or not ATen has quicker ones."""
    monkeypatch.setattr(native_library, "_multiplies", lambda found: found is not None)


@pytest.fixture
def formed_in_c(monkeypatch):
    """How often each direction was multiplied in C."""
    counts, call = Counter(), native.call

    def count(name, *arguments):
        multiplies = {"adapt_output": lambda: arguments[15], "input_gradients": lambda: arguments[-1] is not None}
        if name in multiplies and multiplies[name]():
            counts[name] += 1
        return call(name, *arguments)

    monkeypatch.setattr(native, "call", count)
    return counts


@settings(deadline=None, max_examples=200)
@given(ROWS, EVEN, COLUMNS, RANKS, DTYPES, st.sampled_from(["lora", "read", "given"]), st.data())
def test_output(rows, inner, out, rank, stored, norm_is, data):
    """Between canaries, whatever was there; h among the columns of other layers."""
    memory = torch.full((rows * out + 64,), math.nan, dtype=HALF)
    y, x, w = memory[32:-32].view(rows, out), draw(rows, inner, dtype=HALF), draw(out, inner, dtype=stored, seed=1)
    a, b, scale = draw(rank, inner, seed=2), draw(out, rank, seed=3), data.draw(st.sampled_from([0.7, -2.0, 1.0]))
    bias = draw(out, dtype=data.draw(DTYPES), seed=4) if data.draw(st.booleans()) else None
    bits, stays = draw_mask(rows, inner) if data.draw(st.booleans()) and rows else (None, 1.0)
    shrinks, h = data.draw(st.booleans()), draw(rows, rank + 5, dtype=HALF, seed=5)
    memory[:32] = memory[-32:] = 7
    given_h = (x, h, 2, bits, a, b, scale, shrinks, True, w, bias)
    g, shift = torch.ones(out).double(), torch.zeros(out).double() if bias is None else bias.double()
    if norm_is == "lora":
        native.adapt_output(y, *given_h)
    else:
        magnitude, norm = draw(out, seed=6), draw(out, seed=7).abs() if norm_is == "given" else torch.full((out,), math.nan)
        n = (w.double() + 0.5 * b.double() @ a.double()).norm(dim=1) if norm_is == "read" else norm.double()
        large = native.adapt_output(y, *given_h, magnitude, norm, 1e-3, 0.5 if norm_is == "read" else None)
        assert large is False  # the bias stands outside of the gain
        assert_close(norm, n, w.double().norm(dim=1) + 0.5 * (b.double().abs() @ a.double().abs()).norm(dim=1))
        g = magnitude.double() / norm.double()
    if shrinks:
        dropped, a = x.double() * stays, multiplied(a, HALF)
        assert_close(h[:, 2 : 2 + rank], dropped @ a.T, dropped.abs() @ a.T.abs(), HALF)
    x, w, h, b = x.double(), w.to(HALF).double(), h[:, 2 : 2 + rank].double(), multiplied(scale * b, HALF)
    terms = g.abs() * (x.abs() @ w.abs().T + h.abs() @ b.abs().T) + shift.abs()
    assert_close(y, g * (x @ w.T + h @ b.T) + shift, terms, HALF, steps=8)
    assert (memory[:32] == 7).all()
    assert (memory[-32:] == 7).all()


@settings(deadline=None, max_examples=200)
@given(ROWS, COLUMNS, st.sampled_from([(1,), (8,), (32,), (2, 5), (3, 1, 8)]), st.booleans(), st.booleans(), st.data())
def test_input_gradients(rows, inner, ranks, masked, with_da, data):
    """Of several layers in one sum, some of them with a gain."""
    memory = torch.full((rows * inner + 64,), math.nan, dtype=HALF)
    memory[:32] = memory[-32:] = 7
    dx, x, u = memory[32:-32].view(rows, inner), draw(rows, inner, dtype=HALF), draw(rows, sum(ranks), dtype=HALF, seed=1)
    lora_as = [draw(rank, inner, seed=2 + k) for k, rank in enumerate(ranks)]
    bits, stays = draw_mask(rows, inner) if masked and rows else (None, 1.0)
    outs = [data.draw(EVEN) for _ in ranks]
    dys = [draw(rows, out, dtype=HALF, seed=5 + k) for k, out in enumerate(outs)]
    weights = [draw(out, inner, dtype=data.draw(DTYPES), seed=8 + k) for k, out in enumerate(outs)]
    magnitudes = [draw(out, seed=11 + k) if data.draw(st.booleans()) else None for k, out in enumerate(outs)]
    norms = [None if m is None else 0.5 + draw(len(m), seed=14 + k).abs() for k, m in enumerate(magnitudes)]
    da = torch.full((sum(ranks), inner), math.nan) if with_da else None
    native.input_gradients(dx, x if with_da else None, bits, u, lora_as, da, dys, weights, magnitudes, norms)
    a = multiplied(torch.cat(lora_as), HALF)
    exact, terms = (u.double() @ a) * stays, u.double().abs() @ a.abs()
    for dy, w, m, n in zip(dys, weights, magnitudes, norms, strict=True):
        factor = (w.float() if m is None else (m / n)[:, None] * w.float()).to(HALF).double()
        exact, terms = exact + dy.double() @ factor, terms + dy.double().abs() @ factor.abs()
    assert_close(dx, exact, terms, HALF, steps=8)
    assert (memory[:32] == 7).all()
    assert (memory[-32:] == 7).all()
    if with_da:
        x = x.double() * stays
        assert_close(da, u.double().T @ x, u.double().abs().T @ x.abs(), steps=12)


def test_neither_threads_nor_other_rows_change_a_bit():
    x, w, a, b, dy = (draw(*shape) for shape in ((260, 258), (300, 258), (3, 258), (300, 3), (260, 300)))
    x, w, dy, h = x.to(HALF), w.to(HALF), dy.to(HALF), draw(260, 3, dtype=HALF)
    mask, magnitude = draw_mask(260, 258)[0], draw(300)

    def both(rows):
        y, dx, norm = x.new_empty(rows, 300), x.new_empty(rows, 258), magnitude.new_empty(300)
        gained = (None, magnitude, norm, 2.0, 0.5)
        native.adapt_output(y, x[:rows], h[:rows].clone(), 0, mask, a, b, 0.5, True, True, w, *gained)
        native.input_gradients(dx, None, mask, h[:rows], [a], None, [dy[:rows]], [w], [None], [None])
        return y, dx, norm

    torch.set_num_threads(1)
    alone = both(260)
    for threads, rows in ((2, 260), (3, 260), (7, 260), (3, 5), (2, 199)):
        torch.set_num_threads(threads)
        for one, other in zip(alone, both(rows), strict=True):
            assert torch.equal(one[: len(other)], other)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize(
    ("dora", "options"),
    [
        (False, {}),
        (False, {"dropout": 0.4}),
        (True, {}),
        (True, {"dropout": 0.4}),
        (True, {"norm_grad": True}),
        (True, {"keep_output": False}),
    ],
    ids=str,
)
def test_layers_lie_within_the_budget(dora, options, rows, stored, formed_in_c):
    make_case(rows, 64, 98, 4, dora=dora, x=HALF, stored=stored, options=options).check()
    assert formed_in_c["adapt_output"]
    assert formed_in_c["input_gradients"]


@pytest.mark.parametrize("dora", [False, True])
def test_a_group_is_one_sum(dora, formed_in_c):
    """The gradient of x is as near to fp64 as one product's: nothing is rounded between the layers, and no D is made."""
    torch.manual_seed(0)
    case = make_case(40, 64, 64, 4, dora=dora, x=HALF, stored=HALF)
    arguments = [case.tensors[name] for name in NAMES[1 : None if dora else -1]]
    kind, run = (DoRAArguments, dora_linears) if dora else (LoRAArguments, lora_linears)
    layers = [kind(*(None if t is None else (1 + k) * t.detach() for t in arguments), 0.5) for k in range(3)]
    x = case.tensors["x"].detach().to(HALF).requires_grad_()
    ys = run(x, [layer._replace(lora_a=layer.lora_a.requires_grad_()) for layer in layers])
    dx = torch.autograd.grad(ys, x, [case.dy.to(HALF)] * 3)[0]
    assert formed_in_c == Counter(adapt_output=3, input_gradients=1)
    wide = x.detach().double().requires_grad_()
    exact = [kind(*(t.double() if isinstance(t, torch.Tensor) else t for t in layer)) for layer in layers]
    oracle = torch.autograd.grad(run(wide, exact, impl="reference"), wide, [case.dy.double()] * 3)[0]
    assert (dx.double() - oracle).norm() <= 4e-3 * oracle.norm()


@pytest.mark.parametrize("dora", [False, True])
def test_at_birth_the_bits_are_those_of_the_base_layer(dora, formed_in_c):
    x, w, bias, a = draw(65, 768, dtype=HALF), draw(256, 768, dtype=HALF), draw(256, dtype=HALF), draw(4, 768)
    magnitude = native.row_norm(w, a, torch.zeros(256, 4), 1.0)

    def output(b):
        return dora_linear(x, w, bias, a, b, magnitude, 0.5) if dora else lora_linear(x, w, bias, a, b, 0.5)

    assert torch.equal(output(torch.zeros(256, 4)), torch.nn.functional.linear(x, w, bias))
    assert not formed_in_c["adapt_output"]
    b = torch.zeros(256, 4)
    b[-1, -1] = 1e-30
    output(b)
    assert formed_in_c["adapt_output"]


@pytest.mark.parametrize("dora", [False, True])
def test_a_transform_of_torch_func_sees_the_same(dora):
    x, w, a, b, magnitude = draw(6, 64, dtype=HALF), draw(34, 64, dtype=HALF), draw(4, 64), draw(34, 4), 1 + draw(34).abs()

    def loss(a):
        y = dora_linear(x, w, None, a, b, magnitude, 0.5) if dora else lora_linear(x, w, None, a, b, 0.5)
        return y.float().square().sum()

    leaf = a.clone().requires_grad_()
    assert torch.equal(torch.func.grad(loss)(a), torch.autograd.grad(loss(leaf), leaf)[0])


def test_weights_that_c_cannot_read_are_made_dense(formed_in_c):
    """Strided, or stored in another dtype: the bits are those of a dense copy."""
    weight, bias, a, b, dy = (draw(*size, dtype=HALF) for size in ((64, 98), (64,), (4, 98), (64, 4), (12, 64)))
    results = []
    for stored, added in ((weight, bias), (weight.T.contiguous().T, bias), (weight.double(), bias.double())):
        x = draw(12, 98, dtype=HALF).requires_grad_()
        y = lora_linear(x, stored, added, a, b, 0.5)
        results.append((y.detach(), *torch.autograd.grad(y, x, dy)))
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            assert torch.equal(one, another)
    assert formed_in_c == Counter(adapt_output=3, input_gradients=3)


def test_flops_are_those_of_two_products(formed_in_c):
    case = make_case(32, 64, 98, 4, x=HALF, stored=HALF, needs=("x", "lora_a", "lora_b"))
    leaves = case.inputs()
    trained = [t for t in leaves.values() if t is not None and t.requires_grad]

    def run():
        return torch.autograd.grad(lora_linear(*(leaves[name] for name in NAMES[:-1]), 0.5), trained, case.dy)

    assert meters.flops(run) == 4 * 32 * 64 * 98 + 6 * 4 * 32 * (64 + 98)
    assert formed_in_c == Counter(adapt_output=1, input_gradients=1)


def test_what_is_multiplied(monkeypatch):
    rows, even, odd = draw(3, 4, dtype=HALF), draw(6, 4), draw(5, 4)
    assert native_library.multiply_pays(rows, [even, even.half(), even.T])
    assert not native_library.multiply_pays(rows, [even, odd])
    assert not native_library.multiply_pays(rows, [odd.T])
    assert not native_library.multiply_pays(rows.float(), [even])
    monkeypatch.setattr(native_library, "library", lambda: None)
    assert not native_library.multiply_pays(rows, [even])


def test_operations_are_registered_soundly():
    x, w, a, b, h, dy = (draw(*shape) for shape in ((3, 6), (4, 6), (2, 6), (4, 2), (3, 2), (3, 4)))
    x, h, dy, vector = x.to(HALF), h.to(HALF), dy.to(HALF), 1 + draw(4).abs()
    adapted = (dy.clone(), x, h, 0, None, a, b, 0.5, True, True, w, vector)
    for operation, arguments in (
        ("adapt_output", adapted),
        ("adapt_output", (*adapted, vector.clone(), vector.clone(), 2.0, 0.5)),
        ("input_gradients", (x.clone(), x, None, h, [a], a.clone(), [dy], [w], [vector], [vector])),
    ):
        with torch.no_grad():
            torch.library.opcheck(
                getattr(torch.ops.peftlite_native, operation).default, arguments, test_utils=("test_schema", "test_faketensor")
            )
    assert low_rank.native_products(x, [LoRAArguments(w, None, a, b, 1.0)]) == low_rank.Native(shrinks=True, multiplies=True)
