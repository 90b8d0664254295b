"""PiSSA: Meng et al. 2024, arXiv:2404.02948."""

from typing import Any, final

import torch
from torch import Tensor

from peftlite.starting_point import StartingPointLinear

OVERSAMPLING = 8  # further directions that the fast decomposition carries along (Halko et al. 2011)


@final
class PiSSALinear(StartingPointLinear):
    """Compute ``y = x Wᵀ + b + s (dropout(x) (B A - B₀ A₀)ᵀ)``: LoRA that starts as the r largest singular directions of W.

    ``B₀ = U √(Σ / s)`` and ``A₀ = √(Σ / s) Vᵀ`` from the largest r singular values of W, so that ``s B₀ A₀`` is the best
    approximation of W of rank r: what trains is the principal part, where LoRA starts from noise and zero. A is `lora_a`,
    B is `lora_b`, and they start as the buffers `start_a` and `start_b`. Trained: ``r (in + out)`` parameters, as LoRA.
    Cost: LoRA's at rank 2 r, and one decomposition per layer at birth.

    Use it where LoRA learns too slowly in the first epoch. Weight decay pulls the principal part to zero: the paper uses
    none.

    We differ: the paper writes the residual ``W - s B₀ A₀`` into the base, and the adapter is of no use without that base.
    Here the base stays as it is, bit for bit, and the starting point is subtracted in the forward pass; an injected model
    computes exactly what it computed before. Hence a quantised base keeps its error (QPiSSA's smaller one comes from
    quantising the residual), and the file holds the starting point too, since no two machines decompose W alike.
    `convert_to_lora` writes it as LoRA of rank 2 r.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r``.
        alpha: scaling numerator, by default the rank (``s = alpha / rank = 1``).
        rslora: ``s = alpha / √rank`` (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an element of the input of the low-rank path, in training mode.
        svd_iterations: None (default) decomposes exactly, in ``O(in out min(in, out))`` operations. A number takes the
            paper's fast way, randomised subspace iteration (Halko et al. 2011, arXiv:0909.4061) with so many passes, in
            ``O(in out r)`` each; the paper takes 4 or more.

    Raises:
        ValueError: if W is not finite, or `svd_iterations` is negative.

    Source: Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    arXiv:2404.02948.

    Example:
        >>> layer = PiSSALinear(16, 32, rank=4)
        >>> int(torch.linalg.matrix_rank(layer.lora_b @ layer.lora_a)), torch.equal(layer.effective_weight(), layer.weight)
        (4, True)
    """

    method = "pissa"

    def build(
        self,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
        svd_iterations: int | None = None,
    ) -> None:
        """Decompose W, and create A and B."""
        self.set_scale(alpha, rslora)
        if svd_iterations is not None and (isinstance(svd_iterations, bool) or svd_iterations < 0):
            raise ValueError(f"svd_iterations must be None (exact) or a number from 0, got {svd_iterations!r}.")
        self.svd_iterations = svd_iterations
        weight = self.dense_base()
        if svd_iterations is None:
            u, values, vt = torch.linalg.svd(weight, full_matrices=False)
        else:
            u, values, vt = self._fast_svd(weight, svd_iterations)
        root = (values[: self.rank] / self.scale).sqrt()
        self.start_at(root[:, None] * vt[: self.rank], u[:, : self.rank] * root, dropout)

    def _fast_svd(self, weight: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
        width = min(self.rank + OVERSAMPLING, *weight.shape)
        probe = torch.randn(self.in_features, width, generator=self._generator, dtype=torch.float32)
        q = torch.linalg.qr(weight @ probe.to(weight.device, weight.dtype)).Q
        for _ in range(iterations):
            q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ q).Q).Q
        u, values, vt = torch.linalg.svd(q.T @ weight, full_matrices=False)
        return q @ u, values, vt

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        return {**super().config(), "svd_iterations": self.svd_iterations}
