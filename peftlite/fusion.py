"""Let adapted layers that read the same input run together."""

import difflib
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from peftlite.adapter import AdapterLinear
from peftlite.kernels.dispatch import compute_dtype

OWN = ("rank", "alpha")  # options in which the layers of a group may differ


class FusedGroup:
    """Adapted layers that read the same input, such as query, key and value of an attention.

    The first of them that is called with an input computes the outputs of all; the others hand out theirs when they are
    called with the very same tensor. A call that does not fit (another tensor, a layer in evaluation mode or disabled,
    compiled code) is computed on its own: the group changes what is computed together, never what is computed. The layers
    of a group share one dropout mask.
    """

    def __init__(self, names: Sequence[str], layers: Sequence[AdapterLinear]) -> None:
        self.names, self.layers = tuple(names), tuple(layers)
        self._input: Tensor | None = None
        self._state: object = None
        self._waiting: dict[int, Tensor] = {}  # by the layer's place in the group
        self._together = True

    def __call__(self, layer: AdapterLinear, x: Tensor) -> Tensor:
        """The output of `layer`, a member, for x ``(..., in)``."""
        if not self._together or torch.compiler.is_compiling() or not self._alike():
            return layer.adapted_forward(x)
        place = next(place for place, member in enumerate(self.layers) if member is layer)
        # The version only tells whether the tensor has been written between two layers of one forward pass.
        version = None if x.is_inference() else x._version
        state = (version, layer.training, torch.is_grad_enabled(), compute_dtype(x))
        waits = place in self._waiting
        if waits and x is self._input and state == self._state:
            y = self._waiting.pop(place)
            if not self._waiting:
                self._input = None
            return y
        self._input, self._waiting = None, {}
        if waits and state[1:] == self._state[1:]:  # type: ignore[index]
            self._together = False
            warnings.warn(
                f"fuse: {', '.join(self.names)} were to run together, but {self.names[place]} was called with another "
                "tensor, or after a change of it; from now on they run one by one. Leave them out of fuse.",
                stacklevel=4,
            )
            return layer.adapted_forward(x)
        ys = type(layer).fused_forward(self.layers, x)
        self._input, self._state = x, state
        self._waiting = {other: y for other, y in enumerate(ys) if other != place}
        return ys[place]

    def _alike(self) -> bool:
        training = self.layers[0].training
        return all(layer.standing == "adapted" and layer.training == training for layer in self.layers)

    def __getstate__(self) -> dict[str, object]:
        """Without outputs that wait: they belong to a forward pass, and a copy of the model to none."""
        return self.__dict__ | {"_input": None, "_state": None, "_waiting": {}}


def fuse_adapters(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Let adapted layers that read the same input run together: one cast and one dropout mask of the input, one product with
    all A, and the input's gradient summed inside the products.

    Names, state and results stay as they are; with dropout the layers of a group share one mask. Code that
    calls only one of them pays for all of them. Compiled code runs them one by one. Under FSDP the layers of a group
    belong into one unit, since the first that is called reads the tensors of all.

    Args:
        model: a model with adapters.
        groups: each a tuple of names of adapted layers that stand side by side, such as ``("query", "key", "value")``; it
            holds for every module that has all of them as children.

    Raises:
        ValueError: if a group is found nowhere or only in part, if a layer is in two groups, or if the layers of a
            group differ in method, width of the input or options other than rank and alpha.

    Example:
        >>> model = nn.ModuleDict({"query": nn.Linear(8, 8), "key": nn.Linear(8, 4)})
        >>> model = peftlite.inject_adapters(model, "all-linear", rank=2)
        >>> fuse_adapters(model, [("query", "key")])
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}
    found = [members for group in groups for members in _members(tuple(group), layers)]
    taken: set[int] = {id(layer) for layer in layers.values() if layer.group is not None}
    for members in found:
        _check(members, taken)
    for members in found:
        fused = FusedGroup(list(members), list(members.values()))
        for layer in members.values():
            layer.group = fused


def can_fuse(method: type[AdapterLinear]) -> bool:
    """Whether layers of the `method` can run together: its `fused_forward` computes what its `adapted_forward` does."""
    together, alone = (next(c for c in method.__mro__ if name in vars(c)) for name in ("fused_forward", "adapted_forward"))
    return together is not AdapterLinear and issubclass(together, alone)  # or a subclass has changed one of them only


def _members(group: tuple[str, ...], layers: dict[str, AdapterLinear]) -> list[dict[str, AdapterLinear]]:
    """The adapted layers of every parent that holds all names of `group`."""
    asked = f"fuse: ({', '.join(map(repr, group))})"
    if isinstance(group, str) or len(group) < 2 or len(set(group)) < len(group):
        raise ValueError(f"{asked} is no group; name two or more different layers, as in ('query', 'key', 'value').")
    parents: dict[str, dict[str, AdapterLinear]] = {}
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        if last in group:
            parents.setdefault(parent, {})[last] = layer
    if not parents:
        known = sorted({name.rpartition(".")[2] for name in layers})
        near = difflib.get_close_matches(group[0], known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{asked} names no adapted layer; there are {', '.join(known) or 'none'}.{hint}")
    for parent, held in parents.items():
        missing = [name for name in group if name not in held]
        if missing:
            raise ValueError(
                f"{asked}: {parent or 'the model'} has no adapted layer {', '.join(map(repr, missing))}, only "
                f"{', '.join(map(repr, held))}; adapt it as well, or name a group without it."
            )
    return [{f"{parent}.{name}".lstrip("."): held[name] for name in group} for parent, held in parents.items()]


def _check(members: dict[str, AdapterLinear], taken: set[int]) -> None:
    names = ", ".join(members)
    first, *others = members.values()
    for name, layer in members.items():
        if id(layer) in taken:
            raise ValueError(f"fuse: {name} is in two groups; a layer can be in one.")
        taken.add(id(layer))
    if not can_fuse(type(first)):
        raise ValueError(f"fuse: the method {first.method!r} has no form for layers that run together; leave out fuse.")
    for layer in others:
        if type(layer) is not type(first) or layer.in_features != first.in_features:
            raise ValueError(
                f"fuse: {names} cannot run together: they must have one method and one width of the input, got "
                f"{first.method} of {first.in_features} and {layer.method} of {layer.in_features} features."
            )
        one, other = ({k: v for k, v in member.config().items() if k not in OWN} for member in (first, layer))
        if one != other:
            raise ValueError(f"fuse: {names} cannot run together: their options differ, {one} and {other}.")
