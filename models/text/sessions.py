"""Sessions: what runs the graph of a text encoder. Word-piece ids in, unit vectors out; from any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.runtimes import MIN_PARITY, worst_cosine
from models.vectors import Floats

Ids = NDArray[np.int64]


class Session(NamedTuple):
    """`run` maps the ids `(B, S)` of up to `most` texts of S word-pieces to unit vectors `(B, D)` float32.

    The vector of a text is the same to the bit, whatever texts run with it.
    """

    run: Callable[[Ids], Floats]
    most: int
    precision: str


# Texts that run together in bf16; more are not faster.
BF16_TEXTS = 8
# Texts of several lengths that a reduced precision is compared on, in word-pieces.
LENGTHS = (4, 30, 130)


def open_float32(graph: bytes, weights: bytes) -> Session:
    """Return onnxruntime's session of a graph, which runs in the thread of its caller."""
    from safetensors.numpy import load

    from models.runtimes.onnx import open_session

    session = open_session(graph, load(weights))
    # together they would be 4 % faster, but differ in the last bit
    return Session(lambda ids: np.asarray(session.run(["vector"], {"ids": ids})[0]), 1, "float32")


def open_bf16(graph: bytes, weights: bytes, weights_name: str, threads: int, exact: Session) -> Session | None:
    """Return a session that computes in bf16; None if this machine cannot, or the vectors differ from `exact` ones."""
    try:
        from models.runtimes.openvino import supports_precision
    except ImportError:
        return None
    if not supports_precision("bf16"):
        return None
    try:
        session = _compile(graph, weights, weights_name, threads)
    except (OSError, RuntimeError):
        # no room for a copy of the weights, or a graph that OpenVINO rejects
        return None
    return session if all(_agree(session, exact, length) for length in LENGTHS) else None


def _agree(session: Session, exact: Session, length: int) -> bool:
    """Return whether the vectors of two texts of frequent word-pieces are nearly those of the exact session."""
    ids = np.random.default_rng(length).integers(1000, 10_000, (2, length))
    expected = np.concatenate([exact.run(ids[:1]), exact.run(ids[1:])])
    return worst_cosine(session.run(ids), expected) >= MIN_PARITY


def _compile(graph: bytes, weights: bytes, weights_name: str, threads: int) -> Session:
    import openvino

    from models.runtimes.openvino import CORE, read_graph

    model = read_graph(graph, weights, weights_name)
    config = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads}
    compiled = CORE.compile_model(model, "CPU", {**config, "ENABLE_CPU_PINNING": False})
    requests: SimpleQueue[Any] = SimpleQueue()
    for _ in range(threads):
        requests.put(compiled.create_infer_request())

    def run(ids: Ids) -> Floats:
        request = requests.get()
        try:
            request.set_input_tensor(openvino.Tensor(ids))
            request.infer()
            answer: Floats = request.get_output_tensor().data.copy()
        finally:
            requests.put(request)
        return answer

    return Session(run, BF16_TEXTS, "bf16")
