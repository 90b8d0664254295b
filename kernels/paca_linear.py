"""paca_linear: ``y = x Wᵀ + b + s x[:, idx] Dᵀ``, a few columns of W trained (Woo et al. 2025, arXiv:2503.01905).

The backward passes are derived in ``kernels/README.md``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from peftlite.kernels.dispatch import choose, compute_dtype, positional, without_autocast


def paca_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    index: Tensor,
    scale: float,
    *,
    impl: str = "auto",
) -> Tensor:
    """Compute ``y = x Wᵀ + b + s x[..., idx] Dᵀ``: the linear layer whose columns ``W[:, idx]`` moved by ``s D``.

    The arithmetic runs in the dtype of `x` (autocast's where it is on), gradients come back in the dtype of their
    tensors. Kept for the backward pass is ``x[..., idx]`` alone.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``, frozen.
        bias: ``(out,)`` or None.
        columns: D, ``(out, r)``.
        index: which columns of W move, ``(r,)``, int64, all different.
        scale: the factor ``s``.
        impl: ``"reference"``, ``"torch"`` or ``"auto"``.

    Returns:
        ``(..., out)`` in the dtype of the computation.

    Raises:
        ValueError: if shapes do not fit, or for an unknown `impl`.

    Example:
        >>> x, w = torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 3)
        >>> paca_linear(x, w, None, torch.ones(1, 2), torch.tensor([0, 2]), 1.0)
        tensor([[4.]])
    """
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features or columns.shape != (out_features, *index.shape):
        raise ValueError(
            f"paca_linear: for weight {tuple(weight.shape)} x must be (..., {in_features}), index (r,) and columns "
            f"({out_features}, r); got {tuple(x.shape)}, {tuple(index.shape)} and {tuple(columns.shape)}."
        )
    implementation = choose("paca_linear", impl, x, weight, has_triton=False)
    x = x.to(compute_dtype(x))
    if implementation == "reference":
        return paca_linear_reference(x, weight, bias, columns, index, scale)
    run = _forward_op if torch.compiler.is_compiling() else _PaCA.apply  # as in lora_linear
    y, _ = run(x.reshape(-1, in_features), weight, bias, columns, index, scale)
    return y.view(*x.shape[:-1], out_features)


def paca_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, index: Tensor, scale: float
) -> Tensor:
    """`paca_linear` in plain torch: the oracle of the tests."""
    with without_autocast(x.device):
        base = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return base + scale * F.linear(x[..., index], columns.to(x.dtype))


@positional
def column_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, index: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """``y (M, out)`` and ``x[:, idx] (M, r)`` for x ``(M, in)``."""
    with without_autocast(x.device):
        dtype = x.dtype
        picked = x.index_select(1, index)
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        return y.addmm_(picked, columns.to(dtype).T, alpha=scale), picked


def column_backward(
    dy: Tensor, weight: Tensor, columns: Tensor, picked: Tensor, index: Tensor, scale: float, needs: list[bool]
) -> list[Tensor]:
    """The gradients of `column_forward` that `needs` asks for, in the order x, columns."""
    with without_autocast(dy.device):
        grads = []
        if needs[0]:
            dx = dy @ weight.to(dy.dtype)
            grads.append(dx.index_add_(1, index, dy @ columns.to(dy.dtype), alpha=scale))
        if needs[1]:
            grads.append((picked.T @ dy).T.to(columns.dtype).mul_(scale).contiguous())
        return grads


class _PaCA(torch.autograd.Function):
    """Saves ``x[:, idx]``."""

    forward = staticmethod(column_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, weight, bias, columns, index, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(weight, columns, output[1] if ctx.needs_input_grad[3] else None, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _picked: None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, column_backward, dy)


def _gradients(ctx: Any, run: Callable[..., list[Tensor]], dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    weight, columns, picked, index = ctx.saved_tensors
    need_x, _, need_bias, need_columns, *_ = ctx.needs_input_grad
    if picked is None:  # the columns have no gradient, and their shape is not looked at
        picked = dy.new_empty(dy.shape[0], 0)
    grads = iter(run(dy, weight, columns, picked, index, ctx.scale, [need_x, need_columns]))
    dx, dcolumns = (next(grads) if need else None for need in (need_x, need_columns))
    return dx, None, dy.sum(0).to(ctx.bias_dtype) if need_bias else None, dcolumns, None, None


_forward_op = torch.library.custom_op("peftlite::paca_linear", column_forward, mutates_args=())
_backward_op = torch.library.custom_op("peftlite::paca_linear_backward", column_backward, mutates_args=())
_forward_op.register_autograd(lambda ctx, dy, _picked: _gradients(ctx, _backward_op, dy), setup_context=_PaCA.setup_context)


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], columns.shape[1])


@_backward_op.register_fake
def _(dy: Tensor, weight: Tensor, columns: Tensor, *rest: Any) -> list[Tensor]:
    *_, needs = rest
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    like = (dx, columns)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in zip(like, needs, strict=True) if need]
