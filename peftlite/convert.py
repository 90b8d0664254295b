"""Write adapters of other methods as plain LoRA, which every other tool can read."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from peftlite.inject import replace_module, require_adapters, unchanged_on_error
from peftlite.methods import LoRALinear

Model = TypeVar("Model", bound=nn.Module)


def convert_to_lora(model: Model) -> Model:
    """Replace every adapted layer by a `LoRALinear` of scale 1 that computes the same, in place.

    The rank of a layer becomes that of its factors, at most ``min(in, out)``: MELoRA's n blocks of rank r become rank
    n r, PiSSA needs twice its rank, since its starting point is part of the update. Both factors train from then on,
    also where the method held one of them frozen. Dropout and the dtypes of base and adapter stay.

    Returns:
        `model` itself.

    Raises:
        ValueError: if the model carries no adapters, or for the first layer whose method is not a low-rank update, such
            as DoRA. After an error the model is exactly as it was.

    Example:
        >>> from peftlite import adapters, inject_adapters
        >>> model = inject_adapters(nn.Sequential(nn.Linear(4, 4)), "0", rank=2, alpha=16)
        >>> [layer.scale for layer in adapters(convert_to_lora(model)).values()]
        [1.0]
    """
    layers = require_adapters(model, "convert_to_lora")
    if "" in layers:
        raise ValueError(f"the model is itself a {type(model).__name__} and has no parent; use its to_lora() instead.")
    with unchanged_on_error(model):
        converted = {}
        for name, layer in layers.items():
            try:
                a, b = _narrow(*layer.to_lora())
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            lora = LoRALinear.from_linear(
                layer.to_linear(),
                a.shape[0],
                dropout=layer.config().get("dropout", 0.0),
                adapter_dtype=a.dtype,
                base_dtype=layer.base_dtype,
            )
            with torch.no_grad():
                lora.lora_a.copy_(a)
                lora.lora_b.copy_(b)
            converted[name] = lora
        for name, lora in converted.items():
            replace_module(model, layers[name], lora)
    return model


def _narrow(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors with the product of B ``(out, r)`` and A ``(r, in)``, and no more than ``min(in, out)`` of them."""
    rank, in_features, out_features = a.shape[0], a.shape[1], b.shape[0]
    if rank <= min(in_features, out_features):
        return a, b
    if in_features <= out_features:
        return torch.eye(in_features, dtype=a.dtype, device=a.device), b @ a
    return b @ a, torch.eye(out_features, dtype=a.dtype, device=a.device)
