"""VeRA: Kopiczko et al. 2023, arXiv:2310.11454."""

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import Self

from peftlite.adapter import AdapterLinear
from peftlite.kernels.lora_linear import lora_linear
from peftlite.options import check_dropout
from peftlite.sharing import SharedTensor, seeded_generator


class FrozenBasis(SharedTensor):
    """A frozen matrix ``(rows, r)``, uniform in ``±√3`` (variance 1), that a seed fixes: any prefix of its rows does not
    depend on how many there are. It grows to the largest layer that holds it, and draws itself anew where a move would
    leave it without values, as it is part of the state only on request."""

    def __init__(self, name: str, seed: int, rows: int, rank: int, like: Tensor, *, saved: bool) -> None:
        self.seed = seed
        super().__init__(name, like.new_empty(0, rank), trains=False, persistent=saved)
        self.offer((rows, rank))

    def offer(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`shape` itself: where the basis has fewer rows, it grows."""
        if shape[0] > self.tensor.shape[0]:
            setattr(self, self.name, self._draw(self.tensor.new_empty(shape)))
        return shape

    def _draw(self, empty: Tensor) -> Tensor:
        if empty.is_meta:
            return empty
        # On the CPU in fp32, so that a seed means the same values on every device and in every dtype.
        values = torch.empty(empty.shape, dtype=torch.float32)
        values.uniform_(-math.sqrt(3), math.sqrt(3), generator=seeded_generator(self.seed, f"vera {self.name}"))
        return empty.copy_(values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.tensor
        super()._apply(fn, recurse)
        if before.is_meta:
            self._draw(self.tensor)
        elif not self.tensor.is_meta:
            self.tensor.copy_(before)  # `to_empty` leaves no values, and nothing would load them
        return self


@final
class VeRALinear(AdapterLinear):
    """Compute ``y = x Wᵀ + bias + s b ⊙ (B (d ⊙ (A dropout(x))))``: two vectors train, A and B are frozen, random and shared.

    ``A (r, in)`` and ``B (out, r)`` are slices of one pair of matrices for the whole model, ``d (r,)`` is `vera_d`, born as
    `d_init`, ``b (out,)`` is `vera_b`, born zero, so that an injected model computes bit for bit what it computed before.
    Trained: ``r + out`` parameters, few enough that ranks of 256 to 1024 pay, also above ``min(in, out)``. A step costs
    what LoRA of that rank costs, less a third of its low-rank backward pass, as A has no gradient; nor is the input kept
    for it. The bases take ``r (max in + max out)`` values of memory, once for the model.

    Use it where many adapters are stored or served: a file holds two vectors per layer. It wants a learning rate some ten
    times LoRA's.

    The entries of A have the variance ``2 / in`` and those of B ``2 / r`` (Kaiming), as in the paper. We draw bases of
    variance 1 and keep the factors in the constant ``s = 2 / √(in r)``, with each layer's own ``in``: so a layer's update
    does not depend on which other layers are adapted, where an A drawn for the largest layer would scale the others by
    its size. The bases depend on `basis_seed` alone, not on the seed of the injection, so that they are the same in every
    process, on every device, and after ``load_state_dict`` into a model with the same options.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r``, any positive integer.
        d_init: initial value of every element of d; the paper recommends 0.1 or less.
        basis_seed: fixes A and B.
        save_bases: whether A and B are part of the state, saved once for all layers. They are rebuilt from the seed
            otherwise, which relies on torch's generator giving the same numbers in times to come.
        dropout: probability of dropping an element of the input of the low-rank path, in training mode.

    Source: Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454.

    Example:
        >>> from peftlite import inject_adapters, summary
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2))
        >>> summary(inject_adapters(model, "all-linear", rank=64, method="vera")).trained
        162
        >>> model[0].basis_in is model[2].basis_in
        True
    """

    method = "vera"

    def build(
        self, *, d_init: float = 0.1, basis_seed: int = 0, save_bases: bool = False, dropout: float = 0.0
    ) -> None:
        """Create d and b, and find the bases in the pool or make them."""
        if isinstance(d_init, bool) or not isinstance(d_init, (int, float)) or not 0 < abs(d_init) < math.inf:
            raise ValueError(f"d_init must be a finite number other than 0, or d and b would never move, got {d_init!r}.")
        if isinstance(basis_seed, bool) or not isinstance(basis_seed, int):
            raise ValueError(f"basis_seed must be an integer, got {basis_seed!r}.")
        self.d_init, self.basis_seed, self.save_bases = float(d_init), basis_seed, save_bases
        self.dropout = check_dropout(dropout)
        self.scale = 2 / math.sqrt(self.in_features * self.rank)
        like = self.zeros(0)
        self.basis_in = self._basis("basis_in", self.in_features, like)
        self.basis_out = self._basis("basis_out", self.out_features, like)
        self.vera_d = nn.Parameter(like.new_full((self.rank,), self.d_init))
        self.vera_b = nn.Parameter(like.new_zeros(self.out_features))

    def _basis(self, name: str, rows: int, like: Tensor) -> FrozenBasis:
        return self.share(
            # Layers on different devices have their own copies; the seed makes them equal.
            f"{name} r={self.rank} seed={self.basis_seed} saved={self.save_bases} {like.dtype} {like.device}",
            lambda _: FrozenBasis(name, self.basis_seed, rows, self.rank, like, saved=self.save_bases),
            (rows, self.rank),
        )

    @staticmethod
    def check_rank(rank: int, in_features: int, out_features: int, where: str = "") -> None:
        """Raise a `ValueError` unless `rank` is a positive integer."""
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"{where}rank must be a positive integer, got {rank!r}.")

    @property
    def lora_a(self) -> Tensor:  # type: ignore[override]  # a slice of what all layers hold
        """The frozen A ``(r, in)``, of variance 1."""
        return self.basis_in.tensor[: self.in_features].T

    @property
    def lora_b(self) -> Tensor:  # type: ignore[override]
        """The frozen B ``(out, r)``, of variance 1."""
        return self.basis_out.tensor[: self.out_features]

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        return {
            **self.basic_config(),
            "d_init": self.d_init,
            "basis_seed": self.basis_seed,
            "save_bases": self.save_bases,
            "dropout": self.dropout,
        }

    def _scaled_b(self) -> Tensor:
        """``diag(b) B diag(d)``: both vectors in the one factor that has a gradient then, so that A has none."""
        return self.vera_b[:, None] * self.lora_b * self.vera_d

    def effective_weight(self) -> Tensor:
        """``W + s diag(b) B diag(d) A``, ``(out, in)``."""
        return self.base_weight() + self.scale * (self._scaled_b() @ self.lora_a)

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """A and ``s diag(b) B diag(d)``."""
        return self.lora_a.clone(memory_format=torch.contiguous_format), self.scale * self._scaled_b()

    def adapted_forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + bias + s b ⊙ (B (d ⊙ (A x̃)))`` without a dense update."""
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.base_weight(), self.bias, self.lora_a, self._scaled_b(), self.scale, dropout=dropout)
