"""What the peers compute in one linear layer, as plain functions of its tensors, for `benchmarks.kernels`.

They are written for this benchmark after the published formulas and the peers' order of operations; their modules, checks and
casts are left out, so that a peer is no faster than this. Factors are cast to the dtype of x where they are used, as autocast
would. Dropout is off.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_layers import SCALE, Tensors


def peft_lora(t: Tensors) -> Tensor:
    """``(x Wᵀ + b) + ((x Aᵀ) Bᵀ) s``: Hugging Face PEFT 0.21, and loralib, whose products are the same (Hu et al. 2021,
    arXiv:2106.09685)."""
    dtype = t.x.dtype
    low = F.linear(F.linear(t.x, t.lora_a.to(dtype)), t.lora_b.to(dtype))
    return F.linear(t.x, t.weight, t.bias) + low * SCALE


def peft_dora(t: Tensors) -> Tensor:
    """``y = r + (g - 1) ⊙ (r - b) + g ⊙ (x Aᵀ) Bᵀ s``, ``r = x Wᵀ + b``, with a constant norm: PEFT 0.21 (DoRA: Liu et al.
    2024, arXiv:2402.09353, §4.3)."""
    assert t.magnitude is not None
    dtype = t.x.dtype
    a, b = t.lora_a.to(dtype), t.lora_b.to(dtype)
    base = F.linear(t.x, t.weight, t.bias)
    gain = (t.magnitude.to(dtype) / peft_norm(t).detach()).view(1, -1)
    low = F.linear(F.linear(t.x, a), b)
    inner = base if t.bias is None else base - t.bias
    return base + ((gain - 1) * inner + gain * low * SCALE)


def peft_norm(t: Tensors) -> Tensor:
    """``‖W + s (I Aᵀ Bᵀ)ᵀ‖_row`` in the dtype of W, with two dense products: PEFT 0.21."""
    dtype = t.weight.dtype
    eye = torch.eye(t.lora_a.shape[1], device=t.weight.device, dtype=dtype)
    update = F.linear(F.linear(eye, t.lora_a.to(dtype)), t.lora_b.to(dtype)).T
    return torch.linalg.norm(t.weight + SCALE * update.detach(), dim=1)


def scaling_norm(t: Tensors) -> Tensor:
    """``√(‖W‖² + 2 s ⟨B, W Aᵀ⟩ + s² ⟨B, B (A Aᵀ)⟩)`` of each row in fp32: "Scaling DoRA", arXiv:2603.22276."""
    with torch.no_grad():
        weight, a, b = t.weight.float(), t.lora_a.float(), t.lora_b.float()
        square = weight.square().sum(1)
        cross = (b * (weight @ a.T)).sum(1)
        own = (b * (b @ (a @ a.T))).sum(1)
        return (square + 2 * SCALE * cross + SCALE**2 * own).clamp_min(0).sqrt()


def scaling_dora(t: Tensors) -> Tensor:
    """``y = r + (g - 1) ⊙ x Wᵀ + g ⊙ s (x Aᵀ) Bᵀ`` with the norm above, g in fp32 until it meets x: arXiv:2603.22276, in eager
    torch."""
    assert t.magnitude is not None
    dtype = t.x.dtype
    inner = F.linear(t.x, t.weight)
    low = F.linear(F.linear(t.x, t.lora_a.to(dtype)), t.lora_b.to(dtype))
    gain = t.magnitude / scaling_norm(t).clamp_min(1e-12)
    delta = (gain - 1).to(dtype) * inner + gain.to(dtype) * (SCALE * low)
    return (inner if t.bias is None else inner + t.bias) + delta


FORMULAS: dict[str, dict[str, Callable[[Tensors], Tensor]]] = {
    "lora": {"PEFT's formula": peft_lora},
    "dora": {"PEFT's formula": peft_dora, "Scaling DoRA's formula": scaling_dora},
    "row_norm": {"PEFT's formula": peft_norm, "Scaling DoRA's formula": scaling_norm},
}
