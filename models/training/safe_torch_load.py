"""Reads untrusted files that `torch.save` wrote: no code in them runs, and memory and time are bounded.

torch's weights-only unpickler calls only allowed functions. Those allowed here make plain values: numbers of numpy,
paths, dates, namespaces, collections. numpy's own readers trust their bytes, so none of them is allowed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import resource
import signal
import struct
import sys
import threading
import types
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from models.registry import disk
from models.registry.checkpoint import BadCheckpoint

_ZIP, _DIRECTORY_END = b"PK\3\4", b"PK\5\6"
_END, _END_64, _LOCATOR_64 = 22, 56, 20  # bytes of the records that end an archive
_MOST_MEMBERS, _LARGEST_PICKLE = 100_000, 1 << 23  # bytes; tensors are not in it
_MEMORY, _SECONDS = 1 << 30, 60.0  # beyond twice the size of the file
_NUMBER = re.compile(r"[biufc]\d{1,2}")
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_REASON = re.compile(r"WeightsUnpickler error:\s*(.*)")  # in torch's advice to trust the file
_LONGEST, _MOST_SHOWN = 80, 20


class Inert:
    """Replaces a value that is not needed."""

    def __init__(self, *arguments: object) -> None:
        """Accept and discard the arguments."""

    def __setstate__(self, state: object) -> None:
        """Accept and discard the state."""


class Unknown(Inert):
    """Replaces a value whose class is not known to be harmless."""

    named = ""


class _Dtype(Inert):
    """A dtype of numpy; `code` is None unless it is that of plain numbers."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code if isinstance(code, str) and _NUMBER.fullmatch(code) else None
        self.order = "<"

    def __setstate__(self, state: object) -> None:
        """Read the byte order; discard the rest."""
        if isinstance(state, tuple) and state[1:2] == (">",):
            self.order = ">"


def _number(dtype: object, data: object = b"", *_: object) -> object:
    """Return a number of numpy as Python's."""
    if isinstance(dtype, _Dtype) and dtype.code and isinstance(data, bytes):
        return np.frombuffer(data, dtype.order + dtype.code, 1)[0].item()
    return Inert()


def _array(*_: object) -> Inert:
    return Inert()


def _dictionary(*_: object) -> dict[object, object]:
    return {}


def _list(items: object = (), *_: object) -> list[object]:
    return list(items) if isinstance(items, list | tuple) else []


_FLAVOURS: Mapping[str, type] = {
    "Path": PurePosixPath,
    "PurePath": PurePosixPath,
    "PosixPath": PurePosixPath,
    "PurePosixPath": PurePosixPath,
    "WindowsPath": PureWindowsPath,
    "PureWindowsPath": PureWindowsPath,
}
KNOWN: Mapping[str, Any] = {  # by the name in the file: what makes the value
    **{f"{home}.{name}": made for home in ("pathlib", "pathlib._local") for name, made in _FLAVOURS.items()},
    **{f"numpy.{core}.multiarray.scalar": _number for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    **{f"datetime.{each.__name__}": each for each in (datetime.date, datetime.datetime, datetime.time)},
    **{f"datetime.{each.__name__}": each for each in (datetime.timedelta, datetime.timezone)},
    **{f"builtins.{name}": Inert for name in ("bool", "dict", "float", "int", "list", "object", "str", "tuple")},
    "argparse.Namespace": argparse.Namespace,
    "builtins.frozenset": frozenset,
    "builtins.range": range,
    "builtins.slice": slice,
    "collections.defaultdict": _dictionary,
    "collections.deque": _list,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": Inert,
    "torch.torch_version.TorchVersion": str,
    "types.SimpleNamespace": types.SimpleNamespace,
}


def safe_load(path: Path) -> Any:
    """Return what `torch.save` wrote to `path`; tensors are mapped from the file and use no memory until they are read.

    Raises:
        BadCheckpoint: the file is damaged, is not a checkpoint, would take more memory than its size, or holds a value
            of a class that is not known to be harmless; the message names the class and the place of the value.
    """
    try:
        with open(disk.open_regular(path), "rb") as file:
            return _load(path, file)
    except OSError as error:
        raise BadCheckpoint(f"{path}: {error.strerror or error}") from error


def _load(path: Path, file: BufferedReader) -> Any:
    size = os.fstat(file.fileno()).st_size
    start = file.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < size:
        raise BadCheckpoint(f"{path}: a safetensors file, expected what torch.save wrote")
    is_archive = start.startswith(_ZIP)
    if is_archive:
        _check_archive(path, file, size)
    place = f"/dev/fd/{file.fileno()}"  # the same file that was checked
    unknown: list[str] = []
    try:
        known: list[Any] = [(made, name) for name, made in KNOWN.items()]
        with _quiet(), _bounded(2 * size + _MEMORY, _SECONDS), safe_globals(known):
            unknown = get_unsafe_globals_in_checkpoint(place) if is_archive else []
            with safe_globals([(type("Unknown", (Unknown,), {"named": name}), name) for name in unknown]):
                saved = torch.load(place, map_location="cpu", weights_only=True, mmap=is_archive or None)
    except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
        _reject(path, unknown or _GLOBAL.findall(str(error)), error)
    if unknown:
        _reject(path, unknown, None, _place_of_unknown(saved))
    return saved


def _reject(path: Path, unknown: list[str], cause: Exception | None, found: tuple[str, str] | None = None) -> NoReturn:
    """Raise `BadCheckpoint` with the class that is not known, and the place of a value of it if that was found."""
    if not unknown:
        reason = (_REASON.findall(str(cause)) or str(cause).split("\n"))[0]
        raise BadCheckpoint(
            f"{path}: not a torch checkpoint, or damaged ({type(cause).__name__}: {shown(reason)})"
        ) from cause
    location, name = found or ("", sorted(unknown)[0])
    holds = f"`{shown(location)}` holds a" if location else "it holds a"
    raise BadCheckpoint(
        f"{path}: {holds} `{shown(name)}`, a class or function that would have to be run; expected tensors and plain "
        "values: save the state dictionary, not the whole module, and leave that out"
    ) from cause


def _check_archive(path: Path, file: BufferedReader, size: int) -> None:
    """Raise `BadCheckpoint` if members of the archive would be larger than the file, or if readers may differ on it."""
    try:
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
    except Exception as error:  # a damaged directory raises anything from BadZipFile to struct.error
        raise BadCheckpoint(f"{path}: damaged archive ({shown(str(error))})") from error
    packed = next((member.filename for member in members if member.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise BadCheckpoint(f"{path}: member {shown(packed)!r} is compressed; torch.save stores them as they are")
    sizes = sum(member.file_size for member in members)
    room = archive.start_dir
    if sizes > room or any(member.file_size != member.compress_size for member in members):
        raise BadCheckpoint(f"{path}: its members say they have {sizes} bytes, the file has room for {room}")
    if len(members) > _MOST_MEMBERS:
        raise BadCheckpoint(f"{path}: {len(members)} members, expected at most {_MOST_MEMBERS}")
    largest = max((member.file_size for member in members if member.filename.endswith("data.pkl")), default=0)
    if largest > _LARGEST_PICKLE:
        raise BadCheckpoint(f"{path}: {largest} bytes beside the tensors, expected at most {_LARGEST_PICKLE}")
    if not _ends_plainly(file, size, archive.start_dir):
        raise BadCheckpoint(f"{path}: damaged archive: its directory is not where its last record says")


def _ends_plainly(file: BufferedReader, size: int, directory: int) -> bool:
    """Return whether the records at the end of an archive are where torch writes them, and agree on its directory."""
    file.seek(max(0, size - _END - _LOCATOR_64 - _END_64))
    end = file.read()
    if end[-_END:][:4] != _DIRECTORY_END or end[-2:] != b"\0\0":
        return False
    (place,) = struct.unpack("<L", end[-6:-2])
    if end[-_END - _LOCATOR_64 :][:4] != b"PK\6\7":
        return bool(place == directory)
    (record,) = struct.unpack_from("<Q", end, len(end) - _END - _LOCATOR_64 + 8)
    (place_64,) = struct.unpack_from("<Q", end, len(end) - _END - _LOCATOR_64 - _END_64 + 48)
    return record == size - _END - _LOCATOR_64 - _END_64 and place_64 == directory and place in (directory, 0xFFFFFFFF)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextmanager
def _bounded(memory: int, seconds: float) -> Iterator[None]:
    """Limit the process to `memory` more bytes, and the main thread to `seconds`, within the context.

    Memory is limited on Linux only, which reports and limits the address space of a process.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    ceiling = _address_space() + memory if sys.platform == "linux" else resource.RLIM_INFINITY
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        handler = signal.signal(signal.SIGALRM, _too_slow)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    if ceiling != resource.RLIM_INFINITY and (before[0] == resource.RLIM_INFINITY or ceiling < before[0]):
        resource.setrlimit(resource.RLIMIT_AS, (ceiling, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        if is_main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's warnings about old formats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _too_slow(*_: object) -> NoReturn:
    raise TimeoutError(f"not read within {_SECONDS:.0f} s")


def _place_of_unknown(saved: Any) -> tuple[str, str] | None:
    """Return the place of the first value of an unknown class, as `a.b[0]`, and the name of its class."""
    pending: list[tuple[str, Any]] = [("", saved)]
    seen: set[int] = set()
    while pending:
        location, value = pending.pop()
        if isinstance(value, Unknown) or (isinstance(value, type) and issubclass(value, Unknown)):
            return location, value.named
        if id(value) not in seen:
            seen.add(id(value))
            pending += reversed(_within(location, value))
    return None


def _within(location: str, value: Any) -> list[tuple[str, Any]]:
    """Return the values in a collection or a namespace, with their places."""
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return [(f"{location}.{name}".lstrip("."), each) for name, each in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [(f"{location}[{index}]", each) for index, each in enumerate(value)]
    return []


def shown(text: str) -> str:
    """Return a text from a file as a message shows it: on one line, escaped, at most 80 characters."""
    plain = text if text.isprintable() else ascii(text)[1:-1]
    return plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]}..."


def listed(names: list[str]) -> str:
    """Return names from a file as a message lists them: at most 20."""
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(map(shown, names[:_MOST_SHOWN])) + more
