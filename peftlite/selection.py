"""Choose what trains: the last layers of a stack, or parameters by name."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import nn

from peftlite.inject import adapters, find_trainable
from peftlite.targets import Targets, find_targets

Model = TypeVar("Model", bound=nn.Module)


def top_layers(
    model: nn.Module, targets: Targets, count: int, *, exclude: str | Iterable[str] = ()
) -> Callable[[str, nn.Module], bool]:
    """Those `targets` that lie in the last `count` layers of their stack, to be given to `inject_adapters` as targets.

    A stack is what a number in a dotted name counts: ``encoder.layer`` in ``encoder.layer.11.attention.query``, the
    outermost one if there are several. Targets outside of any stack are left out.

    The backward pass ends at the lowest layer that trains, so that all layers below cost their forward pass alone, and
    keep nothing for the backward pass. Anything that trains or needs a gradient below brings it back: embeddings in
    `trainable`, or inputs that require one, as reentrant gradient checkpointing wants them.

    This is one of the remedies for "LoRA Is Slower Than You Think" (Ko 2025, arXiv:2507.08833).

    Args:
        model: any module.
        targets: as in `inject_adapters`.
        count: how many layers of each stack.
        exclude: names or globs of targets to leave out.

    Returns:
        A callable ``(name, module) -> bool``.

    Raises:
        ValueError: if `targets` means nothing, no target lies in a stack, or a stack has fewer than `count` layers.

    Example:
        >>> from peftlite import adapters, inject_adapters
        >>> model = nn.Sequential(*(nn.ModuleDict({"query": nn.Linear(4, 4), "up": nn.Linear(4, 8)}) for _ in range(6)))
        >>> _ = inject_adapters(model, top_layers(model, "query", 2), rank=2)
        >>> list(adapters(model))
        ['4.query', '5.query']
    """
    patterns = [exclude] if isinstance(exclude, str) else exclude
    chosen: set[nn.Module] = set()
    outside = []
    for name, linear in find_targets(model, targets, exclude=patterns).items():
        stack, index = _stack_of(name)
        if stack is None:
            outside.append(name)
            continue
        size = 1 + max(int(key) for key in model.get_submodule(stack)._modules if key.isdecimal())
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= size:
            raise ValueError(
                f"count must be an integer from 1 to {size}, the number of layers in {stack or 'the model'!r}, got {count!r}."
            )
        if index >= size - count:
            chosen.add(linear)
    if not chosen:
        found = f"{outside[0]!r} and the others lie in none" if outside else "the last ones hold no target"
        raise ValueError(
            f"no target lies in the last {count} numbered layers of {type(model).__name__}: {found}; name the layers that "
            "you mean as targets."
        )

    def is_in_top_layers(name: str, module: nn.Module) -> bool:
        return module in chosen

    return is_in_top_layers


def train_only(model: Model, trainable: str | Iterable[str]) -> Model:
    """Freeze `model` but for the modules and parameters that `trainable` names, in place; no adapters are put in.

    ``train_only(model, ["bias", "head"])`` is BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): all biases train, those of
    norms as well, and a head. `param_groups`, `summary`, `save_adapters` and `load_adapters` work as with adapters; the
    file holds what trains. BitFit is this recipe and not a method, because a method stands for a weight and leaves the
    base's bias alone; to merge there is nothing.

    Args:
        model: any module without adapters; with them, `inject_adapters` has an argument of the same name.
        trainable: last segments of names, or globs on dotted names, of modules or parameters.

    Returns:
        `model` itself.

    Raises:
        ValueError: if an entry matches nothing, or the model carries adapters, which would be frozen.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> [name for name, p in train_only(model, ["bias", "2"]).named_parameters() if p.requires_grad]
        ['0.bias', '1.bias', '2.weight', '2.bias']
    """
    present = adapters(model)
    if present:
        raise ValueError(
            f"the model carries {len(present)} adapters (the first is {next(iter(present))!r}), which train_only would freeze; "
            "name what trains beside them in inject_adapters(..., trainable=...)."
        )
    _, parameters = find_trainable(model, trainable)
    if not parameters:
        raise ValueError("trainable is empty, and nothing would train; name modules or parameters, such as 'bias'.")
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return model


def _stack_of(name: str) -> tuple[str | None, int]:
    """The module whose children the first number in `name` counts, and that number."""
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:depth]), int(part)
    return None, -1
