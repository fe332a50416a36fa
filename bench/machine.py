"""On what, and with what, the figures were measured."""

from __future__ import annotations

import os
import platform
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
        "load average at the start": ", ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def ticks() -> tuple[int, int]:
    """Return the processor time that other guests of the host took, and all there was, since this machine started.

    Source: /proc/stat, whose eighth figure is `steal`; nothing elsewhere than on Linux.
    """
    facts = Path("/proc/stat")
    times = [int(word) for word in facts.read_text().split()[1:9]] if facts.exists() else [0] * 8
    return times[7], sum(times)


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
