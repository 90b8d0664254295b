"""lora_linear: ``y = x Wᵀ + b + s (x̃ Aᵀ) Bᵀ``, the low-rank path of LoRA (Hu et al. 2021, arXiv:2106.09685).

The backward passes are derived in ``kernels/README.md``.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from peftlite.kernels.dispatch import check_linear_shapes, choose, compute_dtype, draw_keep_mask, without_autocast


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Compute ``y = x Wᵀ + b + s (x̃ Aᵀ) Bᵀ``, where ``x̃`` is `x` after dropout.

    The arithmetic runs in the dtype of `x` (autocast's where it is on); `weight`, `bias` and the factors are cast to it
    inside, so that a frozen weight may be stored in any dtype and no cast copy of it is kept for the backward pass.
    Gradients come back in the dtype of their tensors.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``, frozen.
        bias: ``(out,)`` or None.
        lora_a: ``(r, in)``.
        lora_b: ``(out, r)``.
        scale: the factor ``s``.
        dropout: probability of dropping an element of `x` on the low-rank path only; pass 0 in evaluation.
        impl: ``"reference"``, ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``(..., out)`` in the dtype of the computation.

    Raises:
        ValueError: if shapes do not fit, if `weight` requires a gradient, or for an unknown `impl`.

    Example:
        >>> x, w, a, b = torch.ones(2, 3), torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)
        >>> lora_linear(x, w, None, a, b, 0.5)
        tensor([[2.5000, 2.5000, 2.5000],
                [2.5000, 2.5000, 2.5000]])
    """
    check_linear_shapes("lora_linear", x, weight, lora_a, lora_b, bias)
    implementation = choose("lora_linear", impl, x, weight)
    x = x.to(compute_dtype(x))
    if implementation == "triton":
        from peftlite.kernels.lora_linear_triton import lora_linear_triton

        return lora_linear_triton(x, weight, bias, lora_a, lora_b, scale, dropout)
    mask = draw_keep_mask(x, dropout)
    if implementation == "reference":
        return lora_linear_reference(x, weight, bias, lora_a, lora_b, scale, mask, 1.0 - dropout)
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None:
        mask = mask.reshape(rows.shape)
    # Compiled code sees one registered operation; eager code runs the same passes without the dispatcher's overhead,
    # and profilers, FLOP counters and memory meters see each ATen call.
    run = _forward_op if torch.compiler.is_compiling() else _LoRA.apply
    y, _ = run(rows, weight, bias, lora_a, lora_b, scale, mask, 1.0 - dropout)
    return y.view(*x.shape[:-1], weight.shape[0])


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    mask: Tensor | None = None,
    keep: float = 1.0,
) -> Tensor:
    """`lora_linear` in plain torch, for `x` of any shape and a drawn `mask`: the oracle of the tests."""
    with without_autocast(x.device):
        dropped = x if mask is None else x * mask / keep
        base = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return base + scale * F.linear(F.linear(dropped, lora_a.to(x.dtype)), lora_b.to(x.dtype))


def low_rank_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    mask: Tensor | None,
    keep: float,
) -> tuple[Tensor, Tensor]:
    """``y (M, out)`` and ``h (M, r)`` for x ``(M, in)``; y is the only M x out tensor that is made.

    ``h = (x ⊙ mask) Aᵀ``: the ``1 / keep`` of dropout joins the scale, which spares passes over x.
    """
    with without_autocast(x.device):
        dtype = x.dtype
        h = F.linear(_dropped(x, mask), lora_a.to(dtype))
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        return y.addmm_(h, lora_b.to(dtype).T, alpha=scale / keep), h


def low_rank_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    h: Tensor,
    scale: float,
    mask: Tensor | None,
    keep: float,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of `low_rank_forward` that `needs` asks for, in the order x, lora_a, lora_b; x is read for lora_a."""
    with without_autocast(dy.device):
        need_x, need_a, need_b = needs
        dtype, scale = dy.dtype, scale / keep
        grads = []
        u = dy @ lora_b.to(dtype) if need_x or need_a else dy  # (M, r)
        if need_x:
            dx = dy @ weight.to(dtype)
            if mask is None:
                dx.addmm_(u, lora_a.to(dtype), alpha=scale)
            else:
                dx.addcmul_(u @ lora_a.to(dtype), mask.to(dtype), value=scale)
            grads.append(dx)
        if need_a:
            assert x is not None
            grads.append((u.T @ _dropped(x, mask)).to(lora_a.dtype).mul_(scale))
        if need_b:
            # In most shapes cheaper on CPU than dyᵀ h.
            grads.append((h.T @ dy).T.to(lora_b.dtype).mul_(scale).contiguous())
        return grads


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


# `Function.apply` asks for the signature at every call; computing it costs a small layer a third of its step.
low_rank_forward.__signature__ = inspect.signature(low_rank_forward)  # type: ignore[attr-defined]


class _LoRA(torch.autograd.Function):
    """Saves x and h: nothing of the size M x out or out x in."""

    forward = staticmethod(low_rank_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, lora_a, lora_b, ctx.scale, mask, ctx.keep = inputs
        h = output[1]
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, lora_a, lora_b, h, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _dh: None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, low_rank_backward, dy)


def _gradients(ctx: Any, run: Callable[..., list[Tensor]], dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of `low_rank_forward`'s arguments, by `run`: `low_rank_backward` or the operation made of it."""
    if dy is None:
        return (None,) * 8
    need_x, _, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
    x, weight, lora_a, lora_b, h, mask = ctx.saved_tensors
    needs = [need_x, need_a, need_b]
    grads = iter(run(dy, x, weight, lora_a, lora_b, h, ctx.scale, mask, ctx.keep, needs))
    dx, da, db = (next(grads) if need else None for need in needs)
    dbias = dy.sum(0).to(ctx.bias_dtype) if need_bias else None
    return dx, None, dbias, da, db, None, None, None


_forward_op = torch.library.custom_op("peftlite::lora_linear", low_rank_forward, mutates_args=())
_backward_op = torch.library.custom_op("peftlite::lora_linear_backward", low_rank_backward, mutates_args=())
_forward_op.register_autograd(lambda ctx, dy, _dh: _gradients(ctx, _backward_op, dy), setup_context=_LoRA.setup_context)


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, *rest: Any) -> list[Tensor]:
    *_, needs = rest
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    like = (dx, lora_a, lora_b)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in zip(like, needs, strict=True) if need]
