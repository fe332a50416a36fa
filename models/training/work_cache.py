"""Keeps the finished parts of long work on disk, so that work that was stopped continues after them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

import models
from models.vectors import StoredVectors

Arrays = Mapping[str, NDArray[Any]]
Input = str | bytes | NDArray[Any]


class WorkCache:
    """A directory with the finished parts of one piece of work.

    The key of a part is the digest of all its inputs, so a part made from other inputs is never used. Parts are
    written atomically. As a context manager, the cache deletes itself when the work succeeds or its input is rejected
    (`ValueError`); after any other exception it stays, for the same command to continue.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get_bytes(self, make: Callable[[], bytes], *inputs: Input) -> bytes:
        """Return the cached result for `inputs`, or call `make` and cache its result.

        Raises:
            OSError: the part cannot be written or read.
        """
        path = self.directory / digest(*inputs)
        if not path.exists():
            _write(path, make())
        return path.read_bytes()

    def get_arrays(self, make: Callable[[], Arrays], *inputs: Input) -> Arrays:
        """Return arrays by name; otherwise as `get_bytes`."""
        return load(self.get_bytes(lambda: bytes(save(dict(make()))), *inputs))

    def get_json(self, make: Callable[[], Any], *inputs: Input) -> Any:
        """Return a value that JSON can hold; otherwise as `get_bytes`."""
        return json.loads(self.get_bytes(lambda: json.dumps(make()).encode(), *inputs))

    def __enter__(self) -> WorkCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # the same command would be rejected again after a ValueError
        if kind is None or issubclass(kind, ValueError):
            shutil.rmtree(self.directory, ignore_errors=True)
            return
        # an empty directory is of no use; one with parts cannot be removed this way
        with suppress(OSError):
            self.directory.rmdir()


def cache_next_to(path: Path) -> WorkCache:
    """Return the work cache for what will be written to `path`: the directory `.NAME.parts` on the same disk."""
    target = Path(os.path.abspath(path))
    return WorkCache(target.parent / f".{target.name}.parts")


def digest(*inputs: Input) -> str:
    """Return the SHA-256 of the digests of `inputs`; the boundaries between inputs count."""
    total = hashlib.sha256()
    for each in inputs:
        total.update(hashlib.sha256(_buffer(each)).digest())
        if isinstance(each, np.ndarray):
            total.update(f"{each.dtype.str}{each.shape}".encode())
    return total.hexdigest()


def _buffer(data: Input) -> bytes | memoryview:
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).data
    return data.encode() if isinstance(data, str) else data


def arrays_digest(value: object) -> str:
    """Return a digest of all arrays among the attributes of an object, those on disk included."""
    stored = [array for each in vars(value).values() if isinstance(each, StoredVectors) for array in each.arrays]
    return digest(*(each for each in vars(value).values() if isinstance(each, np.ndarray)), *stored)


def source_digest(directory: Path = Path(models.__file__).parent) -> str:
    """Return a digest of the Python modules in a directory (default: all of `models`), which made the parts."""
    return digest(*(path.read_bytes() for path in sorted(directory.rglob("*.py"))))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
