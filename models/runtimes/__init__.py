"""Runtimes: how a net is executed. One protocol, chosen by device, held to the golden vectors."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import numpy as np

from models.registry.checkpoint import BadCheckpoint, Checkpoint
from models.vectors import Floats

MIN_PARITY = 0.9999  # least cosine to the float32 torch net's answer on every golden vector
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("float32", "bf16", "int8")


class Runtime(Protocol):
    """Executes one net on one device; called from one thread at a time."""

    name: str
    on_cpu: bool

    def run(self, contexts: Floats) -> Floats:
        """Map float32 contexts `(B, T, D)` to float32 unit vectors `(B, D)`."""
        ...


class NoSuchDevice(RuntimeError):
    """A device that is not here, or that nothing here can use."""


class NoSuchPrecision(NoSuchDevice):
    """A precision that this device, or nothing here, can compute in."""


class UnfitRuntime(BadCheckpoint):
    """A runtime that answers the golden vectors otherwise than the net that made them."""


def find_device(wanted: str) -> str:
    """Return the device that `wanted` means here; `auto` is cuda or mps where torch sees one, else cpu.

    Raises:
        NoSuchDevice: it is no device, or not here.
    """
    if wanted not in DEVICES:
        raise NoSuchDevice(f"{wanted!r} is no device: choose from {', '.join(DEVICES)}")
    if wanted in ("cuda", "mps"):
        _demand(wanted)
    if wanted != "auto":
        return wanted
    if not _may_be_accelerated():
        return "cpu"  # and importing torch, which takes seconds, was not needed to know
    from models.runtimes.torch import best_device

    return best_device()


def is_accelerated(wanted: str) -> bool:
    """Return whether `wanted` means an accelerator; a child finds out, so that torch stays out of this process."""
    if wanted != "auto":
        return wanted != "cpu"
    if not _may_be_accelerated():
        return False
    code = "from models.runtimes import find_device; print(find_device('auto'))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.strip() in DEVICES[2:]


def _may_be_accelerated() -> bool:
    maybe_cuda = Path("/proc/driver/nvidia").exists() or Path("/dev/nvidiactl").exists()
    return (maybe_cuda or sys.platform == "darwin") and importlib.util.find_spec("torch") is not None


def _demand(device: str) -> None:
    try:
        from models.runtimes.torch import best_device
    except ImportError as error:
        raise NoSuchDevice(f"{device} needs torch, which is not installed") from error
    if best_device() != device:
        raise NoSuchDevice(f"torch sees no {device} here")


def open_runtime(checkpoint: Checkpoint, device: str, threads: int, precision: str = "float32") -> Runtime:
    """Return the checkpoint's net, ready to run on `device` and checked against its golden vectors.

    Raises:
        NoSuchPrecision: nothing here computes in `precision` on that device.
        UnfitRuntime: the answers are not finite or differ from the golden ones.
        BadCheckpoint: the runtime cannot load the net.
    """
    runtime = _make(checkpoint, device, threads, precision)
    check_parity(runtime, checkpoint)
    return runtime


def _make(checkpoint: Checkpoint, device: str, threads: int, precision: str) -> Runtime:
    if device == "cpu":
        return _on_cpu(checkpoint, threads, precision)
    if precision not in ("float32", "bf16"):
        raise NoSuchPrecision(f"there is no {precision} on {device}: choose float32 or bf16")
    if device == "cuda":
        from models.runtimes.cuda import open_cuda

        return open_cuda(checkpoint, precision)
    from models.runtimes.torch import TorchRuntime

    return TorchRuntime(checkpoint, device, precision)


def _on_cpu(checkpoint: Checkpoint, threads: int, precision: str) -> Runtime:
    if precision == "float32":
        from models.runtimes.onnx import OnnxRuntime

        return OnnxRuntime(checkpoint, threads)
    if precision not in PRECISIONS:
        raise NoSuchPrecision(f"{precision!r} is no precision: choose from {', '.join(PRECISIONS)}")
    try:
        from models.runtimes import openvino
    except ImportError as error:
        raise NoSuchPrecision(f"{precision} on cpu needs the extra openvino, which is not installed") from error
    if not openvino.supports_precision(precision):
        raise NoSuchPrecision(f"this processor does not compute in {precision}")
    return openvino.OpenVinoRuntime(checkpoint, precision, threads)


def check_parity(runtime: Runtime, checkpoint: Checkpoint) -> None:
    """Hold `runtime` to the golden vectors; raises `UnfitRuntime` with the worst cosine, or what it failed with."""
    try:
        answer = runtime.run(checkpoint.golden_context)
    except Exception as error:  # a graph may load and not run; onnxruntime's exceptions share no other base
        raise UnfitRuntime(f"{runtime.name}: fails on the golden vectors: {error}") from error
    if answer.shape != checkpoint.golden_vector.shape:
        raise UnfitRuntime(f"{runtime.name}: answers of shape {answer.shape}")
    apart = np.sum((answer - checkpoint.golden_vector) ** 2, axis=1)
    worst = float(1 - np.max(apart) / 2)  # the cosine, where both are unit; less, or NaN, where one is not
    if not worst >= MIN_PARITY:
        raise UnfitRuntime(f"{runtime.name}: cosine {worst:.6f} to the golden vectors, want >= {MIN_PARITY}")
