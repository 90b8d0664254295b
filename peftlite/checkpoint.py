"""Save and load adapters: one safetensors file that holds the tensors and how to rebuild the layers."""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peftlite.adapter import AdapterLinear
from peftlite.inject import adapters, check_not_tied, install, resolve_method, unchanged_on_error
from peftlite.quantization.linear import PackedWeight
from peftlite.sharing import SharedPool
from peftlite.targets import is_plain_linear

FORMAT, VERSION = "peftlite", "1"
SAMPLES = 1024  # elements of a base weight that its fingerprint looks at


def save_adapters(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters of `model`, and whatever else of it trains, to one safetensors file.

    Saved are the adapters' tensors (one that several layers share is saved once), every module all of whose parameters
    train, with its buffers (a head with batch norm keeps its statistics), and every other parameter that trains. The
    metadata hold how to rebuild each layer, a fingerprint of the base and a checksum of it all. The file is written beside
    `path` and renamed, so that a crash never leaves half a file.

    Raises:
        ValueError: if the model has nothing to save.
    """
    layers = adapters(model)
    heads = _trained_tensors(model, layers)
    if not layers and not heads:
        raise ValueError(
            f"nothing to save: {type(model).__name__} carries no adapters and no parameter of it trains; "
            "call inject_adapters first."
        )
    aliases = _aliases(layers)
    tensors = {f"{name}.{key}": t for name, layer in layers.items() for key, t in layer.adapter_state().items()}
    tensors = {key: t for key, t in tensors.items() if key not in aliases}
    tensors.update(heads)
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    # A copy per tensor: safetensors refuses tensors that share storage.
    tensors = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "adapters": json.dumps({name: {"method": layer.method, **layer.config()} for name, layer in layers.items()}),
        "heads": json.dumps({name: name in trained for name in heads}),
        "base": json.dumps({name: fingerprint(layer) for name, layer in layers.items()}),
        "shared": json.dumps(aliases),
    }
    metadata["checksum"] = checksum(tensors, metadata)
    _write_atomically(tensors, metadata, Path(path))


def load_adapters(model: nn.Module, path: str | os.PathLike[str], *, check_base: bool = True) -> nn.Module:
    """Rebuild in `model`, in place, the adapters of a file from `save_adapters`, and load its other tensors.

    The outputs are bit for bit those of the model that was saved. As after `inject_adapters` everything is frozen but the
    adapters and what trained beside them, so that training can go on. Layers of `model` that are already adapted in the
    same way (a model whose own code uses `LoRALinear`) receive their tensors.

    Args:
        model: a model with the base weights that the adapters were trained on.
        path: the file.
        check_base: compare the fingerprint of the base weights. It does not depend on their dtype, but for fp16.

    Returns:
        `model` itself.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, not ours, or of an unknown version or method; if a layer or tensor is missing,
            left over or of another shape; if the base is another one. After an error the model is exactly as it was.
    """
    path = Path(path)
    specs, heads, base, shared, tensors = _read(path)
    present = adapters(model)
    extra = sorted(set(present) - set(specs))
    if extra:
        raise ValueError(
            f"{path}: the model carries an adapter at {extra[0]!r} that the file does not know; load into a model without "
            "adapters (remove_adapters), or one that is adapted in the same way."
        )
    with unchanged_on_error(model):
        pool = SharedPool(specs)
        # All of them first: a layer may let a tensor grow that it shares.
        layers = {name: _rebuild(model, path, name, spec, pool) for name, spec in specs.items()}
        values = []
        for name, layer in layers.items():
            if check_base and fingerprint(layer) != base.get(name):
                trained, here = (side.get("quantized", "dense") for side in (base.get(name, {}), fingerprint(layer)))
                kinds = "shape or values differ" if trained == here else f"that was {trained}, this is {here}"
                raise ValueError(
                    f"{path}: the base weight of {name!r} is not the one that this adapter was trained on ({kinds}). Load it "
                    "into its own base model; check_base=False loads it all the same."
                )
            state = {key: t for key, t in layer.adapter_state().items() if f"{name}.{key}" not in shared}
            own = {key: tensors.pop(f"{name}.{key}", None) for key in state}
            values += [(t, _fitting(path, f"{name}.{key}", own[key], t)) for key, t in state.items()]
        _check_aliases(path, shared, _aliases(layers))
        model_state = model.state_dict(keep_vars=True)
        for name in heads:
            if name not in model_state:
                raise ValueError(f"{path}: the file holds {name!r}, but {type(model).__name__} has no such tensor.")
            values.append((model_state[name], _fitting(path, name, tensors.pop(name, None), model_state[name])))
        if tensors:
            raise ValueError(f"{path}: the tensor {min(tensors)!r} is left over: no layer or head of the file claims it.")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        new_layers = {name: layer for name, layer in layers.items() if name not in present}
        install(model, new_layers, trained=[parameters[name] for name, trains in heads.items() if trains])
        for layer in present.values():
            for parameter in layer.adapter_parameters().values():
                parameter.requires_grad_(True)
    # Nothing can fail any more: shapes fit, and the tensors are in memory.
    with torch.no_grad():
        for target, value in values:
            target.copy_(value)
    return model


def fingerprint(layer: AdapterLinear) -> dict[str, Any]:
    """Shape and a cheap hash of a layer's base weight and bias.

    The hash looks at evenly spaced elements, rounded to bf16, so that the same base in fp32 and in bf16 has the same one.
    """
    digest = hashlib.sha256()
    for tensor in (layer.base_weight(), layer.bias):
        if tensor is not None:
            flat = tensor.detach().reshape(-1)
            step = max(1, flat.numel() // SAMPLES)
            sample = flat[::step].to("cpu", torch.float32).to(torch.bfloat16).view(torch.int16)
            digest.update(sample.numpy().tobytes())
    found = {"shape": list(layer.base_weight().shape), "bias": layer.bias is not None, "hash": digest.hexdigest()[:16]}
    if isinstance(layer.weight, PackedWeight):
        found["quantized"] = layer.weight.form.code
    return found


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of what a file says: safetensors itself would not notice a flipped bit in a value."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in sorted(metadata.items()) if k != "checksum"}).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _trained_tensors(model: nn.Module, layers: Mapping[str, AdapterLinear]) -> dict[str, Tensor]:
    """Parameters outside the adapters that train, and the buffers of modules all of whose parameters do."""
    inside = tuple(f"{name}." for name in layers)
    trained = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and not (inside and name.startswith(inside)) and "" not in layers
    }
    state = model.state_dict(keep_vars=True)
    for name, module in model.named_modules():
        own = list(module.parameters())
        if own and all(p.requires_grad for p in own) and not any(isinstance(m, AdapterLinear) for m in module.modules()):
            prefix = f"{name}." if name else ""
            buffers = {f"{prefix}{key}" for key, _ in module.named_buffers()}
            trained.update({key: state[key] for key in buffers if key in state})
    return dict(sorted(trained.items()))


def _aliases(layers: Mapping[str, AdapterLinear]) -> dict[str, str]:
    """The names of adapter tensors that another layer holds as well, each with the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, layer in layers.items():
        state = layer.state_dict(keep_vars=True)
        for key in layer.adapter_state():
            full = f"{name}.{key}"
            if first.setdefault(id(state[key]), full) != full:
                names[full] = first[id(state[key])]
    return names


def _check_aliases(path: Path, shared: Mapping[str, str], found: Mapping[str, str]) -> None:
    for name in sorted({*shared, *found}):
        if shared.get(name) != found.get(name):
            here, there = ("one tensor", "two") if name in shared else ("two tensors", "one")
            raise ValueError(
                f"{path}: {name!r} and {shared.get(name) or found[name]!r} are {here} in the file and {there} in the model: "
                "the layers do not share as they did. Call remove_adapters first, so that they are rebuilt from the file."
            )


def _rebuild(model: nn.Module, path: Path, name: str, spec: dict[str, Any], pool: SharedPool) -> AdapterLinear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{path}: the file adapts {name!r}, but {type(model).__name__} has no such module.") from None
    if isinstance(module, AdapterLinear):
        if {"method": module.method, **module.config()} != spec:
            raise ValueError(
                f"{path}: {name!r} is already a {type(module).__name__} with other settings than the file's {spec}; call "
                "remove_adapters first."
            )
        return module
    if not is_plain_linear(module):
        raise ValueError(f"{path}: the file adapts {name!r} as an nn.Linear, but there it is {type(module).__name__}.")
    if spec.get("base_dtype") is not None:
        check_not_tied(model, module, name, "holding it in another dtype")
    options = dict(spec)
    try:
        cls = resolve_method(options.pop("method"))
        return cls.from_linear(module, options.pop("rank"), pool=pool, name=name, **options)
    except (TypeError, ValueError) as error:  # of a newer version, or another model
        raise ValueError(f"{path}: {name!r} cannot be rebuilt here: {error}") from error


def _fitting(path: Path, name: str, value: Tensor | None, like: Tensor) -> Tensor:
    if value is None:
        raise ValueError(f"{path}: the tensor {name!r} is missing from the file.")
    if value.shape != like.shape:
        raise ValueError(f"{path}: {name!r} has shape {tuple(value.shape)} in the file and {tuple(like.shape)} in the model.")
    return value


def _read(
    path: Path,
) -> tuple[dict[str, Any], dict[str, bool], dict[str, Any], dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file to load adapters from.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a whole safetensors file, truncated or corrupted ({error}).") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: a safetensors file, but not one from save_adapters (no {FORMAT!r} in its metadata).")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path}: written in version {metadata.get('version')!r} of the format; this peftlite reads version {VERSION!r}. "
            "Update peftlite."
        )
    if metadata.get("checksum") != checksum(tensors, metadata):
        raise ValueError(f"{path}: corrupted: its content does not fit its checksum. Fetch or save it again.")
    try:
        specs, heads, base = (json.loads(metadata[key]) for key in ("adapters", "heads", "base"))
        shared = json.loads(metadata.get("shared", "{}"))
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: corrupted metadata ({error!r}).") from error
    return specs, heads, base, shared, tensors


def _write_atomically(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows; safetensors makes files that nobody else may read
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


def _flush(path: str | Path) -> None:
    """Make sure that what was written, or renamed, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
