"""OpenVINO on CPU: the graph in bf16 or int8, if the processor computes these faster than float32."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as ops
from openvino.passes import ConstantFolding, Manager
from safetensors.numpy import save

from models.registry.checkpoint import GRAPH_FILE, WEIGHTS_FILE, BadCheckpoint, Checkpoint
from models.runtimes.denormals import FlushedDenormals
from models.vectors import Floats

# Activations that share a scale in int8: the smallest group there is, within one row, so rows do not mix.
INT8_GROUP = 32
# scale of an output whose weights are all zero
MIN_SCALE = np.finfo(np.float32).tiny
CONFIG: dict[str, dict[str, str | int]] = {
    "bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
    "int8": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": INT8_GROUP},
}
# Denormals are flushed to zero: see `models.runtimes.denormals`.
FLUSH_DENORMALS = {"CPU_DENORMALS_OPTIMIZATION": True}


class OpenVinoRuntime:
    """One compiled graph with one inference request; OpenVINO splits the work among `threads` threads."""

    on_cpu = True

    def __init__(self, checkpoint: Checkpoint, precision: str, threads: int) -> None:
        self.name = f"openvino-{precision}"
        core = openvino.Core()
        model = _read(core, checkpoint)
        if precision == "int8":
            _quantise(model)
        config = {**CONFIG[precision], **FLUSH_DENORMALS, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        try:
            # OpenVINO sets the mode of the thread that compiles as well, and leaves it so.
            with FlushedDenormals():
                self._request: Any = core.compile_model(model, "CPU", config).create_infer_request()
        except RuntimeError as error:
            raise BadCheckpoint(f"{checkpoint.version}: openvino rejects the graph: {error}") from error

    def run(self, contexts: Floats) -> Floats:
        """Map float32 contexts `(B, T, D)` to float32 unit vectors `(B, D)`."""
        self._request.set_input_tensor(openvino.Tensor(np.ascontiguousarray(contexts), shared_memory=True))
        with FlushedDenormals():
            self._request.infer()
        answer: Floats = self._request.get_output_tensor().data.copy()
        return answer


def supports_precision(precision: str) -> bool:
    """Return whether this processor computes in `precision`; if not, OpenVINO would silently use float32."""
    return precision.upper() in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _read(core: Any, checkpoint: Checkpoint) -> Any:
    """Return the graph with the verified tensors; OpenVINO reads these from a file only."""
    with TemporaryDirectory() as directory:
        (Path(directory) / GRAPH_FILE).write_bytes(checkpoint.graph)
        (Path(directory) / WEIGHTS_FILE).write_bytes(save(dict(checkpoint.weights)))
        try:
            return core.read_model(Path(directory) / GRAPH_FILE)
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
