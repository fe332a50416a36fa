"""Metrics of a Ray node: every process counts in shared memory of its own, and one scrape has the sum."""

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
from service.telemetry.shared_memory import SHM, SUFFIX, Key, SharedMetricValues

_PREFIX = f"lvm-{os.getuid()}-"


class NodeMetrics:
    """The metrics files, in the directory `home`, of the processes of this node; a scrape of any has the sum."""

    def __init__(self, slo_ms: Iterable[float], home: Path) -> None:
        self._slo_ms = tuple(slo_ms)
        self._home = home
        self._finalized = set[Path]()
        self._home.mkdir(mode=0o700, exist_ok=True)
        self._remove_dead_nodes()

    def values(self) -> SharedMetricValues:
        """Return the values of this process: those of one that has ended, if any, so that files do not add up."""
        with _locked(self._home):
            self._finalize_dead()
            mine = self._home / f"{os.getpid()}{SUFFIX}"
            if self._finalized and not mine.exists():
                self._finalized.pop().rename(mine)
            return _LockedValues(self._home, os.getpid())

    def finalize_dead(self) -> None:
        """Count the requests of processes that have ended as lost, and set their gauges to zero."""
        with _locked(self._home):
            self._finalize_dead()

    def _finalize_dead(self) -> None:
        dead = {path for path in self._home.glob(f"*{SUFFIX}") if not _lives(path.stem)}
        for path in dead - self._finalized:
            Metrics(self._slo_ms, SharedMetricValues(self._home, int(path.stem))).finalize()
        self._finalized = dead

    def _remove_dead_nodes(self) -> None:
        """Remove the metrics of nodes on this machine whose processes have all ended."""
        for home in self._home.parent.glob(f"{_PREFIX}*"):
            if home != self._home and not any(_lives(path.stem) for path in home.glob(f"*{SUFFIX}")):
                shutil.rmtree(home, ignore_errors=True)


class _LockedValues(SharedMetricValues):
    """Values that lock the files of the node while they are read: otherwise one could count twice, or not at all."""

    def other_processes(self) -> Iterator[tuple[Key, Sequence[float]]]:
        """Yield the numbers of every key of the other processes."""
        with _locked(self._path.parent):
            yield from super().other_processes()


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Keep the other processes of this node from taking files over."""
    with open(home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lives(pid: str) -> bool:
    return Path(f"/proc/{pid}").exists()


def metrics_home() -> Path:
    """Return the directory of this node's metrics: in memory, if the system has such a place."""
    node = ray.get_runtime_context().get_node_id()
    return (SHM if SHM.is_dir() else Path(tempfile.gettempdir())) / f"{_PREFIX}{node[:16]}"
