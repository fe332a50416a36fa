"""The books of a node: every process counts in a row of its own, and one scrape has the sum."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray

from service.telemetry.metrics import Metrics
from service.telemetry.shared_memory import SUFFIX, Key, SharedMetricValues

SHM = Path("/dev/shm")
_PREFIX = f"lvm-{os.getuid()}-"


class Books:
    """The rows, in the directory `home`, that the processes of this node count in: a scrape here has the sum."""

    def __init__(self, slo_ms: Iterable[float], home: Path) -> None:
        self._slo_ms, self._home, self._closed = tuple(slo_ms), home, set[Path]()
        self._home.mkdir(mode=0o700, exist_ok=True)
        self._clear_away()

    def row(self) -> SharedMetricValues:
        """Return the row of this process: where one is gone, that row, so that there are no more than ever lived."""
        with _locked(self._home):
            self._close_dead()
            mine = self._home / f"{os.getpid()}{SUFFIX}"
            if self._closed and not mine.exists():
                self._closed.pop().rename(mine)
            return _Row(self._home, os.getpid())

    def close_dead(self) -> None:
        """Close the books of the processes that are gone: what they were answering is lost, and they have no levels."""
        with _locked(self._home):
            self._close_dead()

    def _close_dead(self) -> None:
        dead = {path for path in self._home.glob(f"*{SUFFIX}") if not _lives(path.stem)}
        for path in dead - self._closed:
            Metrics(self._slo_ms, SharedMetricValues(self._home, int(path.stem))).finalize()
        self._closed = dead

    def _clear_away(self) -> None:
        """Remove the books of nodes of this machine that are gone with all that ran there."""
        for home in self._home.parent.glob(f"{_PREFIX}*"):
            if home != self._home and not any(_lives(path.stem) for path in home.glob(f"*{SUFFIX}")):
                shutil.rmtree(home, ignore_errors=True)


class _Row(SharedMetricValues):
    """A row that reads the others' while none of them changes hands: else one would be counted twice, or not at all."""

    def other_processes(self) -> Iterator[tuple[Key, Sequence[float]]]:
        """Yield each key of each other process, with its numbers."""
        with _locked(self._path.parent):
            yield from super().other_processes()


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Let no other process of this node give out rows."""
    with open(home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lives(pid: str) -> bool:
    return Path(f"/proc/{pid}").exists()


def home_of_books() -> Path:
    """Return where the processes of this node count: in memory, where there is such a place."""
    node = ray.get_runtime_context().get_node_id()
    return (SHM if SHM.is_dir() else Path(tempfile.gettempdir())) / f"{_PREFIX}{node[:16]}"
