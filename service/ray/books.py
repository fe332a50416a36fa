"""The books of a node: every process counts in a row of its own, and one scrape has the sum."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import ray

from service.cells import SUFFIX, SharedCells
from service.metrics import Metrics

SHM = Path("/dev/shm")


class Books:
    """The rows that the processes of this node count in: a scrape of any ingress here has the sum."""

    def __init__(self, slo_ms: Iterable[float]) -> None:
        self._slo_ms, self._home, self._closed = tuple(slo_ms), home_of_books(), set[str]()
        self._home.mkdir(mode=0o700, exist_ok=True)

    def row(self) -> SharedCells:
        """Return the row of this process."""
        return SharedCells(self._home, os.getpid())

    def close_dead(self) -> None:
        """Close the books of the processes that are gone: what they were answering is lost, and they have no levels."""
        rows = {path.stem for path in self._home.glob(f"*{SUFFIX}")}
        dead = {pid for pid in rows - self._closed if not Path(f"/proc/{pid}").exists()}
        with open(self._home / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for pid in dead:
                Metrics(self._slo_ms, SharedCells(self._home, int(pid))).close_books()
        self._closed |= dead


def home_of_books() -> Path:
    """Return where the processes of this node count: in memory, where there is such a place."""
    node = ray.get_runtime_context().get_node_id()
    return (SHM if SHM.is_dir() else Path(tempfile.gettempdir())) / f"lvm-{os.getuid()}-{node[:16]}"
