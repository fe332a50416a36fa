"""A net of another project, as an ONNX file, from import through the gate to answers of a running server."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

from models.registry.registry import Registry
from models.retrieval.corpus import read_corpus
from models.vectors import Floats, normalise
from models.windows import windows
from tests.conftest import LVM, PATIENCE_S, Process, until
from tests.fakes import octets_of

LENGTH = 5


def regression(registry: Registry) -> Floats:
    """Return the weights `(T x D, D)` of a regression on the windows that the gate scores."""
    data = windows(read_corpus(registry.resolve("retriever").path), LENGTH)
    contexts, targets = data.contexts().reshape(len(data), -1), data.targets()
    gram = contexts.T @ contexts + np.eye(contexts.shape[1], dtype=np.float32)
    weights: Floats = np.linalg.solve(gram, contexts.T @ targets).astype(np.float32)
    return weights


def write_graph(path: Path, weights: Floats) -> None:
    """Write the regression as a graph for one context, with an answer that is not of length one."""
    width, dim = weights.shape
    nodes = [helper.make_node("Reshape", ["x", "flat"], ["row"]), helper.make_node("MatMul", ["row", "W"], ["y"])]
    tensors = [numpy_helper.from_array(weights, "W"), numpy_helper.from_array(np.array([1, width], np.int64), "flat")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, LENGTH, dim])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, dim])]
    graph = helper.make_graph(nodes, "regression", inputs, outputs, tensors)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def test_a_net_from_an_onnx_file_passes_the_gate_beside_amn_and_serves(
    process: Callable[..., Process], tmp_path: Path
) -> None:
    server = process(LVM_RELOAD_S="0.05")
    registry = server.registry
    weights = regression(registry)
    write_graph(tmp_path / "regression.onnx", weights)

    def lvm(*words: str) -> str:
        env = {**os.environ, "LVM_REGISTRY": str(registry.root)}
        ended = subprocess.run([LVM, *words], env=env, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    data = f"wiki/val={registry.resolve('retriever').path}"
    options = ("--encoder", "all-MiniLM-L6-v2", "--license", "mit", "--data", data, "--json")
    version = json.loads(lvm("import", str(tmp_path / "regression.onnx"), "--name", "regression", *options))["id"]
    judged = json.loads(lvm("promote", "primary", version, "--json"))["checked"]
    assert judged["incumbent"].startswith("amn/")
    assert judged["scores"]["wiki/val"]["cosine"] > judged["incumbent_scores"]["wiki/val"]["cosine"]

    # the canary compares answers to these with those of the incumbent, so they are contexts of the data
    contexts = windows(read_corpus(registry.resolve("retriever").path), LENGTH).contexts()[:9]
    headers = {**octets_of(contexts), "accept": "application/octet-stream"}

    def ask() -> httpx.Response:
        return httpx.post(f"{server.url}/predict", content=contexts.tobytes(), headers=headers, timeout=PATIENCE_S)

    number = version.removeprefix("regression/")
    until(lambda: ask().headers["x-model-version"] == number, "the promoted version to answer")
    answer = ask()
    found = np.frombuffer(answer.content, np.float32).reshape(9, -1)
    assert np.allclose(found, normalise(contexts.reshape(9, -1) @ weights), atol=1e-5)
