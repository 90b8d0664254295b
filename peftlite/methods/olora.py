"""OLoRA: Büyükakyüz 2024, arXiv:2406.01775."""

from typing import final

import torch

from peftlite.starting_point import StartingPointLinear


@final
class OLoRALinear(StartingPointLinear):
    """Compute ``y = x Wᵀ + b + s (dropout(x) (B A - B₀ A₀)ᵀ)``: LoRA that starts with an orthonormal basis taken from W.

    ``W = Q R``; ``B₀`` holds the first r columns of Q, orthonormal, and ``A₀`` the first r rows of R. A is `lora_a`, B is
    `lora_b`, and they start as the buffers `start_a` and `start_b`. Trained: ``r (in + out)`` parameters, as LoRA. Cost:
    LoRA's at rank 2 r, and one QR decomposition per layer at birth.

    Use it as PiSSA, of which it is the cheaper relative: a QR decomposition costs a small part of an SVD, but its first r
    directions are those of the first r columns of W and not the largest ones.

    We differ: the paper writes ``W - s B₀ A₀`` into the base. Here the base stays as it is, bit for bit, and the starting
    point is subtracted in the forward pass; the file holds it too. `convert_to_lora` writes it as LoRA of rank 2 r.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r``.
        alpha: scaling numerator, by default the rank (``s = alpha / rank = 1``).
        rslora: ``s = alpha / √rank`` (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an element of the input of the low-rank path, in training mode.

    Raises:
        ValueError: if W is not finite.

    Source: Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv:2406.01775.

    Example:
        >>> layer = OLoRALinear(16, 32, rank=4)
        >>> bool((layer.lora_b.T @ layer.lora_b - torch.eye(4)).abs().max() < 1e-5)
        True
    """

    method = "olora"

    def build(self, *, alpha: float | None = None, rslora: bool = False, dropout: float = 0.0) -> None:
        """Decompose W, and create A and B."""
        self.set_scale(alpha, rslora)
        q, r = torch.linalg.qr(self.dense_base())
        self.start_at(r[: self.rank], q[:, : self.rank], dropout)
