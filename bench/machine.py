"""The machine that is measured on: what it is, and what its processes take. Processes and cores: Linux only."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "onnxruntime", "numpy", "fastapi", "pydantic", "uvicorn", "uvloop", "httptools")


def describe() -> dict[str, str]:
    """Return date, processor, load by others, and versions."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "load average at the start": load_average(),
    }


def load_average() -> str:
    """Return the system's load over 1, 5 and 15 minutes."""
    return ", ".join(f"{load:.2f}" for load in os.getloadavg())


def cores() -> list[int]:
    """Return the cores that this process may use, an empty list if the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def can_pin(least: int = 2) -> bool:
    """Return whether servers can be given cores of their own: there are at least so many, and taskset."""
    return len(cores()) >= least and shutil.which("taskset") is not None


def ticks() -> tuple[int, int]:
    """Return the processor time that other guests of the host took, and all there was, since this machine started.

    Source: the eighth figure of /proc/stat, `steal`; zeros on other systems than Linux.
    """
    facts = Path("/proc/stat")
    times = [int(word) for word in facts.read_text().split()[1:9]] if facts.exists() else [0] * 8
    return times[7], sum(times)


def processor_s(pid: int) -> tuple[float, float]:
    """Return the seconds of processor that the first thread of a process used, and those of its other threads."""
    threads = {int(task.name): task / "schedstat" for task in Path(f"/proc/{pid}/task").iterdir()}
    used = {thread: int(stat.read_text().split()[0]) / 1e9 for thread, stat in threads.items()}
    return used[pid], sum(used.values()) - used[pid]


def core_s(core: int) -> tuple[float, float]:
    """Return the seconds that a core worked for processes or other machines, and those that passed."""
    lines = Path("/proc/stat").read_text().splitlines()
    (counts,) = [line.split()[1:9] for line in lines if line.split()[0] == f"cpu{core}"]
    seconds = [int(count) / os.sysconf("SC_CLK_TCK") for count in counts]
    # Between them: idle, iowait and interrupts.
    user, nice, system, *_, stolen = seconds
    return user + nice + system + stolen, sum(seconds)


def rss_mb(pid: int) -> float:
    """Return the resident memory of a process in megabytes (10^6 bytes)."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) * 1024 / 1e6
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(shown.stdout) * 1024 / 1e6


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
