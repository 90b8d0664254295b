"""TT-LoRA: Anjum et al. 2024, arXiv:2408.01008."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, final

import torch
from torch import Tensor, nn

from peftlite.adapter import AdapterLinear
from peftlite.kernels.lora_linear import lora_linear
from peftlite.options import check_alpha, check_dropout

LARGEST_FACTOR = 64  # of an automatic shape, as in the authors' settings


@final
class TTLoRALinear(AdapterLinear):
    """Compute ``y = x Wᵀ + b + α dropout(x) ΔWᵀ``, ``ΔW[k₁…k_D] = G₁[k₁] G₂[k₂] ⋯ G_D[k_D]``: an update in tensor-train form.

    ΔW ``(out, in)`` is seen as a tensor with a dimension for each factor of `out`, then one for each factor of `in`, in
    row-major order. It is a product of D cores ``(ρ, kⱼ, ρ)``, with 1 in the place of the outermost ρ; ρ is `rank`.
    Trained: ``Σ ρ kⱼ ρ`` parameters, for 768 x 768 at ρ = 5 no more than 990, where LoRA of rank 1 has 1,536.

    The cores of the output multiply up to ``L (out, ρ)``, those of the input to ``R (ρ, in)``, and ``ΔW = L R``: a
    TT-LoRA layer is LoRA of rank ρ whose factors are compressed. So it is computed, without a dense ΔW, in LoRA's time
    and memory, and `to_lora` is exact.

    Use it where the adapter itself must be tiny (thousands of them, or sent over a network). It is a product of many
    factors: clip gradients and warm up. The authors take ρ = 5, α = 16 and a learning rate of 5e-3.

    We differ: α multiplies as it is, as in the paper, and is 16 by default, as in the authors' scripts, whatever the rank.
    The first output core is born zero, so that an injected model computes what it did; the authors start from an update
    that is not zero (``init="direct"``, ``"tt_svd"``). Their two forward passes are different parameterisations; ours is
    `shape`, outputs first, in both. A prime size stays whole, and costs there what LoRA does; the authors have no rule.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``ρ``, the rank between any two cores.
        shape: factors of `out_features`, then factors of `in_features`; one shape must fit all layers of an injection. By
            default the largest factor up to 64 of either size at the outer ends, and small ones inside, which gives the
            authors' ``[64, 4, 3, 3, 4, 64]`` for 768 x 768.
        alpha: ``α``.
        init: ``"zero"``, or ``"direct"`` (all cores uniform, of norm 1), or ``"tt_svd"`` (the tensor-train decomposition
            of a matrix uniform in ``±1/√in``).
        dropout: probability of dropping an element of the input of the adapter, in training mode.

    Raises:
        ValueError: if `shape` does not multiply up to the sizes of the layer, or for an unknown `init`.

    Source: Anjum et al. 2024, "Tensor Train Low-rank Approximation (TT-LoRA): Democratizing AI with Accelerated LLMs",
    arXiv:2408.01008.

    Example:
        >>> layer = TTLoRALinear(768, 768, rank=5)
        >>> layer.shape, sum(p.numel() for p in layer.adapter_parameters().values())
        ([64, 4, 3, 3, 4, 64], 990)
    """

    method = "tt_lora"

    def build(
        self,
        *,
        shape: Sequence[int] | None = None,
        alpha: float = 16.0,
        init: str = "zero",
        dropout: float = 0.0,
    ) -> None:
        """Create the cores."""
        if init not in ("zero", "direct", "tt_svd"):
            raise ValueError(f"init must be 'zero', 'direct' or 'tt_svd', got {init!r}.")
        if shape is None:
            shape = [*factorise(self.out_features), *reversed(factorise(self.in_features))]
        self.shape, self.split = list(shape), self._split(list(shape))
        self.init, self.dropout, self.scale = init, check_dropout(dropout), check_alpha(alpha)
        if init == "tt_svd":
            matrix = self.draw_uniform(self.out_features, self.in_features, bound=1 / math.sqrt(self.in_features))
            cores = tt_svd(matrix, self.shape, self.rank)
        else:
            ranks = [1, *[self.rank] * (len(self.shape) - 1), 1]
            cores = [self.draw_uniform(ranks[j], k, ranks[j + 1], bound=1.0) for j, k in enumerate(self.shape)]
            cores = [core / torch.linalg.vector_norm(core) for core in cores]
        if init == "zero":
            cores[0] = torch.zeros_like(cores[0])
        self.cores = nn.ParameterList([nn.Parameter(core.contiguous()) for core in cores])

    def _split(self, shape: list[int]) -> int:
        """How many of the factors belong to the output."""
        if all(type(k) is int and k > 0 for k in shape):
            for split, size in enumerate(accumulate(shape, lambda a, b: a * b), 1):
                if size == self.out_features and split < len(shape) and math.prod(shape[split:]) == self.in_features:
                    return split
        raise ValueError(
            f"shape must be positive integers that multiply up to out_features = {self.out_features}, followed by some that "
            f"multiply up to in_features = {self.in_features}, got {shape}; without `shape` it is chosen."
        )

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        options = {"shape": self.shape, "alpha": self.scale, "init": self.init, "dropout": self.dropout}
        return {**self.basic_config(), **options}

    def halves(self) -> tuple[Tensor, Tensor]:
        """``L (out, ρ)`` and ``R (ρ, in)`` with ``ΔW = L R``."""
        left = self.cores[0].squeeze(0)
        for core in self.cores[1 : self.split]:
            left = (left @ core.flatten(1)).reshape(-1, core.shape[2])  # (n, ρ) (ρ, k ρ') -> (n k, ρ')
        right = self.cores[-1].squeeze(2)
        for core in reversed(self.cores[self.split : -1]):
            right = (core.flatten(0, 1) @ right).reshape(core.shape[0], -1)  # (ρ k, ρ') (ρ', m) -> (ρ, k m)
        return left, right

    def effective_weight(self) -> Tensor:
        """``W + α L R``, ``(out, in)``."""
        left, right = self.halves()
        return self.base_weight() + self.scale * (left @ right)

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """``R`` and ``α L``."""
        left, right = self.halves()
        return right.clone(), self.scale * left

    def adapted_forward(self, x: Tensor) -> Tensor:
        """LoRA of rank ρ with factors R and L."""
        left, right = self.halves()
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.base_weight(), self.bias, right, left, self.scale, dropout=dropout)


def factorise(size: int) -> list[int]:
    """Factors of `size`: the largest up to 64, or a larger prime, then 5, 4, 3 and 2 and what else is left, descending.

    An outer core of k has ``k ρ`` parameters and an inner one ``k ρ²``, so the large factor goes outside; a 4 costs what
    two 2 do, with one core less.

    Example:
        >>> factorise(768), factorise(3072), factorise(50257), factorise(1)
        ([64, 4, 3], [64, 4, 4, 3], [1733, 29], [1])
    """
    primes, rest, p = [], size, 2
    while rest > 1:
        p = p if rest % p == 0 else p + 1 if p * p <= rest else rest
        while rest % p == 0:
            primes.append(p)
            rest //= p
    outer = max(primes, default=1)
    if outer <= LARGEST_FACTOR:
        outer = max(d for d in range(1, LARGEST_FACTOR + 1) if size % d == 0)
    inner, rest = [], size // outer
    for p in sorted({*primes, 4}, key=lambda p: (p != 4, -p)):
        while rest % p == 0:
            inner.append(p)
            rest //= p
    return [outer, *sorted(inner, reverse=True)]


def tt_svd(matrix: Tensor, shape: Sequence[int], rank: int) -> list[Tensor]:
    """Cores ``(ρ, k, ρ)`` of a `matrix` seen as a tensor of `shape`, by successive SVDs (Oseledets 2011).

    Exact if `rank` is at least that of every unfolding; a core of lower rank is filled with zeros.
    """
    cores, left = [], 1
    rest = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    for k in shape[:-1]:
        u, values, vt = torch.linalg.svd(rest.reshape(left * k, -1), full_matrices=False)
        keep = min(rank, values.shape[0])
        core, rest = u.new_zeros(left * k, rank), vt.new_zeros(rank, vt.shape[1])
        core[:, :keep], rest[:keep] = u[:, :keep], values[:keep, None] * vt[:keep]
        cores.append(core.reshape(left, k, rank))
        left = rank
    return [core.to(matrix.dtype) for core in [*cores, rest.reshape(left, shape[-1], 1)]]
