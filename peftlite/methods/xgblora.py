"""XGBLoRA: Zhang et al. 2024, arXiv:2410.19694."""

import math
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftlite.adapter import AdapterLinear
from peftlite.kernels.lora_linear import lora_linear
from peftlite.training.controller import Controller, check_count


@final
class XGBLoRALinear(AdapterLinear):
    """Compute ``y = x (W + Σ_k η s B_k A_k + s B A)ᵀ + b``: gradient boosting, one short-lived pair of low rank after another.

    ``A (r, in)`` is `lora_a`, ``B (out, r)`` is `lora_b`, the booster that trains; those of earlier rounds are frozen side by
    side in `boosters_a (R, in)` and `boosters_b (out, R)`. Trained: ``r (in + out)`` parameters at a time, usually with r = 1;
    all rounds together make an update of rank ``r`` times their number. `XGBLoRA` is the controller that ends the rounds;
    without it the layer is LoRA.

    Use it for the quality of a high rank with the optimizer's state and the gradients of rank 1. The parameters that train
    at a time flatter it: those of all rounds make up the adapter (`XGBLoRA.parameter_counts` says both).

    Where we differ: the paper adds each booster to W. Here W is never written; boosters are kept, in the adapter's dtype, for
    thousands of small updates would be lost in a 16-bit weight, and a quantised one has nowhere to put them. `to_lora` gives
    them as one LoRA, `merge_adapters` the paper's artefact. They never take more than ``min(in, out)`` columns, at which their
    exact product fits. The paper has no code and names no defaults: here the rank is yours, all layers take part
    in each round, and its penalty ``λ (‖A‖² + ‖B‖²)`` is the optimizer's weight decay.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r`` of a booster; 1 in the paper.
        alpha: numerator of the scale ``s``, by default the rank (``s = 1``).
        rslora: ``s = alpha / √rank`` (Kalajdzievski 2023, arXiv:2312.03732).
        boosted_rank: ``R``, columns of the boosters kept so far; set by loading.

    Source: Zhang et al. 2024, "Less is More: Extreme Gradient Boost Rank-1 Adaption for Efficient Finetuning of LLMs", arXiv:2410.19694.

    Example:
        >>> model = peftlite.inject_adapters(nn.Sequential(nn.Linear(16, 32)), "0", rank=1, method="xgblora")
        >>> optimizer = torch.optim.AdamW(peftlite.param_groups(model, lr=1e-2))
        >>> boosting = XGBLoRA(model, optimizer, steps_per_round=2, rounds=3)
        >>> for _ in range(6):
        ...     model(torch.randn(4, 16)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> [tuple(factor.shape) for factor in model[0].to_lora()]  # three boosters as one LoRA
        [(3, 16), (32, 3)]
    """  # noqa: E501  (the title)

    method = "xgblora"

    boosters_a: Tensor
    boosters_b: Tensor

    def build(self, *, alpha: float | None = None, rslora: bool = False, boosted_rank: int = 0) -> None:
        """Create A and B, and room for the boosters of earlier rounds."""
        check_count("boosted_rank", boosted_rank)
        self.create_factors(alpha, rslora)
        self.register_buffer("boosters_a", self.zeros(boosted_rank, self.in_features))
        self.register_buffer("boosters_b", self.zeros(self.out_features, boosted_rank))

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        return {**self.low_rank_config(), "boosted_rank": self.boosters_a.shape[0]}

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A (R + r, in)`` and ``B (out, R + r)`` of all boosters, scales folded into B."""
        return torch.cat([self.boosters_a, self.lora_a]), torch.cat([self.boosters_b, self.scale * self.lora_b], dim=1)

    def effective_weight(self) -> Tensor:
        """``W + Σ_k η s B_k A_k + s B A``, ``(out, in)``."""
        a, b = self.factors()
        return self.base_weight() + b @ a

    def adapted_forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b + (x Aᵀ) Bᵀ`` with the factors of all boosters side by side."""
        if not self.boosters_a.shape[0]:
            return lora_linear(x, self.base_weight(), self.bias, self.lora_a, self.lora_b, self.scale)
        return lora_linear(x, self.base_weight(), self.bias, *self.factors(), 1.0)

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """All boosters as one pair of rank ``R + r``."""
        return self.factors()

    @torch.no_grad()
    def keep_booster(self, shrinkage: float, max_rank: int | None, generator: torch.Generator) -> None:
        """Move ``η s B A`` to the boosters, compress these if they outgrow `max_rank`, and begin anew with ``B = 0``."""
        a = torch.cat([self.boosters_a, self.lora_a])
        b = torch.cat([self.boosters_b, shrinkage * self.scale * self.lora_b], dim=1)
        limit = min(self.in_features, self.out_features, max_rank or self.in_features)
        self.boosters_a, self.boosters_b = (a, b) if a.shape[0] <= limit else _compress(a, b, limit)
        bound = 1 / math.sqrt(self.in_features)
        fresh = torch.empty(self.lora_a.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        self.lora_a.copy_(fresh)
        self.lora_b.zero_()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # A state saved in a later round has more boosters than a fresh layer: make room for them.
        a, b = (state_dict.get(f"{prefix}{name}") for name in ("boosters_a", "boosters_b"))
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]:
            self.boosters_a = self.boosters_a.new_zeros(a.shape[0], self.in_features)
            self.boosters_b = self.boosters_b.new_zeros(self.out_features, a.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args)


class XGBLoRA(Controller):
    """End a boosting round every κ steps: keep the booster ``η s B A``, draw another, and choose the layers that train next.

    In a round only the chosen layers train; the others stay bit for bit. At its end their booster joins the frozen ones, A is
    drawn anew, B is zero, and the optimizer forgets its moments for both: they belong to the old booster. With ``η = 1``
    the function does not change at that. Warm-up at the start of a round is the learning rate schedule's part.

    The layers that are not chosen have ``requires_grad`` off; under ``DistributedDataParallel`` with fewer layers than
    all, pass ``find_unused_parameters=True``. Ranks choose alike.

    Args:
        model: a model with layers of method ``"xgblora"``.
        optimizer: an optimizer that has all of their parameters.
        steps_per_round: κ.
        rounds: T; the last booster goes on training. By default there is no last one.
        layers_per_round: how many transformer layers (or other blocks, see `block_of`) take part in a round, by default all.
        shrinkage: η, the share of a booster that is kept when its round ends; below 1 the function changes at that.
        max_rank: compress the kept boosters to this rank by a truncated SVD when they outgrow it, which loses a little. By
            default they are only compressed where that is exact.
        block_of: from a layer's name to the name of its block; by default all of it up to the first number,
            ``encoder.layer.3`` of ``encoder.layer.3.attention.query``, and layers without a number are blocks of their own.
        seed: what the choice of layers and the new A depend on, together with the step.

    Raises:
        ValueError: for a number out of range, and as `Controller`.

    Source: Zhang et al. 2024, arXiv:2410.19694.
    """

    methods = ("xgblora",)
    layers: dict[str, XGBLoRALinear]  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        steps_per_round: int,
        rounds: int | None = None,
        layers_per_round: int | None = None,
        shrinkage: float = 1.0,
        max_rank: int | None = None,
        block_of: Callable[[str], str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, seed=seed)
        self.blocks: dict[str, list[str]] = {}
        for name in self.layers:
            self.blocks.setdefault((block_of or numbered_block)(name), []).append(name)
        self.steps_per_round = check_count("steps_per_round", steps_per_round, least=1)
        self.rounds = None if rounds is None else check_count("rounds", rounds, least=1)
        self.max_rank = None if max_rank is None else check_count("max_rank", max_rank, least=1)
        self.layers_per_round = len(self.blocks)
        if layers_per_round is not None:
            self.layers_per_round = check_count("layers_per_round", layers_per_round, least=1)
        if self.layers_per_round > len(self.blocks):
            raise ValueError(
                f"layers_per_round is {layers_per_round}, but the adapted layers lie in {len(self.blocks)} blocks "
                f"({', '.join(list(self.blocks)[:3])}, ...); choose fewer, or name the blocks by `block_of`."
            )
        if not 0 < shrinkage <= 1:
            raise ValueError(f"shrinkage must be in (0, 1], got {shrinkage!r}.")
        self.shrinkage = float(shrinkage)
        self._choose()
        self.attach()

    def settings(self) -> dict[str, Any]:
        """The options that the schedule depends on."""
        names = ("steps_per_round", "rounds", "layers_per_round", "shrinkage", "max_rank", "seed")
        return {**{name: getattr(self, name) for name in names}, "blocks": list(self.blocks)}

    @property
    def round(self) -> int:
        """The current round, from 0."""
        passed = self.step // self.steps_per_round
        return passed if self.rounds is None else min(passed, self.rounds - 1)

    def chosen(self, of_round: int | None = None) -> list[str]:
        """Names of the layers that train in a round, by default the current one."""
        first_step = (self.round if of_round is None else of_round) * self.steps_per_round
        generator = self.generator(first_step)
        picked = torch.randperm(len(self.blocks), generator=generator)[: self.layers_per_round].sort().values
        blocks = list(self.blocks)
        return [name for i in picked.tolist() for name in self.blocks[blocks[i]]]

    def parameter_counts(self) -> dict[str, int]:
        """Parameters that train in this ``round``, and those of all boosters so far, ``accumulated``."""
        trained = sum(p.numel() for name in self.chosen() for p in self.layers[name].adapter_parameters().values())
        return {
            "round": trained,
            "accumulated": trained + sum(m.boosters_a.numel() + m.boosters_b.numel() for m in self.layers.values()),
        }

    def after_step(self) -> None:
        """At the end of a round keep its boosters, and begin the next one."""
        ended, rest = divmod(self.step, self.steps_per_round)
        if rest or (self.rounds is not None and ended > self.rounds):
            return
        if ended == self.rounds:  # no other booster follows: the last one is what it is, but for its shrinkage
            with torch.no_grad():
                for name in self.chosen(ended - 1):
                    self.layers[name].lora_b.mul_(self.shrinkage)
            return
        generator = self.generator(-self.step)  # another one than chooses the layers
        for name in self.chosen(ended - 1):
            layer = self.layers[name]
            layer.keep_booster(self.shrinkage, self.max_rank, generator)
            for parameter in layer.adapter_parameters().values():
                self.optimizer.state.pop(parameter, None)
        self._choose()

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Let the layers of the saved round train."""
        self._choose()

    def release(self) -> None:
        """Let all layers train again."""
        for layer in self.layers.values():
            _let_train(layer, True)

    def _choose(self) -> None:
        chosen = set(self.chosen())
        for name, layer in self.layers.items():
            _let_train(layer, name in chosen)


def numbered_block(name: str) -> str:
    """`name` up to its first part that is a number, or all of it.

    Example:
        >>> from peftlite.methods.xgblora import numbered_block
        >>> numbered_block("encoder.layer.3.attention.query"), numbered_block("classifier")
        ('encoder.layer.3', 'classifier')
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name


def _let_train(layer: XGBLoRALinear, trains: bool) -> None:
    for parameter in layer.adapter_parameters().values():
        parameter.requires_grad_(trains)
        if not trains:
            parameter.grad = None


def _compress(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of rank `rank` of ``B A``; computed in fp32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    q_a, r_a = torch.linalg.qr(a.to(wide).T)
    q_b, r_b = torch.linalg.qr(b.to(wide))
    u, sigma, v = torch.linalg.svd(r_b @ r_a.T)
    root = sigma[:rank].sqrt()
    return (root[:, None] * (v[:rank] @ q_a.T)).to(a.dtype), ((q_b @ u[:, :rank]) * root).to(b.dtype)
