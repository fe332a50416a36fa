"""Parts of long work, kept on disk until the whole is done, so that work that was stopped can be gone on with."""

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

Arrays = Mapping[str, NDArray[Any]]
Input = str | bytes | NDArray[Any]


class Parts:
    """The parts of one piece of work, in a directory of their own; it goes when the work is done, or refused.

    A part is found again by the digest of all that it depends on, so that none made of other inputs is ever taken.
    It is there whole or not at all.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, make: Callable[[], bytes], *inputs: Input) -> bytes:
        """Return what `make` returns, or returned for the same `inputs` before the work was stopped.

        Raises:
            OSError: the part cannot be kept.
        """
        path = self.directory / digest(*inputs)
        if not path.exists():
            _write(path, make())
        return path.read_bytes()

    def arrays(self, make: Callable[[], Arrays], *inputs: Input) -> Arrays:
        """Return arrays by name, as `get` returns bytes."""
        return load(self.get(lambda: bytes(save(dict(make()))), *inputs))

    def figures(self, make: Callable[[], Any], *inputs: Input) -> Any:
        """Return what JSON can hold, as `get` returns bytes."""
        return json.loads(self.get(lambda: json.dumps(make()).encode(), *inputs))

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None or issubclass(kind, ValueError):  # the same command would be refused again
            shutil.rmtree(self.directory, ignore_errors=True)
        else:
            with suppress(OSError):
                self.directory.rmdir()  # unless there are parts


def beside(path: Path) -> Parts:
    """Return the parts of what will be at `path`, kept beside it, on the same disk."""
    there = Path(os.path.abspath(path))
    return Parts(there.parent / f".{there.name}.parts")


def digest(*inputs: Input) -> str:
    """Return the SHA-256 of the digests of `inputs`, so that none can run into the next."""
    whole = hashlib.sha256()
    for each in inputs:
        whole.update(hashlib.sha256(_buffer(each)).digest())
        if isinstance(each, np.ndarray):
            whole.update(f"{each.dtype.str}{each.shape}".encode())
    return whole.hexdigest()


def _buffer(data: Input) -> bytes | memoryview:
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).data
    return data.encode() if isinstance(data, str) else data


def identity(data: object) -> str:
    """Return a digest of all arrays that an object has as its attributes."""
    return digest(*(value for value in vars(data).values() if isinstance(value, np.ndarray)))


def sources(room: Path = Path(models.__file__).parent) -> str:
    """Return a digest of the modules in a directory, all of `models` by default: what they make depends on them."""
    return digest(*(path.read_bytes() for path in sorted(room.rglob("*.py"))))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
