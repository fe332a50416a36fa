"""Do public clients of the Open Inference Protocol get the same vectors as callers of /predict?"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import httpx
import numpy as np

from bench.servers import RunningServer
from bench.stats import max_difference
from bench.untrained import draw_contexts
from models.vectors import Floats

OCTETS = "application/octet-stream"
INFER = "/v2/models/primary/infer"


def same_answers(server: RunningServer, dim: int) -> dict[str, float | None]:
    """Return the largest difference to /predict of answers to a KServe v2 JSON request and to Triton's HTTP client.

    None if Triton's client is not installed.
    """
    contexts = draw_contexts(4, dim, seed=1)
    shape = "x".join(map(str, contexts.shape))
    headers = {"content-type": f"{OCTETS}; shape={shape}", "accept": OCTETS}
    known = httpx.post(f"{server.url}/predict", content=contexts.tobytes(), headers=headers).raise_for_status()
    vectors = np.frombuffer(known.content, "<f4").reshape(-1, dim)
    has_triton = importlib.util.find_spec("tritonclient") is not None
    return {
        "kserve_json": max_difference(_by_json(server, contexts), vectors),
        "triton_client": max_difference(_by_triton(server, contexts), vectors) if has_triton else None,
    }


def _by_json(server: RunningServer, contexts: Floats) -> Floats:
    tensor = {"name": "context", "datatype": "FP32", "shape": contexts.shape, "data": contexts.ravel().tolist()}
    answer = httpx.post(f"{server.url}{INFER}", json={"inputs": [tensor]}).raise_for_status().json()
    (output,) = answer["outputs"]
    return np.asarray(output["data"], np.float32).reshape(output["shape"])


def _by_triton(server: RunningServer, contexts: Floats) -> Floats:
    triton: Any = importlib.import_module("tritonclient.http")
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        tensor = triton.InferInput("context", list(contexts.shape), "FP32")
        tensor.set_data_from_numpy(contexts)
        answer = client.infer("primary", [tensor]).as_numpy("vector")
    return np.asarray(answer, np.float32)
