"""ShareLoRA: Song et al. 2024, arXiv:2406.10785."""

import math
from typing import Any, final

import torch
from torch import Tensor

from peftlite.adapter import AdapterLinear
from peftlite.kernels.lora_linear import lora_linear
from peftlite.options import check_dropout
from peftlite.sharing import SharedTensor, check_scope, group_of


@final
class ShareLoRALinear(AdapterLinear):
    """Compute ``y = x Wᵀ + b + s (dropout(x) Aᵀ) Bᵀ``, where the layers of a group share A, B, or both.

    ``A (r, in)`` and ``B (out, r)`` are born and trained as LoRA's: A uniform in ``±1/√in``, B zero. A shared factor is one
    Parameter, and its gradient is the sum over its layers. A group is what `scope` says, as far as shape and rank agree.

    Trained, for a group of L layers: ``r in + L r out`` with A shared, ``L r in + r out`` with B shared,
    ``r (in + out)`` with both; a layer alone is LoRA. Time and memory of a step are LoRA's; what shrinks is the
    optimizer's state, the file, and the memory of a server that holds many adapters.

    Use it when the adapter itself must be small, or to regularise LoRA at a high rank; the paper recommends sharing A.

    The authors' LLaMA code draws the shared A from ``N(0, 1/r²)``, the paper says that it is born as in LoRA, which we follow.
    Their code ties layers by the names of their modules and breaks the tie when layers move to different devices; ours names
    groups by the layer's place in the model, and refuses to share across devices. Grouped query attention: keys and values
    have a smaller ``out`` than queries, so that with ``scope="qkv"`` the three share A, but only keys and values share B.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r``.
        share: which factors are shared: ``"a"``, ``"b"`` or ``"ab"``.
        scope: among which layers: ``"type"``, those in the same place of repeated blocks; ``"qkv"``, the same, with query,
            key and value taken together; ``"shape"``, all layers.
        alpha: scaling numerator, by default the rank (``s = 1``).
        rslora: ``s = alpha / √rank`` (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an element of the input of the low-rank path, in training mode.

    Source: Song et al. 2024, "ShareLoRA: Parameter Efficient and Robust Large Language Model Fine-tuning via Shared
    Low-Rank Adaptation", arXiv:2406.10785.

    Example:
        >>> from torch import nn
        >>> from peftlite import inject_adapters, summary
        >>> model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
        >>> inject_adapters(model, "all-linear", rank=2, method="sharelora")[3].lora_a is model[0].lora_a
        True
        >>> summary(model).trained == 2 * 16 + 4 * 2 * 16
        True
    """

    method = "sharelora"

    def build(
        self,
        *,
        share: str = "a",
        scope: str = "type",
        alpha: float | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """Create A and B, or find them in the pool."""
        if share not in ("a", "b", "ab"):
            raise ValueError(f"share must be 'a', 'b' or 'ab', got {share!r}.")
        check_scope(scope, self._pool.names if self._pool else ())
        self.shared_factors, self.scope, self.dropout = share, scope, check_dropout(dropout)
        self.set_scale(alpha, rslora)
        group = f"{group_of(self._name, scope)} r={self.rank}"
        shape_a, shape_b = (self.rank, self.in_features), (self.out_features, self.rank)

        def make_a(generator: torch.Generator | None) -> SharedTensor:
            values = self.draw_uniform(*shape_a, bound=1 / math.sqrt(self.in_features), generator=generator)
            return SharedTensor("lora_a", values, trains=True)

        def make_b(_: torch.Generator | None) -> SharedTensor:
            return SharedTensor("lora_b", self.zeros(*shape_b), trains=True)

        self.factor_a = self.share(f"A {group} in={self.in_features}" if "a" in share else None, make_a, shape_a)
        self.factor_b = self.share(f"B {group} out={self.out_features}" if "b" in share else None, make_b, shape_b)

    @property
    def lora_a(self) -> Tensor:  # type: ignore[override]  # it stands in the module that its layers share
        """A ``(r, in)``."""
        return self.factor_a.tensor

    @property
    def lora_b(self) -> Tensor:  # type: ignore[override]
        """B ``(out, r)``."""
        return self.factor_b.tensor

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        return {**self.low_rank_config(), "share": self.shared_factors, "scope": self.scope, "dropout": self.dropout}

    def effective_weight(self) -> Tensor:
        """``W + s B A``, ``(out, in)``."""
        return self.base_weight() + self.scale * (self.lora_b @ self.lora_a)

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """A and ``s B``."""
        return self.lora_a.detach().clone(), self.scale * self.lora_b

    def adapted_forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b + s (x̃ Aᵀ) Bᵀ`` without the dense update."""
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.base_weight(), self.bias, self.lora_a, self.lora_b, self.scale, dropout=dropout)
