"""MELoRA: Ren et al. 2024, arXiv:2402.17263."""

from typing import Any, final

import torch
from torch import Tensor

from peftlite.adapter import AdapterLinear
from peftlite.kernels.lora_linear import lora_linear
from peftlite.options import check_dropout


@final
class MELoRALinear(AdapterLinear):
    """Compute ``y = x Wᵀ + b + s (dropout(x) diag(A₁…Aₙ)ᵀ) diag(B₁…Bₙ)ᵀ``: n small LoRAs side by side.

    The input and the output are cut into n chunks; mini adapter k reads chunk k of the input and writes chunk k of the
    output. All Aₖ side by side are `lora_a` ``(r, in)``, all Bₖ on top of one another `lora_b` ``(out, r)``, so that
    ``ΔW = s (B A) ⊙ mask``, where the mask keeps the n diagonal blocks. Its rank goes up to ``n r``, for LoRA's price
    of rank r: ``r (in + out)`` trained parameters, whatever n. ``s = alpha / rank``.

    The n products are done as one of rank ``n r`` with the block-diagonal factors, which costs LoRA's time at that rank
    and one kernel instead of n small ones.

    Use it where LoRA needs a higher rank than there is memory for (optimizer state, checkpoints per task). Features that
    lie far apart cannot influence each other within one layer; with attention, chunks follow the heads.

    We differ: chunks need not be of equal size, as in `torch.tensor_split`, so that n need not divide the layer's sizes;
    all mini adapters have one rank; inputs have any number of dimensions (the authors' code takes three and cannot
    merge); one dropout mask serves all chunks, which is the same as one each, since every element is read once.
    Aₖ is uniform in ``±1/√inₖ``, as LoRA of its size.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r`` of each mini adapter.
        blocks: ``n``; by default 2, the authors' choice on GLUE, or 1 where two blocks of this rank do not fit.
        alpha: scaling numerator, by default the rank.
        rslora: ``s = alpha / √rank`` (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an element of the input of the adapters, in training mode.

    Raises:
        ValueError: if a block would be smaller than its rank.

    Source: Ren et al. 2024, "MELoRA: Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning",
    arXiv:2402.17263.

    Example:
        >>> layer = MELoRALinear(16, 32, rank=2, blocks=4)
        >>> sum(p.numel() for p in layer.adapter_parameters().values())
        96
        >>> _ = torch.nn.init.normal_(layer.lora_b)
        >>> int(torch.linalg.matrix_rank(layer.effective_weight() - layer.weight))
        8
    """

    method = "melora"

    def build(
        self, *, blocks: int | None = None, alpha: float | None = None, rslora: bool = False, dropout: float = 0.0
    ) -> None:
        """Create A and B."""
        smaller = min(self.in_features, self.out_features)
        if blocks is None:
            blocks = 2 if 2 * self.rank <= smaller else 1
        if isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= blocks <= smaller // self.rank:
            raise ValueError(
                f"blocks must be an integer from 1 to {smaller // self.rank} for rank {self.rank} in a layer of "
                f"{self.in_features} -> {self.out_features} features (no block may be smaller than its rank), got {blocks!r}."
            )
        self.blocks, self.dropout = blocks, check_dropout(dropout)
        self.create_factors(alpha, rslora)
        with torch.no_grad():
            for chunk in self.lora_a.tensor_split(blocks, dim=1):
                chunk *= (self.in_features / chunk.shape[1]) ** 0.5

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        return {**self.low_rank_config(), "blocks": self.blocks, "dropout": self.dropout}

    def block_diagonal(self) -> tuple[Tensor, Tensor]:
        """``diag(A₁…Aₙ) (n r, in)`` and ``diag(B₁…Bₙ) (out, n r)``."""
        a, b = self.lora_a.tensor_split(self.blocks, dim=1), self.lora_b.tensor_split(self.blocks)
        return torch.block_diag(*a), torch.block_diag(*b)

    def effective_weight(self) -> Tensor:
        """``W + s diag(B₁A₁, …, BₙAₙ)``, ``(out, in)``."""
        a, b = self.lora_a.tensor_split(self.blocks, dim=1), self.lora_b.tensor_split(self.blocks)
        return self.base_weight() + self.scale * torch.block_diag(*(bk @ ak for ak, bk in zip(a, b, strict=True)))

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """The block-diagonal factors, of rank ``n r``, the scale in B."""
        a, b = self.block_diagonal()
        return a, self.scale * b

    def adapted_forward(self, x: Tensor) -> Tensor:
        """LoRA of rank ``n r`` with block-diagonal factors."""
        a, b = (self.lora_a, self.lora_b) if self.blocks == 1 else self.block_diagonal()
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.base_weight(), self.bias, a, b, self.scale, dropout=dropout)
