"""Store the frozen base of a model in 4 or 8 bits (QLoRA: Dettmers et al. 2023, arXiv:2305.14314), and bring it back."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from peftlite.inject import adapters, check_not_tied, replace_module
from peftlite.quantization.blockwise import Format
from peftlite.quantization.linear import QuantizedLinear, check_finite
from peftlite.targets import Targets, as_patterns, find_targets

Model = TypeVar("Model", bound=nn.Module)


def quantize_base(
    model: Model,
    targets: Targets,
    code: str = "nf4",
    *,
    exclude: str | Iterable[str] = (),
    block: int = 64,
    scale_code: str | None = "auto",
    scale_block: int = 256,
) -> Model:
    """Replace the target layers of `model` by `QuantizedLinear` layers, in place: ``w ≈ c_block · level[index]``.

    Call it before `inject_adapters`, which takes the quantised layers as it takes ``nn.Linear``, with every method. Their
    weights are frozen for good. NF4 takes 4.127 bits per number. Keep what maps to the output (heads, ``lm_head``) out of it.
    After an error the model is exactly as it was.

    A model may be quantised on the meta device and get its weights later, by ``load_state_dict(..., assign=True)`` from a
    model that was quantised in the same way.

    Args:
        model: any module, without adapters.
        targets: as for `inject_adapters`.
        code: ``"nf4"``, 16 levels at quantiles of the normal distribution, or ``"int8"``, the levels ``k / 127``.
        exclude: names or globs of targets to leave alone.
        block: numbers that share a scale.
        scale_code: double quantisation, the code in which the scales themselves are stored, in 8 bits: ``"dynamic"`` (as
            bitsandbytes does) or ``"fp8_e4m3"`` (8-bit floats, as the paper says); None keeps them in fp32. By default
            ``"dynamic"`` for NF4, and None for int8, whose error it would raise by a twentieth.
        scale_block: scales that share a second scale.

    Returns:
        `model` itself.

    Raises:
        ValueError: for a target that matches nothing, cannot carry an adapter, is quantised already, holds non-finite
            values or shares its weight with another module; for an unknown code; if the model carries adapters.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> quantize_base(model, "all-linear", exclude="2")[0].weight
        PackedWeight(nf4, shape=(32, 64), block=64, scale_code=dynamic, dtype=torch.float32)
    """
    if scale_code == "auto":
        scale_code = "dynamic" if code == "nf4" else None
    form = Format(code, block, scale_code, scale_block)
    present = adapters(model)
    if present:
        raise ValueError(
            f"the model carries {len(present)} adapters (the first is {next(iter(present))!r}), which were made for the base "
            "as it is; call quantize_base first and inject_adapters then."
        )
    found = find_targets(model, targets, exclude=as_patterns(exclude))
    for name, linear in found.items():
        if isinstance(linear, QuantizedLinear):
            raise ValueError(f"{name!r} is quantised already ({linear.weight!r}); leave it out with `exclude`.")
        check_not_tied(model, linear, name, "quantising it")
        check_finite(linear.weight, f"{name}: ")
    while found:  # one after the other, so that the dense weights can go as they are replaced
        _, linear = found.popitem()
        replace_module(model, linear, QuantizedLinear(linear, form))  # type: ignore[arg-type]
    return model


def dequantize_base(model: Model, *, dtype: torch.dtype | None = None) -> Model:
    """Replace every `QuantizedLinear` of `model` by an ``nn.Linear`` with the dense weight ``deq(W)``, in place.

    Args:
        model: a model without adapters.
        dtype: dtype of the dense weights; by default that of the weights that were quantised.

    Returns:
        `model` itself. The weights are frozen, as they were.

    Raises:
        ValueError: if there is no quantised layer, or the model carries adapters.

    Example:
        >>> model = quantize_base(nn.Sequential(nn.Linear(8, 4)), "0", "int8")
        >>> dequantize_base(model)
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    if adapters(model):
        raise ValueError(
            "the model carries adapters, which stand on the quantised base; call remove_adapters first, or merge_adapters with "
            "quantized='dequantize'."
        )
    found = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no quantised layer to make dense.")
    for layer in found:
        replace_module(model, layer, layer.to_dense(dtype))
    return model
