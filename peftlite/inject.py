"""Put adapters into a model, find them, switch them off, take them out."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from peftlite.adapter import AdapterLinear
from peftlite.fusion import fuse_adapters
from peftlite.methods import METHODS
from peftlite.sharing import SharedPool, seeded_generator
from peftlite.targets import Targets, as_patterns, both_target_and_trained, find_targets, require_match, resolve_pattern

Model = TypeVar("Model", bound=nn.Module)


def inject_adapters(
    model: Model,
    targets: Targets,
    rank: int,
    *,
    method: str | type[AdapterLinear] = "lora",
    alpha: float | None = None,
    dropout: float = 0.0,
    trainable: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    base_dtype: torch.dtype | str | None = None,
    seed: int | None = None,
    fuse: Iterable[Sequence[str]] = (),
    **method_options: Any,
) -> Model:
    """Replace the target layers of `model` by adapted ones, in place, and freeze everything else.

    After an error the model is exactly as it was.

    Args:
        model: any module. A layer that it holds under several names is replaced under all of them.
        targets: last segments of names (``"query"``), or globs on dotted names (``"encoder.*.query"``), or
            ``"all-linear"`` (every linear layer outside `trainable`), or a callable ``(name, module) -> bool``.
        rank: rank of the updates.
        method: a name in `METHODS`, or an `AdapterLinear` class.
        alpha: scaling numerator; the scale is ``alpha / rank``. By default the rank, for a scale of 1.
        dropout: probability of dropping an input element on the adapter's path, in training mode.
        trainable: names or globs of modules or parameters that train in full and are saved with the adapters.
        exclude: names or globs of targets to leave alone.
        rank_pattern: rank by name or glob, for targets that differ from `rank`; the first match wins.
        alpha_pattern: alpha by name or glob, likewise.
        base_dtype: hold the frozen weights and biases of the targets in this dtype. They are rounded once, now and for
            good: `remove_adapters` gives back the rounded layer.
        seed: makes the initial values a function of seed and layer name alone. By default a seed is drawn from torch's
            global generator, so that they follow ``torch.manual_seed``.
        fuse: groups of layers that read the same input and run together, such as ``[("query", "key", "value")]``; see
            `fuse_adapters`.
        method_options: further options of the method, such as ``rslora=True``.

    Returns:
        `model` itself.

    Raises:
        ValueError: if an entry of `targets`, `trainable`, `exclude` or a pattern matches nothing, a value is out of
            range, a layer cannot carry an adapter, or the model carries adapters already.
        TypeError: for an option that the method does not have.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> model = inject_adapters(model, "all-linear", rank=4, trainable="2")
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.lora_a', '0.lora_b', '2.weight', '2.bias']
    """
    cls = resolve_method(method)
    present = adapters(model)
    if present:
        raise ValueError(
            f"the model already carries {len(present)} adapters (the first is {next(iter(present))!r}); call remove_adapters "
            "or merge_adapters first. For other ranks in some layers use rank_pattern."
        )
    heads, parameters = find_trainable(model, trainable)
    found = find_targets(model, targets, exclude=exclude, heads=heads)
    for name, linear in found.items():  # also by a single parameter, or through a tied weight
        if any(own is parameter for own in linear.parameters() for parameter in parameters):
            raise ValueError(both_target_and_trained(name))
    if base_dtype is not None:
        for name, linear in found.items():
            check_not_tied(model, linear, name, "holding it in another dtype")
    ranks = resolve_pattern("rank_pattern", rank_pattern, found)
    alphas = resolve_pattern("alpha_pattern", alpha_pattern, found)
    if seed is None:
        seed = int(torch.randint(2**62, ()).item())
    options = {**method_options, **({"dropout": dropout} if dropout != 0 else {})}
    with unchanged_on_error(model):
        layers = {}
        pool = SharedPool(found, lambda key: seeded_generator(seed, f"shared {key}"))
        for name, linear in found.items():
            layer_rank = ranks.get(name, rank)
            cls.check_rank(layer_rank, linear.in_features, linear.out_features, f"layer {name!r}: ")
            layer_alpha = alphas.get(name, alpha)
            layers[name] = cls.from_linear(
                linear,
                layer_rank,
                base_dtype=base_dtype,
                generator=seeded_generator(seed, name),
                pool=pool,
                name=name,
                **options,
                **({} if layer_alpha is None else {"alpha": layer_alpha}),
            )
        install(model, layers, trained=parameters)
        fuse_adapters(model, fuse)
    return model


def adapters(model: nn.Module) -> dict[str, AdapterLinear]:
    """The adapted layers of `model` by name, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdapterLinear)}


def require_adapters(model: nn.Module, purpose: str) -> dict[str, AdapterLinear]:
    """As `adapters`; a `ValueError` that says what for if there are none."""
    found = adapters(model)
    if not found:
        raise ValueError(f"{purpose}: {type(model).__name__} carries no adapters; call inject_adapters first.")
    return found


def remove_adapters(model: Model) -> Model:
    """Put plain ``nn.Linear`` layers with the untouched base weights back, in place; the adapters are lost.

    The weights stay frozen, as they were under the adapter. Returns `model`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> remove_adapters(inject_adapters(model, "0", rank=2))
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
        )
    """
    for name, layer in require_adapters(model, "remove_adapters").items():
        _check_replaceable(name, layer)
        replace_module(model, layer, layer.to_linear())
    return model


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the block the adapted layers compute what the base computes, bit for bit."""
    layers = list(require_adapters(model, "disable_adapters").values())
    before = [layer.stand("base") for layer in layers]
    try:
        yield
    finally:
        for layer, standing in zip(layers, before, strict=True):
            layer.stand(*standing)


def resolve_method(method: str | type[AdapterLinear]) -> type[AdapterLinear]:
    """The class that `method` names; a `ValueError` with the nearest name if there is none."""
    if isinstance(method, type) and issubclass(method, AdapterLinear):
        return method
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown method {method!r}; there are {', '.join(sorted(METHODS))}.{hint}")
    return METHODS[method]


def install(model: nn.Module, layers: Mapping[str, AdapterLinear], *, trained: Iterable[nn.Parameter]) -> None:
    """Put `layers` in place, freeze the model, and let the adapters and the parameters `trained` train."""
    model.requires_grad_(False)
    for name, layer in layers.items():
        replace_module(model, model.get_submodule(name), layer)
        for parameter in layer.adapter_parameters().values():
            parameter.requires_grad_(True)
    for parameter in trained:
        parameter.requires_grad_(True)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands in `model`, also where several parents hold it."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def check_not_tied(model: nn.Module, layer: nn.Module, name: str, action: str) -> None:
    """Raise a `ValueError` if another module of `model` holds the weight or bias of `layer` as well."""
    own = {id(p): key for key, p in layer.named_parameters(recurse=False) if key in ("weight", "bias")}
    for holder_name, holder in model.named_modules():
        if holder is layer:
            continue
        for key, parameter in holder.named_parameters(recurse=False):
            if id(parameter) in own:
                raise ValueError(
                    f"{name}.{own[id(parameter)]} is tied to {holder_name}.{key}: {action} would change that as well. "
                    "Untie it first (give one of the two a copy)."
                )


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """If the block raises, put modules, requires_grad flags and the tensors under the parameters back."""
    parameters = [(p, p.data, p.requires_grad) for p in model.parameters()]
    children = [(m, dict(m._modules)) for m in model.modules()]
    try:
        yield
    except BaseException:
        for parameter, data, requires_grad in parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        for module, modules in children:
            module._modules.update(modules)
        raise


def find_trainable(model: nn.Module, trainable: str | Iterable[str]) -> tuple[list[str], list[nn.Parameter]]:
    """The modules that `trainable` names, and all parameters that it means."""
    modules = {name: m for name, m in model.named_modules() if name and next(m.parameters(), None) is not None}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    heads: list[str] = []
    trained: dict[int, nn.Parameter] = {}
    for pattern in as_patterns(trainable):
        for name in require_match("trainable", pattern, [*modules, *parameters], "module or parameter"):
            if name in modules:
                heads.append(name)
                trained.update((id(p), p) for p in modules[name].parameters())
            else:
                trained[id(parameters[name])] = parameters[name]
    return heads, list(trained.values())


def _check_replaceable(name: str, layer: AdapterLinear) -> None:
    if not name:
        raise ValueError(f"the model is itself a {type(layer).__name__} and has no parent; use its to_linear() instead.")
