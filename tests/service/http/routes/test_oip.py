"""The Open Inference Protocol: a public Triton client, and KServe's plain JSON, get what /predict gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.conftest import Running
from tests.fakes import D, Gate, T, contexts, mean_of, raises

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
        with pytest.raises(InferenceServerException, match='unknown model "nothing"'):
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
        ({"shape": [10**9, T, D]}, 413, "/inputs/0/shape"),
    ],
)
def test_what_is_no_tensor_is_told_why_in_both_dialects(
    serve: Serve, changes: dict[str, Any], status: int, pointer: str | None
) -> None:
    answer = serve().http.post("/v2/models/amn/infer", json=body(contexts(), **changes))
    problem = answer.json()
    assert (answer.status_code, problem.get("pointer")) == (status, pointer)
    assert problem["error"] == problem["detail"]


def infer(server: Running, request: Any, **more: Any) -> httpx.Response:
    return server.http.post("/v2/models/amn/infer", json=request, **more)


@pytest.mark.parametrize("identity", ["7", "", None])
def test_the_id_comes_back_as_it_came(serve: Serve, identity: str | None) -> None:
    answer = infer(serve(), {**body(contexts()), "id": identity})
    assert (answer.status_code, answer.json().get("id")) == (200, identity)


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"id": 0}, "/id"),
        ({"id": False}, "/id"),
        ({"nonsense": None}, "/nonsense"),
        ({"model_name": "gru"}, "/model_name"),
        ({"parameters": []}, "/parameters"),
        ({"parameters": {"custom": 1}}, "/parameters/custom"),
        ({"parameters": {"binary_data_output": "true"}}, "/parameters/binary_data_output"),
        ({"parameters": {"priority": 1}}, "/parameters/priority"),
        ({"parameters": {"sequence_id": "a"}}, "/parameters/sequence_id"),
        ({"parameters": {"sequence_start": True}}, "/parameters/sequence_start"),
        ({"parameters": {"timeout": 1.5}}, "/parameters/timeout"),
        ({"inputs": []}, "/inputs"),
        ({"inputs": [None]}, "/inputs/0"),
        ({"outputs": {}}, "/outputs"),
        ({"outputs": [{"name": "vector"}, {"name": "vector"}]}, "/outputs"),
        ({"outputs": [{"name": "y"}]}, "/outputs/0/name"),
        ({"outputs": [{"name": "vector", "data": []}]}, "/outputs/0/data"),
        ({"outputs": [{"name": "vector", "parameters": {"binary_data": 1}}]}, "/outputs/0/parameters/binary_data"),
    ],
)
def test_rejects_what_it_does_not_understand(serve: Serve, changes: dict[str, Any], pointer: str) -> None:
    answer = infer(serve(), {**body(contexts()), **changes})
    assert (answer.status_code, answer.json()["pointer"]) == (422, pointer)


@pytest.mark.parametrize("shape", [[0, T, D], [1.5, T, D], [True, T, D], [1, T], [1, D, T], "1", None, []])
def test_rejects_a_shape_that_is_none(serve: Serve, shape: Any) -> None:
    answer = infer(serve(), body(contexts(), shape=shape))
    assert (answer.status_code, answer.json()["pointer"]) == (422, "/inputs/0/shape")


def test_rejects_numbers_beside_bytes_and_bytes_that_nobody_claims(serve: Serve) -> None:
    server, batch = serve(), contexts()
    size, data = len(batch.tobytes()), batch.ravel().tolist()
    for tensor, status in (({"parameters": {"binary_data_size": size}, "data": data}, 422), ({"data": data}, 400)):
        header = json.dumps(body(batch, **tensor)).encode()
        headers = {"inference-header-content-length": str(len(header))}
        answer = server.http.post("/v2/models/amn/infer", content=header + batch.tobytes(), headers=headers)
        assert answer.status_code == status, answer.text


def test_what_says_nothing_is_taken(serve: Serve) -> None:
    parameters = {"priority": 0, "sequence_id": 0, "sequence_start": False, "timeout": 0, "binary_data_output": None}
    request = {**body(contexts(), parameters=None), "parameters": parameters, "outputs": [], "model_name": "amn"}
    assert infer(serve(), request).status_code == 200


def test_the_timeout_is_in_microseconds_and_told_once(serve: Serve) -> None:
    gate = Gate()
    server, request = serve(amn=gate), {**body(contexts()), "parameters": {"timeout": 50_000}}
    try:
        assert infer(server, request).status_code == 504
    finally:
        gate.opened.set()
    twice = infer(server, request, headers={"x-request-timeout-ms": "1000"})
    assert (twice.status_code, twice.json()["pointer"]) == (422, "/parameters/timeout")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"outputs": [triton.InferRequestedOutput("vector", class_count=3)]}, "classification"),
        ({"outputs": [triton.InferRequestedOutput("y")]}, "vector"),
        ({"sequence_id": 3, "sequence_start": True}, "sequence_id"),
        ({"priority": 2}, "priority"),
        ({"parameters": {"custom": 1}}, "custom"),
        ({"query_params": {"custom": 1}}, "custom"),
    ],
)
def test_tritons_client_is_told_the_name_of_what_is_not_supported(
    serve: Serve, options: dict[str, Any], named: str
) -> None:
    server = serve()
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        asked = triton.InferInput("context", [1, T, D], "FP32")
        asked.set_data_from_numpy(contexts())
        with pytest.raises(InferenceServerException, match=named) as refusal:
            client.infer("amn", [asked], **options)
    assert refusal.value.status() == "422"


def test_tritons_client_is_told_that_there_is_no_shared_memory(serve: Serve) -> None:
    server = serve()
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        asked = triton.InferInput("context", [1, T, D], "FP32")
        asked.set_shared_memory("region", 4 * T * D)
        with pytest.raises(InferenceServerException, match="shared_memory"):
            client.infer("amn", [asked])


@pytest.mark.parametrize("datatype", [np.float16, np.float64, np.int32])
def test_tritons_client_is_told_the_datatype(serve: Serve, datatype: Any) -> None:
    server = serve()
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        asked = triton.InferInput("context", [1, T, D], np_to_triton_dtype(datatype))
        asked.set_data_from_numpy(contexts().astype(datatype))
        with pytest.raises(InferenceServerException, match="FP32"):
            client.infer("amn", [asked])


def test_tritons_client_reads_the_configuration_and_the_index(serve: Serve) -> None:
    server = serve(max_rows=7)
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        (version,) = client.get_model_metadata("amn")["versions"]
        configuration = client.get_model_config("primary")
        assert configuration == client.get_model_config("amn", version)
        index = client.get_model_repository_index()
        assert client.is_model_ready("amn", version)
        assert not client.is_model_ready("amn", "1")
        assert "model_configuration" in client.get_server_metadata()["extensions"]
    assert (configuration["name"], configuration["max_batch_size"]) == ("amn", 7)
    assert configuration["input"] == [{"name": "context", "data_type": "TYPE_FP32", "dims": [T, D]}]
    assert configuration["output"] == [{"name": "vector", "data_type": "TYPE_FP32", "dims": [D]}]
    assert {entry["name"] for entry in index} == {"primary", "fallback", "amn", "gru"}
    assert {entry["state"] for entry in index} == {"READY"}
    assert [entry["version"] for entry in index if entry["name"] == "amn"] == [version]


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda client: client.get_model_config("nothing"), '"nothing"'),
        (lambda client: client.get_model_metadata("nothing"), '"nothing"'),
        (lambda client: client.get_inference_statistics(), "/metrics"),
        (lambda client: client.get_inference_statistics("amn"), "/metrics"),
        (lambda client: client.get_inference_statistics("amn", "1"), "/metrics"),
        (lambda client: client.load_model("amn"), "lvm promote"),
        (lambda client: client.unload_model("amn"), "lvm promote"),
        (lambda client: client.get_trace_settings(), "LVM_TRACE_SHARE"),
        (lambda client: client.get_trace_settings("amn"), "LVM_TRACE_SHARE"),
        (lambda client: client.update_trace_settings(settings={"trace_rate": "1"}), "LVM_TRACE_SHARE"),
        (lambda client: client.get_log_settings(), "LVM_LOG_LEVEL"),
        (lambda client: client.update_log_settings({"log_info": True}), "LVM_LOG_LEVEL"),
        (lambda client: client.get_system_shared_memory_status(), "shared memory"),
        (lambda client: client.register_system_shared_memory("a", "/a", 4), "shared memory"),
        (lambda client: client.unregister_cuda_shared_memory(), "shared memory"),
    ],
)
def test_tritons_client_is_told_what_stands_in_for_what_is_missing(
    serve: Serve, ask: Callable[[Any], Any], said: str
) -> None:
    server = serve()
    with (
        triton.InferenceServerClient(server.url.removeprefix("http://")) as client,
        pytest.raises(InferenceServerException, match=said) as refusal,
    ):
        ask(client)
    assert refusal.value.status() == "404"


@pytest.mark.parametrize(
    ("method", "path", "sent", "status"),
    [
        ("GET", "/v2/nothing", {}, 404),
        ("GET", "/v2/models/nothing", {}, 404),
        ("GET", "/v2/models/amn/versions/1", {}, 404),
        ("PUT", "/v2", {}, 405),
        ("GET", "/v2/models/amn/versions/1/infer", {}, 405),
        ("POST", "/v2/models/amn", {}, 405),
        ("POST", "/v2/models/amn/infer", {"content": b"{"}, 400),
        ("POST", "/v2/models/amn/infer", {"content": b"x", "headers": {"content-type": "text/csv"}}, 415),
        ("POST", "/v2/models/amn/infer", {"content": b" " * 20_000}, 413),
        ("POST", "/v2/repository/index", {"content": b" " * 70_000}, 413),
        ("POST", "/v2/repository/index", {"content": b"[]"}, 400),
        ("POST", "/v2/repository/index", {"json": {"nonsense": 1}}, 422),
        ("GET", "/v2?nonsense=1", {}, 422),
        ("GET", "/v2/models/amn", {"headers": {"x": "a" * 17_000}}, 431),
    ],
)
def test_every_error_has_the_member_that_these_clients_read(
    serve: Serve, method: str, path: str, sent: dict[str, Any], status: int
) -> None:
    answer = serve(max_body_mb=0.01).http.request(method, path, **sent)
    problem = answer.json()
    assert (answer.status_code, problem["error"]) == (status, problem["detail"])


def test_refusals_and_failures_have_it_too(serve: Serve) -> None:
    strange = serve(tokens="a-token-that-is-long-enough").http
    for path in ("/v2", "/v2/models/amn", "/v2/nothing"):
        assert strange.get(path).json()["error"]
    assert strange.post("/v2/models/amn/infer").json()["error"]
    failed = infer(serve(amn=raises), body(contexts()))
    assert (failed.status_code, failed.json()["error"]) == (503, failed.json()["detail"])


def test_other_paths_have_one_member_for_it(serve: Serve) -> None:
    assert "error" not in serve().http.get("/v2nothing").json()


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
