"""RefLoRA: Zhang, Li and Giannakis 2025, arXiv:2505.18877."""

import math
from collections import defaultdict
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftlite.training.controller import Controller, check_choice, check_count

# How state of the optimizers scales with the gradient: by its first power, or by its second.
MOMENT_POWERS = {
    "exp_avg": 1,
    "momentum_buffer": 1,
    "grad_avg": 1,
    "exp_inf": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "square_avg": 2,
    "sum": 2,
}


@final
class RefLoRA(Controller):
    """Step ``B A`` in its best factorisation: ``g_A ← S⁻¹ g_A``, ``g_B ← g_B S``, ``S (A Aᵀ) S = Bᵀ B``.

    ``B A`` is also ``(B P⁻ᵀ)(Pᵀ A)`` for any invertible P, and a gradient step is not the same in each. RefLoRA takes the
    pair that minimises an upper bound of the loss after the step: the one with the smallest factors, which are balanced,
    ``Ã Ãᵀ = B̃ᵀ B̃``. ``S = P Pᵀ`` is the geometric mean of ``(A Aᵀ)⁻¹`` and ``Bᵀ B``. To go there, step and come back is to
    precondition the gradients, so that the factors stay what they are and the optimizer keeps its moments.

    * ``variant="matrix"`` does that before the step: ``O((in + out) r² + r³)`` per layer, nothing kept.
    * ``variant="scalar"`` (RefLoRA-S) rescales the factors after the step, ``A ← √σ A``, ``B ← B / √σ`` with
      ``σ = ‖B‖_F / ‖A‖_F``, which makes their norms equal, and the optimizer's moments with them. It is cheaper.

    Take it where plain LoRA learns slowly or depends on its initial scale; forward pass, size and merging stay LoRA's. It
    works on factors whose product alone matters, each held by one layer: LoRA's and DoRA's.

    While B is 0, as at birth, S is 0 and both preconditioned gradients vanish: the first `warmup_steps` are plain steps, and
    a layer one of whose factors is still zero, or not finite, goes on with them. (The authors' other remedy, two random
    factors and a rewritten base, would change the frozen weights.) The authors' code is undamped, and gives NaN for factors
    of deficient rank; we add `damping` times the mean eigenvalue to both Gram matrices, and clamp. The Gram matrices are
    taken in fp32; the algebra on them, r x r, in fp64, since its condition is the product of theirs. Clipping
    comes before all this and sees the plain gradients.

    Args:
        model: a model with adapters of LoRA or DoRA.
        optimizer: the optimizer of their parameters.
        variant: ``"matrix"`` or ``"scalar"``.
        warmup_steps: plain steps at the beginning.
        interval: act in every so many-th step; the others are plain.
        damping: relative damping of the Gram matrices (``"matrix"`` only).

    Raises:
        ValueError: for an option out of range, factors that layers share, or as `Controller`.

    Source: Zhang, Li and Giannakis 2025, "RefLoRA: Refactored Low-Rank Adaptation for Efficient Fine-Tuning of Large
        Models", arXiv:2505.18877.

    Example:
        >>> from peftlite import inject_adapters, param_groups
        >>> model = inject_adapters(nn.Sequential(nn.Linear(8, 8)), "0", rank=4)
        >>> optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
        >>> with RefLoRA(model, optimizer, warmup_steps=2) as controller:
        ...     for _ in range(4):
        ...         model(torch.ones(2, 8)).square().sum().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> controller.step
        4
    """

    methods = ("lora", "dora")

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        variant: str = "matrix",
        warmup_steps: int = 100,
        interval: int = 1,
        damping: float = 1e-6,
    ) -> None:
        super().__init__(model, optimizer)
        self.variant = check_choice("variant", variant, ("matrix", "scalar"))
        self.warmup_steps = check_count("warmup_steps", warmup_steps)
        self.interval = check_count("interval", interval, least=1)
        if not (math.isfinite(damping) and damping > 0):
            raise ValueError(f"damping must be a positive number, got {damping!r}.")
        self.damping = damping
        holders: dict[int, str] = {}
        for name, layer in self.layers.items():
            for key in ("lora_a", "lora_b"):
                other = holders.setdefault(id(layer.get_parameter(key)), name)
                if other != name:
                    raise ValueError(f"RefLoRA: {name}.{key} is shared with {other!r}; each layer must have its own factors.")
        self._pairs = [(layer.get_parameter("lora_a"), layer.get_parameter("lora_b")) for layer in self.layers.values()]
        self.attach()

    def settings(self) -> dict[str, Any]:
        """What the steps depend on."""
        return {name: getattr(self, name) for name in ("variant", "warmup_steps", "interval", "damping")}

    @torch.no_grad()
    def before_step(self) -> None:
        """Precondition the gradients."""
        if self.variant == "scalar" or self.step < self.warmup_steps or (self.step - self.warmup_steps) % self.interval:
            return
        groups = defaultdict(list)  # layers of one rank and place share one batched decomposition
        for a, b in self._pairs:
            if a.grad is not None and b.grad is not None:
                groups[a.shape[0], a.device, torch.promote_types(a.dtype, torch.float32)].append((a, b))
        for (_, _, dtype), pairs in groups.items():
            gram_a = torch.stack([_gram(a.to(dtype)) for a, _ in pairs])
            gram_b = torch.stack([_gram(b.to(dtype).T) for _, b in pairs])
            metrics, inverses = balance(gram_a, gram_b, self.damping)
            for (a, b), metric, inverse in zip(pairs, metrics.to(dtype), inverses.to(dtype), strict=True):
                assert a.grad is not None
                assert b.grad is not None
                a.grad.copy_(inverse @ a.grad.to(dtype))
                b.grad.copy_(b.grad.to(dtype) @ metric)

    @torch.no_grad()
    def after_step(self) -> None:
        """Rescale the factors and their moments, in the scalar variant."""
        if self.variant == "matrix" or self.step < self.warmup_steps or (self.step - self.warmup_steps) % self.interval:
            return
        for a, b in self._pairs:
            wide = torch.promote_types(a.dtype, torch.float32)
            norm_a, norm_b = (torch.linalg.vector_norm(factor, dtype=wide) for factor in (a, b))
            ratio = (norm_b / norm_a).sqrt()
            ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1)  # zero factors stay as they are
            for parameter, factor in ((a, ratio), (b, 1 / ratio)):
                moments = {k: t for k, t in self.optimizer.state.get(parameter, {}).items() if isinstance(t, Tensor) and t.ndim}
                for key in moments:
                    if key not in MOMENT_POWERS:
                        raise RuntimeError(
                            f"RefLoRA: it is not known how {key!r}, a state of {type(self.optimizer).__name__}, scales with "
                            "the gradient; use variant='matrix', which leaves the state alone."
                        )
                parameter.mul_(factor)
                for key, moment in moments.items():
                    # RMSprop's momentum is of gradients over their own size; like Adam's quotient it has no scale.
                    power = 0 if key == "momentum_buffer" and "square_avg" in moments else MOMENT_POWERS[key]
                    moment.div_(factor**power)


def balance(gram_a: Tensor, gram_b: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``S`` with ``S G_A S = G_B``, and its inverse, for ``G_A = A Aᵀ`` and ``G_B = Bᵀ B``, ``(..., r, r)`` each, in fp64.

    Both are damped by `damping` times their mean eigenvalue. Where one of them is zero or not finite S is the identity.
    """
    gram_a, gram_b = gram_a.double(), gram_b.double()
    traces = [gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (gram_a, gram_b)]
    usable = torch.stack([torch.isfinite(trace) & (trace > 0) for trace in traces]).all(0)[..., None, None]
    eye = torch.eye(gram_a.shape[-1], dtype=torch.float64, device=gram_a.device)
    floors = [damping * trace[..., None, None] / len(eye) for trace in traces]
    gram_a, gram_b = (
        torch.where(usable, gram + floor * eye, eye) for gram, floor in zip((gram_a, gram_b), floors, strict=True)
    )
    values, vectors = torch.linalg.eigh(gram_a)
    values = values.clamp_min(torch.finfo(torch.float64).tiny).sqrt()[..., None, :]
    half, inverse_half = ((vectors * power) @ vectors.mT for power in (values, 1 / values))
    inner, basis = torch.linalg.eigh(half @ gram_b @ half)
    # Below this the decomposition knows nothing of an eigenvalue but that it is small.
    least = inner[..., -1:] * (torch.finfo(torch.float64).eps * len(eye))
    inner = inner.clamp_min(least).sqrt()[..., None, :]
    root, inverse_root = ((basis * power) @ basis.mT for power in (inner, 1 / inner))
    return inverse_half @ root @ inverse_half, half @ inverse_root @ half


def _gram(factor: Tensor) -> Tensor:
    return factor @ factor.T
