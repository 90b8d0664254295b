"""Which layers a request means: patterns on dotted names, and errors that name the nearest ones."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeGuard, TypeVar

from torch import nn

from peftlite.quantization.linear import PackedWeight, QuantizedLinear

Value = TypeVar("Value", int, float)
Targets = str | Iterable[str] | Callable[[str, nn.Module], bool]

PlainLinear = nn.Linear | QuantizedLinear
FOREIGN = " Layers of bitsandbytes are not wrapped: load the model in 16 bits and call quantize_base."
FAST_PATHS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)


def as_patterns(patterns: str | Iterable[str]) -> list[str]:
    """One pattern or several, as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the dotted `name`, its last segments, or a glob on either.

    Example:
        >>> matches("encoder.0.query", "query"), matches("encoder.0.query", "encoder.*"), matches("my_query", "query")
        (True, True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def require_match(what: str, pattern: str, names: Iterable[str], of: str) -> list[str]:
    """The `names` that `pattern` matches.

    Raises:
        ValueError: if there is none; it names the candidates by their last segments, and the nearest.
    """
    names = list(names)
    found = [name for name in names if matches(name, pattern)]
    if not found:
        leaves = sorted({name.rpartition(".")[2] for name in names})
        near = difflib.get_close_matches(pattern.rpartition(".")[2], leaves, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        shown = ", ".join(leaves[:20]) + (", ..." if len(leaves) > 20 else "")
        raise ValueError(f"{what} {pattern!r} matches no {of}; their names end in: {shown or 'there are none'}.{hint}")
    return found


def find_targets(
    model: nn.Module, targets: Targets, *, exclude: Iterable[str] = (), heads: Iterable[str] = ()
) -> dict[str, PlainLinear]:
    """The ``nn.Linear`` and `QuantizedLinear` layers of `model` that `targets` means, by name, in the order of the model.

    Args:
        model: any module.
        targets: last segments of names, or globs on dotted names, or ``"all-linear"``, or a callable
            ``(name, module) -> bool`` that is asked about each linear layer.
        exclude: patterns of layers to leave out.
        heads: names of modules that train in full; ``"all-linear"`` leaves out what lies in them.

    Raises:
        ValueError: if an entry matches nothing, if nothing is left, or if a layer cannot carry an adapter: its parent
            reads its weight directly, it has hooks that would be lost, its weight is computed and not a Parameter, or
            it is meant to train in full.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(find_targets(model, "all-linear", exclude=["2"]))
        ['0']
    """
    if is_plain_linear(model):
        raise ValueError("the model is itself an nn.Linear and has no parent to put an adapter into; use from_linear.")
    # A layer that the model holds under several names may be meant by any of them.
    linears = {name: m for name, m in model.named_modules(remove_duplicate=False) if is_plain_linear(m)}
    in_heads = {m for name, m in linears.items() if any(name == h or name.startswith(f"{h}.") for h in heads)}
    kind = f"nn.Linear of {type(model).__name__}"
    if callable(targets):
        wanted = {m for name, m in linears.items() if targets(name, m)}
    elif targets == "all-linear":
        wanted = {m for m in linears.values() if m not in in_heads}
    else:
        wanted = {linears[name] for pattern in as_patterns(targets) for name in _require_linear(model, pattern, linears, kind)}
    candidates = [name for name, m in linears.items() if m in wanted]
    for pattern in as_patterns(exclude):
        matched = require_match("exclude", pattern, candidates, f"target of {type(model).__name__}")
        wanted -= {linears[name] for name in matched}
    if not wanted:
        count = len(set(linears.values()))
        raise ValueError(f"the targets {_describe(targets)} leave no {kind} to adapt; it has {count} in all.")
    for name, linear in linears.items():
        if linear in wanted:
            if linear in in_heads:
                raise ValueError(both_target_and_trained(name))
            _check_can_carry(model, name, linear)
    return {name: m for name, m in model.named_modules() if m in wanted}


def is_plain_linear(module: nn.Module) -> TypeGuard[PlainLinear]:
    """Whether `module` is of exactly a type that can be adapted; a subclass may compute something else."""
    return type(module) in (nn.Linear, QuantizedLinear)


def both_target_and_trained(name: str) -> str:
    """What to say of a layer that is to be adapted and to be trained in full."""
    return f"{name!r} is both a target and part of what `trainable` trains in full; take it out of one of the two."


def resolve_pattern(what: str, patterns: Mapping[str, Value] | None, names: Iterable[str]) -> dict[str, Value]:
    """The value that each name gets from `patterns`: the first pattern that matches a name wins.

    Raises:
        ValueError: for a pattern that matches no target.
    """
    resolved: dict[str, Value] = {}
    for pattern, value in (patterns or {}).items():
        for name in require_match(what, pattern, names, "target"):
            resolved.setdefault(name, value)
    return resolved


def _require_linear(model: nn.Module, pattern: str, linears: Mapping[str, PlainLinear], kind: str) -> list[str]:
    others = [(name, m) for name, m in model.named_modules() if name and name not in linears and matches(name, pattern)]
    if any(matches(name, pattern) for name in linears):
        # A plain name that also means a subclass would adapt only some of the layers that it seems to promise.
        others = [] if set(pattern) & set("*?[") else [(name, m) for name, m in others if isinstance(m, nn.Linear)]
    if others:
        name, module = others[0]
        raise ValueError(
            f"target {pattern!r} matches {type(module).__name__} {name!r} of {type(model).__name__}, but only layers of the "
            "exact type nn.Linear can be adapted (a subclass may compute something else); a glob leaves the others out."
            + (FOREIGN if type(module).__module__.startswith("bitsandbytes") else "")
        )
    return require_match("target", pattern, linears, kind)


def _check_can_carry(model: nn.Module, name: str, linear: PlainLinear) -> None:
    parts = name.split(".")
    for depth in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        if isinstance(parent, FAST_PATHS):
            raise ValueError(
                f"{name!r} lies in {type(parent).__name__} {'.'.join(parts[:depth]) or '(the model itself)'!r}, whose fast "
                "path reads its weight directly and would skip the adapter without a word; leave it out with `exclude`, or "
                "write the block with plain nn.Linear calls."
            )
    if not isinstance(linear.weight, nn.Parameter | PackedWeight):
        raise ValueError(
            f"the weight of {name!r} is not a Parameter but computed (weight_norm, pruning?); make it permanent first, "
            "then inject."
        )
    if type(linear.weight).__module__.startswith("torchao"):
        raise ValueError(
            f"the weight of {name!r} is a {type(linear.weight).__name__} of torchao, which cannot be wrapped; load the model "
            "in 16 bits and call quantize_base."
        )
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        raise ValueError(f"{name!r} has hooks, which would be lost with the layer; register them after injection.")


def _describe(targets: Targets) -> str:
    return repr(getattr(targets, "__name__", "a callable")) if callable(targets) else repr(targets)
