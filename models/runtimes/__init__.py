"""Runtimes: how a net is executed. They share one protocol, are chosen by device, and must match the golden vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from models.devices import DEVICES, may_be_accelerated
from models.registry.checkpoint import ONNX_NET, BadCheckpoint, Checkpoint
from models.vectors import Floats

# least cosine between an answer and the golden vector
MIN_PARITY = 0.9999
PRECISIONS = ("float32", "bf16", "int8")


class Runtime(Protocol):
    """Executes one net on one device. Call it from one thread at a time."""

    name: str
    on_cpu: bool
    # numbers of rows for which it has a path of its own; each is checked
    sizes: tuple[int, ...]

    def run(self, contexts: Floats) -> Floats:
        """Map float32 contexts `(B, T, D)` to float32 unit vectors `(B, D)`."""
        ...


class NoSuchDevice(RuntimeError):
    """The device does not exist here, or cannot be used."""


class NoSuchPrecision(NoSuchDevice):
    """The device cannot compute in this precision."""


class UnfitRuntime(BadCheckpoint):
    """The answers of a runtime differ from the golden vectors."""


def find_device(wanted: str) -> str:
    """Return the device that `wanted` stands for; `auto` is cuda or mps if torch finds one, else cpu.

    Raises:
        NoSuchDevice: the device is unknown or not available.
    """
    if wanted not in DEVICES:
        raise NoSuchDevice(f"unknown device {wanted!r}; choose from {', '.join(DEVICES)}")
    if wanted in ("cuda", "mps"):
        _require(wanted)
    if wanted != "auto":
        return wanted
    if not may_be_accelerated():
        return "cpu"
    from models.runtimes.torch import best_device

    return best_device()


def _require(device: str) -> None:
    try:
        from models.runtimes.torch import best_device
    except ImportError as error:
        raise NoSuchDevice(f"{device} requires torch, which is not installed") from error
    if best_device() != device:
        raise NoSuchDevice(f"torch finds no {device} device")


def open_runtime(checkpoint: Checkpoint, device: str, threads: int, precision: str = "float32") -> Runtime:
    """Return the net of a checkpoint, ready to run on `device` and checked against its golden vectors.

    A net that came as an ONNX file has no torch module, so it runs on the CPU whatever the device is. On the CPU, a
    `precision` such as openvino-float32 names the library too.

    Raises:
        NoSuchPrecision: the device cannot compute in `precision`.
        UnfitRuntime: the answers are not finite or differ from the golden vectors.
        BadCheckpoint: the runtime cannot load the net.
    """
    is_onnx = checkpoint.card.architecture == ONNX_NET
    runtime = _open_onnx(checkpoint, threads, precision) if is_onnx else _make(checkpoint, device, threads, precision)
    check_every_path(runtime, checkpoint)
    return runtime


def open_for_trial(checkpoint: Checkpoint, precision: str, sizes: tuple[int, ...]) -> Runtime:
    """Return what `open_runtime` returns for the CPU and one thread; OpenVINO has graphs for `sizes` rows only."""
    if precision == "float32" or checkpoint.card.architecture == ONNX_NET:
        return open_runtime(checkpoint, "cpu", 1, precision)
    runtime = _open_openvino(checkpoint, 1, precision, sizes)
    check_every_path(runtime, checkpoint)
    return runtime


def check_every_path(runtime: Runtime, checkpoint: Checkpoint) -> None:
    """Call `check_parity` with all golden vectors, and with each number of rows that has a path of its own."""
    check_parity(runtime, checkpoint)
    for rows in runtime.sizes:
        check_parity(runtime, _with_golden(checkpoint, rows))


def _with_golden(checkpoint: Checkpoint, rows: int) -> Checkpoint:
    """Return a checkpoint with exactly `rows` golden vectors, repeated if there are fewer."""
    context = np.resize(checkpoint.golden_context, (rows, *checkpoint.golden_context.shape[1:]))
    vector = np.resize(checkpoint.golden_vector, (rows, *checkpoint.golden_vector.shape[1:]))
    return replace(checkpoint, golden_context=context, golden_vector=vector)


def _open_onnx(checkpoint: Checkpoint, threads: int, precision: str) -> Runtime:
    """Return a net that came as an ONNX file, which runs no more rows at once than its import tried."""
    from models.runtimes.blocks import Blocks

    rows, is_fixed = checkpoint.card.config.get("max_rows"), bool(checkpoint.card.config.get("fixed_rows"))
    if type(rows) is not int or rows < 1:
        raise BadCheckpoint(f"{checkpoint.version}: the card has max_rows {rows!r}; expected a positive number")
    return Blocks(_on_cpu(checkpoint, 1 if is_fixed else threads, precision), rows, is_fixed)


def _make(checkpoint: Checkpoint, device: str, threads: int, precision: str) -> Runtime:
    if device == "cpu":
        return _on_cpu(checkpoint, threads, precision)
    if precision not in ("float32", "bf16"):
        raise NoSuchPrecision(f"{device} does not support precision {precision!r}; choose float32 or bf16")
    if device == "cuda":
        from models.runtimes.cuda import open_cuda

        return open_cuda(checkpoint, precision)
    from models.runtimes.torch import TorchRuntime

    return TorchRuntime(checkpoint, device, precision)


def _on_cpu(checkpoint: Checkpoint, threads: int, precision: str) -> Runtime:
    if precision == "float32":
        from models.runtimes.onnx import OnnxRuntime

        return OnnxRuntime(checkpoint, threads)
    return _open_openvino(checkpoint, threads, precision)


def _open_openvino(
    checkpoint: Checkpoint, threads: int, precision: str, sizes: tuple[int, ...] | None = None
) -> Runtime:
    """Return the net in OpenVINO, with graphs for `sizes` rows, or for those that it has by default."""
    number_format = precision.removeprefix("openvino-")
    if number_format not in PRECISIONS:
        raise NoSuchPrecision(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    try:
        from models.runtimes import openvino
    except ImportError as error:
        raise NoSuchPrecision(f"{precision} on cpu requires the extra openvino, which is not installed") from error
    if not openvino.supports_precision(number_format):
        raise NoSuchPrecision(f"this processor does not compute in {number_format}")
    return openvino.OpenVinoRuntime(checkpoint, number_format, threads, sizes or openvino.SIZES)


def check_parity(runtime: Runtime, checkpoint: Checkpoint) -> None:
    """Compare a runtime with the golden vectors; raises `UnfitRuntime` with the worst cosine, or with its error."""
    try:
        answer = runtime.run(checkpoint.golden_context)
    except Exception as error:
        # a graph may load but not run; onnxruntime's exceptions have no other common base
        raise UnfitRuntime(f"{runtime.name}: fails on the golden vectors: {error}") from error
    if answer.shape != checkpoint.golden_vector.shape:
        expected = checkpoint.golden_vector.shape
        raise UnfitRuntime(f"{runtime.name}: answers have shape {answer.shape}; expected {expected}")
    worst = worst_cosine(answer, checkpoint.golden_vector)
    if not worst >= MIN_PARITY:
        raise UnfitRuntime(f"{runtime.name}: cosine {worst:.6f} to the golden vectors; expected >= {MIN_PARITY}")


def worst_cosine(answer: Floats, golden: Floats) -> float:
    """Return the least cosine of answers `(G, D)` to the golden vectors; less, or NaN, if one has not unit length."""
    distances = np.sum((answer - golden) ** 2, axis=1)
    return float(1 - np.max(distances) / 2)
