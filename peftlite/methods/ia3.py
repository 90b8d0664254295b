"""(IA)³: Liu et al. 2022, arXiv:2205.05638."""

from typing import Any, final

import torch
from torch import Tensor, nn

from peftlite.adapter import AdapterLinear
from peftlite.kernels.dispatch import compute_dtype


@final
class IA3Linear(AdapterLinear):
    """Compute ``y = l ⊙ (x Wᵀ) + b`` or ``y = (l ⊙ x) Wᵀ + b``: a learnt factor per output or per input feature.

    ``l`` is `factor`, 1 at birth. Trained: ``out`` parameters per layer, or ``in`` with ``side="in"``: the least of all
    methods here. Cost: one pass over the output or the input, no product. There is no rank; `rank` is ignored, and 1 will do.

    Use it for very little data, or where thousands of tasks each need their own adapter. The paper rescales keys and
    values (``side="out"`` on them) and the input of a feed-forward block's second layer (``side="in"`` on it); here all
    targets of one `inject_adapters` have the same side. Learning rates are an order of magnitude above LoRA's: the paper
    takes 3e-3.

    We differ where a layer has a bias: it stays outside of the factor, as in our DoRA, so that the layer is its
    `effective_weight` and the base's own bias; Hugging Face PEFT scales it too. T5, the paper's model, has none.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ignored, but checked as everywhere.
        side: ``"out"`` or ``"in"``.

    Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
    arXiv:2205.05638.

    Example:
        >>> layer = IA3Linear(16, 32, rank=1)
        >>> {name: tuple(p.shape) for name, p in layer.adapter_parameters().items()}
        {'factor': (32,)}
    """

    method = "ia3"

    def build(self, *, side: str = "out") -> None:
        """Create the factors."""
        if side not in ("out", "in"):
            raise ValueError(f"side must be 'out' or 'in', got {side!r}.")
        self.side = side
        self.factor = nn.Parameter(self.zeros(self.out_features if side == "out" else self.in_features) + 1)

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        return {**self.basic_config(), "side": self.side}

    def effective_weight(self) -> Tensor:
        """``diag(l) W`` or ``W diag(l)``, ``(out, in)``."""
        return (self.factor[:, None] if self.side == "out" else self.factor) * self.base_weight()

    def adapted_forward(self, x: Tensor) -> Tensor:
        """One product with W, and one pass over its input or output."""
        dtype = compute_dtype(x)
        # The factor keeps its own dtype: beside 1, bf16 has no room for what it learns.
        if self.side == "in":
            return self.base_forward((self.factor * x.to(dtype)).to(dtype))
        # l ⊙ (x Wᵀ + b) + (1 - l) b: with a factor of 1 these are the bits of the base layer, whose product adds b before
        # it rounds.
        y = self.factor * self.base_forward(x)
        return (y if self.bias is None else torch.addcmul(y, 1 - self.factor, self.bias.to(y.dtype))).to(dtype)
