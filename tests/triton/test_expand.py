"""T3 in the interpreter against fp64: what is done in place, its tails, and what must stay untouched."""

import pytest
import torch
from guarded import Guards, assert_rounded, draw_mask

from peftlite.kernels.dropout_triton import keep_mask_reference
from peftlite.kernels.expand_triton import expand_

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 8, 16), (7, 72, 16), (33, 100, 32), (75, 257, 48), (129, 100, 64)]  # rows, columns, padded rank
FORMS = ("plain", "bias", "gain", "gain and bias", "bias inside", "mask")
CASES = [(dtype, form) for form in FORMS[3:] for dtype in DTYPES] + [(DTYPES[-1], form) for form in FORMS[:3]]


def operands(rows, columns, rank, dtype, by_rank, guards, misaligned=False):
    y = guards.empty(rows, columns, dtype=dtype, misaligned=misaligned)
    y.copy_(torch.randn(rows, columns))
    v = guards.copy(torch.randn(rows, rank).to(dtype), misaligned)
    p = guards.copy(torch.randn(*((rank, columns) if by_rank else (columns, rank))).to(dtype), misaligned)
    return y, v, p


def product(v, p, by_rank):
    return v.double() @ (p.double() if by_rank else p.double().T)


@pytest.mark.parametrize(("dtype", "form"), CASES)
@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_against_fp64(rows, columns, rank, dtype, form):
    guards, scale = Guards(), 0.7
    by_rank = form == "mask"
    y, v, p = operands(rows, columns, rank, dtype, by_rank, guards)
    gain, bias = guards.copy(1 + 0.3 * torch.randn(columns)), guards.copy(torch.randn(columns).to(dtype))
    base, low = y.double(), scale * product(v, p, by_rank)
    options = {}
    if form == "mask":
        options["mask"] = draw_mask(torch.tensor([5]), rows, columns, 0.25)
        low = low * keep_mask_reference(5, rows, columns, 0.25)
    if "gain" in form or "inside" in form:
        options["gains"] = [gain]
    if "bias" in form:
        options |= {"biases": [bias], "bias_inside": form == "bias inside"}
    g = gain.double() if "gains" in options else 1.0
    b = bias.double() if "biases" in options else 0.0
    expected = g * (base + low) + ((1 - g) * b if form == "bias inside" else b)
    expand_([y], v, [p], [scale], by_rank=by_rank, **options)
    guards.check()
    assert_rounded(form, y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [16, 112, 384])
def test_ranks(padded, dtype):
    for by_rank in (True, False):
        guards = Guards()
        y, v, p = operands(7, 40, padded, dtype, by_rank, guards)
        expected = y.double() + product(v, p, by_rank)
        expand_([y], v, [p], [1.0], by_rank=by_rank)
        guards.check()
        assert_rounded("y", y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_alignment(dtype):
    guards = Guards()
    wide, v, p = operands(33, 150, 16, dtype, True, guards)
    before, part = wide.clone(), wide[:, 3:103]
    expected = part.double() + product(v, p[:, 3:103], True)
    expand_([part], v, [p[:, 3:103]], [1.0], by_rank=True)
    assert_rounded("y", part, expected)
    untouched = torch.ones(150, dtype=torch.bool)
    untouched[3:103] = False
    assert torch.equal(wide[:, untouched], before[:, untouched])
    y, v, p = operands(33, 100, 16, dtype, True, guards, misaligned=True)
    expected = y.double() + product(v, p, True)
    expand_([y], v, [p], [1.0], by_rank=True)
    guards.check()
    assert_rounded("y", y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gain_of_one_changes_no_bit(dtype):
    y, v = torch.randn(33, 100).to(dtype), torch.randn(33, 16).to(dtype)
    before, bias = y.clone(), torch.randn(100).to(dtype)
    b = torch.zeros(100, 16, dtype=dtype)
    expand_([y], v, [b], [1.0], by_rank=False, gains=[torch.ones(100)], biases=[bias], bias_inside=True)
    assert torch.equal(y, before)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_groups_equal_single_launches(size):
    columns, scales = (100, 8, 72, 257)[:size], [0.5, 1.0, 2.0, 0.25][:size]
    ys = [torch.randn(40, c).bfloat16() for c in columns]
    v = torch.randn(40, 32 * size).bfloat16()
    bs = [torch.randn(c, 32).bfloat16() for c in columns]
    gains, biases = [torch.rand(c) for c in columns], [torch.randn(c).bfloat16() for c in columns]
    expected = [y.clone() for y in ys]
    for i, y in enumerate(expected):
        own = {"gains": [gains[i]], "biases": [biases[i]]}
        expand_([y], v[:, 32 * i : 32 * (i + 1)], [bs[i]], [scales[i]], by_rank=False, **own)
    guards = Guards()
    outputs = [guards.empty(*y.shape, dtype=y.dtype).copy_(y) for y in ys]
    expand_(outputs, v, bs, scales, by_rank=False, gains=gains, biases=biases)
    guards.check()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_no_rows():
    expand_([torch.randn(0, 9)], torch.randn(0, 16), [torch.randn(16, 9)], [1.0], by_rank=True)


def test_what_does_not_fit_is_said():
    y, v, a = torch.randn(5, 9), torch.randn(5, 16), torch.randn(16, 9)
    with pytest.raises(ValueError, match=r"y of shape \(5, 9\) and v of shape \(5, 17\) for 1 y do not fit p of shape"):
        expand_([y], torch.randn(5, 17), [a], [1.0], by_rank=True)
    with pytest.raises(ValueError, match=r"bias_inside .* give gains and biases"):
        expand_([y], v, [a], [1.0], by_rank=True, biases=[torch.randn(9)], bias_inside=True)
    with pytest.raises(ValueError, match=r"expand_: y must have 9 rows with stride\(-1\) = 1"):
        expand_([y.T], v, [a], [1.0], by_rank=True)
