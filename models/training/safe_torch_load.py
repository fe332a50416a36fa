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
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch.serialization import safe_globals

from models.registry import disk
from models.registry.checkpoint import BadCheckpoint
from models.training.pickle_places import place_of

_TAR_MARK, _TAR_MARK_AT = b"ustar", 257
_ZIP, _DIRECTORY_END = b"PK\3\4", b"PK\5\6"
_END, _END_64, _LOCATOR_64 = 22, 56, 20  # bytes of the records that end an archive
_MOST_MEMBERS, _LARGEST_PICKLE = 100_000, 1 << 23  # bytes; tensors are not in it
_MEMORY, _SECONDS = 1 << 30, 60.0  # beyond twice the size of the file
_NUMBER = re.compile(r"[biufc]\d{1,2}")
_GLOBAL = re.compile(r"GLOBAL (.+?) (?:was not an allowed global|whose module)", re.DOTALL)
_REASON = re.compile(r"WeightsUnpickler error:\s*(.*)")  # in torch's advice to trust the file
_NEWER = re.compile(r"Unsupported operand 1[45]\d$")  # of protocol 4 and 5
_LONGEST, _MOST_SHOWN = 80, 20


class Inert:
    """Replaces a value that is not needed."""

    def __init__(self, *arguments: object) -> None:
        """Accept and discard the arguments."""

    def __setstate__(self, state: object) -> None:
        """Accept and discard the state."""


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


class _Dictionary:
    """A subclass of a dictionary, as a plain one."""

    def __new__(cls, *_: object) -> Any:
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
    **{f"numpy.{core}.numeric._frombuffer": _array for core in ("core", "_core")},
    **{f"numpy.{each.__name__}": Inert for each in np.sctypeDict.values()},
    "numpy.bool_": Inert,
    **{
        f"{home}.AttributeDict": _Dictionary  # of Lightning's hyper-parameters
        for home in (
            "lightning.fabric.utilities.data",
            "lightning.pytorch.utilities.parsing",
            "lightning_fabric.utilities.data",
            "pytorch_lightning.utilities.parsing",
        )
    },
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
    if not start:
        raise BadCheckpoint(f"{path}: the file is empty")
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < size:
        raise BadCheckpoint(f"{path}: a safetensors file, expected what torch.save wrote")
    file.seek(_TAR_MARK_AT)
    if file.read(len(_TAR_MARK)) == _TAR_MARK:
        raise BadCheckpoint(f"{path}: the tar format of torch before 0.2; load it with torch and save it again")
    is_archive = start.startswith(_ZIP)
    if is_archive:
        _check_archive(path, file, size)
    place = f"/dev/fd/{file.fileno()}"  # the same file that was checked
    try:
        known: list[Any] = [(made, name) for name, made in KNOWN.items()]
        with _quiet(), _bounded(2 * size + _MEMORY, _SECONDS), safe_globals(known):
            return torch.load(place, map_location="cpu", weights_only=True, mmap=is_archive or None)
    except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
        unknown = _GLOBAL.search(str(error))
        if unknown is None:
            reason = (_REASON.findall(str(error)) or str(error).split("\n"))[0]
            if _NEWER.search(reason):
                reason = "a pickle of protocol 4 or 5; expected 2, the default of torch.save"
            raise BadCheckpoint(
                f"{path}: not a torch checkpoint, or damaged ({type(error).__name__}: {shown(reason)})"
            ) from error
        with _bounded(2 * size + _MEMORY, _SECONDS):
            where = _place(file, unknown[1])
        raise BadCheckpoint(
            f"{path}: {where} holds a `{shown(unknown[1])}`, a class or function that would have to be run; expected "
            "tensors and plain values: save the state dictionary, not the whole module, and leave that out"
        ) from error


def _place(file: BufferedReader, name: str) -> str:
    """Return the place of the first value made by `name`, as a message shows it."""
    file.seek(0)
    with _pickle_in(file) as pickled:
        # torch's message lacks the module of a builtin
        place = place_of(pickled, name if "." in name else f"builtins.{name}")
    return f"`{shown(place)}`" if place else "it"


@contextmanager
def _pickle_in(file: BufferedReader) -> Iterator[IO[bytes]]:
    """Yield the pickle of an archive, or the whole file if it is not one."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        yield file
        return
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as pickled:
            yield pickled


def _check_archive(path: Path, file: BufferedReader, size: int) -> None:
    """Raise `BadCheckpoint` if members of the archive would be larger than the file, or if readers may differ on it."""
    try:
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
    except Exception as error:  # a damaged directory raises anything from BadZipFile to struct.error
        raise BadCheckpoint(f"{path}: damaged archive ({shown(str(error))})") from error
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise BadCheckpoint(f"{path}: a TorchScript archive, which holds a program; save the state dictionary instead")
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


def shown(text: str) -> str:
    """Return a text from a file as a message shows it: on one line, escaped, at most 80 characters."""
    if not text:
        return "''"
    plain = text if text.isprintable() else ascii(text)[1:-1]
    return plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]}..."


def listed(names: list[str]) -> str:
    """Return names from a file as a message lists them: at most 20."""
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(map(shown, names[:_MOST_SHOWN])) + more
