"""PaCA: Woo et al. 2025, arXiv:2503.01905."""

from typing import Any, final

import torch
from torch import Tensor, nn

from peftlite.adapter import AdapterLinear
from peftlite.kernels.paca_linear import paca_linear


@final
class PaCALinear(AdapterLinear):
    """Compute ``y = x Wᵀ + b + s x[:, idx] Dᵀ``: r columns of W train, drawn at random, and the others stay.

    ``idx (r,)`` is the buffer `index`; ``D (out, r)``, zero at birth, is `columns`: how far the columns ``W[:, idx]`` have
    moved. It is LoRA whose A is a frozen choice of inputs. Trained: ``r out`` parameters per layer. There is no product
    with A, forward or backward, and kept for the backward pass is ``x[..., idx] (M, r)``: no input, no ``x Aᵀ``.

    Use it where LoRA's additional products cost time and its inputs memory ("LoRA Is Slower Than You Think", Ko 2025,
    arXiv:2507.08833): the gradient of D is full fine-tuning's, for these columns. It wants a learning rate near full
    fine-tuning's at ``s = 1``, and twice as many columns as LoRA has ranks for as many parameters.

    We differ: the authors rewrite W in place in each forward, in step with a counter of accumulated gradients. Here W is
    never written. Its columns and D meet in the output, where an update below half an ulp of a 16-bit W still counts.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r``, how many columns train.
        alpha: scaling numerator, by default the rank (``s = alpha / rank = 1``).
        rslora: ``s = alpha / √rank`` (Kalajdzievski 2023, arXiv:2312.03732).

    Source: Woo et al. 2025, "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", arXiv:2503.01905.

    Example:
        >>> layer = PaCALinear(16, 32, rank=4)
        >>> {name: tuple(t.shape) for name, t in layer.adapter_state().items()}
        {'columns': (32, 4), 'index': (4,)}
    """

    method = "paca"
    index: Tensor

    def build(self, *, alpha: float | None = None, rslora: bool = False) -> None:
        """Draw the columns, and create D."""
        self.set_scale(alpha, rslora)
        index = torch.randperm(self.in_features, generator=self._generator)[: self.rank].sort().values
        self.columns = nn.Parameter(self.zeros(self.out_features, self.rank))
        self.register_buffer("index", index.to(self.weight.device))

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        return self.low_rank_config()

    def effective_weight(self) -> Tensor:
        """``W`` with ``s D`` added to its columns ``idx``, ``(out, in)``."""
        base = self.base_weight()
        wide = base.to(torch.promote_types(base.dtype, self.columns.dtype))
        return wide.index_add(1, self.index, self.scale * self.columns.to(wide.dtype))

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """The choice of inputs as a matrix of zeros and ones, and ``s D``."""
        a = self.columns.new_zeros(self.rank, self.in_features)
        a.scatter_(1, self.index[:, None], 1.0)
        return a, self.scale * self.columns

    def adapted_forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b + s x[:, idx] Dᵀ``."""
        return paca_linear(x, self.base_weight(), self.bias, self.columns, self.index, self.scale)
