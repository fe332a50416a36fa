"""Devices that may run a net, found without loading numpy or torch: a supervisor asks, and runs none."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

DEVICES = ("auto", "cpu", "cuda", "mps")


def is_accelerated(wanted: str) -> bool:
    """Return whether `wanted` stands for an accelerator; a child process asks torch, so this one never imports it."""
    if wanted != "auto":
        return wanted != "cpu"
    if not may_be_accelerated():
        return False
    code = "from models.runtimes import find_device; print(find_device('auto'))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.strip() in DEVICES[2:]


def may_be_accelerated() -> bool:
    """Return whether it is worth loading torch, which takes seconds, to look for an accelerator."""
    maybe_cuda = Path("/proc/driver/nvidia").exists() or Path("/dev/nvidiactl").exists()
    return (maybe_cuda or sys.platform == "darwin") and importlib.util.find_spec("torch") is not None
