"""dora_linear: ``y = g ⊙ (x Wᵀ + s (x̃ Aᵀ) Bᵀ) + b``, ``g = m / ‖W + s B A‖_row`` (Liu et al. 2024, arXiv:2402.09353).

The backward passes are derived in ``kernels/README.md``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftlite.kernels.dispatch import check_linear_shapes, choose, compute_dtype, positional, saved_tensors
from peftlite.kernels.dropout import draw_keep_mask, kept
from peftlite.kernels.lora_linear import lora_linears
from peftlite.kernels.low_rank import LoRAArguments, Native, first_columns, flatten, unflatten
from peftlite.kernels.row_norm import BaseSquare, accumulation_dtype
from peftlite.kernels.summed_output import Summed, SummedOutput
from peftlite.kernels.weight_decomposed import (
    DoRAArguments,
    DoRANeeds,
    dora_linear_reference,
    native_passes,
    weight_decomposed_backward,
    weight_decomposed_forward,
)


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
    keep_output: bool | SummedOutput = True,
    base_square: BaseSquare | None = None,
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
        keep_output: keep y for the gradient of the magnitude. What follows often keeps it as well, and then it costs nothing;
            otherwise False spares its ``M x out`` elements, and lets what follows write into y, for one more product with W
            in the backward pass. A `SummedOutput` offers y anew; eager code on ATen calls accepts it, and elsewhere it is True.
        base_square: keeps ``‖W‖²`` of this layer's weight from one call to the next, and sees when W has changed.
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
    layer = DoRAArguments(weight, bias, lora_a, lora_b, magnitude, scale)
    options: dict[str, Any] = {"dropout": dropout, "dropout_mode": dropout_mode, "norm_grad": norm_grad, "impl": impl}
    return dora_linears(x, [layer], keep_output=keep_output, base_squares=[base_square], **options)[0]


def dora_linears(
    x: Tensor,
    layers: Sequence[DoRAArguments],
    *,
    dropout: float = 0.0,
    dropout_mode: str = "lowrank",
    norm_grad: bool = False,
    keep_output: bool | SummedOutput = True,
    base_squares: Sequence[BaseSquare | None] | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """Compute `dora_linear` of several layers that read the same `x`, for less than one by one; see `lora_linears`.

    Args:
        x: ``(..., in)``.
        layers: weight, bias, factors, magnitude and scale of each.
        dropout: as in `dora_linear`; x̃ is drawn once for all of them.
        dropout_mode: as in `dora_linear`.
        norm_grad: as in `dora_linear`.
        keep_output: as in `dora_linear`.
        base_squares: one for each layer, as in `dora_linear`.
        impl: as in `dora_linear`.

    Returns:
        The ``(..., out)`` of each layer.
    """
    for layer in layers:
        check_linear_shapes("dora_linear", x, layer.weight, layer.lora_a, layer.lora_b, layer.bias, layer.magnitude)
    if dropout_mode not in ("lowrank", "peft"):
        raise ValueError(f"dora_linear: dropout_mode must be 'lowrank' or 'peft', got {dropout_mode!r}.")
    implementation = choose("dora_linear", impl, x, layers[0].weight)
    x = x.to(compute_dtype(x))
    if implementation == "triton" and (dropout_mode == "lowrank" or dropout == 0.0):
        from peftlite.kernels.dora_linear_triton import dora_linears_triton

        return dora_linears_triton(x, layers, dropout, norm_grad, bool(keep_output))
    mask, keep = draw_keep_mask(x, dropout)
    squares = [None] * len(layers) if base_squares is None else base_squares
    if mask is not None and dropout_mode == "peft":
        dropped = x * kept(mask, x.shape, x.dtype) / keep
        options: dict[str, Any] = {"norm_grad": norm_grad, "keep_output": bool(keep_output), "impl": implementation}
        inner = dora_linears(dropped, layers, base_squares=squares, **options)
        # W alone, as a low-rank path of rank 0: `F.linear` would keep a cast copy of W for its backward pass.
        bare = [LoRAArguments(w, None, a[:0].detach(), b[:, :0].detach(), 0.0) for w, _, a, b, *_ in layers]
        rest = lora_linears(x - dropped, bare, impl=implementation)
        return [of_dropped + of_rest for of_dropped, of_rest in zip(inner, rest, strict=True)]
    if implementation == "reference":
        return [dora_linear_reference(x, *layer, mask, keep, norm_grad) for layer in layers]
    rows = x.reshape(-1, x.shape[-1])
    # See lora_linears on why compiled and eager code differ here.
    if torch.compiler.is_compiling():
        ys = [_forward_op(rows, *layer, mask, keep, norm_grad, bool(keep_output))[0] for layer in layers]
    else:
        flat = flatten([(*layer, square) for layer, square in zip(layers, squares, strict=True)])
        ys = list(_DoRA.apply(rows, mask, keep, native_passes(rows, layers), norm_grad, keep_output, *flat)[: len(layers)])
    return [y.view(*x.shape[:-1], layer.weight.shape[0]) for y, layer in zip(ys, layers, strict=True)]


class _DoRA(torch.autograd.Function):
    """Saves x, h, n and the output y, whose storage its consumer usually saves too: nothing of the size out x in."""

    @staticmethod
    @positional
    def forward(
        x: Tensor, mask: Tensor | None, keep: float, runs: Native, norm_grad: bool, keep_output: Any, *flat: Any
    ) -> tuple[Tensor, ...]:
        count = len(flat) // 7
        layers = [DoRAArguments(*layer) for layer in unflatten(flat[: 6 * count], 6)]
        ys, h, norms = weight_decomposed_forward(x, layers, mask, keep, runs, flat[6 * count :])
        return *ys, h, *norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mask, ctx.keep, ctx.runs, ctx.norm_grad, keep_output, *flat = inputs
        count = len(flat) // 7
        ys, h, norms = output[:count], output[count], output[count + 1 :]
        ctx.mark_non_differentiable(h, *norms)
        ctx.set_materialize_grads(False)
        ctx.scales = flat[5 * count : 6 * count]
        need = [needs[2:5] for needs in unflatten(ctx.needs_input_grad[6 : 6 + 6 * count], 6)]
        need_y = [m or (ctx.norm_grad and (a or b)) for a, b, m in need]
        need_x = any(need_y) or any(a for a, _, _ in need)
        offered = isinstance(keep_output, SummedOutput) and count == 1 and need_y[0] and keep_output.accept()
        ctx.offer = keep_output if offered else None
        kept = [y if needed and keep_output and not offered else None for y, needed in zip(ys, need_y, strict=True)]
        ctx.save_for_backward(x if need_x else None, mask, h, *kept, *norms, *flat[: 5 * count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mask, h, *saved = saved_tensors("dora_linear", ctx)
        count = len(ctx.scales)
        ys: list[Tensor | Summed | None] = list(saved[:count])
        norms, flat = saved[count : 2 * count], saved[2 * count :]
        if ctx.offer is not None:
            ys[0] = ctx.offer.take()
        layers = [DoRAArguments(*layer) for layer in unflatten([*flat, *ctx.scales], 6)]
        hs = first_columns(layers)
        needs = unflatten(ctx.needs_input_grad[6 : 6 + 6 * count], 6)
        used = [k for k in range(count) if dys[k] is not None]  # an output that the loss does not depend on has no gradient
        grads: list[list[Tensor | None]] = [[None] * 7 for _ in layers]
        dx = None
        if used:
            dx, adapters = weight_decomposed_backward(
                [dys[k] for k in used],  # type: ignore[misc]
                x,
                [layers[k] for k in used],
                [ys[k] for k in used],
                h,
                [hs[k] for k in used],
                [norms[k] for k in used],
                mask,
                ctx.keep,
                ctx.runs,
                ctx.norm_grad,
                ctx.needs_input_grad[0],
                [DoRANeeds(*needs[k][2:5]) for k in used],
            )
            for k, adapter in zip(used, adapters, strict=True):
                dy, bias = dys[k], layers[k].bias
                if needs[k][1]:
                    grads[k][1] = dy.sum(0).to(bias.dtype)  # type: ignore[union-attr]
                grads[k][2:5] = adapter
        return dx, None, None, None, None, None, *flatten(grads)  # type: ignore[arg-type]


def _single_forward(
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
    keep_output: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    layer = DoRAArguments(weight, bias, lora_a, lora_b, magnitude, scale)
    (y,), h, (norm,) = weight_decomposed_forward(x, [layer], mask, keep, native_passes(x, [layer]), [None])
    return y, h, norm


def _single_backward(
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
    layer = DoRAArguments(weight, bias, lora_a, lora_b, magnitude, scale)
    need_x, *need = needs
    of_forward = (x, [layer], [y], h, [0], [norm], mask, keep, native_passes(h, [layer]))
    dx, (adapter,) = weight_decomposed_backward([dy], *of_forward, norm_grad, need_x, [DoRANeeds(*need)])
    return [gradient for gradient in (dx, *adapter) if gradient is not None]


def _save_single(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, lora_a, lora_b, magnitude, ctx.scale, mask, ctx.keep, ctx.norm_grad, keep_output = inputs
    y, h, norm = output
    need_a, need_b, need_m = ctx.needs_input_grad[3:6]
    need_y = need_m or (ctx.norm_grad and (need_a or need_b))
    x = x if need_a or need_y else None
    ctx.save_for_backward(
        x, weight, bias, lora_a, lora_b, magnitude, y if need_y and keep_output else None, h, norm, mask
    )


def _single_gradients(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, lora_a, lora_b, magnitude, y, h, norm, mask = saved_tensors("dora_linear", ctx)
    need_x, _, need_bias, *need_adapter = ctx.needs_input_grad[:6]
    needs = [need_x, *need_adapter]
    options = (ctx.scale, mask, ctx.keep, ctx.norm_grad, needs)
    grads = iter(_backward_op(dy, x, weight, bias, lora_a, lora_b, magnitude, y, h, norm, *options))
    dx, da, db, dm = (next(grads) if need else None for need in needs)
    return dx, None, dy.sum(0).to(bias.dtype) if need_bias else None, da, db, dm, None, None, None, None, None


_forward_op = torch.library.custom_op("peftlite::dora_linear", _single_forward, mutates_args=())
_backward_op = torch.library.custom_op("peftlite::dora_linear_backward", _single_backward, mutates_args=())
_forward_op.register_autograd(_single_gradients, setup_context=_save_single)


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
