"""LVM_COMPAT=lnsp: a client written from the description of LNSP's servers gets what it expects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest

from models.vectors import Floats
from service.http.routes.lnsp import OPTIONS
from service.settings import BadSettings, Settings, read_settings
from tests.conftest import PATIENCE_S, Running, until
from tests.fakes import D, Gate, T, add_version, answers_nan, contexts, mean_of, raises

Serve = Callable[..., Running]
PATHS = ("/infer", "/infer/batch", "/health", "/info")


class Caller:
    """What LNSP's callers have: one address for each model, and these four calls."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=PATIENCE_S)

    def infer(self, context_vectors: list[list[float]]) -> dict[str, Any]:
        body = {"context_vectors": context_vectors, "temperature": 1.0, "normalize": True}
        response = self.http.post("/infer", json=body)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        assert answer.keys() == {"predicted_vector", "confidence", "latency_ms", "model_type", "device"}
        return answer

    def is_healthy(self) -> bool:
        response = self.http.get("/health")
        return response.status_code == 200 and response.json() == {"status": "healthy", "model_loaded": True}


@pytest.fixture
def lnsp(serve: Serve) -> Callable[..., Running]:
    return lambda **options: serve(compat="lnsp", **options)


@pytest.fixture
def caller(lnsp: Serve) -> Iterator[Caller]:
    made = Caller(lnsp().url)
    with made.http:
        yield made


def cosine(one: Floats, other: Floats) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_their_client_gets_a_prediction(caller: Caller) -> None:
    assert caller.is_healthy()
    (context,) = contexts()
    answer = caller.infer(context.tolist())
    np.testing.assert_allclose(answer["predicted_vector"], mean_of(context[None])[0], atol=1e-6)
    assert (answer["model_type"], answer["device"]) == ("amn", "cpu")
    assert 0 < answer["latency_ms"] < PATIENCE_S * 1e3


def test_confidence_is_the_mean_cosine_to_the_context_whatever_its_lengths(caller: Caller) -> None:
    (context,) = contexts() * np.array([0.5, 1, 2, 3, 4], np.float32)[:, None]
    answer = caller.infer(context.tolist())
    predicted = np.array(answer["predicted_vector"], np.float32)
    assert answer["confidence"] == pytest.approx(np.mean([cosine(predicted, each) for each in context]), abs=1e-5)
    assert isinstance(answer["confidence"], float)
    context[:] = 0
    context[0, 0] = 1
    assert caller.infer(context.tolist())["confidence"] == pytest.approx(1 / T, abs=1e-6), "zero vectors count as 0"


def test_a_batch_is_answered_in_order_as_each_context_alone(caller: Caller) -> None:
    many = contexts(3).tolist()
    answer = caller.http.post("/infer/batch", json={"context_vectors": many}).json()
    each = [caller.infer(context) for context in many]
    np.testing.assert_allclose(answer["predicted_vectors"], [one["predicted_vector"] for one in each], atol=1e-6)
    np.testing.assert_allclose(answer["confidences"], [one["confidence"] for one in each], atol=1e-6)
    assert answer.keys() == {"predicted_vectors", "confidences", "latency_ms", "model_type", "device"}
    assert len(caller.http.post("/infer/batch", json={"context_vectors": many[:1]}).json()["confidences"]) == 1


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"temperature": 0.7}, "/temperature"),
        ({"temperature": True}, "/temperature"),
        ({"temperature": "1"}, "/temperature"),
        ({"normalize": False}, "/normalize"),
        ({"normalize": 1}, "/normalize"),
        ({"top_k": 5}, "/top_k"),
        ({"context_vectors": contexts()[0, :4].tolist()}, "/context_vectors"),
        ({"context_vectors": [*contexts()[0].tolist()[:4], [0.0] * (D - 1)]}, "/context_vectors/4"),
        ({"context_vectors": [*[[0.0] * D] * 4, [*[0.0] * (D - 1), "x"]]}, f"/context_vectors/4/{D - 1}"),
        ({"context_vectors": contexts().tolist()}, "/context_vectors"),
        ({"context_vectors": None}, ""),
    ],
)
def test_rejects_what_it_cannot_honour_with_a_pointer(caller: Caller, changes: dict[str, Any], pointer: str) -> None:
    response = caller.http.post("/infer", json={"context_vectors": contexts()[0].tolist(), **changes})
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
    assert response.json()["pointer"].startswith(pointer)


def test_options_may_be_null_or_stand_in_the_query_string(caller: Caller) -> None:
    body = {"context_vectors": contexts()[0].tolist()}
    assert caller.http.post("/infer", json={**body, "temperature": None, "normalize": None}).status_code == 200
    assert caller.http.post("/infer?temperature=1&normalize=true", json=body).status_code == 200
    assert caller.http.post("/infer?temperature=2", json=body).json()["pointer"] == "/temperature"


def test_a_norm_policy_points_at_the_vector(lnsp: Serve) -> None:
    server = lnsp(norm_policy="refuse")
    many = contexts(2)
    many[1, 3] *= 2
    for path, vectors, pointer in (("/infer", many[1], "/3"), ("/infer/batch", many, "/1/3")):
        problem = server.http.post(path, json={"context_vectors": vectors.tolist()}).json()
        assert (problem["status"], problem["pointer"]) == (422, f"/context_vectors{pointer}")


def test_info_is_about_the_net_that_is_asked_first(caller: Caller) -> None:
    info = caller.http.get("/info").json()
    assert (info["model_type"], info["dim"], info["context_length"], info["device"]) == ("amn", D, T, "cpu")
    assert info.keys() >= {"architecture", "parameters", "encoder", "version"}


def test_answers_of_a_fallback_name_it_and_are_counted(lnsp: Serve) -> None:
    server = lnsp(amn=raises)
    response = server.http.post("/infer", json={"context_vectors": contexts()[0].tolist()})
    assert response.json()["model_type"] == "gru"
    assert (response.headers["x-served-by"], response.headers["x-fallback-reason"]) == ("fallback", "model_failed")
    assert server.metric("lvm_requests_total", route="/infer", outcome="fallback") == 1
    assert server.metric("lvm_request_seconds_count", route="/infer", stage="infer") == 1


def test_failures_are_problems_with_a_retry_after(lnsp: Serve) -> None:
    server = lnsp(amn=raises, gru=answers_nan)
    response = server.http.post("/infer", json={"context_vectors": contexts()[0].tolist()})
    assert (response.status_code, response.json()["type"]) == (503, "urn:lvm:problem:model_failed")
    assert response.headers["retry-after"] == "1"


def test_deadlines_and_limits_hold(lnsp: Serve) -> None:
    gate = Gate()
    server = lnsp(amn=gate, gru=gate, max_rows=4)
    try:
        late = {"X-Request-Timeout-Ms": "100"}
        body = {"context_vectors": contexts()[0].tolist()}
        assert server.http.post("/infer", json=body, headers=late).status_code == 504
    finally:
        gate.opened.set()
    assert server.http.post("/infer/batch", json={"context_vectors": contexts(5).tolist()}).status_code == 413
    assert server.http.post("/infer", content=b"x", headers={"content-type": "text/plain"}).status_code == 415


def test_a_long_batch_is_read_in_slices(lnsp: Serve) -> None:
    many = contexts(1000)
    text = json.dumps({"context_vectors": many.tolist(), "temperature": 1})
    assert len(text) > 2**19
    answer = lnsp().http.post("/infer/batch", content=text, headers={"content-type": "application/json"}).json()
    np.testing.assert_allclose(answer["predicted_vectors"], mean_of(many), atol=1e-6)


def test_is_compared_with_the_candidate(lnsp: Serve) -> None:
    server = lnsp(shadow_share=1)
    registry = server.app.state.deployments.registry
    registry.point("candidate", add_version(registry, "gru", "second"))
    until(lambda: "candidate" in server.app.state.deployments.slots, "the candidate")
    server.http.post("/infer", json={"context_vectors": contexts()[0].tolist()})
    until(lambda: server.metric("lvm_shadow_total", outcome="compared"), "the comparison")


def test_health_needs_no_token_and_the_others_do(lnsp: Serve) -> None:
    server = lnsp(tokens="someone:0123456789abcdef")
    assert server.http.get("/health?from=balancer").status_code == 200
    assert server.http.get("/info").status_code == 401
    assert server.http.post("/infer", json={}).status_code == 401
    assert server.http.get("/info", headers={"authorization": "Bearer 0123456789abcdef"}).status_code == 200


def test_health_is_503_while_draining(lnsp: Serve) -> None:
    server = lnsp()
    server.app.state.process.is_draining = True
    response = server.http.get("/health")
    assert (response.status_code, response.json()["type"]) == (503, "urn:lvm:problem:draining")


def test_without_the_setting_there_is_no_trace_of_it(serve: Serve) -> None:
    server = serve()
    for path in PATHS:
        assert server.http.request("POST" if "infer" in path else "GET", path, json={}).status_code == 404
    assert "/infer" not in server.http.get("/metrics").text.replace("/v2/models/{model}/infer", "")
    assert not {*PATHS} & server.http.get("/openapi.json").json()["paths"].keys()


def test_openapi_documents_the_routes(lnsp: Serve) -> None:
    server = lnsp()
    document = server.http.get("/openapi.json").json()
    assert {*PATHS} < document["paths"].keys()
    context = contexts()[0].tolist()
    answers = {
        "/infer": server.http.post("/infer", json={"context_vectors": context}),
        "/infer/batch": server.http.post("/infer/batch", json={"context_vectors": [context]}),
        "/health": server.http.get("/health"),
        "/info": server.http.get("/info"),
    }
    for path, answer in answers.items():
        (operation,) = document["paths"][path].values()
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json(), {**schema, "components": document["components"]})
    (operation,) = document["paths"]["/infer"].values()
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    allowed = jsonschema.Draft202012Validator({**body, "components": document["components"]})
    assert set(OPTIONS) < body["properties"].keys()
    assert allowed.is_valid({"context_vectors": context, "temperature": 1.0, "normalize": None})
    assert not allowed.is_valid({"context_vectors": context, "temperature": 0.5})
    assert not allowed.is_valid({"context_vectors": context, "normalize": False})


def test_rejects_an_interface_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().compat == ""
    monkeypatch.setenv("LVM_COMPAT", "triton")
    with pytest.raises(BadSettings, match="LVM_COMPAT"):
        read_settings()
