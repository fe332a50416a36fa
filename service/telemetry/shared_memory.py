"""Cells: the numbers that instruments count in; of this process alone, or shared with the workers beside it.

A shared row is a file that several processes map: a worker writes its own and reads the others' at a scrape,
and what it counted outlives it. One writer a file, numbers of eight aligned bytes: no locks.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

SHM = Path("/dev/shm")  # memory, if there is such a place
PREFIX = "lvm-workers-"  # of directories of rows; a lock tells whether their supervisor lives
SUFFIX = ".cells"
KEYS, CELLS = 1 << 18, 1 << 15  # bytes, numbers
Key = tuple[str, ...]  # the name of an instrument and label values


class MetricValues:
    """A row of float64 numbers, handed out in pieces."""

    def __init__(self) -> None:
        self._own: list[float] = []
        self.values: list[float] | memoryview[float] = self._own

    def take(self, key: Key, size: int) -> int:
        """Return where the `size` numbers of `key` begin, zeros at first."""
        at = len(self._own)
        self._own.extend([0.0] * size)
        return at

    def taken(self) -> Sequence[Key]:
        """Return the keys that an earlier holder of the row took."""
        return ()

    def elsewhere(self) -> Iterator[tuple[Key, Sequence[float]]]:
        """Yield the numbers of every key of the other processes."""
        yield from ()


class SharedMetricValues(MetricValues):
    """The row of worker `slot` among those in the directory `home`; goes on where an earlier holder stopped.

    Raises:
        OSError: the row does not fit on the file system.
    """

    def __init__(self, home: Path, slot: int) -> None:
        self._path = home / f"{slot}{SUFFIX}"
        with open(self._path, "a+b") as file:
            _reserve(file.fileno(), KEYS + 8 * CELLS)
            self._map = mmap.mmap(file.fileno(), 0)
        self.values = memoryview(self._map)[KEYS:].cast("d")
        self._places = _places(self._map)

    def take(self, key: Key, size: int) -> int:
        """Return where the `size` numbers of `key` begin; raises `OverflowError` where there is no more room."""
        if key not in self._places:
            at = sum(count for _, count in self._places.values())
            self._write_key([*key], at, size)
            self._places[key] = at, size
        return self._places[key][0]

    def taken(self) -> Sequence[Key]:
        """Return the keys that an earlier holder of the row took."""
        return tuple(self._places)

    def elsewhere(self) -> Iterator[tuple[Key, Sequence[float]]]:
        """Yield the numbers of every key in the files beside this one."""
        for path in sorted(self._path.parent.glob(f"*{SUFFIX}")):
            with suppress(FileNotFoundError):  # removed just now: the supervisor is gone
                yield from self._rows_of(path)

    def _rows_of(self, path: Path) -> Iterator[tuple[Key, Sequence[float]]]:
        if path == self._path or not path.stat().st_size:
            return
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as there:
            values = memoryview(there[KEYS:]).cast("d")
            yield from ((key, values[at : at + size]) for key, (at, size) in _places(there).items())

    def _write_key(self, key: list[str], at: int, size: int) -> None:
        begin = 8 + int.from_bytes(self._map[:8], "little")
        line = json.dumps([key, at, size]).encode() + b"\n"
        if begin + len(line) > KEYS or at + size > CELLS:
            raise OverflowError(f"no room for {key} in {self._path}")
        self._map[begin : begin + len(line)] = line
        self._map[:8] = (begin - 8 + len(line)).to_bytes(8, "little")  # last: a reader sees whole lines only


def _reserve(file: int, size: int) -> None:
    """Give a file its blocks: a process that writes to a map of a full file system is killed."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def _places(there: mmap.mmap) -> dict[Key, tuple[int, int]]:
    text = there[8 : 8 + int.from_bytes(there[:8], "little")]
    return {tuple(key): (at, size) for key, at, size in map(json.loads, text.splitlines())}


@contextmanager
def metrics_directory(rows: int, places: Sequence[Path] = ()) -> Iterator[Path]:
    """Make a directory of `rows` rows in the first of `places` with room, and remove it in the end.

    Unless they are named, the places are memory and the directory of temporary files.

    What supervisors that were killed left behind is removed first.

    Raises:
        OSError: there is room nowhere.
    """
    places = places or [place for place in (SHM, Path(tempfile.gettempdir())) if place.is_dir()]
    for place in places:
        _clear_away(place)
    with ExitStack() as stack:
        yield _first_with_room(stack, places, rows)


def _first_with_room(stack: ExitStack, places: Sequence[Path], rows: int) -> Path:
    first, *others = places
    try:
        with ExitStack() as attempt:
            home = Path(attempt.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX, dir=first)))
            attempt.enter_context(_locked(home))
            for row in range(rows):
                SharedMetricValues(home, row)
            stack.enter_context(attempt.pop_all())
            return home
    except OSError:
        if not others:
            raise
        return _first_with_room(stack, others, rows)


def _clear_away(place: Path) -> None:
    """Remove the directories below `place` whose supervisors are gone."""
    for home in place.glob(f"{PREFIX}*"):
        with suppress(OSError), _locked(home):  # else its supervisor lives, or it is another user's
            shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Hold the lock of a directory; raises `OSError` if another process does."""
    directory = os.open(home, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(directory)
