"""Tensors that several layers hold as one, and which layers those are."""

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

SCOPES = ("type", "qkv", "shape")
PROJECTIONS = re.compile(r"(to_|w)?(q|k|v|query|key|value)(_?(proj|lin|linear))?")


class SharedTensor(nn.Module):
    """One parameter (or buffer), called `name`, held as a submodule by every layer that shares it.

    As a submodule, because then the layers stay tied by construction: whatever replaces the tensor (``to``, ``to_empty``,
    ``load_state_dict(assign=True)``, ``deepcopy``, pickling, FSDP) replaces it in the one module that they all hold.
    ``model.parameters()`` yields it once.

    Args:
        name: name of the tensor in the module.
        tensor: its values.
        trains: whether it is a Parameter; a buffer otherwise.
        persistent: whether a buffer is part of the state.
    """

    def __init__(self, name: str, tensor: Tensor, *, trains: bool, persistent: bool = True) -> None:
        super().__init__()
        self.name = name
        if trains:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor, persistent=persistent)

    @property
    def tensor(self) -> Tensor:
        """The tensor itself, whichever object it is at the moment."""
        return getattr(self, self.name)

    def offer(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a layer gets which asks for `shape`: that of the tensor. A subclass may grow to meet the wish."""
        return tuple(self.tensor.shape)

    def extra_repr(self) -> str:
        """Name and shape, for ``print(model)``."""
        return f"{self.name}, {tuple(self.tensor.shape)}"


Shared = TypeVar("Shared", bound=SharedTensor)


class SharedPool:
    """The shared tensors of one model while its layers are made: the first layer that asks for a key has it made.

    `inject_adapters` and `load_adapters` make one for each call. In a model of one's own, layers that are given one pool,
    and their names, share likewise.

    Args:
        names: names of all layers that are going to be made.
        generator: from the key of a tensor to the generator of its initial values; by default torch's global one draws.

    Example:
        >>> from peftlite import ShareLoRALinear
        >>> pool = SharedPool()
        >>> layers = [ShareLoRALinear(8, 8, 2, pool=pool, name=f"blocks.{i}.up") for i in range(2)]
        >>> layers[0].lora_a is layers[1].lora_a
        True
    """

    def __init__(self, names: Iterable[str] = (), generator: Callable[[str], torch.Generator] | None = None) -> None:
        self.names = tuple(names)
        self._generator = generator
        self._made: dict[str, tuple[str, SharedTensor]] = {}

    def take(
        self,
        key: str,
        layer: str,
        make: Callable[[torch.Generator | None], Shared],
        wanted: tuple[tuple[int, ...], torch.dtype, torch.device],
    ) -> Shared:
        """The module under `key`, made by `make` for the first `layer` that asks.

        Raises:
            ValueError: if its tensor is not of the `wanted` shape, dtype and device.
        """
        if key not in self._made:
            self._made[key] = (layer, make(None if self._generator is None else self._generator(key)))
        first, module = self._made[key]
        found = (module.offer(wanted[0]), module.tensor.dtype, module.tensor.device)
        if found != wanted:
            raise ValueError(
                f"layer {layer!r} cannot share {module.name!r} with {first!r}: it needs {_describe(*wanted)}, and the shared "
                f"tensor is {_describe(*found)}. Give all of them one adapter_dtype and one device, or leave one out."
            )
        return module  # type: ignore[return-value]  # of the type that `make` makes under this key


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on `seed` and `name` alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def check_scope(scope: str, names: Iterable[str]) -> None:
    """Raise a `ValueError` unless `scope` is one of ``"type"``, ``"qkv"``, ``"shape"``, and finds what it is about.

    Args:
        scope: which layers belong together, see `group_of`.
        names: names of all layers that are adapted; none if they are not known.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}, got {scope!r}.")
    names = list(names)
    if scope == "qkv" and names and not any(PROJECTIONS.fullmatch(name.rpartition(".")[2]) for name in names):
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise ValueError(
            f"scope='qkv' finds no query, key or value projection among the targets, whose names end in: {ends}. Use "
            "scope='type', or 'shape' to share between all layers of one shape."
        )


def group_of(name: str, scope: str) -> str:
    """The group that the layer `name` shares in.

    With ``"type"`` layers that stand in the same place of repeated blocks: their names differ in indices only. With
    ``"qkv"`` the query, key and value projections of all blocks besides are one group. With ``"shape"`` all layers are.

    Example:
        >>> group_of("encoder.0.attention.query", "type"), group_of("encoder.11.attention.query", "qkv")
        ('encoder.*.attention.query', 'encoder.*.attention.qkv')
    """
    if scope == "shape":
        return "*"
    *parents, last = name.split(".")
    if scope == "qkv" and PROJECTIONS.fullmatch(last):
        last = "qkv"
    return ".".join("*" if part.isdecimal() else part for part in (*parents, last))


def _describe(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"{' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')} on {device}"
