"""onnxruntime on CPU: a graph without weights, fed with the verified tensors of the checkpoint."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at import; on by default since 1.29

import onnxruntime

from models.checkpoint import BadCheckpoint, Checkpoint
from models.corpus import Floats


class OnnxRuntime:
    """One inference session; the graph's parameters are the checkpoint's arrays, by name."""

    name = "onnxruntime"

    def __init__(self, checkpoint: Checkpoint, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        # The graph need not read every tensor (AMN's key bias cancels out), and a session refuses others.
        used = [name for name in checkpoint.weights if name.encode() in checkpoint.graph]
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(checkpoint.weights[name]) for name in used]
        options.add_external_initializers(used, values)
        try:
            self._session = onnxruntime.InferenceSession(checkpoint.graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no other base
            raise BadCheckpoint(f"{checkpoint.version}: onnxruntime refuses the graph: {error}") from error

    def run(self, contexts: Floats) -> Floats:
        """Map float32 contexts `(B, T, D)` to float32 unit vectors `(B, D)`."""
        answer: Any = self._session.run(None, {"context": contexts})[0]
        return np.asarray(answer, np.float32)
