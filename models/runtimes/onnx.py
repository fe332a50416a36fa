"""onnxruntime on CPU: a graph without weights, fed with the verified tensors of the checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at import; on by default since 1.29

import onnxruntime

from models.registry.checkpoint import BadCheckpoint, Checkpoint
from models.runtimes.priority import gives_way
from models.vectors import Floats

MIN_ROWS_PER_THREAD = 8  # least rows worth a thread: for fewer, waking it takes longer than it saves


def open_session(graph: bytes, weights: Mapping[str, NDArray[Any]]) -> Any:
    """Return a session that runs in its caller's thread; `graph` finds its parameters among `weights` by name."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails raises; its own lines would be written by whoever runs the net
    # The graph need not read every tensor (AMN's key bias cancels out), and a session refuses others.
    used = [name for name in weights if name.encode() in graph]
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(weights[name]) for name in used]
    options.add_external_initializers(used, values)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class OnnxRuntime:
    """One inference session; the graph's parameters are the checkpoint's arrays, by name.

    The session runs in its caller's thread. Large batches are divided by rows among up to `threads` of them: one
    crossing a batch, where threads inside the session would meet, or spin, at every node.
    """

    name = "onnxruntime"
    on_cpu = True

    def __init__(self, checkpoint: Checkpoint, threads: int) -> None:
        try:
            self._session = open_session(checkpoint.graph, checkpoint.weights)
        except Exception as error:  # onnxruntime's exceptions share no other base
            raise BadCheckpoint(f"{checkpoint.version}: onnxruntime refuses the graph: {error}") from error
        self._threads = threads
        self._helpers = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="onnxruntime")

    def run(self, contexts: Floats) -> Floats:
        """Map float32 contexts `(B, T, D)` to float32 unit vectors `(B, D)`."""
        count = min(self._threads, len(contexts) // MIN_ROWS_PER_THREAD)
        if count < 2 or gives_way():
            return self._run(contexts)
        mine, *others = np.array_split(contexts, count)
        helped = [self._helpers.submit(self._run, part) for part in others]
        return np.concatenate([self._run(mine), *(help.result() for help in helped)])

    def _run(self, contexts: Floats) -> Floats:
        answer: Floats = self._session.run(["vector"], {"context": contexts})[0]
        return answer
