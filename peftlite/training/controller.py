"""Controller: what changes the training step, attached through the optimizer's own hooks."""

import hashlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from peftlite.adapter import AdapterLinear

_attached: "weakref.WeakSet[Controller]" = weakref.WeakSet()


class Controller(ABC):
    """Act before and after each step of `optimizer`, as a function of ``(seed, step)``; the training loop stays as it is.

    A controller registers itself in the optimizer's step hooks, so that it acts once per optimizer step, however many
    batches were accumulated for it, and with any implementation of the step (foreach, fused). `step` counts the steps that
    were taken. One that ``torch.amp.GradScaler`` skips, because a gradient overflowed, is not taken: nothing is counted and
    nothing done, also where the fused optimizer is called and skips by itself.

    Whatever a subclass draws comes from `generator`, so that it is the same on all ranks of a distributed run, and after a
    resume (`state_dict`, `load_state_dict`). In a ``with`` block, the controller detaches at the end.

    A subclass is made thus: its ``__init__`` calls this one, prepares itself and calls `attach` last; it overrides
    `settings`, and what it needs of `before_step`, `after_step`, `extra_state`, `load_extra_state` and `release`.

    Args:
        model: the model that `optimizer` trains; ``DistributedDataParallel`` and ``torch.compile`` are looked through.
        optimizer: the optimizer, made after everything that trains was set to train. Closures are not supported.
        seed: what all draws depend on, together with the step.

    Attributes:
        methods: names of the methods whose layers it works on; empty for any model.
        layers: those layers of the model, by name.
        step: number of optimizer steps taken.

    Raises:
        ValueError: if the model has no layer of `methods`, the optimizer lacks a parameter that trains in them, or a
            controller of the same class is attached already.
    """

    methods: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, seed: int = 0) -> None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # under torch.compile's wrapper
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"{self.name} attaches to the step hooks of a torch.optim.Optimizer, got {type(optimizer).__name__}; of a "
                "wrapper pass the optimizer inside."
            )
        for other in _attached:
            if type(other) is type(self) and other.optimizer is optimizer:
                raise ValueError(f"a {self.name} is attached to this optimizer already; call its detach() first.")
        self.optimizer: Optimizer = optimizer
        self.seed = check_count("seed", seed, least=None)
        self.step = 0
        self._handles: list[Any] = []
        self._skipped = False
        self.layers = self._find_layers()
        own = {f"{name}.{key}": p for name, layer in self.layers.items() for key, p in layer.adapter_parameters().items()}
        self.require_in_optimizer({name: p for name, p in own.items() if p.requires_grad})

    @property
    def name(self) -> str:
        """Name of the class, for messages and saved states."""
        return type(self).__name__

    @property
    def attached(self) -> bool:
        """Whether it acts on the optimizer's steps."""
        return bool(self._handles)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The options that the schedule depends on, as plain values; a saved state loads under the same ones only."""

    def before_step(self) -> None:  # noqa: B027  (optional)
        """Act on the gradients; they are accumulated, and divided by `gradient_scale` they are those of the loss."""

    def after_step(self) -> None:  # noqa: B027  (optional)
        """Act on the parameters; `step` counts the step that was just taken."""

    def extra_state(self) -> dict[str, Any]:
        """State beyond `step`: plain values and tensors."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (optional)
        """Put back what `extra_state` gave, and put the model where the schedule has it; `step` is set already."""

    def release(self) -> None:  # noqa: B027  (optional)
        """Undo what was set up in model and optimizer; called by `detach`."""

    def attach(self) -> None:
        """Register the hooks; the last line of a subclass's ``__init__``."""
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]
        _attached.add(self)

    def detach(self) -> None:
        """Stop acting, and leave nothing behind in model and optimizer; a second call does nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _attached.discard(self)
        self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the states of model and optimizer; ``torch.save`` takes it."""
        return {"controller": self.name, "settings": self.settings(), "step": self.step, **self.extra_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the controller of `state` was; call it after the optimizer's own ``load_state_dict``.

        Raises:
            ValueError: if the state is another controller's, was made with other settings, or lacks something.
        """
        if state.get("controller") != self.name:
            raise ValueError(f"the state is one of {state.get('controller')!r}, and this is a {self.name}.")
        expected = self.state_dict().keys()
        if expected != state.keys():
            missing, left = sorted(expected - state.keys()), sorted(state.keys() - expected)
            raise ValueError(f"the state of {self.name} does not fit: missing {missing}, left over {left}.")
        saved, own = state["settings"], self.settings()
        for key in sorted({*saved, *own}):
            if saved.get(key) != own.get(key):
                raise ValueError(
                    f"{self.name}: the state was saved with {key}={saved.get(key)!r}, and this one has "
                    f"{key}={own.get(key)!r}, which is another schedule; make it with the same options."
                )
        self.step = int(state["step"])
        self.load_extra_state(state)

    def generator(self, step: int) -> torch.Generator:
        """A CPU generator whose draws are a function of ``(seed, step)`` alone."""
        digest = hashlib.sha256(f"{self.name}:{self.seed}:{step}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    @property
    def gradient_scale(self) -> Tensor | float:
        """The factor on the gradients in `before_step`: a fused step under GradScaler unscales them only later."""
        scale = getattr(self.optimizer, "grad_scale", None)
        return 1.0 if scale is None else scale

    def require_in_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raise a `ValueError` that names the first of `parameters` that the optimizer does not step."""
        stepped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in parameters.items() if id(p) not in stepped]
        if missing:
            raise ValueError(
                f"{self.name}: the optimizer lacks {missing[0]!r} and {len(missing) - 1} more of the {len(parameters)} "
                "parameters that it must train; make the optimizer from param_groups(model, ...), after inject_adapters "
                "and before anything is frozen."
            )

    def _find_layers(self) -> dict[str, AdapterLinear]:
        if not self.methods:
            return {}
        present = {name: m for name, m in self.model.named_modules() if isinstance(m, AdapterLinear)}
        found = {name: layer for name, layer in present.items() if layer.method in self.methods}
        if not found:
            others = ", ".join(sorted({layer.method for layer in present.values()}))
            wanted = " or ".join(repr(method) for method in self.methods)
            raise ValueError(
                f"{self.name} is for layers of method {wanted}, and {type(self.model).__name__} has none "
                f"({f'its adapters are of {others}' if others else 'it carries no adapters'}); call "
                f"inject_adapters(..., method={self.methods[0]!r}) first."
            )
        return found

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(callable(argument) for argument in (*args[1:], *kwargs.values())):
            raise RuntimeError(
                f"{self.name} needs the gradients before the step, and a closure computes them inside it; call "
                "loss.backward() and then optimizer.step()."
            )
        found_inf = getattr(optimizer, "found_inf", None)  # GradScaler leaves the skipping to a fused step
        self._skipped = found_inf is not None and bool(found_inf.item())
        if not self._skipped:
            self.before_step()

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._skipped:
            self.step += 1
            self.after_step()


def check_count(option: str, value: object, *, least: int | None = 0) -> int:
    """`value` if it is an integer, and not below `least`; a `ValueError` that names the option otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{option} must be an integer{bound}, got {value!r}.")
    return value


def check_choice(option: str, value: object, choices: Iterable[str]) -> str:
    """`value` if it is one of `choices`; a `ValueError` that lists them otherwise."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return str(value)
