"""Arrays of `.npy` and `.npz` files, mapped from disk. Nothing is unpickled: a pickle can run any program."""

from __future__ import annotations

import io
import lzma
import math
import mmap
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from models.registry import disk
from models.retrieval.fields import BadFields, Texts

SUFFIXES = (".npz", ".npy")
# Rows that are read at a time.
BLOCK = 4096
# Rows that are read at a time if they do not follow each other.
_SCATTERED = 64
_BLOCK_BYTES = 1 << 22
_MAX_HEADER_BYTES = 1 << 16
_LOCAL_HEADER_BYTES = 30
_HEADERS: Mapping[tuple[int, int], Callable[[IO[bytes]], Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class BadArrays(ValueError):
    """A file of arrays cannot be read or used; the message starts with the file and, if known, the array."""


@dataclass(frozen=True)
class Array:
    """One array: its name in the file `source`, and its bytes, from `begin` on in `path`.

    Of a structured array it is one `field`; then `stored` is the shape and the type of the whole.
    """

    source: str
    name: str
    path: Path
    begin: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_column: bool
    member: str
    field: str | None = None
    stored: tuple[tuple[int, ...], np.dtype[Any]] | None = None

    @property
    def label(self) -> str:
        """The file and the name, for messages."""
        return f"{self.source}: `{self.name}`" if self.name else self.source

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def rows(self) -> Rows:
        """Return the rows, mapped from disk; raises `BadArrays` if the file is shorter than its header says."""
        return Rows(self)

    def blocks(self, size: int = BLOCK) -> Iterator[NDArray[Any]]:
        """Yield the rows in order, `size` at a time, without keeping them in memory."""
        rows = self.rows()
        for first in range(0, len(self), size):
            yield rows.take(slice(first, first + size))

    def values(self) -> list[Any]:
        """Return one Python value for each row `(N,)`; None for NaN, text for bytes.

        Raises:
            BadArrays: the array has another type than text, numbers and truth values, or a text is not valid.
        """
        if self.dtype.kind not in "USbiuf" or len(self.shape) != 1:
            raise BadArrays(
                f"{self.label} is {self.dtype} {self.shape}; expected one text, number or truth value for each row"
            )
        found: list[Any] = []
        for block in self.blocks():
            found += self._listed(block, len(found))
        return found

    def _listed(self, block: NDArray[Any], first: int) -> list[Any]:
        try:
            if block.dtype.kind == "S":
                return [value.decode() for value in block.tolist()]
            return [None if value != value else value for value in block.tolist()]
        except ValueError as error:
            raise BadArrays(f"{self.label}: row {first} or one of the next {BLOCK}: {error}") from error

    def texts(self, spool: Path) -> Texts:
        """Return the texts `(N,)` in UTF-8, written to the file `spool` and mapped from it; raises as `values`."""
        if self.dtype.kind not in "US" or len(self.shape) != 1:
            raise BadArrays(f"{self.label} is {self.dtype} {self.shape}; expected one text for each row")
        sizes: list[NDArray[np.int64]] = []
        with open(spool, "wb") as file:
            for number, block in enumerate(self.blocks()):
                try:
                    texts = Texts.of(self._listed(block, number * BLOCK))
                except BadFields as error:
                    raise BadArrays(f"{self.label}: {error}") from error
                sizes.append(np.diff(texts.offsets))
                file.write(texts.text.tobytes())
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
        empty = np.zeros(0, np.uint8)
        return Texts(np.memmap(spool, np.uint8, "r") if offsets[-1] else empty, offsets)


class Rows:
    """The rows of an array on disk; each call releases the memory of what it read."""

    def __init__(self, array: Array) -> None:
        shape, dtype = array.stored or (array.shape, array.dtype)
        count = math.prod(shape)
        try:
            with open(disk.open_regular(array.path), "rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            flat = np.frombuffer(self._mapped, dtype, count, array.begin) if count else np.empty(0, dtype)
        except (OSError, ValueError) as error:
            raise BadArrays(f"{array.label}: the file is shorter than {dtype} {shape} needs") from error
        shaped = flat.reshape(shape, order="F" if array.by_column else "C")
        self._array = shaped if array.field is None else shaped[array.field]

    def take(self, which: slice | NDArray[np.int64]) -> NDArray[Any]:
        """Return a copy of these rows."""
        if isinstance(which, slice):
            return self._copy(which)
        # Each row that is read maps the pages around it as well.
        return np.concatenate([self._copy(part) for part in np.array_split(which, len(which) // _SCATTERED + 1)])

    def _copy(self, which: slice | NDArray[np.int64]) -> NDArray[Any]:
        found = np.array(self._array[which])
        self._mapped.madvise(mmap.MADV_DONTNEED)
        return found


class ArrayFile:
    """A `.npy` or `.npz` file; `names` are those of its arrays, "" for that of a `.npy` file.

    A structured array counts as one array for each of its fields. An array of a compressed `.npz` is unpacked into the
    directory `scratch` when it is asked for.

    Raises:
        BadArrays: the file is missing, damaged, or a pickle.
    """

    def __init__(self, path: Path, scratch: Path) -> None:
        self.path = path
        self._scratch = scratch
        self._members: dict[str, zipfile.ZipInfo] = {}
        with self._opened() as file:
            magic = file.read(6)
            file.seek(0)
            if magic.startswith(b"PK"):
                found = list(self._described(file))
            elif magic == b"\x93NUMPY":
                found = [_described(path, "", file)]
            else:
                raise BadArrays(f"{path}: {_why_not_numpy(magic)}")
        self._arrays = {part.name: part for array in found for part in _parts(array)}
        if not self._arrays:
            raise BadArrays(f"{path}: holds no array")
        self.names = tuple(self._arrays)

    def __getitem__(self, name: str) -> Array:
        """Return an array, ready to be read; raises `BadArrays` if it is missing, damaged, or of Python objects."""
        if name not in self._arrays:
            known = ", ".join(self.names)
            raise BadArrays(f"{self.path}: has no array {name!r}; it has {known}")
        array = self._arrays[name]
        if array.dtype.hasobject:
            raise BadArrays(f"{array.label} {_why_no_objects(name)}")
        return self._verified(array) if array.member in self._members else array

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array, without reading it."""
        return self._arrays[name].shape

    def is_text(self, name: str) -> bool:
        """Return whether an array holds text."""
        return self._arrays[name].dtype.kind in "US"

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        try:
            with open(disk.open_regular(self.path), "rb") as file:
                yield file
        except OSError as error:
            raise BadArrays(f"{self.path}: {error.strerror or error}") from error
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError) as error:
            raise BadArrays(f"{self.path}: damaged: {error}") from error

    def _described(self, file: IO[bytes]) -> Iterator[Array]:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name == info.filename or name in self._members:
                    continue
                self._members[name] = info
                with archive.open(info) as member:
                    yield _described(self.path, name, member)

    def _verified(self, array: Array) -> Array:
        """Return a member of the archive, whose checksum was compared, with the place of its bytes."""
        info = self._members[array.member]
        is_stored = info.compress_type == zipfile.ZIP_STORED
        target = self._scratch / f"{info.header_offset}.npy"
        with self._opened() as file, zipfile.ZipFile(file) as archive, archive.open(info) as member:
            with open(os.devnull if is_stored else target, "wb") as unpacked:
                shutil.copyfileobj(member, unpacked, _BLOCK_BYTES)
            begin = _begin(file, info) if is_stored else 0
        return replace(array, path=self.path if is_stored else target, begin=begin + array.begin)


def _begin(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Return where the bytes of a stored member begin: after its local header, its name and its extra field."""
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    name, extra = struct.unpack("<HH", header[26:30])
    return int(info.header_offset + _LOCAL_HEADER_BYTES + name + extra)


def _why_not_numpy(magic: bytes) -> str:
    if magic[:1] == b"\x80":
        return "is a pickle, which is never loaded: it can run any program; save its arrays with numpy.savez"
    return "is neither a .npz nor a .npy file of numpy"


def _why_no_objects(name: str) -> str:
    if not name:
        return "holds pickled Python objects, which are never loaded: they can run any program; save arrays instead"
    return (
        f"holds pickled Python objects, which are never loaded: they can run any program; save it as text or numbers, "
        f"`{name}=numpy.array(list, dtype=str)`, or do without it"
    )


def _described(path: Path, name: str, file: IO[bytes]) -> Array:
    """Return the array whose header begins here; its `begin` counts from there."""
    head = io.BytesIO(file.read(_MAX_HEADER_BYTES))
    try:
        shape, by_column, dtype = _HEADERS[np.lib.format.read_magic(head)](head)
    except Exception as error:
        # a damaged header raises anything from KeyError to TokenError
        label = f"{path}: `{name}`" if name else path
        raise BadArrays(f"{label}: damaged header: {error}") from error
    return Array(str(path), name, path, head.tell(), shape, dtype, by_column, name)


def _parts(array: Array) -> list[Array]:
    """Return the array, or one array for each field of a structured one."""
    if array.dtype.names is None or array.dtype.hasobject:
        return [array]
    prefix = f"{array.name}." if array.name else ""
    fields = ((name, array.dtype[name]) for name in array.dtype.names)
    return [
        replace(
            array,
            name=f"{prefix}{name}",
            shape=(*array.shape, *inner.shape),
            dtype=inner.base,
            field=name,
            stored=(array.shape, array.dtype),
        )
        for name, inner in fields
    ]
