"""LISA: Pan et al. 2024, arXiv:2403.17919."""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from peftlite.training.controller import Controller, check_count


@final
class LISA(Controller):
    """Train `active` of the `layers` at a time, drawn anew every `period` steps, and all that lies outside of `layers`.

    Layerwise importance sampling is no adapter: the layers train in full, but a layer that is not active is frozen, so that
    the backward pass computes no gradient for it, and its moments are dropped, so that AdamW holds those of the
    active layers alone. Trained at any time: what lies outside (embeddings and head) plus `active` layers. The result is a
    fully trained model. Take it for the quality of full fine-tuning at about LoRA's memory; learning rates are those of full
    fine-tuning.

    The draw is a function of ``(seed, step // period)``, and uniform without replacement unless `layer_weights` says
    otherwise (the paper leaves that to later work). A layer that stays active keeps its moments; one that comes back starts
    anew, with Adam's bias correction of its own. The schedule of the learning rate stays global.

    What `layers` may train are their parameters that require gradients when the controller is made; all of them must be in
    the optimizer already, so make it before the controller. To spare the backward pass below the lowest active layer, freeze
    the embeddings before that. ``DistributedDataParallel`` averages the gradients of what required them when it was made: make
    it first, with ``find_unused_parameters=True``, and give it to LISA as the model. FSDP and ZeRO-3 do not allow
    ``requires_grad`` to change during a run. ``torch.compile`` makes a graph per set of active layers. To save with
    `save_adapters` before the end, use `all_training`.

    Args:
        model: any model.
        optimizer: an optimizer of all that is ever to train.
        layers: the layers to draw from: modules of `model`, or the dotted name of an ``nn.ModuleList`` or ``nn.Sequential``.
        active: ``γ``, how many train at a time (the authors: 2, and 4 for 70B).
        period: ``K``, optimizer steps between draws (the authors' code: 20).
        layer_weights: a weight for each layer; without one all are alike.
        seed: what the draws depend on, together with the step.

    Attributes:
        chosen: indices of the active layers, in increasing order.

    Raises:
        ValueError: for an option out of range, a layer without a parameter that trains, or as `Controller`.

    Source: Pan et al. 2024, "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
        arXiv:2403.17919.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))), nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> with LISA(model, optimizer, "1", active=2, period=5) as controller:
        ...     for _ in range(5):
        ...         model(torch.ones(3, 4)).sum().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...     print(len(controller.chosen), sum(p.requires_grad for p in model[1].parameters()))
        2 4
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        layers: str | Sequence[nn.Module],
        *,
        active: int = 2,
        period: int = 20,
        layer_weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            if not model.find_unused_parameters:
                raise ValueError(
                    "LISA freezes layers, and DistributedDataParallel waits for their gradients; make it with "
                    "find_unused_parameters=True."
                )
        elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                "LISA was given a model outside of DistributedDataParallel in a run of several processes. Wrapped later, it "
                "would never average the gradients of layers that are frozen now: wrap first, and give LISA the wrapper.",
                stacklevel=2,
            )
        super().__init__(model, optimizer, seed=seed)
        self.blocks = self._resolve(layers)
        self.active = check_count("active", active, least=1)
        self.period = check_count("period", period, least=1)
        if active > len(self.blocks):
            raise ValueError(f"active = {active} is more than the {len(self.blocks)} layers that there are.")
        self.layer_weights = [1.0] * len(self.blocks) if layer_weights is None else [float(w) for w in layer_weights]
        valid = all(math.isfinite(weight) and weight >= 0 for weight in self.layer_weights)
        if not valid or len(self.layer_weights) != len(self.blocks) or sum(w > 0 for w in self.layer_weights) < active:
            raise ValueError(
                f"layer_weights must be {len(self.blocks)} numbers, one for each layer, none negative and at least active = "
                f"{active} of them above 0, got {layer_weights!r}."
            )
        names = {id(p): name for name, p in self.model.named_parameters()}
        self._trained: list[list[nn.Parameter]] = []
        claimed: dict[int, int] = {}
        for index, block in enumerate(self.blocks):
            own = [p for p in block.parameters() if p.requires_grad]
            if not own:
                raise ValueError(
                    f"LISA: layer {index} ({type(block).__name__}) has no parameter that trains; let all layers train before "
                    "the optimizer is made, LISA freezes what is not active."
                )
            for parameter in own:
                if id(parameter) not in names:
                    raise ValueError(f"LISA: layer {index} ({type(block).__name__}) is no part of {type(self.model).__name__}.")
                if claimed.setdefault(id(parameter), index) != index:
                    raise ValueError(
                        f"LISA: {names[id(parameter)]!r} belongs to the layers {claimed[id(parameter)]} and {index}; a shared "
                        "parameter cannot be frozen in one of them."
                    )
            self._trained.append(own)
        rest = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.require_in_optimizer(rest)
        self.attach()
        self._activate()

    def _resolve(self, layers: str | Sequence[nn.Module]) -> list[nn.Module]:
        if isinstance(layers, str):
            try:
                found = self.model.get_submodule(layers)
            except AttributeError:
                found = None
            if not isinstance(found, (nn.ModuleList, nn.Sequential)):
                lists = [n for n, m in self.model.named_modules() if n and isinstance(m, (nn.ModuleList, nn.Sequential))]
                raise ValueError(
                    f"layers {layers!r} is no nn.ModuleList or nn.Sequential of {type(self.model).__name__}; there are: "
                    f"{', '.join(lists) or 'none'}. Or give a list of modules."
                )
            layers = list(found)
        blocks = list(layers)
        if not blocks:
            raise ValueError("layers is empty; give the layers to draw from.")
        return blocks

    def settings(self) -> dict[str, Any]:
        """What the draws depend on, with the number of layers."""
        names = ("active", "period", "layer_weights", "seed")
        return {**{name: getattr(self, name) for name in names}, "layers": len(self.blocks)}

    def chosen_at(self, step: int) -> list[int]:
        """Indices of the layers that are active in step `step` (from 0)."""
        weights = torch.tensor(self.layer_weights, dtype=torch.float64)
        drawn = torch.multinomial(weights, self.active, generator=self.generator(step // self.period))
        return sorted(drawn.tolist())

    def after_step(self) -> None:
        """Draw anew at the end of a period."""
        if self.step % self.period == 0:
            self._activate()

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Activate the layers of the coming step."""
        self._activate()

    def release(self) -> None:
        """Let all layers train again; they have moments where they were active last."""
        for own in self._trained:
            for parameter in own:
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def all_training(self) -> Iterator[None]:
        """Inside the block all layers count as training: `save_adapters` saves what trains, and all of them have."""
        self.release()
        try:
            yield
        finally:
            self._set_flags()

    def _set_flags(self) -> None:
        for index, own in enumerate(self._trained):
            for parameter in own:
                parameter.requires_grad_(index in self.chosen)

    def _activate(self) -> None:
        self.chosen = self.chosen_at(self.step)
        self._set_flags()
        for index, own in enumerate(self._trained):
            for parameter in own:
                if index not in self.chosen:
                    parameter.grad = None
                    self.optimizer.state.pop(parameter, None)
