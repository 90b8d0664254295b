"""DoRA: Liu et al. 2024, arXiv:2402.09353."""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import Self

from peftlite.adapter import AdapterLinear
from peftlite.kernels.dora_linear import dora_linears
from peftlite.kernels.row_norm import BaseSquare, row_norm
from peftlite.kernels.summed_output import SummedOutput
from peftlite.kernels.weight_decomposed import EPS, DoRAArguments
from peftlite.options import check_dropout


@final
class DoRALinear(AdapterLinear):
    """Compute ``y = g ⊙ (x Wᵀ + s (dropout(x) Aᵀ) Bᵀ) + b``, ``g = m / ‖W + s B A‖_row``: direction and magnitude apart.

    ``A (r, in)`` is `lora_a`, ``B (out, r)`` is `lora_b`, ``m (out,)`` is `magnitude`, one per output feature, born as the
    row norms of W, so that g is exactly 1 and an injected model computes bit for bit what it computed before. Trained:
    ``r (in + out) + out`` parameters. The magnitude stays in fp32 when the model is cast to 16 bits: in bf16 most
    of its updates would round to nothing.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r``.
        alpha: scaling numerator, by default the rank (``s = 1``).
        rslora: ``s = alpha / √rank`` (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an element of the input, in training mode.
        dropout_mode: ``"lowrank"`` (default) drops on the low-rank path only; ``"peft"`` drops on the base path of the
            direction too, as Hugging Face PEFT does, which costs a second product with W.
        norm_grad: differentiate through the norm. By default it is a constant of the graph (§4.3 of the paper).
        keep_output: keep the output for the gradient of the magnitude. What follows often keeps it too, and then it is there
            once. Where it does not, False spares that memory for one more product with W in the backward pass, and for a
            residual sum `peftlite.residual_sum` does without that product. May be set on a single layer at any time,
            ``layer.keep_output = False``; of layers that run together (`fuse`) the first one's setting holds.

    Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353.

    Example:
        >>> layer = DoRALinear(16, 32, rank=4)
        >>> torch.equal(layer.effective_weight(), layer.weight)  # until it is trained
        True
    """

    method = "dora"

    def build(
        self,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
        dropout_mode: str = "lowrank",
        norm_grad: bool = False,
        keep_output: bool = True,
    ) -> None:
        """Create A, B and the magnitude."""
        if dropout_mode not in ("lowrank", "peft"):
            raise ValueError(f"dropout_mode must be 'lowrank' or 'peft', got {dropout_mode!r}.")
        self.dropout, self.dropout_mode, self.norm_grad = check_dropout(dropout), dropout_mode, norm_grad
        self.keep_output: bool | SummedOutput = keep_output  # an offer during a call by `residual_sum`, and only then
        self.create_factors(alpha, rslora)
        self._base_square = BaseSquare()
        self.magnitude = nn.Parameter(row_norm(self.base_weight(), self.lora_a, self.lora_b, self.scale))

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        return {
            **self.low_rank_config(),
            "dropout": self.dropout,
            "dropout_mode": self.dropout_mode,
            "norm_grad": self.norm_grad,
            "keep_output": self.keep_output,
        }

    def effective_weight(self) -> Tensor:
        """``diag(m / ‖W + s B A‖_row) (W + s B A)``, ``(out, in)``."""
        direction = self.base_weight() + self.scale * (self.lora_b @ self.lora_a)
        # The very numbers of the forward pass, so that the gain is exactly 1 at birth here too
        norm = row_norm(self.base_weight(), self.lora_a, self.lora_b, self.scale)
        if self.norm_grad and torch.is_grad_enabled():
            own = torch.linalg.vector_norm(direction, dim=1)
            norm = own + (norm - own.detach())  # exact, since the two are close: the number of one, the gradient of the other
        return (self.magnitude / norm.clamp_min(EPS))[:, None] * direction

    def adapted_forward(self, x: Tensor) -> Tensor:
        """``g ⊙ (x Wᵀ + s (x̃ Aᵀ) Bᵀ) + b`` without a dense weight."""
        return self.fused_forward([self], x)[0]

    @classmethod
    def fused_forward(cls, layers: Sequence[Self], x: Tensor) -> list[Tensor]:
        """The same for several layers that read one x."""
        first = layers[0]
        return dora_linears(
            x,
            [layer._arguments() for layer in layers],
            dropout=first.dropout if first.training else 0.0,
            dropout_mode=first.dropout_mode,
            norm_grad=first.norm_grad,
            keep_output=first.keep_output,
            base_squares=[layer._base_square for layer in layers],
        )

    def _arguments(self) -> DoRAArguments:
        return DoRAArguments(self.base_weight(), self.bias, self.lora_a, self.lora_b, self.magnitude, self.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        magnitude, gradient = self.magnitude, self.magnitude.grad

        def apply(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if (tensor is magnitude or tensor is gradient) and result.dtype.itemsize < 4:
                return tensor.to(result.device, torch.float32)
            return result

        return super()._apply(apply, recurse)
