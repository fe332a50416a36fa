"""The memory that metrics are counted in: private to a process, or a file that several processes map.

Each worker writes its own file and reads the files of the others when it is scraped. Its counts outlive it.
A file has one writer, and a number is eight aligned bytes, so no locks are needed.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from service.telemetry.log import logger

SHM = Path("/dev/shm")
# Directories of metric files. Their supervisor holds a lock on them while it lives.
PREFIX = "lvm-workers-"
SUFFIX = ".cells"
# A file begins with KEY_BYTES for the keys, one JSON line each, behind their length in eight bytes.
KEY_BYTES = 1 << 18
MAX_VALUES = 1 << 15
# The last values of a file are for keys that find no room. Nothing reads them.
UNREAD_VALUES = 64
# The name of an instrument, then its label values.
Key = tuple[str, ...]


class MetricValues:
    """An array of float64 numbers that instruments allocate parts of."""

    def __init__(self) -> None:
        self._own: list[float] = []
        self.values: list[float] | memoryview[float] = self._own

    def allocate(self, key: Key, size: int) -> int:
        """Return the offset of the `size` numbers of `key`. They start at zero."""
        offset = len(self._own)
        self._own.extend([0.0] * size)
        return offset

    def has(self, key: Key) -> bool:
        """Return whether the numbers of a key that was allocated count, because there was room for them."""
        return True

    def allocated(self) -> Sequence[Key]:
        """Return the keys that an earlier process has allocated in this memory."""
        return ()

    def other_processes(self) -> Iterator[tuple[Key, Sequence[float]]]:
        """Yield each key of each other process, with its numbers."""
        yield from ()


class SharedMetricValues(MetricValues):
    """The file of process `slot` in `directory`. A process continues the counts of the last one in its slot.

    Raises:
        OSError: The file system has no room for the file.
    """

    def __init__(self, directory: Path, slot: int) -> None:
        self._path = directory / f"{slot}{SUFFIX}"
        with open(self._path, "a+b") as file:
            _reserve(file.fileno(), KEY_BYTES + 8 * MAX_VALUES)
            self._map = mmap.mmap(file.fileno(), 0)
        self.values = memoryview(self._map)[KEY_BYTES:].cast("d")
        self._places = dict(_read_keys(self._map))
        self._end = max((offset + size for offset, size in self._places.values()), default=0)
        self._is_full = False

    def allocate(self, key: Key, size: int) -> int:
        """Return the offset of the `size` numbers of `key`. If the file is full, nothing reads them.

        A key that another release has left with another size begins at zero.
        """
        if self._places.get(key, (0, -1))[1] != size:
            self._places.pop(key, None)
            offset = self._end
            if not self._append_key(key, offset, size):
                return self._unread(key)
            self._places[key] = offset, size
            self._end = offset + size
        return self._places[key][0]

    def has(self, key: Key) -> bool:
        """Return whether there was room for a key."""
        return key in self._places

    def allocated(self) -> Sequence[Key]:
        """Return the keys that are in the file."""
        return tuple(self._places)

    def other_processes(self) -> Iterator[tuple[Key, Sequence[float]]]:
        """Yield each key of each other file in the directory, with its numbers."""
        for path in sorted(self._path.parent.glob(f"*{SUFFIX}")):
            # The supervisor may exit and remove the files at any time.
            with suppress(FileNotFoundError):
                yield from self._read_other(path)

    def _read_other(self, path: Path) -> Iterator[tuple[Key, Sequence[float]]]:
        if path == self._path or not path.stat().st_size:
            return
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            places = _read_keys(mapped)
            end = max((at + size for at, size in places.values()), default=0)
            values = memoryview(mapped[KEY_BYTES : KEY_BYTES + 8 * end]).cast("d")
        yield from ((key, values[at : at + size]) for key, (at, size) in places.items())

    def _unread(self, key: Key) -> int:
        if not self._is_full:
            self._is_full = True
            logger().error("metrics full", name=key[0], path=str(self._path))
        return MAX_VALUES - UNREAD_VALUES

    def _append_key(self, key: Key, offset: int, size: int) -> bool:
        """Write a key; return whether there is room for it."""
        start = 8 + int.from_bytes(self._map[:8], "little")
        line = json.dumps([key, offset, size]).encode() + b"\n"
        if start + len(line) > KEY_BYTES or offset + size > MAX_VALUES - UNREAD_VALUES:
            return False
        self._map[start : start + len(line)] = line
        # The length is written last, so a reader never sees part of a line.
        self._map[:8] = (start - 8 + len(line)).to_bytes(8, "little")
        return True


def shared_block(path: Path, size: int) -> mmap.mmap | None:
    """Return `size` bytes that processes share by `path`; None if they would lie on a disk, or there is no room."""
    if SHM not in path.parents:
        return None
    with suppress(OSError), open(path, "a+b") as file:
        _reserve(file.fileno(), size)
        return mmap.mmap(file.fileno(), size)
    return None


def _reserve(file: int, size: int) -> None:
    """Allocate the blocks of a file. The kernel kills a process that writes to a map if the file system is full."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def _read_keys(mapped: mmap.mmap) -> Mapping[Key, tuple[int, int]]:
    """Return the offset and the size of each key."""
    return _parse_keys(mapped[8 : 8 + int.from_bytes(mapped[:8], "little")])


# As many as there are files, more or less: keys are seldom added, and each scrape reads them.
@lru_cache(maxsize=64)
def _parse_keys(lines: bytes) -> Mapping[Key, tuple[int, int]]:
    return {tuple(key): (offset, size) for key, offset, size in map(json.loads, lines.splitlines())}


@contextmanager
def metrics_directory(slots: int, parents: Sequence[Path] = ()) -> Iterator[Path]:
    """Make a directory with `slots` metric files, and remove it at the end.

    It lies in the first of `parents` that has room; by default these are /dev/shm and the directory of temporary
    files. Directories of supervisors that were killed are removed first.

    Raises:
        OSError: No parent has room.
    """
    parents = parents or [parent for parent in (SHM, Path(tempfile.gettempdir())) if parent.is_dir()]
    for parent in parents:
        _remove_stale(parent)
    with ExitStack() as stack:
        yield _make_directory(stack, slots, parents)


def _make_directory(stack: ExitStack, slots: int, parents: Sequence[Path]) -> Path:
    first, *others = parents
    try:
        with ExitStack() as attempt:
            directory = Path(attempt.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX, dir=first)))
            attempt.enter_context(_locked(directory))
            for slot in range(slots):
                SharedMetricValues(directory, slot)
            stack.enter_context(attempt.pop_all())
            return directory
    except OSError:
        if not others:
            raise
        return _make_directory(stack, slots, others)


def _remove_stale(parent: Path) -> None:
    """Remove the directories in `parent` whose supervisor is gone."""
    for directory in parent.glob(f"{PREFIX}*"):
        # OSError: its supervisor is alive, or it belongs to another user.
        with suppress(OSError), _locked(directory):
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a directory.

    Raises:
        OSError: Another process holds the lock.
    """
    directory = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(directory)
