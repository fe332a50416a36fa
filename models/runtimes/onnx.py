"""onnxruntime on CPU: a graph without weights, which reads the verified tensors of the checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

# read at import; telemetry is on by default since 1.29
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

from models.registry.checkpoint import BadCheckpoint, Checkpoint
from models.runtimes.denormals import FlushedDenormals
from models.runtimes.priority import has_lowered_priority
from models.vectors import Floats

# For fewer rows, waking a thread takes longer than it saves.
MIN_ROWS_PER_THREAD = 8
# Rows of one run. A net with so many bytes of weights may take megabytes for a row, and more rows are not faster.
MAX_ROWS, LARGE_NET, MAX_ROWS_LARGE = 128, 100_000_000, 32


def open_session(graph: bytes, weights: Mapping[str, NDArray[Any]]) -> Any:
    """Return a session that runs in the caller's thread; `graph` finds its parameters in `weights` by name."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    # Failures raise. The library would write its own lines to the log of the process.
    options.log_severity_level = 4
    # The graph may not read every tensor (AMN's key bias cancels out), and a session rejects unknown ones.
    used = [name for name in weights if name.encode() in graph]
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(weights[name]) for name in used]
    options.add_external_initializers(used, values)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class _OneRow:
    """A session bound to an array of `shape` in and one of `answer` out: binding takes a tenth of the time of AMN."""

    def __init__(self, session: Any, shape: tuple[int, ...], answer: tuple[int, ...]) -> None:
        self._session = session
        self._context, self._vector = np.empty(shape, np.float32), np.empty(answer, np.float32)
        self._binding = session.io_binding()
        for bind, name, array in (
            (self._binding.bind_input, "context", self._context),
            (self._binding.bind_output, "vector", self._vector),
        ):
            bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)

    def run(self, contexts: Floats) -> Floats:
        """Map one context `(1, T, D)` to its unit vector `(1, D)`."""
        self._context[:] = contexts
        with FlushedDenormals():
            self._session.run_with_iobinding(self._binding)
        return self._vector.copy()


class OnnxRuntime:
    """One inference session with the arrays of a checkpoint as parameters.

    The session runs in the caller's thread. Large batches are split by rows among up to `threads` threads, which meet
    once per batch. Threads inside the session would meet, or spin, at every node.
    """

    name = "onnxruntime"
    on_cpu = True
    sizes: tuple[int, ...] = (1,)

    def __init__(self, checkpoint: Checkpoint, threads: int) -> None:
        try:
            self._session = open_session(checkpoint.graph, checkpoint.weights)
        except Exception as error:
            # onnxruntime's exceptions have no other common base
            raise BadCheckpoint(f"{checkpoint.version}: onnxruntime rejects the graph: {error}") from error
        self._row_shape = (1, *checkpoint.golden_context.shape[1:])
        self._one_row = _OneRow(self._session, self._row_shape, (1, *checkpoint.golden_vector.shape[1:]))
        size = sum(tensor.nbytes for tensor in checkpoint.weights.values())
        self._max_rows = MAX_ROWS if size < LARGE_NET else MAX_ROWS_LARGE
        self._threads = threads
        self._helpers = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="onnxruntime")

    def run(self, contexts: Floats) -> Floats:
        """Map float32 contexts `(B, T, D)` to float32 unit vectors `(B, D)`."""
        if contexts.shape == self._row_shape:
            return self._one_row.run(contexts)
        count = min(self._threads, len(contexts) // MIN_ROWS_PER_THREAD)
        if count < 2 or has_lowered_priority():
            return self._run(contexts)
        mine, *others = np.array_split(contexts, count)
        helped = [self._helpers.submit(self._run, part) for part in others]
        return np.concatenate([self._run(mine), *(help.result() for help in helped)])

    def _run(self, contexts: Floats) -> Floats:
        answers: list[Floats] = []
        # the session's own option works only in the thread that opened the first session
        with FlushedDenormals():
            for at in range(0, len(contexts) or 1, self._max_rows):
                answers += self._session.run(["vector"], {"context": contexts[at : at + self._max_rows]})
        return answers[0] if len(answers) == 1 else np.concatenate(answers)
