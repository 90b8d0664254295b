"""Small models, the variants of every method, and the check that an error has changed nothing."""

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from counts import COUNTS
from torch import Tensor, nn

from peftlite import METHODS, AdapterLinear

# What the contract runs over: the library's methods, or the one of `use_method_file`.
CLASSES: dict[str, type[AdapterLinear]] = dict(METHODS)

# Values to try for options that are neither flags nor numbers; "method.option" goes before "option".
# None: no value fits every layer here, or leaves its function alone; the method's own tests cover the option.
CHOICES: dict[str, dict[str, Any] | None] = {
    "dropout_mode": {"dropout_mode": "peft", "dropout": 0.25},
    "ia3.side": {"side": "in"},
    "tt_lora.shape": None,
    "tt_lora.init": None,
    "svd_iterations": {"svd_iterations": 2},
    "melora.blocks": {"blocks": 1},  # more do not fit the smallest shapes; two are the default
    "normaliser": {"normaliser": "factors"},
    "sdlora.scope": {"scope": "layer"},
    "finished": {"finished": [2, 0, 1]},
    "phase": {"finished": [2], "phase": "between"},
    "scope": {"scope": "qkv"},
    "share": {"share": "ab"},
    "preset": {"preset": "vera_like"},
    **{f"train_{key}": {f"train_{key}": False} for key in "abuv"},
    **{f"tie_{key}": {f"tie_{key}": False} for key in "ab"},
}
NUMBERS: dict[str, Any] = {
    "alpha": 3.0,
    "dropout": 0.25,
    "d_init": 0.5,
    "basis_seed": 7,
    "initial_rank": 100,
    "active_rank": 1,
    "magnitude": 0.8,
    "boosted_rank": 2,
}


def options_of(method: str) -> list[str]:
    """The options of a method, read from its `build`."""
    return [name for name in inspect.signature(CLASSES[method].build).parameters if name != "self"]


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Every method plain, and with each of its options changed; an option that nobody covers here is an error."""
    found: list[tuple[str, dict[str, Any]]] = []
    for method in CLASSES:
        found.append((method, {}))
        for name in options_of(method):
            default = inspect.signature(CLASSES[method].build).parameters[name].default
            if (key := f"{method}.{name}" if f"{method}.{name}" in CHOICES else name) in CHOICES:
                choice = CHOICES[key]
            else:
                choice = {name: not default if isinstance(default, bool) else NUMBERS[name]}
            found += [] if choice is None else [(method, choice)]
    return found


def variant_id(variant: tuple[str, dict[str, Any]]) -> str:
    """`variant` as a test id."""
    return "-".join([variant[0], *(f"{key}={value}" for key, value in variant[1].items())])


VARIANTS = variants()


def use_method_file(path: Path) -> None:
    """Run the contract over the method in `path` instead: one subclass of `AdapterLinear`, and ``closed_formula``, which
    gives the number of its trained parameters from in_features, out_features and rank."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # where pickle looks for the class
    spec.loader.exec_module(module)
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == path.stem]
    found = [c for c in classes if issubclass(c, AdapterLinear)]
    if len(found) != 1 or not callable(getattr(module, "closed_formula", None)):
        raise pytest.UsageError(
            f"--method-file {path} must hold one subclass of AdapterLinear, and a function closed_formula(in_features, "
            f"out_features, rank) that counts its parameters; it holds {[c.__name__ for c in found]}."
        )
    CLASSES.clear()
    CLASSES[found[0].method] = found[0]
    COUNTS[found[0].method] = module.closed_formula
    VARIANTS[:] = variants()


class Block(nn.Module):
    """A residual block with attention-like names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., width)`` to the same shape."""
        x = x + torch.sigmoid(self.query(x)) * self.value(x)
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks and a head with batch norm."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Block(width), Block(width))
        self.head = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, width)`` to ``(batch, classes)``."""
        return self.head(self.encoder(x))


def net(seed: int = 0) -> Net:
    """A `Net` whose values depend on `seed` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


@torch.no_grad()
def perturb(module: nn.Module, seed: int = 1) -> None:
    """Add N(0, 0.1²) to everything that trains: a test with B = 0 would be vacuous."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.1 * noise).to(parameter.dtype))


def make_layer(
    variant: tuple[str, dict[str, Any]],
    in_features: int,
    out_features: int,
    rank: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> AdapterLinear:
    """A layer of `variant` over a seeded ``nn.Linear``, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        linear = nn.Linear(in_features, out_features, bias).to(dtype)
        return CLASSES[variant[0]].from_linear(linear, rank, **{**variant[1], **options}).eval()


def outcome(model: nn.Module, x: Tensor, run: Any = None) -> dict[str, Tensor]:
    """Output of `model`, or of `run`, and the gradients of x and of everything that has one."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = (run or model)(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fail unless both have the same entries, bit for bit."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that an error must leave alone: modules and tensors by identity, values, flags."""
    modules = [(name, id(m), type(m), m.training, list(m._modules)) for name, m in model.named_modules(remove_duplicate=False)]
    tensors = [
        (name, id(t), t.data_ptr(), t.dtype, t.requires_grad, None if t.grad is None else id(t.grad))
        for name, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    ]
    return [modules, tensors]


@contextlib.contextmanager
def refused(model: nn.Module, match: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """The block raises `error` with a message that `match` finds, and `model` is exactly as before."""
    before, values = snapshot(model), {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(error, match=match):
        yield
    assert snapshot(model) == before
    after = model.state_dict()
    assert list(after) == list(values)
    for key, value in values.items():
        assert torch.equal(after[key].nan_to_num(), value.nan_to_num()), key
