"""Tied-LoRA: Renduchintala et al. 2023, arXiv:2311.09578."""

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from peftlite.adapter import AdapterLinear
from peftlite.kernels.lora_linear import lora_linear
from peftlite.options import check_dropout
from peftlite.sharing import SharedTensor, check_scope, group_of

FLAGS = ("train_a", "train_b", "train_u", "train_v", "tie_a", "tie_b")
PRESETS: dict[str, tuple[bool, ...]] = {  # in the order of FLAGS
    "lora": (True, True, False, False, False, False),
    "tl5": (True, True, False, False, True, True),
    "tl6": (True, True, True, True, True, True),
    "vera_like": (False, False, True, True, True, True),
}


@final
class TiedLoRALinear(AdapterLinear):
    """Compute ``y = x Wᵀ + b + s v ⊙ (B (u ⊙ (A dropout(x))))``, where A and B may be tied over the layers, and each may train.

    ``A (r, in)`` and ``B (out, r)`` are one for all layers of a type if they are tied; ``u (r,)`` is `tied_u` and
    ``v (out,)`` is `tied_v`, always the layer's own. What does not train is frozen: A and B at random values, u and v at 1,
    where they are left out. Trained, for L layers of one type: ``train_a · r in + train_b · r out`` (times L where
    untied) ``+ L (train_u · r + train_v · out)``. A step costs what LoRA's costs.

    Use ``"tl6"``, the default, to have LoRA's quality within a point or two at an eighth of its parameters; ``"tl5"`` where
    even that is too much. ``"lora"`` and ``"vera_like"`` are the corners that other methods are known by.

    An injected model computes bit for bit what it computed before, as the leftmost factor that trains is born zero:
    B if it trains, else v, else u, else A. The others are born as LoRA's A, uniform in ``±1/√fan-in``, u and v as 1.
    The paper does not say how it starts with a frozen B; this is our reading. Nor could we confirm which combinations it
    calls TL1 to TL4: they are among the flags, under no name. TL5 and TL6 are named by the parameter counts that it gives.
    It adapts the fused projection of queries, keys and values. Where they are apart, ``scope="qkv"`` gives the three one
    A, and each its own B, as the fused layer has it; u stays one per projection.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r``.
        preset: ``"lora"``, ``"tl5"``, ``"tl6"`` or ``"vera_like"``: values for the flags that are not given.
        train_a: whether A trains.
        train_b: whether B trains.
        train_u: whether u trains.
        train_v: whether v trains.
        tie_a: whether A is one for all layers of a type.
        tie_b: whether B is.
        scope: which layers are of one type: ``"type"``, those in the same place of repeated blocks; ``"qkv"``, the same, with
            query, key and value taken together for A; ``"shape"``, all layers of one shape.
        alpha: scaling numerator, by default the rank (``s = 1``), as in the paper.
        rslora: ``s = alpha / √rank`` (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an element of the input of the low-rank path, in training mode.

    Source: Renduchintala et al. 2023, "Tied-LoRA: Enhancing parameter efficiency of LoRA with weight tying", arXiv:2311.09578.

    Example:
        >>> from peftlite import inject_adapters, summary
        >>> model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
        >>> summary(inject_adapters(model, "all-linear", rank=2, method="tied_lora")).trained
        136
        >>> 2 * 16 + 2 * 16 + 4 * (2 + 16)
        136
    """

    method = "tied_lora"

    def build(
        self,
        *,
        preset: str = "tl6",
        train_a: bool | None = None,
        train_b: bool | None = None,
        train_u: bool | None = None,
        train_v: bool | None = None,
        tie_a: bool | None = None,
        tie_b: bool | None = None,
        scope: str = "type",
        alpha: float | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """Create A, B, u and v, or find A and B in the pool."""
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}, got {preset!r}.")
        given = (train_a, train_b, train_u, train_v, tie_a, tie_b)
        self.flags = {
            flag: default if value is None else value
            for flag, value, default in zip(FLAGS, given, PRESETS[preset], strict=True)
        }
        for flag, value in self.flags.items():
            if not isinstance(value, bool):
                raise ValueError(f"{flag} must be True or False, or None for the preset's, got {value!r}.")
        a_trains, b_trains, u_trains, v_trains, a_tied, b_tied = self.flags.values()
        if not (a_trains or b_trains or u_trains or v_trains):
            raise ValueError("nothing would train: set one of train_a, train_b, train_u, train_v, or use another preset.")
        check_scope(scope, self._pool.names if self._pool else ())
        self.preset, self.scope, self.dropout = preset, scope, check_dropout(dropout)
        self.set_scale(alpha, rslora)
        # The leftmost factor that trains is born zero: nothing left of it is, so that it has a gradient.
        zero = next(name for name, trains in zip("bvua", (b_trains, v_trains, u_trains, a_trains), strict=True) if trains)
        self.factor_a = self._factor("lora_a", self.rank, self.in_features, a_trains, zero == "a", scope if a_tied else None)
        scope_b = "type" if scope == "qkv" else scope
        self.factor_b = self._factor("lora_b", self.out_features, self.rank, b_trains, zero == "b", scope_b if b_tied else None)
        self.tied_u = nn.Parameter(self.zeros(self.rank) + float(zero != "u")) if u_trains else None
        self.tied_v = nn.Parameter(self.zeros(self.out_features) + float(zero != "v")) if v_trains else None

    def _factor(self, name: str, rows: int, columns: int, trains: bool, zero: bool, scope: str | None) -> SharedTensor:
        def make(generator: torch.Generator | None) -> SharedTensor:
            bound = 0.0 if zero else 1 / math.sqrt(columns)
            return SharedTensor(name, self.draw_uniform(rows, columns, bound=bound, generator=generator), trains=trains)

        key = None if scope is None else f"{name} {group_of(self._name, scope)} {rows} x {columns}"
        return self.share(key, make, (rows, columns))

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
        return {
            **self.low_rank_config(),
            "preset": self.preset,
            **self.flags,
            "scope": self.scope,
            "dropout": self.dropout,
        }

    def _scaled_b(self) -> Tensor:
        """``diag(v) B diag(u)``: both vectors in one factor, so that a frozen A has no gradient, and x need not be kept."""
        b = self.lora_b
        if self.tied_v is not None:
            b = self.tied_v[:, None] * b
        return b if self.tied_u is None else b * self.tied_u

    def effective_weight(self) -> Tensor:
        """``W + s diag(v) B diag(u) A``, ``(out, in)``."""
        return self.base_weight() + self.scale * (self._scaled_b() @ self.lora_a)

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """A and ``s diag(v) B diag(u)``."""
        return self.lora_a.detach().clone(), self.scale * self._scaled_b()

    def adapted_forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b + s v ⊙ (B (u ⊙ (A x̃)))`` without a dense update."""
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.base_weight(), self.bias, self.lora_a, self._scaled_b(), self.scale, dropout=dropout)
