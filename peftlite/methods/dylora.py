"""DyLoRA: Valipour et al. 2022, arXiv:2210.07558."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftlite.adapter import AdapterLinear
from peftlite.kernels.lora_linear import lora_linear
from peftlite.options import check_dropout
from peftlite.training.controller import Controller, check_choice, check_count


@final
class DyLoRALinear(AdapterLinear):
    """Compute ``y = x Wᵀ + b + (alpha / k) (dropout(x) A[:k]ᵀ) B[:, :k]ᵀ``: an update that works at every rank ``k ≤ r``.

    ``A (r, in)`` is `lora_a`, ``B (out, r)`` is `lora_b`, k is `active_rank`, at first r: then it is plain LoRA. B is zero at
    birth, so that an injected model computes bit for bit what it computed before, at any k. Trained: ``r (in + out)``
    parameters; deployed at k: ``k (in + out)``.

    Take it to find the rank: one training with the controller `DyLoRA`, which trains another k in each step, then an
    evaluation at each rank (`set_rank`). `truncate` keeps what the chosen rank needs; `to_lora` gives its factors. What the
    controller draws acts in training mode only; evaluation, merging and saving go by `active_rank`. Under
    ``torch.compile`` all the drawn ranks share one graph, and each active rank has its own.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r``, the largest rank.
        alpha: scaling numerator at every rank, by default r.
        rslora: ``alpha / √k`` in place of ``alpha / k`` (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an element of the input of the low-rank path, in training mode.
        active_rank: ``k``, by default r.

    Source: Valipour et al. 2022, "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free
        Low-Rank Adaptation", arXiv:2210.07558.

    Example:
        >>> layer = DyLoRALinear(16, 32, rank=8, active_rank=2)
        >>> layer.scale, [tuple(factor.shape) for factor in layer.to_lora()]
        (4.0, [(2, 16), (32, 2)])
    """

    method = "dylora"

    drawn: Tensor | None
    included: Tensor | None
    live: Tensor | None

    def build(
        self, *, alpha: float | None = None, rslora: bool = False, dropout: float = 0.0, active_rank: int | None = None
    ) -> None:
        """Create A and B."""
        self.dropout = check_dropout(dropout)
        self.create_factors(alpha, rslora)
        for name in ("drawn", "included", "live"):  # integers and flags, which a cast of the model leaves alone
            self.register_buffer(name, None, persistent=False)
        self.set_rank(self.rank if active_rank is None else active_rank)

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer."""
        return {**self.low_rank_config(), "dropout": self.dropout, "active_rank": self.active_rank}

    def set_rank(self, rank: int) -> None:
        """Answer with rank `rank` in evaluation, merging and saving."""
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= self.rank:
            raise ValueError(f"active_rank must be an integer from 1 to the layer's rank {self.rank}, got {rank!r}.")
        self.active_rank = rank
        self.scale = self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def effective_weight(self) -> Tensor:
        """``W + (alpha / k) B[:, :k] A[:k]``, ``(out, in)``, with k the active rank."""
        k = self.active_rank
        return self.base_weight() + self.scale * (self.lora_b[:, :k] @ self.lora_a[:k])

    def adapted_forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b + (alpha / k) (x̃ A[:k]ᵀ) B[:, :k]ᵀ`` without the dense update."""
        if self.training and self.drawn is not None:
            # By masks and not by slices, so that one compiled graph serves every rank that is drawn.
            assert self.included is not None
            assert self.live is not None
            k = self.drawn.to(torch.promote_types(self.lora_b.dtype, torch.float32))
            gate = self.included * (self.alpha / (k.sqrt() if self.rslora else k))  # (r,)
            a = torch.where(self.live[:, None], self.lora_a, self.lora_a.detach())
            b, scale = torch.where(self.live, self.lora_b, self.lora_b.detach()) * gate, 1.0
        else:
            a, b, scale = self.lora_a[: self.active_rank], self.lora_b[:, : self.active_rank], self.scale
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.base_weight(), self.bias, a, b, scale, dropout=dropout)

    def draw(self, rank: int | None, first: int = 0) -> None:
        """In training mode use rank `rank`, of which components `first` and up learn; with None, `active_rank` again."""
        if rank is None:
            self.drawn = self.included = self.live = None
            return
        if self.drawn is None or self.included is None or self.live is None:
            device = self.lora_a.device
            self.drawn = torch.zeros((), dtype=torch.int64, device=device)
            self.included, self.live = (torch.zeros(self.rank, dtype=torch.bool, device=device) for _ in range(2))
        self.drawn.fill_(rank)
        for mask, start in ((self.included, 0), (self.live, first)):
            mask.zero_()
            mask[start:rank] = True

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """``A[:k]`` and ``(alpha / k) B[:, :k]``, with k the active rank."""
        return self.lora_a[: self.active_rank].clone(), self.scale * self.lora_b[:, : self.active_rank]

    @torch.no_grad()
    def truncate(self, rank: int) -> None:
        """Keep the first `rank` components for good, with the same alpha: what is left is plain LoRA of that rank.

        The parameters are new ones, so do it after training, once the controller is detached.
        """
        if self.drawn is not None:
            raise ValueError("a DyLoRA controller still draws ranks for this layer; call its detach() before truncating.")
        self.set_rank(rank)
        self.lora_a = nn.Parameter(self.lora_a[:rank].clone(), requires_grad=self.lora_a.requires_grad)
        self.lora_b = nn.Parameter(self.lora_b[:, :rank].clone(), requires_grad=self.lora_b.requires_grad)
        self.rank = rank


@final
class DyLoRA(Controller):
    """Draw one rank ``k ~ p`` per optimizer step for all `DyLoRALinear` layers, and train the update truncated to it.

    With ``update="frozen"``, the authors' choice, the step trains component k alone (the last `unit` of k), on top of those
    before it, which are constants; with ``update="full"`` it trains all k. A layer of lower rank than k uses all it has. The
    rank is a function of ``(seed, step)``, the same for all batches that are accumulated and in all processes.

    The components that a step does not train have gradient 0. An optimizer would move them all the same, by momentum and
    weight decay, and let their moments fade. By default we put them back after the step, bit for bit (moments of the
    parameter's own shape too), at the cost of a copy during the step; ``untouched="advance"`` lets the optimizer have its
    way, as the authors' code does.

    The paper allows any distribution over ranks and names no other than the uniform one; `probabilities` takes any.

    Args:
        model: a model with `DyLoRALinear` layers.
        optimizer: the optimizer of their parameters.
        update: ``"frozen"`` or ``"full"``.
        ranks: the ranks to draw from, by default all multiples of `unit` up to the largest rank in the model.
        probabilities: their weights, by default equal.
        unit: how many components are added and trained together.
        untouched: ``"keep"`` or ``"advance"``: what becomes of components that the step does not train.
        seed: what the draws depend on, together with the step.

    Attributes:
        rank: the rank of the coming step.

    Raises:
        ValueError: for an option out of range, or as `Controller`.

    Source: Valipour et al. 2022, "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free
        Low-Rank Adaptation", arXiv:2210.07558.

    Example:
        >>> from peftlite import inject_adapters, param_groups
        >>> from peftlite.methods.dylora import set_rank
        >>> model = inject_adapters(nn.Sequential(nn.Linear(8, 8)), "0", rank=4, method="dylora")
        >>> optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
        >>> with DyLoRA(model, optimizer, seed=1) as controller:
        ...     for _ in range(20):
        ...         model(torch.ones(2, 8)).square().sum().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> set_rank(model.eval(), 2)
    """

    methods = ("dylora",)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        update: str = "frozen",
        ranks: Sequence[int] | None = None,
        probabilities: Sequence[float] | None = None,
        unit: int = 1,
        untouched: str = "keep",
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, seed=seed)
        self.update = check_choice("update", update, ("frozen", "full"))
        self.untouched = check_choice("untouched", untouched, ("keep", "advance"))
        self.unit = check_count("unit", unit, least=1)
        largest = max(layer.rank for layer in self.layers.values())
        self.ranks = list(range(unit, largest + 1, unit)) if ranks is None else [check_count("ranks", k) for k in ranks]
        wrong = [k for k in self.ranks if not 1 <= k <= largest or k % unit]
        if wrong or not self.ranks:
            raise ValueError(
                f"ranks must be multiples of unit = {unit} from 1 to {largest}, the largest rank in the model, got "
                f"{wrong or self.ranks}."
            )
        self.probabilities = [1.0] * len(self.ranks) if probabilities is None else [float(p) for p in probabilities]
        if len(self.probabilities) != len(self.ranks) or not (
            all(math.isfinite(p) and p >= 0 for p in self.probabilities) and sum(self.probabilities) > 0
        ):
            raise ValueError(
                f"probabilities must be {len(self.ranks)} numbers, one for each of the ranks {self.ranks}, none negative and "
                f"not all 0, got {probabilities!r}."
            )
        self._kept: dict[tuple[int, str], list[Tensor]] = {}
        self.attach()
        self._prepare()

    def settings(self) -> dict[str, Any]:
        """What the draws and the step depend on."""
        names = ("update", "ranks", "probabilities", "unit", "untouched", "seed")
        return {name: getattr(self, name) for name in names}

    def rank_at(self, step: int) -> int:
        """The rank that step `step` (from 0) trains."""
        weights = torch.tensor(self.probabilities, dtype=torch.float64)
        return self.ranks[int(torch.multinomial(weights, 1, generator=self.generator(step)))]

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Draw the rank of the coming step."""
        self._prepare()

    def release(self) -> None:
        """Let the layers train at their active rank again."""
        for layer in self._dynamic():
            layer.draw(None)

    def before_step(self) -> None:
        """Note what the step must leave alone."""
        if self.untouched == "keep":
            self._kept = {key: [view.clone() for view in views] for key, views in self._outside().items()}

    def after_step(self) -> None:
        """Put it back, and draw the next rank."""
        if self.untouched == "keep":
            for key, views in self._outside().items():
                before = self._kept.get(key) or [torch.zeros_like(view) for view in views]  # moments were born in the step
                torch._foreach_copy_(views, before)
            self._kept = {}
        self._prepare()

    def _prepare(self) -> None:
        self.rank = self.rank_at(self.step)
        for layer in self._dynamic():
            layer.draw(*self._span(layer))

    def _span(self, layer: DyLoRALinear) -> tuple[int, int]:
        """The rank that `layer` uses, and the first component that learns."""
        rank = min(self.rank, layer.rank)
        return rank, 0 if self.update == "full" else max(0, rank - self.unit)

    def _outside(self) -> dict[tuple[int, str], list[Tensor]]:
        """Views of the components that do not learn, by parameter and name of the moment ("" for the values)."""
        found = {}
        for layer in self._dynamic():
            rank, first = self._span(layer)
            for parameter, dim in ((layer.lora_a, 0), (layer.lora_b, 1)):
                state = self.optimizer.state.get(parameter, {})
                like = {k: t for k, t in state.items() if isinstance(t, Tensor) and t.shape == parameter.shape}
                for key, tensor in {"": parameter.detach(), **like}.items():
                    spans = [(0, first), (rank, layer.rank)]
                    views = [tensor.narrow(dim, start, end - start) for start, end in spans if end > start]
                    if views:
                        found[id(parameter), key] = views
        return found

    def _dynamic(self) -> list[DyLoRALinear]:
        return [layer for layer in self.layers.values() if isinstance(layer, DyLoRALinear)]


def set_rank(model: nn.Module, rank: int) -> None:
    """Let every `DyLoRALinear` of `model` answer with rank `rank`, or with all it has if that is less.

    Raises:
        ValueError: if there is no such layer, or `rank` is not one of the largest of them.
    """
    for layer, own in _layers_and_ranks(model, rank):
        layer.set_rank(own)


def truncate(model: nn.Module, rank: int) -> None:
    """Keep the first `rank` components of every `DyLoRALinear` of `model` for good; layers of lower rank stay.

    Raises:
        ValueError: as `set_rank`, or if a controller is attached.
    """
    for layer, own in _layers_and_ranks(model, rank):
        layer.truncate(own)


def _layers_and_ranks(model: nn.Module, rank: int) -> Iterator[tuple[DyLoRALinear, int]]:
    layers = sorted((m for m in model.modules() if isinstance(m, DyLoRALinear)), key=lambda layer: -layer.rank)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer of method 'dylora', whose rank could be set.")
    yield layers[0], rank  # the largest first, and unchanged: it refuses what is out of range before anything is done
    yield from ((layer, min(rank, layer.rank)) for layer in layers[1:])
