"""dora_linear: ``y = g ⊙ (x Wᵀ + s (x̃ Aᵀ) Bᵀ) + b``, ``g = m / ‖W + s B A‖_row`` (Liu et al. 2024, arXiv:2402.09353).

The backward passes are derived in ``kernels/README.md``.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from peftlite.kernels.dispatch import (
    check_linear_shapes,
    choose,
    compute_dtype,
    draw_keep_mask,
    saved_tensors,
    without_autocast,
)
from peftlite.kernels.lora_linear import lora_linear, lora_linear_reference, low_rank_backward, low_rank_forward
from peftlite.kernels.row_norm import accumulation_dtype, inverse_norm_gradients, row_blocks, row_norm

EPS = 1e-12  # a row of zeros has norm 0: g is m / EPS there, and m is 0 at birth
LARGE_GAIN = 2.0  # above it, the bias inside g y would lose digits of y
SMALL_GAIN = 1 / 16  # below it, g ⊙ inner may have underflowed, and m may be 0
LARGE_BIAS = 4.0  # times the mean of |g ⊙ inner|: above it, y - b has lost the digits that dm needs
SAMPLE = 16  # rows of y that this mean is taken over


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    dropout_mode: str = "lowrank",
    norm_grad: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Compute ``y = g ⊙ (x Wᵀ + s (x̃ Aᵀ) Bᵀ) + b`` with ``g = m / max(‖W + s B A‖_row, 1e-12)``.

    The norm is a constant of the graph, as in §4.3 of the paper, unless `norm_grad` asks for the exact gradient. Norm and
    gain are fp32 at least, whatever the dtype of the computation; the bias stands outside the gain. With ``m = ‖W‖_row``
    as `row_norm` computes it and ``B = 0`` the gain is exactly 1 (with Triton: but for an ulp) and y ``x Wᵀ + b``.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``, frozen.
        bias: ``(out,)`` or None.
        lora_a: ``(r, in)``.
        lora_b: ``(out, r)``.
        magnitude: ``(out,)``, fp32 or fp64.
        scale: the factor ``s``.
        dropout: probability of dropping an element of `x`; pass 0 in evaluation.
        dropout_mode: ``"lowrank"`` drops on the low-rank path only (x̃ above). ``"peft"`` is Hugging Face PEFT's meaning,
            ``y = x Wᵀ + (g - 1) ⊙ (x̃ Wᵀ) + g ⊙ s (x̃ Aᵀ) Bᵀ + b``, at the price of a second product with W.
        norm_grad: differentiate through the norm too.
        impl: ``"reference"``, ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``(..., out)`` in the dtype of the computation.

    Raises:
        ValueError: if shapes do not fit, if `weight` requires a gradient, or for an unknown `impl` or `dropout_mode`.

    Example:
        >>> x, w, a, b = torch.ones(1, 2), torch.diag(torch.tensor([3.0, 4.0])), torch.ones(1, 2), torch.zeros(2, 1)
        >>> dora_linear(x, w, None, a, b, torch.tensor([6.0, 4.0]), 1.0)
        tensor([[6., 4.]])
    """
    check_linear_shapes("dora_linear", x, weight, lora_a, lora_b, bias, magnitude)
    if dropout_mode not in ("lowrank", "peft"):
        raise ValueError(f"dora_linear: dropout_mode must be 'lowrank' or 'peft', got {dropout_mode!r}.")
    implementation = choose("dora_linear", impl, x, weight)
    x = x.to(compute_dtype(x))
    if implementation == "triton" and (dropout_mode == "lowrank" or dropout == 0.0):
        from peftlite.kernels.dora_linear_triton import dora_linear_triton
        return dora_linear_triton(x, weight, bias, lora_a, lora_b, magnitude, scale, dropout, norm_grad)
    mask = draw_keep_mask(x, dropout)
    keep = 1.0 - dropout
    if mask is not None and dropout_mode == "peft":
        dropped = x * mask / keep
        inner = dora_linear(dropped, weight, bias, lora_a, lora_b, magnitude, scale, norm_grad=norm_grad, impl=implementation)
        # W alone, as a low-rank path of rank 0: `F.linear` would keep a cast copy of W for its backward pass.
        a, b = lora_a[:0].detach(), lora_b[:, :0].detach()
        return inner + lora_linear(x - dropped, weight, None, a, b, 0.0, impl=implementation)
    if implementation == "reference":
        return dora_linear_reference(x, weight, bias, lora_a, lora_b, magnitude, scale, mask, keep, norm_grad)
    rows = x.reshape(-1, x.shape[-1])
    mask = None if mask is None else mask.reshape(rows.shape)
    run = _forward_op if torch.compiler.is_compiling() else _DoRA.apply
    y, *_ = run(rows, weight, bias, lora_a, lora_b, magnitude, scale, mask, keep, norm_grad)
    return y.view(*x.shape[:-1], weight.shape[0])


def dora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scale: float,
    mask: Tensor | None = None,
    keep: float = 1.0,
    norm_grad: bool = False,
) -> Tensor:
    """`dora_linear` in plain torch, for `x` of any shape and a drawn `mask`: the oracle of the tests."""
    with without_autocast(x.device):
        inner = lora_linear_reference(x, weight, None, lora_a, lora_b, scale, mask, keep)
        norm = torch.linalg.vector_norm(weight + scale * (lora_b @ lora_a), dim=1).clamp_min(EPS)
        y = magnitude / (norm if norm_grad else norm.detach()) * inner
        return (y if bias is None else y + bias).to(x.dtype)


def dora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scale: float,
    mask: Tensor | None,
    keep: float,
    norm_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y (M, out)``, ``h = x̃ Aᵀ (M, r)`` and the norm ``n (out,)``; y is the only M x out tensor that is made.

    `norm_grad` matters to the backward pass only.
    """
    with without_autocast(x.device):
        y, h = low_rank_forward(x, weight, bias, lora_a, lora_b, scale, mask, keep)
        # After the product, which has brought W into the cache; the other way round both would wait for memory.
        norm = row_norm(weight, lora_a, lora_b, scale).clamp_min_(EPS)
        gain = magnitude.to(norm.dtype) / norm
        # g ⊙ inner + b as g ⊙ (inner + b) + (1 - g) b, one pass over y: where g is 1 nothing changes, so that the layer
        # gives the very bits of the base layer, whose product adds the bias before it rounds.
        rest = None if bias is None else (1 - gain) * bias
        for rows in row_blocks(y, norm.dtype):
            if rest is None:
                torch.mul(y[rows], gain, out=y[rows])
            else:
                torch.addcmul(rest, y[rows], gain, out=y[rows])
        if bias is not None and not y.is_meta:  # without values there is nothing to look for
            large = (gain.abs() > LARGE_GAIN).nonzero().squeeze(1)
            if large.numel():
                inner = _inner_columns(large, x, weight, lora_b, h, scale / keep)
                y[:, large] = torch.addcmul(bias[large].to(gain.dtype), inner, gain[large]).to(y.dtype)
        return y, h, norm


def dora_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    y: Tensor | None,
    h: Tensor,
    norm: Tensor,
    scale: float,
    mask: Tensor | None,
    keep: float,
    norm_grad: bool,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that `needs` asks for, in the order x, lora_a, lora_b, magnitude.

    y is read for the magnitude's gradient and with `norm_grad` only.
    """
    with without_autocast(dy.device):
        need_x, need_a, need_b, need_m = needs
        acc = norm.dtype
        gain = magnitude.to(acc) / norm
        through_norm = norm_grad and (need_a or need_b)
        need_dm = need_m or through_norm
        dm = torch.zeros_like(norm)
        inner_grad = torch.empty_like(dy)  # D = g ⊙ dy, (M, out)
        for rows in row_blocks(dy, acc):
            part = inner_grad[rows]
            if need_dm:
                assert y is not None
                product = part if part.dtype == acc else torch.empty_like(part, dtype=acc)  # g ⊙ inner ⊙ dy
                if bias is None:
                    product.copy_(y[rows])
                else:
                    torch.sub(y[rows], bias.to(acc), out=product)
                dm += product.mul_(dy[rows]).sum(0)
            torch.mul(dy[rows], gain, out=part)
        if need_dm:
            assert x is not None
            assert y is not None
            dm /= magnitude.to(acc)
            lost = _lost_columns(y, bias, gain)
            if lost.numel():
                inner = _inner_columns(lost, x, weight, lora_b, h, scale / keep)
                dm[lost] = (inner.to(acc) * dy[:, lost]).sum(0) / norm[lost]
        grads = low_rank_backward(inner_grad, x, weight, lora_a, lora_b, h, scale, mask, keep, [need_x, need_a, need_b])
        if through_norm:
            da, db = inverse_norm_gradients(weight, lora_a, lora_b, scale, dm * magnitude, norm, EPS)
            if need_a:
                grads[int(need_x)] += da
            if need_b:
                grads[-1] += db
        if need_m:
            grads.append(dm.to(magnitude.dtype))
        return grads


def _inner_columns(columns: Tensor, x: Tensor, weight: Tensor, lora_b: Tensor, h: Tensor, scale: float) -> Tensor:
    """``inner (M, len(columns))`` of some output features, from x and h and not from y."""
    return F.linear(x, weight[columns].to(x.dtype)).addmm_(h, lora_b[columns].to(x.dtype).T, alpha=scale)


def _lost_columns(y: Tensor, bias: Tensor | None, gain: Tensor) -> Tensor:
    """The output features whose product ``g ⊙ inner`` cannot be had from y with enough digits."""
    lost = gain.abs() < SMALL_GAIN
    if bias is not None:
        sample = y[:: max(1, y.shape[0] // SAMPLE)]
        lost |= bias.abs() > LARGE_BIAS * (sample - bias).abs().mean(0)
    return lost.nonzero().squeeze(1)


dora_forward.__signature__ = inspect.signature(dora_forward)  # type: ignore[attr-defined]  # see lora_linear


class _DoRA(torch.autograd.Function):
    """Saves x, h, n and the output y, whose storage its consumer usually saves too: nothing of the size out x in."""

    forward = staticmethod(dora_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, lora_a, lora_b, magnitude, ctx.scale, mask, ctx.keep, ctx.norm_grad = inputs
        y, h, norm = output
        ctx.mark_non_differentiable(h, norm)
        ctx.set_materialize_grads(False)
        need_a, need_b, need_m = ctx.needs_input_grad[3:6]
        need_y = need_m or (ctx.norm_grad and (need_a or need_b))
        ctx.save_for_backward(
            x if need_a or need_y else None, weight, bias, lora_a, lora_b, magnitude, y if need_y else None, h, norm, mask
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _dh: None, _dnorm: None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dora_backward, dy)


def _gradients(ctx: Any, run: Callable[..., list[Tensor]], dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of `dora_forward`'s arguments, by `run`: `dora_backward` or the operation made of it."""
    if dy is None:
        return (None,) * 10
    x, weight, bias, lora_a, lora_b, magnitude, y, h, norm, mask = saved_tensors("dora_linear", ctx)
    need_x, _, need_bias, need_a, need_b, need_m, *_ = ctx.needs_input_grad
    needs = [need_x, need_a, need_b, need_m]
    options = (ctx.scale, mask, ctx.keep, ctx.norm_grad, needs)
    grads = iter(run(dy, x, weight, bias, lora_a, lora_b, magnitude, y, h, norm, *options))
    dx, da, db, dm = (next(grads) if need else None for need in needs)
    dbias = dy.sum(0).to(bias.dtype) if need_bias else None
    return dx, None, dbias, da, db, dm, None, None, None, None


_forward_op = torch.library.custom_op("peftlite::dora_linear", dora_forward, mutates_args=())
_backward_op = torch.library.custom_op("peftlite::dora_linear_backward", dora_backward, mutates_args=())
_forward_op.register_autograd(lambda ctx, dy, *_: _gradients(ctx, _backward_op, dy), setup_context=_DoRA.setup_context)


@_forward_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y, h = x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])
    return y, h, x.new_empty(weight.shape[0], dtype=accumulation_dtype(weight, lora_a, lora_b))


@_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *rest: Any,
) -> list[Tensor]:
    like = (dy.new_empty(dy.shape[0], weight.shape[1]), lora_a, lora_b, magnitude)
    wanted = zip(like, rest[-1], strict=True)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in wanted if need]
