"""The passes in C against fp64, by every instruction set that this machine has."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import assert_close, draw, draw_mask, multiplied

from peftlite.kernels import native, native_library

pytestmark = pytest.mark.usefixtures("poisoned", "instruction_set", "three_threads")
SIZES = st.sampled_from([1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 47, 64, 70, 97])
DTYPES = st.sampled_from(native_library.DTYPES)
SCALES = st.sampled_from([0.7, -2.0, 1.0])
RANKS = st.sampled_from([1, 2, 3, 7, 8, 13, 64])


def among_others(rows, rank, dtype, *, seed):
    """A matrix with columns on both sides of those that are meant."""
    return draw(rows, rank + 5, dtype=dtype, seed=seed), slice(2, 2 + rank)


@settings(deadline=None)
@given(SIZES, SIZES, RANKS, DTYPES, SCALES)
def test_row_norm(out, inner, rank, dtype, scale):
    w, a, b = draw(out, inner, dtype=dtype), draw(rank, inner), draw(out, rank, seed=1)
    whole = w.double() + scale * b.double() @ a.double()
    terms = w.double().abs() + abs(scale) * b.double().abs() @ a.double().abs()
    assert_close(native.row_norm(w, a, b, scale), whole.norm(dim=1), terms.norm(dim=1))


@settings(deadline=None, max_examples=200)
@given(SIZES, SIZES, SIZES, RANKS, DTYPES, SCALES, st.sampled_from(["lora", "read", "given"]), st.data())
def test_adapt_output(rows, inner, out, rank, dtype, scale, norm_is, data):
    """In place, between canaries; h among the columns of other layers."""
    memory = draw(rows * out + 32, dtype=dtype)
    y, x = memory[16:-16].view(rows, out), draw(rows, inner, dtype=dtype, seed=1)
    before, kept = memory.clone(), y.double()
    a, b, magnitude = draw(rank, inner, seed=2), draw(out, rank, seed=3), draw(out, seed=4)
    w, bias = draw(out, inner, dtype=data.draw(DTYPES), seed=5), None
    if data.draw(st.booleans()):
        bias = draw(out, dtype=data.draw(DTYPES), seed=6)
    bits, stays = draw_mask(rows, inner) if data.draw(st.booleans()) else (None, 1.0)
    shrinks = data.draw(st.booleans())
    whole, columns = among_others(rows, rank, dtype, seed=7)
    others = whole.clone()
    norm = draw(out, seed=8).abs() if norm_is == "given" else torch.full((out,), math.nan)
    n = (w.double() + 0.5 * b.double() @ a.double()).norm(dim=1) if norm_is == "read" else norm.double()
    given_h = (x, whole, columns.start, bits, a, b, scale, shrinks)
    if norm_is == "lora":
        assert native.adapt_output(y, *given_h) is False
        g, shift = torch.ones(out).double(), torch.zeros(out).double()
    else:
        limit = (magnitude.double() / n).abs().median().item() * 1.0001
        large = native.adapt_output(y, *given_h, False, w, bias, magnitude, norm, limit, 0.5 if norm_is == "read" else None)
        assert large == bool((magnitude / norm).abs().max() > limit)
        assert_close(norm, n, w.double().norm(dim=1) + 0.5 * (b.double().abs() @ a.double().abs()).norm(dim=1))
        g, shift = magnitude.double() / norm.double(), torch.zeros(out).double() if bias is None else bias.double()
    if shrinks:
        x, a = x.double() * stays, multiplied(a, dtype)
        assert_close(whole[:, columns], x @ a.T, x.abs() @ a.T.abs(), dtype)
        whole[:, columns] = others[:, columns] = whole[:, columns].clone()
    assert torch.equal(whole, others)
    h, b = whole[:, columns].double(), multiplied(scale * b, dtype)
    terms = g.abs() * (kept.abs() + h.abs() @ b.abs().T) + (1 + g.abs()) * shift.abs()
    assert_close(y, g * (kept + h @ b.T) + (1 - g) * shift, terms, dtype, steps=8)
    assert torch.equal(memory[:16], before[:16])
    assert torch.equal(memory[-16:], before[-16:])


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([0, 1, 3, 4, 5, 8, 63, 64, 65, 131]),
    SIZES,
    RANKS,
    DTYPES,
    SCALES,
    st.booleans(),
    st.booleans(),
    st.sampled_from(["lora", "read", 1.0, 0.75]),
    st.data(),
)
def test_output_gradients(rows, out, rank, dtype, scale, with_u, with_db, y_is, data):
    dy, b = draw(rows, out, dtype=dtype), draw(out, rank, seed=1)
    (wide_h, of_h), (wide_u, of_u) = (among_others(rows, rank, dtype, seed=seed) for seed in (2, 3))
    others, u = wide_u.clone(), wide_u if with_u else None
    db = torch.full((out, rank), math.nan) if with_db else None
    low_rank = (dy, b, scale, wide_h, of_h.start, u, of_u.start, db)
    magnitude, n = 1 + draw(out, seed=4).abs(), 1 + draw(out, seed=5).abs()
    gain, inner_grad = torch.ones(out), dy
    if y_is == "lora":
        assert native.output_gradients(*low_rank) == 0
    else:
        gain = magnitude / n
        y, residual, keep, limit = draw(rows, out, dtype=dtype, seed=6), None, 1.0, 4.0
        bias = draw(out, dtype=data.draw(DTYPES), seed=7) if data.draw(st.booleans()) else None
        shift = torch.zeros(out).double() if bias is None else bias.double()
        output, sizes = y.double(), shift.abs() * rows
        if y_is != "read":
            keep, limit, residual = y_is, 8.0, draw(rows, out, dtype=dtype, seed=8)
            residual = torch.where(draw(rows, out, seed=9) < -0.5, y, residual)  # dropped there
            dy[residual == y] = 0
            output = keep * (y.double() - residual.double())
            sizes = (output.abs() + y.double().abs()).sum(0)
        scaled = torch.empty_like(dy) if data.draw(st.booleans()) else None
        dm, lost = torch.full((out,), math.nan), torch.empty(out, dtype=torch.bool)
        gained = (y, residual, keep, bias, magnitude, n, limit, scaled, dm, lost)
        found = native.output_gradients(*low_rank, *gained)
        inner, others_of_y = output - shift, 0 if residual is None else residual.double().abs()
        terms = dy.double().abs() * (y.double().abs() + others_of_y + shift.abs())
        assert_close(dm, (dy.double() * inner).sum(0) / magnitude.double(), terms.sum(0) / magnitude.double(), steps=8)
        inner_grad = (gain * dy.float()).to(dtype)
        if scaled is not None:
            assert torch.equal(scaled, inner_grad)
        share = sizes / (inner.abs() if residual is None else inner.abs() * (output != 0)).sum(0)
        near = (share / limit - 1).abs() < 1e-4  # fp32 may say either there
        assert ((lost == (~(share <= limit) & (sizes > 0))) | near).all()
        assert found == lost.sum()
    if with_u:
        factors = multiplied(gain[:, None] * (scale * b), dtype)
        assert_close(wide_u[:, of_u], dy.double() @ factors, dy.double().abs() @ factors.abs(), dtype, steps=8)
        wide_u[:, of_u] = others[:, of_u]
    assert torch.equal(wide_u, others)
    if with_db:  # from a D that is rounded where it is multiplied as bf16
        d = multiplied(gain * dy.float(), dtype)
        h = wide_h[:, of_h].double()
        assert_close(db, scale * d.T @ h, abs(scale) * d.abs().T @ h.abs(), steps=12)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([0, 1, 3, 4, 5, 8, 63, 64, 65, 131]),
    SIZES,
    st.sampled_from([(1,), (3,), (8,), (64,), (2, 5), (3, 1, 8)]),
    DTYPES,
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_input_gradients(rows, inner, ranks, dtype, dropped, with_dx, with_da):
    memory = draw(rows * inner + 32, dtype=dtype)
    dx, x = memory[16:-16].view(rows, inner), draw(rows, inner, dtype=dtype, seed=1)
    u = draw(rows, sum(ranks), dtype=dtype, seed=2)
    before, kept = memory.clone(), dx.double()
    lora_as = [draw(rank, inner, seed=3 + k) for k, rank in enumerate(ranks)]
    bits, stays = draw_mask(rows, inner) if dropped and rows else (None, 1.0)
    da = torch.full((sum(ranks), inner), math.nan) if with_da else None
    native.input_gradients(dx if with_dx else None, x if with_da else None, bits, u, lora_as, da, [], [], [], [])
    if with_dx:
        a = multiplied(torch.cat(lora_as), dtype)
        terms = kept.abs() + u.double().abs() @ a.abs()
        assert_close(dx, kept + (u.double() @ a) * stays, terms, dtype, steps=8)
        memory[16:-16] = before[16:-16]
    assert torch.equal(memory, before)
    if with_da:
        x = x.double() * stays
        assert_close(da, u.double().T @ x, u.double().abs().T @ x.abs(), steps=12)
