"""lora_linear: ``y = x Wᵀ + b + s (x̃ Aᵀ) Bᵀ``, the low-rank path of LoRA (Hu et al. 2021, arXiv:2106.09685).

The backward passes are derived in ``kernels/README.md``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from peftlite.kernels.dispatch import check_linear_shapes, choose, compute_dtype, positional, saved_tensors, without_autocast
from peftlite.kernels.dropout import draw_keep_mask, kept
from peftlite.kernels.low_rank import (
    LoRAArguments,
    Native,
    Needs,
    OutputGradient,
    first_columns,
    flatten,
    low_rank_backward,
    low_rank_forward,
    native_products,
    unflatten,
)


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
        dropout: probability of dropping an element of `x` on the low-rank path only, rounded to a multiple of 2⁻¹⁶; pass 0
            in evaluation.
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
    return lora_linears(x, [LoRAArguments(weight, bias, lora_a, lora_b, scale)], dropout=dropout, impl=impl)[0]


def lora_linears(x: Tensor, layers: Sequence[LoRAArguments], *, dropout: float = 0.0, impl: str = "auto") -> list[Tensor]:
    """Compute `lora_linear` of several layers that read the same `x`, for less than one by one.

    ``x̃`` is drawn once for all of them. x is cast and saved once, the products with all A are one, and the gradient of x
    is summed inside the products that it consists of.

    Args:
        x: ``(..., in)``.
        layers: weight, bias, factors and scale of each.
        dropout: as in `lora_linear`.
        impl: as in `lora_linear`.

    Returns:
        The ``(..., out)`` of each layer.
    """
    for layer in layers:
        check_linear_shapes("lora_linear", x, layer.weight, layer.lora_a, layer.lora_b, layer.bias)
    implementation = choose("lora_linear", impl, x, layers[0].weight)
    x = x.to(compute_dtype(x))
    if implementation == "triton":
        from peftlite.kernels.lora_linear_triton import lora_linears_triton

        return lora_linears_triton(x, layers, dropout)
    mask, keep = draw_keep_mask(x, dropout)
    if implementation == "reference":
        return [lora_linear_reference(x, *layer, mask, keep) for layer in layers]
    rows = x.reshape(-1, x.shape[-1])
    # Compiled code sees one registered operation a layer; eager code runs the same passes without the dispatcher's
    # overhead, and profilers, FLOP counters and memory meters see each ATen call.
    if torch.compiler.is_compiling():
        ys = [_forward_op(rows, *layer, mask, keep)[0] for layer in layers]
    else:
        ys = list(_LoRA.apply(rows, mask, keep, native_products(rows, layers), *flatten(layers))[: len(layers)])
    return [y.view(*x.shape[:-1], layer.weight.shape[0]) for y, layer in zip(ys, layers, strict=True)]


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
        dropped = x if mask is None else x * kept(mask, x.shape, x.dtype) / keep
        base = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return base + scale * F.linear(F.linear(dropped, lora_a.to(x.dtype)), lora_b.to(x.dtype))


class _LoRA(torch.autograd.Function):
    """Saves x and h: nothing of the size M x out or out x in."""

    @staticmethod
    @positional
    def forward(x: Tensor, mask: Tensor | None, keep: float, runs: Native, *flat: Any) -> tuple[Tensor, ...]:
        ys, h = low_rank_forward(x, [LoRAArguments(*layer) for layer in unflatten(flat, 5)], mask, keep, runs)
        return *ys, h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mask, ctx.keep, ctx.runs, *flat = inputs
        *ys, h = output
        count = len(ys)
        weights, biases = flat[:count], flat[count : 2 * count]
        factors, ctx.scales = flat[2 * count : 4 * count], flat[4 * count :]
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        need_a = any(ctx.needs_input_grad[4 + 2 * count : 4 + 3 * count])
        ctx.save_for_backward(x if need_a else None, mask, h, *weights, *factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mask, h, *saved = saved_tensors("lora_linear", ctx)
        count = len(ctx.scales)
        need_x, _, _, _, *need = ctx.needs_input_grad
        layers = [LoRAArguments(w, None, a, b, s) for (w, a, b), s in zip(unflatten(saved, 3), ctx.scales, strict=True)]
        hs = first_columns(layers)
        used = [k for k in range(count) if dys[k] is not None]  # an output that the loss does not depend on has no gradient
        grads: list[Tensor | None] = [None] * (5 * count)
        dx = None
        if used:
            dx, pairs = low_rank_backward(
                lambda k, _u, _start: OutputGradient(dys[used[k]]),  # type: ignore[arg-type]
                x,
                [layers[k] for k in used],
                h,
                [hs[k] for k in used],
                mask,
                ctx.keep,
                ctx.runs,
                need_x,
                [Needs(need[2 * count + k], need[3 * count + k]) for k in used],
            )
            for k, (da, db) in zip(used, pairs, strict=True):
                dy = dys[k]
                assert dy is not None
                if need[count + k]:
                    grads[count + k] = dy.sum(0).to(ctx.bias_dtypes[k])
                grads[2 * count + k], grads[3 * count + k] = da, db
        return dx, None, None, None, *grads


def _single_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    mask: Tensor | None,
    keep: float,
) -> tuple[Tensor, Tensor]:
    layers = [LoRAArguments(weight, bias, lora_a, lora_b, scale)]
    (y,), h = low_rank_forward(x, layers, mask, keep, native_products(x, layers))
    return y, h


def _single_backward(
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
    layer = LoRAArguments(weight, None, lora_a, lora_b, scale)
    need_x, *need = needs
    of_forward = (x, [layer], h, [0], mask, keep, native_products(h, [layer]))
    dx, ((da, db),) = low_rank_backward(lambda *_: OutputGradient(dy), *of_forward, need_x, [Needs(*need)])
    return [gradient for gradient in (dx, da, db) if gradient is not None]


def _save_single(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, lora_a, lora_b, ctx.scale, mask, ctx.keep = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, lora_a, lora_b, output[1], mask)


def _single_gradients(ctx: Any, dy: Tensor, _dh: Tensor) -> tuple[Tensor | None, ...]:
    need_x, _, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
    x, weight, lora_a, lora_b, h, mask = saved_tensors("lora_linear", ctx)
    needs = [need_x, need_a, need_b]
    grads = iter(_backward_op(dy, x, weight, lora_a, lora_b, h, ctx.scale, mask, ctx.keep, needs))
    dx, da, db = (next(grads) if need else None for need in needs)
    return dx, None, dy.sum(0).to(ctx.bias_dtype) if need_bias else None, da, db, None, None, None


_forward_op = torch.library.custom_op("peftlite::lora_linear", _single_forward, mutates_args=())
_backward_op = torch.library.custom_op("peftlite::lora_linear_backward", _single_backward, mutates_args=())
_forward_op.register_autograd(_single_gradients, setup_context=_save_single)


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, *rest: Any) -> list[Tensor]:
    *_, needs = rest
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    like = (dx, lora_a, lora_b)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in zip(like, needs, strict=True) if need]
