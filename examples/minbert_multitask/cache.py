"""Tokenised files: safetensors with a checksum, written whole or not at all."""

import hashlib
import logging
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)


def checksum(tensors: dict[str, Tensor], text: str) -> str:
    """sha256 of names, values and text, so that a flipped bit is noticed as surely as a truncated file."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def write_cache(path: Path, tensors: dict[str, Tensor], text: str) -> None:
    """Write `tensors` and `text` to a temporary file and rename it, so that no reader ever meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"text": text, "sha256": checksum(tensors, text)})
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_cache(path: Path) -> tuple[dict[str, Tensor], str] | None:
    """What `write_cache` wrote; None where there is no file or a damaged one, which is logged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        logger.warning("the cached file %s cannot be read (%s) and is built anew", path, error)
        return None
    text = metadata.get("text", "")
    if metadata.get("sha256") != checksum(tensors, text):
        logger.warning("the cached file %s does not match its checksum and is built anew", path)
        return None
    return tensors, text
