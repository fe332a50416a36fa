"""The Open Inference Protocol: a public Triton client, and KServe's plain JSON, get what /predict gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.conftest import Running
from tests.fakes import D, T, contexts, mean_of, raises

Serve = Callable[..., Running]


def body(batch: Any, **changes: Any) -> dict[str, Any]:
    tensor = {"name": "context", "datatype": "FP32", "shape": [len(batch), T, D], "data": batch.ravel().tolist()}
    return {"inputs": [{**tensor, **changes}]}


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_tritons_client_gets_the_vectors_in_every_mix_of_wires(serve: Serve, binary_in: bool, binary_out: bool) -> None:
    server = serve()
    batch = contexts(3)
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        asked = triton.InferInput("context", [3, T, D], "FP32")
        asked.set_data_from_numpy(batch, binary_data=binary_in)
        wanted = triton.InferRequestedOutput("vector", binary_data=binary_out)
        answer = client.infer("amn", [asked], outputs=[wanted], request_id="7")
    np.testing.assert_allclose(answer.as_numpy("vector"), mean_of(batch), atol=1e-6)
    assert answer.get_response()["id"] == "7"
    assert answer.get_response()["model_name"] == "amn"


def test_tritons_client_finds_the_server_and_its_models(serve: Serve) -> None:
    server = serve()
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("primary")
        assert not client.is_model_ready("nothing")
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        metadata = client.get_model_metadata("gru")
        assert metadata["inputs"] == [{"name": "context", "datatype": "FP32", "shape": [-1, T, D]}]
        assert metadata["outputs"] == [{"name": "vector", "datatype": "FP32", "shape": [-1, D]}]
        assert client.is_model_ready("gru", metadata["versions"][0])
        with pytest.raises(InferenceServerException, match="no model called that"):
            client.infer("nothing", [triton.InferInput("context", [1, T, D], "FP32")])


@pytest.mark.parametrize("nested", [True, False])
def test_kserves_json_gets_the_vector_of_predict(serve: Serve, nested: bool) -> None:
    server = serve()
    batch = contexts(2)
    request = body(batch, **({"data": batch.tolist()} if nested else {}))
    output = server.http.post("/v2/models/primary/infer", json=request).json()["outputs"][0]
    predicted = server.http.post("/predict", json={"contexts": batch.tolist()}).json()["vectors"]
    assert (output["name"], output["datatype"], output["shape"]) == ("vector", "FP32", [2, D])
    assert output["data"] == np.asarray(predicted).ravel().tolist()


def test_the_primary_falls_back_and_a_named_net_does_not(serve: Serve) -> None:
    server = serve(amn=raises)
    answer = server.http.post("/v2/models/primary/infer", json=body(contexts()))
    assert answer.json()["parameters"] == {"served_by": "fallback", "fallback_reason": "model_failed"}
    assert server.http.post("/v2/models/amn/infer", json=body(contexts())).status_code == 503


@pytest.mark.parametrize(
    ("changes", "status", "pointer"),
    [
        ({"name": "x"}, 422, "/inputs/0/name"),
        ({"datatype": "FP64"}, 422, "/inputs/0/datatype"),
        ({"shape": [1, T]}, 422, "/inputs/0/shape"),
        ({"shape": [True, T, D]}, 422, "/inputs/0/shape"),
        ({"shape": [2, T, D]}, 422, "/inputs/0/data"),
        ({"data": None}, 422, "/inputs/0/data"),
        ({"data": [True] * (T * D)}, 422, "/inputs/0/data/0"),
        ({"data": [1e39] * (T * D)}, 422, "/inputs/0/data/0"),
        ({"parameters": {"binary_data_size": 4}}, 400, None),
        ({"parameters": 1}, 422, "/inputs/0/parameters"),
        ({"shape": [10**9, T, D]}, 413, "/inputs/0/data"),
    ],
)
def test_what_is_no_tensor_is_told_why_in_both_dialects(
    serve: Serve, changes: dict[str, Any], status: int, pointer: str | None
) -> None:
    answer = serve().http.post("/v2/models/amn/infer", json=body(contexts(), **changes))
    problem = answer.json()
    assert (answer.status_code, problem.get("pointer")) == (status, pointer)
    assert problem["error"] == problem["detail"]


@pytest.mark.parametrize("length", ["x", "-1", "100000"])
def test_a_header_length_that_is_none_is_malformed(serve: Serve, length: str) -> None:
    headers = {"Inference-Header-Content-Length": length}
    assert serve().http.post("/v2/models/amn/infer", json=body(contexts()), headers=headers).status_code == 400


@pytest.mark.parametrize("path", ["amn/versions/none/infer", "a/b/infer", "%2e%2e/infer", "amn/x/y/infer", "infer"])
def test_paths_that_are_no_model_are_unknown(serve: Serve, path: str) -> None:
    assert serve().http.post(f"/v2/models/{path}", json=body(contexts())).status_code == 404


def test_infer_counts_under_one_label(serve: Serve) -> None:
    server = serve()
    server.http.post("/v2/models/amn/infer", json=body(contexts()))
    server.http.post("/v2/models/gru/infer", json={})
    route = "/v2/models/{model}/infer"
    assert server.metric("lvm_requests_total", route=route, outcome="ok") == 1
    assert server.metric("lvm_requests_total", route=route, outcome="invalid") == 1
