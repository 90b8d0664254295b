"""SD-LoRA: Wu et al. 2025, arXiv:2501.13198."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from peftlite.adapter import AdapterLinear
from peftlite.kernels.lora_linear import lora_linear
from peftlite.options import check_dropout
from peftlite.sharing import SharedTensor, seeded_generator

Model = TypeVar("Model", bound=nn.Module)


@final
class SDLoRALinear(AdapterLinear):
    """Compute ``y = x (W + Σ_{k<t} α_k c_k D_k + α_t s B A)ᵀ + b``: task after task, old directions kept, magnitudes trained.

    ``A (r, in)`` is `lora_a`, ``B (out, r)`` is `lora_b`, ``α (t,)`` is `magnitudes`. The directions of finished tasks,
    ``D_k = B_k A_k / ‖B_k A_k‖_F``, are frozen in `directions_a` and `directions_b`, with `coefficients` for the ``c_k``.
    Trained on task t: ``r (in + out) + t`` parameters. `end_task` freezes the current direction, `start_task` adds the next;
    neither changes the function. For learning tasks one after the other, without their data and without being told at test
    time which task it is. Without dropout the cost of a forward is LoRA's at the sum of the ranks.

    As in the paper there is one magnitude per task for the whole network, one Parameter that all its layers hold.

    Where we differ: as in the authors' code the current direction is not normalised while it trains, for B is zero at birth;
    their code then divides the stored one by ``‖B‖_F ‖A‖_F`` and starts all magnitudes anew, at which the function jumps. Here
    the layer keeps the norm, ``c_t = s ‖B A‖_F``, and the function stays; magnitudes per layer take it in,
    ``α_t ← α_t s ‖B A‖_F`` with ``c_t = 1``. A direction that is dropped because older ones span it leaves its magnitude: a row
    of `coefficients` says of which older ones its term is made now, which is exact where the paper's ``α_k + Δα_k``
    assumes ``α_t = 1``.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: ``r`` of the current task.
        alpha: numerator of the scale ``s``, by default the rank (``s = 1``).
        rslora: ``s = alpha / √rank`` (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an element of the input of the low-rank paths, in training mode.
        magnitude: what each α starts at: 1 in the paper, 0.8 in its authors' code.
        normaliser: ``"product"`` divides a stored direction by ``‖B A‖_F`` (the paper), ``"factors"`` by ``‖B‖_F ‖A‖_F``
            (the code). The function is the same; with ``scope="layer"`` the gradient of the magnitude is scaled by it.
        scope: ``"network"``, one magnitude per task for all layers, or ``"layer"``, one for each of them.
        finished: ranks of the directions of the finished tasks, 0 for one that was dropped; set by loading.
        phase: ``"task"``, or ``"between"`` two tasks, when there is no current direction; set by loading.

    Source: Wu et al. 2025, "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning", arXiv:2501.13198.

    Example:
        >>> from peftlite.methods.sdlora import end_task, start_task
        >>> model = nn.Sequential(SDLoRALinear(16, 32, rank=4))
        >>> nn.init.ones_(model[0].lora_b).shape  # in place of training
        torch.Size([32, 4])
        >>> _ = end_task(model)
        >>> start_task(model, rank=2).__class__.__name__
        'Sequential'
        >>> {name: tuple(p.shape) for name, p in model[0].adapter_parameters().items()}
        {'lora_a': (2, 16), 'lora_b': (32, 2), 'shared.magnitudes': (2,)}
    """

    method = "sdlora"

    def build(
        self,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
        magnitude: float = 1.0,
        normaliser: str = "product",
        scope: str = "network",
        finished: Sequence[int] = (),
        phase: str = "task",
    ) -> None:
        """Create the current pair, the magnitudes, and room for the directions of finished tasks."""
        if not (isinstance(magnitude, int | float) and math.isfinite(magnitude) and magnitude != 0):
            raise ValueError(f"magnitude must be a finite number other than 0, got {magnitude!r}; 0 would stop all gradients.")
        if normaliser not in ("product", "factors"):
            raise ValueError(f"normaliser must be 'product' or 'factors', got {normaliser!r}.")
        if scope not in ("network", "layer"):
            raise ValueError(f"scope must be 'network' or 'layer', got {scope!r}.")
        if phase not in ("task", "between"):
            raise ValueError(f"phase must be 'task' or 'between', got {phase!r}.")
        self.dropout, self.magnitude, self.normaliser = check_dropout(dropout), float(magnitude), normaliser
        self.scope, self.finished, self.phase = scope, tuple(finished), phase
        if phase == "task":
            self.create_factors(alpha, rslora)
        else:
            self.set_scale(alpha, rslora)
            self.lora_a, self.lora_b = (nn.Parameter(self.zeros(*s)) for s in ((0, self.in_features), (self.out_features, 0)))
        count = len(finished) + (phase == "task")
        self.shared = self.share(
            "magnitudes" if scope == "network" else None,
            lambda _: SharedTensor("magnitudes", self.zeros(count) + self.magnitude, trains=True),
            (count,),
        )
        kept = sum(finished)
        self.register_buffer("directions_a", self.zeros(kept, self.in_features))
        self.register_buffer("directions_b", self.zeros(self.out_features, kept))
        self.register_buffer("coefficients", self.zeros(len(finished), kept))

    directions_a: Tensor
    directions_b: Tensor
    coefficients: Tensor

    @property
    def magnitudes(self) -> nn.Parameter:
        """α ``(t,)``, of finished tasks and the current one."""
        return self.shared.magnitudes  # type: ignore[return-value]

    def config(self) -> dict[str, Any]:
        """Options that rebuild the layer, its history with them."""
        return {
            **self.low_rank_config(),
            "dropout": self.dropout,
            "magnitude": self.magnitude,
            "normaliser": self.normaliser,
            "scope": self.scope,
            "finished": list(self.finished),
            "phase": self.phase,
        }

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A (Σr, in)`` and ``B (out, Σr)`` of all directions, magnitudes and scales folded into B."""
        past = len(self.finished)
        a: Tensor = self.lora_a
        b: Tensor = self.lora_b
        if self.phase == "task":
            b = b * (self.magnitudes[past] * self.scale)
        if not self.directions_a.shape[0]:
            return a, b
        weights = self.magnitudes[:past] @ self.coefficients  # (Σr,)
        return torch.cat([self.directions_a, a]), torch.cat([self.directions_b * weights, b], dim=1)

    def effective_weight(self) -> Tensor:
        """``W + Σ_{k<t} α_k c_k D_k + α_t s B A``, ``(out, in)``."""
        a, b = self.factors()
        return self.base_weight() + b @ a

    def adapted_forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b + (x̃ Aᵀ) Bᵀ`` with the factors of all directions side by side."""
        a, b = self.factors()
        return lora_linear(x, self.base_weight(), self.bias, a, b, 1.0, dropout=self.dropout if self.training else 0.0)

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """All directions as one pair of rank ``Σr``."""
        a, b = self.factors()
        return a.clone(), b.clone()

    @torch.no_grad()
    def _finish(self, tolerance: float | None) -> "FinishedDirection":
        a, b = self.lora_a.detach(), self.lora_b.detach()
        norm = math.sqrt(max(_inner(a, b, a, b), 0.0))
        lengths = [torch.linalg.vector_norm(t.double()).item() for t in (a, b)]
        divisor = norm if self.normaliser == "product" else lengths[0] * lengths[1]
        mix, residual = self._project(a, b, norm)
        kept = norm > 0 and (tolerance is None or residual > tolerance)
        unit = self.scale * divisor
        if norm > 0 and self.scope == "layer":
            self.magnitudes[-1] *= unit
            unit = 1.0
        past, columns = self.coefficients.shape
        rank = a.shape[0] if kept else 0
        coefficients = self.coefficients.new_zeros(past + 1, columns + rank)
        coefficients[:past, :columns] = self.coefficients
        if kept:
            coefficients[past, columns:] = unit
            self.directions_a = torch.cat([self.directions_a, a])
            self.directions_b = torch.cat([self.directions_b, b / divisor], dim=1)
        elif norm > 0:
            coefficients[past] = mix * (unit / divisor)
        self.coefficients = coefficients
        self.finished, self.phase = (*self.finished, rank), "between"
        self.lora_a, self.lora_b = nn.Parameter(a[:0]), nn.Parameter(b[:, :0])
        return FinishedDirection("", norm, residual, kept)

    def _project(self, a: Tensor, b: Tensor, norm: float) -> tuple[Tensor, float]:
        """The mix of stored directions nearest to B A, one value per column, and ``‖rest‖² / ‖B A‖²``."""
        ranks = [rank for rank in self.finished if rank]
        if not ranks or not norm:
            return self.coefficients.new_zeros(sum(ranks)), 1.0
        stored = list(zip(self.directions_a.split(ranks), self.directions_b.split(ranks, dim=1), strict=True))
        gram = torch.tensor([[_inner(*left, *right) for right in stored] for left in stored], dtype=torch.float64)
        inner = torch.tensor([_inner(*pair, a, b) for pair in stored], dtype=torch.float64)
        mix = torch.linalg.pinv(gram, hermitian=True) @ inner
        residual = max(norm**2 - (inner @ mix).item(), 0.0) / norm**2
        return mix.repeat_interleave(torch.tensor(ranks)).to(self.coefficients), residual

    def _begin(self, rank: int, generator: torch.Generator) -> None:
        self._adapter_dtype, self._generator = self.magnitudes.dtype, generator
        # The scale stays what it is, whatever the rank
        alpha = self.scale * (math.sqrt(rank) if self.rslora else rank)
        self.rank, self.phase = rank, "task"
        self.create_factors(alpha, self.rslora)
        self._generator = None
        if self.magnitudes.shape[0] == len(self.finished):  # of shared ones the first layer has it done
            before = self.magnitudes.detach()
            self.shared.magnitudes = nn.Parameter(torch.cat([before, before.new_full((1,), self.magnitude)]))


@dataclass(frozen=True)
class FinishedDirection:
    """What `end_task` did to one layer.

    Attributes:
        name: dotted name of the layer.
        norm: ``‖B A‖_F`` of the task's direction before it was normalised; 0 if it did not train.
        residual: ``‖D_t - Σ_k δ_k D_k‖² / ‖D_t‖²``, how far it is from all that older directions can mix; 1 without any.
        kept: whether it was kept as a direction of its own.
    """

    name: str
    norm: float
    residual: float
    kept: bool


def end_task(model: nn.Module, *, tolerance: float | None = None) -> tuple[FinishedDirection, ...]:
    """Freeze the current direction of every SD-LoRA layer, ``D_t = B A / ‖B A‖_F``, ``c_t = s ‖B A‖_F``; no jump.

    Magnitudes go on training; A and B are gone until `start_task`.

    Args:
        model: a model with layers of method ``"sdlora"``.
        tolerance: the paper's knowledge distillation (SD-LoRA-KD, τ = 9e-4 there): a layer's direction is dropped, and its
            term written as a mix of older directions, where these leave no more than this share of its square norm. The
            function then changes by what they leave. By default every direction is kept.

    Raises:
        ValueError: if the model has no such layers, no task is running, or no layer has trained.
    """
    layers = _layers(model, "end_task")
    if any(layer.phase != "task" for layer in layers.values()):
        raise ValueError("end_task: no task is running, the last one has ended; call start_task(model) first.")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance!r}; the paper takes 9e-4.")
    if not any(layer.lora_b.any() for layer in layers.values()):
        raise ValueError(
            "end_task: lora_b is zero in every layer, so the task has no direction to keep; train it first, by an optimizer "
            "made after start_task."
        )
    return tuple(replace(layer._finish(tolerance), name=name) for name, layer in layers.items())


def start_task(model: Model, *, rank: int | None = None, seed: int = 0) -> Model:
    """Give every SD-LoRA layer a new pair A, B for the next task, ``B = 0``, and one more magnitude; the function stays.

    Make the optimizer after it: the parameters are new ones. The first task needs no call.

    Args:
        model: a model with layers of method ``"sdlora"``.
        rank: rank of the new pair, by default that of the last one; `reduced_rank` is the paper's schedule. The scale s stays.
        seed: makes the new A a function of seed, number of the task and name of the layer.

    Raises:
        ValueError: if the model has no such layers, a task is running, or the rank does not fit.
    """
    layers = _layers(model, "start_task")
    if any(layer.phase == "task" for layer in layers.values()):
        raise ValueError("start_task: a task is running; call end_task(model) first, which keeps what it has learnt.")
    for name, layer in layers.items():
        if rank is not None:
            layer.check_rank(rank, layer.in_features, layer.out_features, f"layer {name!r}: ")
    for name, layer in layers.items():
        layer._begin(rank or layer.rank, seeded_generator(seed, f"task {len(layer.finished)} {name}"))
    return model


def reduced_rank(task: int, *, ranks: Sequence[int] = (10, 8, 6), starts: Sequence[int] = (4, 8)) -> int:
    """The rank of task `task`, counted from 1, in the paper's rank reduction (SD-LoRA-RR).

    Example:
        >>> [reduced_rank(task) for task in (1, 3, 4, 7, 8, 20)]
        [10, 10, 8, 8, 6, 6]
    """
    if task < 1 or len(ranks) != len(starts) + 1:
        raise ValueError(f"tasks count from 1 and each of `starts` begins one more rank; got {task}, {ranks}, {starts}.")
    return ranks[sum(task >= start for start in starts)]


def _layers(model: nn.Module, action: str) -> dict[str, SDLoRALinear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SDLoRALinear)}
    if not layers:
        raise ValueError(
            f"{action}: {type(model).__name__} has no layer of method 'sdlora'; call "
            "inject_adapters(..., method='sdlora') first."
        )
    return layers


def _inner(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> float:
    """``⟨B A, D C⟩ = Σ (Bᵀ D) ⊙ (A Cᵀ)`` in fp64, without a dense product."""
    a, b, c, d = (t.double() for t in (a, b, c, d))
    return ((b.T @ d) * (a @ c.T)).sum().item()
