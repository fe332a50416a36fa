"""The cores that this process may use, and the thread pools of libraries, which count the cores of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from math import inf
from pathlib import Path, PurePosixPath

# OpenMP (faiss) and Rayon (tokenizers). They are read when the library is loaded or first used.
POOLS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")


def cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: those of its affinity or of its least CPU quota, at least 1.

    A fraction of a core does not count: threads that use more than the quota stand still until its period ends.
    `root` is the directory of `proc` and `sys`.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([affinity, *map(_quota, _cgroups(root))])))


def pool_limits(threads: int) -> dict[str, str]:
    """Return the environment variables that limit each pool to so many threads, except those that are set."""
    return {name: str(threads) for name in POOLS if name not in os.environ}


def _cgroups(root: Path) -> Iterator[Path]:
    """Yield the directories of the cgroups that may limit the CPU of this process, of version 1 and 2. Linux only."""
    # Another system, or a sandbox that hides them.
    with suppress(OSError, ValueError):
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        # The line of version 2 names no controller.
        groups = {controller: path for _, names, path in lines for controller in names.split(",")}
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            mount, _, system = line.partition(" - ")
            kind, _, options = system.split(maxsplit=2)
            controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
            if controller in groups and controller in ("", *options.split(",")):
                exported, mounted = mount.split()[3:5]
                yield from _upwards(root / mounted.lstrip("/"), _inside(groups[controller], exported))


def _inside(group: str, exported: str) -> PurePosixPath:
    """Return the path of a cgroup within a mount that shows the hierarchy from `exported` on.

    A container without a namespace of cgroups sees the path on the host, and a mount that begins at its own cgroup.
    """
    path = PurePosixPath(group)
    return path.relative_to(exported) if path.is_relative_to(exported) else PurePosixPath()


def _upwards(mount: Path, inner: PurePosixPath) -> Iterator[Path]:
    yield mount / inner
    yield from (mount / parent for parent in inner.parents)


def _quota(cgroup: Path) -> float:
    """Return the CPU quota of a cgroup in cores; infinite without one."""
    with suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((cgroup / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else inf
    return inf
