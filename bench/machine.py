"""The machine that is measured on: what it is, and what its processes take. Processes and cores: Linux only."""

from __future__ import annotations

import os
import platform
import shutil
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
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


def stolen_s() -> tuple[float, float]:
    """Return the seconds that other guests of the host took of all cores, and all that passed, since the start."""
    times = psutil.cpu_times()
    return getattr(times, "steal", 0.0), sum(times[:8])


def processor_s(pid: int) -> tuple[float, float]:
    """Return the seconds of processor that the first thread of a process used, and those of its other threads."""
    threads = {int(task.name): task / "schedstat" for task in Path(f"/proc/{pid}/task").iterdir()}
    used = {thread: int(stat.read_text().split()[0]) / 1e9 for thread, stat in threads.items()}
    return used[pid], sum(used.values()) - used[pid]


def core_s(core: int) -> tuple[float, float]:
    """Return the seconds that a core worked for processes or other machines, and those that passed."""
    times = psutil.cpu_times(percpu=True)[core]
    return times.user + times.nice + times.system + times.steal, sum(times[:8])


def rss_mb(pid: int) -> float:
    """Return the resident memory of a process in megabytes (10^6 bytes)."""
    return float(psutil.Process(pid).memory_info().rss / 1e6)


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
