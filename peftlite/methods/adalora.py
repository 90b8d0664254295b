"""AdaLoRA: Zhang et al. 2023, arXiv:2303.10512."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftlite.adapter import AdapterLinear
from peftlite.kernels.lora_linear import lora_linear
from peftlite.options import check_alpha, check_dropout
from peftlite.training.controller import Controller, check_choice, check_count

STD = 0.02  # of the initial singular vectors, as in the authors' code


@final
class AdaLoRALinear(AdapterLinear):
    """Compute ``y = x Wᵀ + b + s (dropout(x) Qᵀ) diag(λ) Pᵀ``: an update in the form of a singular value decomposition.

    ``Q (r, in)`` is `lora_a`, ``P (out, r)`` is `lora_b`, ``λ (r,)`` is `lora_e`; ``s = alpha / (r0 + 1e-5)`` with the rank
    r0 of birth, whatever is pruned later. P and Q are drawn from N(0, 0.02²), λ is zero, so that an injected model computes
    bit for bit what it computed before. Trained: ``r (in + out + 1)`` parameters; a step costs what LoRA's costs.

    Take it where the layers deserve different ranks and a first training run is to find them: the controller `AdaLoRA`
    moves a budget of ranks to the triplets ``(P_k, λ_k, Q_k)`` that matter. Without it this is LoRA with three factors.
    A pruned triplet has ``λ_k = 0``; `drop_pruned` leaves it out. `to_lora` gives ``Q`` and ``s P diag(λ)`` without it.

    `alpha` defaults to r0, which is what the authors' code makes of an alpha of 0.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r``.
        alpha: scaling numerator, by default the initial rank.
        dropout: probability of dropping an element of the input of the low-rank path, in training mode.
        initial_rank: ``r0`` of the scale, by default the rank; another one in a layer that was pruned.

    Source: Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv:2303.10512.

    Example:
        >>> layer = AdaLoRALinear(768, 768, rank=12)
        >>> sum(p.numel() for p in layer.adapter_parameters().values())
        18444
    """

    method = "adalora"

    def build(self, *, alpha: float | None = None, dropout: float = 0.0, initial_rank: int | None = None) -> None:
        """Create P, λ and Q."""
        self.initial_rank = check_count("initial_rank", self.rank if initial_rank is None else initial_rank, least=1)
        self.dropout = check_dropout(dropout)
        self.alpha = check_alpha(self.initial_rank if alpha is None else alpha)
        self.scale = self.alpha / (self.initial_rank + 1e-5)
        self.lora_a = nn.Parameter(self._draw(self.rank, self.in_features))
        self.lora_b = nn.Parameter(self._draw(self.out_features, self.rank))
        self.lora_e = nn.Parameter(self.zeros(self.rank))

    def _draw(self, *shape: int) -> Tensor:
        values = torch.empty(shape, dtype=torch.float32).normal_(0, STD, generator=self._generator)
        return values.to(self.weight.device, self._adapter_dtype)

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        own = {"alpha": self.alpha, "dropout": self.dropout, "initial_rank": self.initial_rank}
        return {**self.basic_config(), **own}

    def effective_weight(self) -> Tensor:
        """``W + s P diag(λ) Q``, ``(out, in)``."""
        return self.base_weight() + self.scale * ((self.lora_b * self.lora_e) @ self.lora_a)

    def adapted_forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b + s (x̃ Qᵀ) (P diag(λ))ᵀ`` without the dense update."""
        dropout, b = self.dropout if self.training else 0.0, self.lora_b * self.lora_e
        return lora_linear(x, self.base_weight(), self.bias, self.lora_a, b, self.scale, dropout=dropout)

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """``A = Q`` and ``B = s P diag(λ)`` of the triplets that are left; one with ``B = 0`` if none is."""
        keep = self._left()
        return self.lora_a[keep].clone(), self.scale * self.lora_b[:, keep] * self.lora_e[keep]

    @torch.no_grad()
    def drop_pruned(self) -> int:
        """Leave the pruned triplets out for good, and return the rank that is left (1, with ``λ = 0``, where none is).

        The function stays the same. The parameters are new ones, so do it after training, before `save_adapters`.
        """
        keep = self._left()
        trains = [p.requires_grad for p in (self.lora_a, self.lora_b, self.lora_e)]
        values = self.lora_a[keep], self.lora_b[:, keep], self.lora_e[keep]
        self.lora_a, self.lora_b, self.lora_e = (
            nn.Parameter(value.clone(), requires_grad=flag) for value, flag in zip(values, trains, strict=True)
        )
        self.rank = len(keep)
        return self.rank

    def _left(self) -> Tensor:
        left = self.lora_e.nonzero()[:, 0]
        return left if len(left) else left.new_zeros(1)


@final
class AdaLoRA(Controller):
    """Allot ``b(t)`` triplets over the `AdaLoRALinear` layers: the most important ones stay, λ of the others is zeroed.

    From ``b_0``, all of them, the budget falls to ``b_T = target_rank · layers``:
    ``b(t) = b_T + ⌊(b_0 - b_T) (1 - (t - initial_steps) / (total_steps - final_steps - initial_steps))³⌋`` in the middle
    phase. There, every `interval` steps, ``λ_k`` is zeroed for the triplets outside the top ``b(t)`` of the model; it still
    gets gradients, so that a triplet may come back. From step ``total_steps - final_steps`` on the choice is fixed.

    Importance of a triplet: ``S_k = s(λ_k) + mean_j s(P_jk) + mean_j s(Q_kj)``, ``s(w) = Ī U``, with the running means
    ``Ī`` of ``I = |w ∂L/∂w|`` (`beta1`) and ``U`` of ``|I - Ī|`` (`beta2`). Ties go to the layer that comes first, so that
    exactly ``b(t)`` survive. To keep P and Q near orthogonal, ``orthogonality · ∂R/∂w`` is added to the gradients before
    the step (and to the importance, since L is the whole objective): the loss needs no term. Clipping comes earlier, and
    does not see it. All this takes passes over the adapter alone, and twice its size in memory.

    Where we differ: I is taken with the weights that the gradient belongs to, as in the paper's Algorithm 1; the authors'
    code takes it with those after the step. Counts must be optimizer steps, and `initial_steps` above 0, because with
    ``λ = 0`` no score says anything yet; our defaults for the two phases are round numbers of our own.

    Args:
        model: a model with `AdaLoRALinear` layers; inject them with about 1.5 times the rank that is to be left.
        optimizer: the optimizer of their parameters.
        total_steps: ``T``, number of optimizer steps of the run.
        target_rank: mean rank at the end.
        initial_steps: steps before anything is pruned, by default a tenth of all.
        final_steps: steps with the final choice, by default a third of all.
        interval: steps between two choices.
        beta1: decay of ``Ī``.
        beta2: decay of ``U``.
        orthogonality: weight ``γ`` of R; 0 leaves it out.
        penalty: ``"norm"``, R is the mean of ``‖PᵀP - I‖_F`` and ``‖QQᵀ - I‖_F`` over all matrices, as in the authors'
            code; ``"squared"``, their squares, summed, as in the paper.

    Raises:
        ValueError: for an option out of range, or as `Controller`.

    Source: Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv:2303.10512.

    Example:
        >>> from peftlite import inject_adapters, param_groups
        >>> model = inject_adapters(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "all-linear", rank=3, method="adalora")
        >>> optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
        >>> with AdaLoRA(model, optimizer, total_steps=30, target_rank=2) as controller:
        ...     for _ in range(30):
        ...         model(torch.ones(4, 8)).sum().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> sum(controller.ranks().values())
        4
    """

    methods = ("adalora",)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int,
        target_rank: int,
        initial_steps: int | None = None,
        final_steps: int | None = None,
        interval: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orthogonality: float = 0.1,
        penalty: str = "norm",
    ) -> None:
        super().__init__(model, optimizer)
        self.total_steps = check_count("total_steps", total_steps, least=1)
        self.target_rank = check_count("target_rank", target_rank, least=1)
        self.initial_steps = check_count("initial_steps", total_steps // 10 if initial_steps is None else initial_steps)
        self.final_steps = check_count("final_steps", total_steps // 3 if final_steps is None else final_steps)
        self.interval = check_count("interval", interval, least=1)
        if self.initial_steps + self.final_steps >= total_steps:
            raise ValueError(
                f"initial_steps + final_steps = {self.initial_steps} + {self.final_steps} leaves no step of total_steps = "
                f"{total_steps} to prune in; make them smaller."
            )
        for name, beta in {"beta1": beta1, "beta2": beta2}.items():
            if not 0 <= beta < 1:
                raise ValueError(f"{name} must be in [0, 1), got {beta!r}.")
        if not orthogonality >= 0:
            raise ValueError(f"orthogonality must not be negative, got {orthogonality!r}; 0 leaves it out.")
        self.beta1, self.beta2, self.orthogonality = beta1, beta2, orthogonality
        self.penalty = check_choice("penalty", penalty, ("norm", "squared"))
        self.first_budget = sum(layer.rank for layer in self.layers.values())
        self.last_budget = target_rank * len(self.layers)
        if self.last_budget > self.first_budget:
            raise ValueError(
                f"target_rank = {target_rank} in {len(self.layers)} layers is a budget of {self.last_budget}, more than the "
                f"{self.first_budget} triplets that there are; inject with a higher rank (about 1.5 target_rank)."
            )
        self._parameters = {f"{name}.{key}": p for name, v in self.layers.items() for key, p in v.adapter_parameters().items()}
        wide = {n: torch.promote_types(p.dtype, torch.float32) for n, p in self._parameters.items()}
        self._mean = {n: torch.zeros_like(p, dtype=wide[n], requires_grad=False) for n, p in self._parameters.items()}
        self._spread = {n: torch.zeros_like(value) for n, value in self._mean.items()}
        self._chosen: dict[str, Tensor] = {}
        self.attach()

    def settings(self) -> dict[str, Any]:
        """What the schedule and the scores depend on."""
        names = ("total_steps", "target_rank", "initial_steps", "final_steps", "interval", "beta1", "beta2", "orthogonality")
        return {**{name: getattr(self, name) for name in names}, "penalty": self.penalty}

    def budget(self, step: int) -> int:
        """``b(t)``: how many triplets there may be after `step` steps."""
        length = self.total_steps - self.final_steps - self.initial_steps
        left = min(max(self.total_steps - self.final_steps - step, 0), length)
        return self.last_budget + (self.first_budget - self.last_budget) * left**3 // length**3

    def ranks(self) -> dict[str, int]:
        """The number of triplets with ``λ ≠ 0`` in each layer, as things stand."""
        return {name: int(layer.get_parameter("lora_e").count_nonzero()) for name, layer in self.layers.items()}

    def scores(self) -> dict[str, Tensor]:
        """The importance ``S (r,)`` of the triplets of each layer."""
        s = {name: mean * self._spread[name] for name, mean in self._mean.items()}
        return {n: s[f"{n}.lora_e"] + s[f"{n}.lora_b"].mean(0) + s[f"{n}.lora_a"].mean(1) for n in self.layers}

    def regulariser(self) -> Tensor:
        """``R``, which is 0 where every P has orthonormal columns and every Q orthonormal rows."""
        terms = []
        for layer in self.layers.values():
            p, q = layer.get_parameter("lora_b"), layer.get_parameter("lora_a")
            for gram in (p.T @ p, q @ q.T):
                terms.append(torch.linalg.vector_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
        distances = torch.stack(terms)
        return distances.mean() if self.penalty == "norm" else distances.square().sum()

    def before_step(self) -> None:
        """Add the gradient of R, and update the importance."""
        trained = [(name, p) for name, p in self._parameters.items() if p.grad is not None]
        if not trained:
            raise RuntimeError(
                "AdaLoRA: no adapter has a gradient at the optimizer's step, so nothing can be scored; call loss.backward() "
                "before optimizer.step(), and zero_grad() after it."
            )
        scale, parameters = self.gradient_scale, [p for _, p in trained]
        if self.orthogonality:
            with torch.enable_grad():
                extra = torch.autograd.grad(self.regulariser(), parameters, allow_unused=True)
            for parameter, term in zip(parameters, extra, strict=True):
                if term is not None:
                    assert parameter.grad is not None
                    parameter.grad.add_(term * (self.orthogonality * scale))
        if self.step + 1 < self.total_steps - self.final_steps:
            self._update_importance(scale)

    @torch.no_grad()
    def _update_importance(self, scale: Tensor | float) -> None:
        names = list(self._mean)
        means, spreads = [self._mean[n] for n in names], [self._spread[n] for n in names]
        sensitivity = []
        for name in names:
            p, like = self._parameters[name], self._mean[name]
            # A layer that this batch did not use did not matter to it.
            sensitivity.append(torch.zeros_like(like) if p.grad is None else (p.to(like) * p.grad.to(like)).div_(scale).abs_())
        torch._foreach_lerp_(means, sensitivity, 1 - self.beta1)
        distance = torch._foreach_sub(sensitivity, means)
        torch._foreach_abs_(distance)
        torch._foreach_lerp_(spreads, distance, 1 - self.beta2)

    @torch.no_grad()
    def after_step(self) -> None:
        """Zero λ outside of the budget, where the schedule has it."""
        final = self.step >= self.total_steps - self.final_steps
        if not final and (self.step <= self.initial_steps or self.step % self.interval):
            return
        keep = self._chosen or self._choose(self.budget(self.step))
        if final:
            self._chosen = keep
        for name, layer in self.layers.items():
            layer.get_parameter("lora_e").mul_(keep[name])

    def _choose(self, count: int) -> dict[str, Tensor]:
        scores = self.scores()
        device = next(iter(scores.values())).device
        together = torch.cat([s.to(device, torch.float64) for s in scores.values()])
        keep = torch.zeros_like(together, dtype=torch.bool)
        keep[together.argsort(descending=True, stable=True)[:count]] = True
        parts = keep.split([len(s) for s in scores.values()])
        return {name: part.to(scores[name].device) for name, part in zip(scores, parts, strict=True)}

    def extra_state(self) -> dict[str, Any]:
        """The running means, and the choice."""
        return {"mean": dict(self._mean), "spread": dict(self._spread), "chosen": dict(self._chosen)}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Put the running means and the choice back."""
        for key, own in {"mean": self._mean, "spread": self._spread}.items():
            if state[key].keys() != own.keys():
                raise ValueError(f"AdaLoRA: the state is of other layers: {sorted(state[key].keys() ^ own.keys())[0]!r}.")
            for name, value in own.items():
                value.copy_(state[key][name])
        self._chosen = {n: keep.to(self._mean[f"{n}.lora_e"].device) for n, keep in state["chosen"].items()}
