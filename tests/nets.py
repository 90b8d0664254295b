"""Small models, the variants of every method, and the check that an error has changed nothing."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftlite import METHODS, AdapterLinear

# Values to try for options that are neither flags nor numbers; "method.option" goes before "option".
CHOICES: dict[str, dict[str, Any]] = {"dropout_mode": {"dropout_mode": "peft", "dropout": 0.25}}
NUMBERS: dict[str, Any] = {"alpha": 3.0, "dropout": 0.25, "initial_rank": 100, "active_rank": 1}


def options_of(method: str) -> list[str]:
    """The options of a method, read from its `build`."""
    return [name for name in inspect.signature(METHODS[method].build).parameters if name != "self"]


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Every method plain, and with each of its options changed; an option that nobody covers here is an error."""
    found: list[tuple[str, dict[str, Any]]] = []
    for method in METHODS:
        found.append((method, {}))
        for name in options_of(method):
            default = inspect.signature(METHODS[method].build).parameters[name].default
            if f"{method}.{name}" in CHOICES:
                found.append((method, CHOICES[f"{method}.{name}"]))
            elif isinstance(default, bool):
                found.append((method, {name: not default}))
            else:
                found.append((method, CHOICES[name] if name in CHOICES else {name: NUMBERS[name]}))
    return found


def variant_id(variant: tuple[str, dict[str, Any]]) -> str:
    """`variant` as a test id."""
    return "-".join([variant[0], *(f"{key}={value}" for key, value in variant[1].items())])


VARIANTS = variants()


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
        return METHODS[variant[0]].from_linear(linear, rank, **{**variant[1], **options}).eval()


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
