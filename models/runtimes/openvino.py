"""OpenVINO on CPU: the graph in float32, or in bf16 or int8 if the processor computes these faster."""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as ops
from openvino.passes import ConstantFolding, Manager
from safetensors.numpy import save

from models.registry.checkpoint import GRAPH_FILE, ONNX_NET, WEIGHTS_FILE, BadCheckpoint, Checkpoint
from models.runtimes.denormals import FlushedDenormals
from models.runtimes.onnx import MIN_ROWS_PER_THREAD
from models.vectors import Floats

# Rows of the graphs.
SIZES = (1, 4, 8, 16, 24, 32, 128)
# A call takes as long as so many rows more.
CALL_ROWS = 4
# Activations that share a scale in int8: the smallest group there is, within one row, so rows do not mix.
INT8_GROUP = 32
# scale of an output whose weights are all zero
MIN_SCALE = np.finfo(np.float32).tiny
CONFIG: dict[str, dict[str, str | int]] = {
    "float32": {"INFERENCE_PRECISION_HINT": "f32"},
    "bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
    "int8": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": INT8_GROUP},
}
# Denormals are flushed to zero: see `models.runtimes.denormals`.
FLUSH_DENORMALS = {"CPU_DENORMALS_OPTIMIZATION": True}
# One for the whole process. A Core gives the first thread that uses it another stack for signal handlers, and frees it
# at its own end. With several, a thread kept a stack that was freed, and the next signal ended the process.
CORE = openvino.Core()


class OpenVinoRuntime:
    """A compiled graph for each number of rows in `sizes`, with the weights in `precision`.

    Nothing is derived from the shape of a call, so one row takes as little as half the time. A batch runs in parts, the
    last filled up. OpenVINO splits the work of a graph among at most `threads` threads, one per `MIN_ROWS_PER_THREAD`
    rows. A net that came as an ONNX file has one graph for any number of rows, since it may not allow another shape.
    """

    on_cpu = True

    def __init__(self, checkpoint: Checkpoint, precision: str, threads: int, sizes: tuple[int, ...] = SIZES) -> None:
        self.name = f"openvino-{precision}"
        self.sizes = () if checkpoint.card.architecture == ONNX_NET else sizes
        model = _read(checkpoint)
        if precision == "int8":
            _quantise(model)
        try:
            # OpenVINO sets the mode of the thread that compiles as well, and leaves it so.
            with FlushedDenormals():
                self._any_rows: Any = None if self.sizes else _compile(model, precision, threads)
                self._graphs = {rows: _FixedRows(_compile_for(model, rows, precision, threads)) for rows in self.sizes}
        except RuntimeError as error:
            raise BadCheckpoint(f"{checkpoint.version}: openvino rejects the graph: {error}") from error

    def run(self, contexts: Floats) -> Floats:
        """Map float32 contexts `(B, T, D)` to float32 unit vectors `(B, D)`."""
        if self._any_rows:
            return _run_any_rows(self._any_rows, contexts)
        parts = split(len(contexts), self.sizes)
        if len(parts) == 1:
            return self._graphs[parts[0]].run(contexts)
        blocks = np.split(contexts, list(accumulate(parts))[:-1])
        return np.concatenate([self._graphs[rows].run(block) for rows, block in zip(parts, blocks, strict=True)])


@cache
def split(rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of the graphs that run `rows` in the least time; the last one may be larger than needed."""
    if rows > 2 * sizes[-1]:
        return (sizes[-1], *split(rows - sizes[-1], sizes))
    whole = [(size,) for size in sizes if size >= rows][:1]
    divided = [(size, *split(rows - size, sizes)) for size in sizes if size < rows]
    return min(whole + divided, key=lambda parts: sum(parts) + CALL_ROWS * len(parts))


class _FixedRows:
    """A request of a graph with a fixed number of rows. Fewer rows are filled up by those of the calls before."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self._contexts: Floats = request.get_input_tensor().data
        self._vectors: Floats = request.get_output_tensor().data
        self._contexts[:] = 0

    def run(self, contexts: Floats) -> Floats:
        """Map contexts `(n, T, D)`, as many as there are rows or fewer, to unit vectors `(n, D)`."""
        if contexts.shape[1:] != self._contexts.shape[1:]:
            raise ValueError(f"contexts of shape {contexts.shape}; expected {self._contexts.shape}")
        self._contexts[: len(contexts)] = contexts
        _infer(self._request)
        return self._vectors[: len(contexts)].copy()


def _infer(request: Any) -> None:
    with FlushedDenormals():
        # The options spare a copy of the answer.
        request.infer(share_outputs=True, decode_strings=False)


def _compile(model: Any, precision: str, threads: int) -> Any:
    config = {**CONFIG[precision], **FLUSH_DENORMALS, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    return CORE.compile_model(model, "CPU", config).create_infer_request()


def _compile_for(model: Any, rows: int, precision: str, threads: int) -> Any:
    """Return a request of a copy of the graph for `rows` contexts; both share the weights."""
    fixed = model.clone()
    fixed.reshape([rows, *(length.get_length() for length in list(model.input().get_partial_shape())[1:])])
    return _compile(fixed, precision, max(1, min(threads, rows // MIN_ROWS_PER_THREAD)))


def _run_any_rows(request: Any, contexts: Floats) -> Floats:
    request.set_input_tensor(openvino.Tensor(np.ascontiguousarray(contexts), shared_memory=True))
    _infer(request)
    answer: Floats = request.get_output_tensor().data.copy()
    return answer


def supports_precision(precision: str) -> bool:
    """Return whether this processor computes in `precision`; if not, OpenVINO would silently use float32."""
    known = CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return precision == "float32" or precision.upper() in known


def read_graph(graph: bytes, weights: bytes, weights_file: str) -> Any:
    """Return an ONNX graph whose weights are in `weights_file`, which OpenVINO reads from a directory only.

    Raises:
        OSError: the directory of temporary files has no room for the weights.
        RuntimeError: OpenVINO rejects the graph.
    """
    with TemporaryDirectory() as directory:
        path = Path(directory) / GRAPH_FILE
        path.write_bytes(graph)
        path.with_name(weights_file).write_bytes(weights)
        return CORE.read_model(path)


def _read(checkpoint: Checkpoint) -> Any:
    """Return the graph with the verified tensors."""
    try:
        return read_graph(checkpoint.graph, save(dict(checkpoint.weights)), WEIGHTS_FILE)
    except RuntimeError as error:
        raise BadCheckpoint(f"{checkpoint.version}: openvino rejects the graph: {error}") from error


def _quantise(model: Any) -> None:
    """Store the weights of every product as int8 with one scale per output; the compiler quantises the activations."""
    folding = Manager()
    folding.register_pass(ConstantFolding())
    folding.run_passes(model)
    for node in model.get_ops():
        if node.get_type_name() == "MatMul" and node.input_value(1).get_node().get_type_name() == "Constant":
            weights = node.input_value(1).get_node().data
            inputs = 1 if node.get_attributes()["transpose_b"] else 0
            scale = np.maximum(np.abs(weights).max(axis=inputs, keepdims=True) / 127, MIN_SCALE)
            stored = ops.convert(ops.constant(np.rint(weights / scale).astype(np.int8)), "f32")
            node.input(1).replace_source_output(ops.multiply(stored, ops.constant(scale)).output(0))
