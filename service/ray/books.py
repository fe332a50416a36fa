"""The books of a node: every process counts in a row of its own, and one scrape has the sum."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import ray

from service.cells import SUFFIX, SharedCells
from service.metrics import Metrics

SHM = Path("/dev/shm")
_PREFIX = f"lvm-{os.getuid()}-"


class Books:
    """The rows that the processes of this node count in: a scrape of any ingress here has the sum."""

    def __init__(self, slo_ms: Iterable[float]) -> None:
        self._slo_ms, self._home, self._closed = tuple(slo_ms), home_of_books(), set[str]()
        self._home.mkdir(mode=0o700, exist_ok=True)
        self._clear_away()

    def row(self) -> SharedCells:
        """Return the row of this process."""
        return SharedCells(self._home, os.getpid())

    def close_dead(self) -> None:
        """Close the books of the processes that are gone: what they were answering is lost, and they have no levels."""
        rows = {path.stem for path in self._home.glob(f"*{SUFFIX}")}
        dead = {pid for pid in rows - self._closed if not _lives(pid)}
        with open(self._home / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for pid in dead:
                Metrics(self._slo_ms, SharedCells(self._home, int(pid))).close_books()
        self._closed |= dead

    def _clear_away(self) -> None:
        """Remove the books of nodes of this machine that are gone with all that ran there."""
        for home in self._home.parent.glob(f"{_PREFIX}*"):
            if home != self._home and not any(_lives(path.stem) for path in home.glob(f"*{SUFFIX}")):
                shutil.rmtree(home, ignore_errors=True)


def _lives(pid: str) -> bool:
    return Path(f"/proc/{pid}").exists()


def home_of_books() -> Path:
    """Return where the processes of this node count: in memory, where there is such a place."""
    node = ray.get_runtime_context().get_node_id()
    return (SHM if SHM.is_dir() else Path(tempfile.gettempdir())) / f"{_PREFIX}{node[:16]}"
