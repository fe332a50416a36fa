"""Reads and writes safetensors files without copies of them in memory, so that tensors can stay on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.registry.manifest import Buffer

_DTYPES = {"U8": "u1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}
_LENGTH_BYTES = 8


class BadTensors(ValueError):
    """The bytes are not a safetensors file, or use a type that is not read here."""


def view_tensors(data: Buffer) -> dict[str, NDArray[Any]]:
    """Return the tensors of a safetensors file by name, as read-only views of `data`.

    Raises:
        BadTensors: the header is damaged, or a tensor exceeds the file.
    """
    try:
        begin = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        header = json.loads(data[_LENGTH_BYTES:begin])
        header.pop("__metadata__", None)
        return {name: _view(data, begin, entry) for name, entry in header.items()}
    except Exception as error:
        # a damaged header raises anything from KeyError to RecursionError
        raise BadTensors(f"not a safetensors file: {error}") from error


def _view(data: Buffer, begin: int, entry: Mapping[str, Any]) -> NDArray[Any]:
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    first, last = entry["data_offsets"]
    count = math.prod(entry["shape"])
    if not 0 <= first <= last or last - first != count * dtype.itemsize:
        raise ValueError(f"data_offsets {entry['data_offsets']} do not fit the shape {entry['shape']}")
    if not count:
        return np.empty(entry["shape"], dtype)
    return np.frombuffer(data, dtype, count, begin + first).reshape(entry["shape"])


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write a new safetensors file; the widest type comes first, so that every tensor is aligned."""
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    types = {np.dtype(code): name for name, code in _DTYPES.items()}
    header, end = {}, 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        dtype, shape = types[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name]).data)
