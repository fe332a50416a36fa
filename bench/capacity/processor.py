"""Seconds of processor: what a process had, and what others had of its core; Linux."""

from __future__ import annotations

import os
from pathlib import Path


def processor_s(pid: int) -> tuple[float, float]:
    """Return the seconds of processor that the first thread of a process had, and those of its others."""
    threads = {int(task.name): task / "schedstat" for task in Path(f"/proc/{pid}/task").iterdir()}
    had = {thread: int(stat.read_text().split()[0]) / 1e9 for thread, stat in threads.items()}
    return had[pid], sum(had.values()) - had[pid]


def core_s(core: int) -> tuple[float, float]:
    """Return the seconds that a core has worked for processes or other machines, and those that have passed for it."""
    lines = Path("/proc/stat").read_text().splitlines()
    (ticks,) = [line.split()[1:9] for line in lines if line.split()[0] == f"cpu{core}"]
    seconds = [int(tick) / os.sysconf("SC_CLK_TCK") for tick in ticks]
    user, nice, system, *_, stolen = seconds  # between them: idle, iowait, interrupts
    return user + nice + system + stolen, sum(seconds)
