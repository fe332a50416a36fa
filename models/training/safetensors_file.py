"""Reads files of safetensors: tensors by name, and texts about them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from models.registry import disk
from models.registry.checkpoint import BadCheckpoint


def is_safetensors(path: Path) -> bool:
    """Return whether the file begins as safetensors do, with the length of a JSON object and its brace, or is named so.

    Raises:
        BadCheckpoint: there is no such file, or it is not a regular file.
    """
    try:
        with open(disk.open_regular(path), "rb") as file:
            start = file.read(9)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BadCheckpoint(f"{path}: {error.strerror or error}") from error
    return path.suffix.lower() == ".safetensors" or (start[8:] == b"{" and int.from_bytes(start[:8], "little") < size)


def read_safetensors(path: Path) -> dict[str, Any]:
    """Return the tensors under `model_state_dict`, and beside it the metadata: JSON as values, the rest as texts.

    The tensors are mapped from the file, and use no memory until they are read.

    Raises:
        BadCheckpoint: the file is damaged.
    """
    try:
        with open(disk.open_regular(path), "rb") as file, safe_open(f"/dev/fd/{file.fileno()}", "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = {name: _value(text) for name, text in (opened.metadata() or {}).items()}
            return {**metadata, "model_state_dict": tensors}
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{path}: not a safetensors file, or damaged ({error})") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
