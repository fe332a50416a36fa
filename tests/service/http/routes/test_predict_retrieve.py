"""The contract over a real socket: what callers send, what comes back, and what is counted."""

from __future__ import annotations

import base64
import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from models.registry.registry import Registry
from tests.conftest import Running, until
from tests.fakes import (
    D,
    Gate,
    T,
    add_version,
    answers_nan,
    answers_wrong_shape,
    contexts,
    corpus,
    mean_of,
    octets_of,
    raises,
)

Serve = Callable[..., Running]
OCTETS = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}


def post(server: Running, body: Any, path: str = "/predict", **headers: str) -> httpx.Response:
    return server.http.post(path, json=body, headers=headers)


def test_one_context_gets_one_vector_and_the_model_that_made_it(serve: Serve) -> None:
    server = serve()
    context = contexts()
    answer = post(server, {"context": context[0].tolist()})
    body = answer.json()
    assert answer.status_code == 200
    np.testing.assert_allclose(body["vector"], mean_of(context)[0], atol=1e-6)
    assert (body["model"], body["served_by"], body["fallback_reason"]) == ("amn", "primary", None)
    assert set(body["timing_ms"]) == {"decode", "queue", "infer"}
    assert answer.headers["x-model"] == "amn"
    assert answer.headers["x-model-version"] == body["version"]
    assert answer.headers["x-served-by"] == "primary"
    assert "x-fallback-reason" not in answer.headers
    assert [part.split(";")[0] for part in answer.headers["server-timing"].split(", ")][:3] == [
        "decode",
        "queue",
        "infer",
    ]


def test_every_wire_gives_the_same_vectors(serve: Serve) -> None:
    server = serve()
    batch = contexts(3)
    listed = post(server, {"contexts": batch.tolist()}).json()["vectors"]
    coded = [base64.b64encode(context.tobytes()).decode() for context in batch]
    through_base64 = post(server, {"contexts": coded, "encoding": "base64"}).json()["vectors"]
    raw = server.http.post("/predict", content=batch.tobytes(), headers=OCTETS | octets_of(batch))
    raw_to_json = server.http.post("/predict", content=batch.tobytes(), headers=octets_of(batch))
    expected = mean_of(batch)
    np.testing.assert_allclose(listed, expected, atol=1e-6)
    np.testing.assert_array_equal(
        [np.frombuffer(base64.b64decode(text), "<f4") for text in through_base64], np.asarray(listed, np.float32)
    )
    np.testing.assert_array_equal(np.frombuffer(raw.content, "<f4").reshape(3, D), np.asarray(listed, np.float32))
    np.testing.assert_array_equal(raw_to_json.json()["vectors"], listed)
    assert raw.headers["content-type"] == f"application/octet-stream; dtype=float32; shape=3x{D}"


def test_octets_may_be_float16_in_either_direction(serve: Serve) -> None:
    server = serve()
    half = {"content-type": "application/octet-stream; dtype=float16"}
    batch = contexts(3).astype(np.float16)
    many = octets_of(batch)
    expected = mean_of(batch.astype(np.float32))
    sent = server.http.post("/predict", content=batch.tobytes(), headers=many)
    np.testing.assert_allclose(sent.json()["vectors"], expected, atol=1e-6)
    both = server.http.post("/predict", content=batch.tobytes(), headers=many | {"accept": half["content-type"]})
    assert both.headers["content-type"] == f"application/octet-stream; dtype=float16; shape=3x{D}"
    np.testing.assert_allclose(np.frombuffer(both.content, "<f2").reshape(3, D), expected, atol=1e-3)
    query = corpus().vectors[3].astype(np.float16).tobytes()
    assert server.http.post("/retrieve?k=1", content=query, headers=half).json()["results"][0]["id"] == 3
    infinite = np.full((1, T, D), np.inf, np.float16).tobytes()
    assert server.http.post("/predict", content=infinite, headers=half).status_code == 422
    eighth = {"content-type": "application/octet-stream; dtype=int4"}
    assert server.http.post("/predict", content=batch.tobytes(), headers=eighth).status_code == 415


def test_a_list_of_one_is_answered_with_a_list(serve: Serve) -> None:
    assert len(post(serve(), {"contexts": contexts().tolist()}).json()["vectors"]) == 1


@pytest.mark.parametrize(
    ("body", "status", "reason", "pointer"),
    [
        (b"{", 400, "malformed", None),
        (b'{"context": \xff}', 400, "malformed", None),
        (b"[" * 100_000, 400, "malformed", None),
        (b"[]", 400, "malformed", None),
        (b'{"context": 1, "context": 2}', 400, "malformed", None),
        (b"{}", 422, "invalid", ""),
        (b'{"contekst": []}', 422, "invalid", "/contekst"),
        (b'{"context": [], "contexts": []}', 422, "invalid", ""),
        (b'{"context": [[1, 2], [3]]}', 422, "invalid", "/context"),
        (b'{"contexts": []}', 422, "invalid", "/contexts"),
    ],
)
def test_rejects_invalid_bodies_with_a_reason(
    serve: Serve, body: bytes, status: int, reason: str, pointer: str | None
) -> None:
    answer = serve().http.post("/predict", content=body, headers={"content-type": "application/json"})
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["type"]) == (status, status, f"urn:lvm:problem:{reason}")
    assert problem.get("pointer") == pointer
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "bad", ["NaN", "Infinity", "-Infinity", "1e39", "1e999", "9" * 5000, "true", '"1.5"', "null", "[0.1]", "{}"]
)
def test_a_bad_number_is_pointed_at_and_never_echoed(serve: Serve, bad: str) -> None:
    rows = [[str(float(x)) for x in row] for row in contexts()[0]]
    rows[2][3] = bad
    text = '{"context": [' + ",".join("[" + ",".join(row) + "]" for row in rows) + "]}"
    answer = serve().http.post("/predict", content=text, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["pointer"]) == (422, "/context/2/3")
    assert bad == "{}" or bad not in answer.json()["detail"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_binary_gets_the_same_verdict_as_json(serve: Serve, value: float) -> None:
    batch = contexts(2)
    batch[1, 2, 3] = value
    answer = serve().http.post("/predict", content=batch.tobytes(), headers=octets_of(batch))
    assert (answer.status_code, answer.json()["pointer"]) == (422, "/1/2/3")


@pytest.mark.parametrize("content", [b"", b"\0" * (4 * T * D - 1), b"\0" * (4 * T * D + 4)])
def test_rejects_octets_of_the_wrong_length(serve: Serve, content: bytes) -> None:
    assert serve().http.post("/predict", content=content, headers=OCTETS).status_code == 400


@pytest.mark.parametrize("path", ["/predict", "/retrieve"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rejects_octets_of_several_rows_without_a_shape(serve: Serve, path: str, dtype: str) -> None:
    rows = contexts(4).astype(dtype)
    headers = {"content-type": f"application/octet-stream; dtype={dtype}"}
    answer = serve().http.post(path, content=rows.tobytes(), headers=headers)
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:lvm:problem:invalid")
    assert f"shape=4x{T}x{D}" in answer.json()["detail"]
    assert serve().http.post(path, content=rows[0].tobytes(), headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("path", "sent", "told"),
    [
        ("/predict", (T, 2 * D), (T, 2 * D)),
        ("/predict", (2 * T, D), (2 * T, D)),
        ("/predict", (T, 3, D), (T, 3, D)),
        ("/predict", (T * D,), (T * D,)),
        ("/predict", (2, 1, T, D), (2, 1, T, D)),
        ("/predict", (1, T, D), (2, T, D)),
        ("/predict", (3, T, D), (2, T, D)),
        ("/predict", (3, 7), (T, D)),
        ("/retrieve", (T * D,), (T * D,)),
        ("/retrieve", (2, D), (2, D)),
        ("/retrieve", (2, T, D), (3, T, D)),
        ("/retrieve", (2, 2, D), (2, 2, D)),
        ("/retrieve", (T, D), (D,)),
        ("/retrieve", (D,), (T, D)),
    ],
)
def test_rejects_a_shape_that_is_not_the_nets_or_the_bodys(
    serve: Serve, path: str, sent: tuple[int, ...], told: tuple[int, ...]
) -> None:
    rows = np.ones(sent, np.float32)
    headers = {"content-type": f"application/octet-stream; shape={'x'.join(map(str, told))}"}
    answer = serve().http.post(path, content=rows.tobytes(), headers=headers)
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:lvm:problem:invalid")
    assert "expected" in answer.json()["detail"]


def test_rejects_float16_that_is_told_as_float32(serve: Serve) -> None:
    rows = contexts(2).astype(np.float16)  # as many bytes as one context of float32
    headers = {"content-type": f"application/octet-stream; shape=2x{T}x{D}"}
    answer = serve().http.post("/predict", content=rows.tobytes(), headers=headers)
    assert answer.status_code == 422
    assert "float32" in answer.json()["detail"]


def test_octets_are_answered_in_the_rank_that_their_shape_tells(serve: Serve) -> None:
    server, rows = serve(), contexts()
    for given, field, shape in ((rows, "vectors", f"1x{D}"), (rows[0], "vector", f"{D}")):
        headers = octets_of(given)
        assert field in server.http.post("/predict", content=given.tobytes(), headers=headers).json()
        raw = server.http.post("/predict", content=given.tobytes(), headers={**OCTETS, **headers})
        assert raw.headers["content-type"].endswith(f"; shape={shape}")
    alone = server.http.post("/predict", content=rows.tobytes(), headers=OCTETS)
    assert alone.headers["content-type"].endswith(f"; shape={D}")


def test_a_shape_says_whether_octets_are_a_query_or_a_context(serve: Serve) -> None:
    server, known = serve(), corpus()
    for rows, field in ((known.vectors[3], "query"), (known.vectors[2:7], "context")):
        raw = server.http.post("/retrieve", content=rows.tobytes(), headers=octets_of(rows)).json()
        listed = post(server, {field: rows.tolist()}, "/retrieve").json()
        assert raw["results"] == listed["results"]


@pytest.mark.parametrize("options", [{"profile": "fast"}, {"encoding": "hex"}, {"model": 3}, {"model": ""}, {"k": 1}])
def test_options_are_checked(serve: Serve, options: dict[str, Any]) -> None:
    answer = post(serve(), {"context": contexts()[0].tolist(), **options})
    assert (answer.status_code, answer.json()["pointer"]) == (422, f"/{next(iter(options))}")


def test_a_named_model_has_no_fallback(serve: Serve) -> None:
    server = serve(amn=raises)
    context = contexts()[0].tolist()
    for name in ("gru", "fallback"):
        assert post(server, {"context": context, "model": name}).json()["model"] == "gru"
    assert post(server, {"context": context, "model": "amn"}).status_code == 503
    unknown = post(server, {"context": context, "model": "../amn"})
    assert (unknown.status_code, unknown.json()["type"]) == (404, "urn:lvm:problem:unknown_model")


def test_the_batch_profile_tries_gru_first(serve: Serve) -> None:
    body = post(serve(), {"context": contexts()[0].tolist(), "profile": "batch"}).json()
    assert (body["model"], body["served_by"], body["fallback_reason"]) == ("gru", "fallback", None)


def test_rejects_too_many_rows_and_too_long_bodies(serve: Serve) -> None:
    server = serve(max_rows=2, max_body_mb=0.01)
    assert post(server, {"contexts": contexts(3).tolist()}).status_code == 413
    assert server.http.post("/predict", content=contexts(3).tobytes(), headers=OCTETS).status_code == 413
    many = contexts(3)
    assert server.http.post("/predict", content=many.tobytes(), headers=octets_of(many)).status_code == 413
    declared = server.http.post("/predict", content=b" " * 20_000, headers=OCTETS)
    chunked = server.http.post("/predict", content=(b" " * 5_000 for _ in range(4)), headers=OCTETS)
    assert (declared.status_code, chunked.status_code) == (413, 413)
    assert declared.json()["type"] == "urn:lvm:problem:too_large"


def test_rejects_unknown_routes_methods_and_media_types(serve: Serve) -> None:
    server = serve()
    wrong_method = server.http.get("/predict")
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")
    assert server.http.get("/nothing").status_code == 404
    for path in ("/predict", "/predict?unknown=1", "/retrieve?unknown=1"):
        assert server.http.post(path, content=b"x", headers={"content-type": "text/csv"}).status_code == 415
    assert all(
        server.http.request(method, path).headers["content-type"] == "application/problem+json"
        for method, path in (("GET", "/predict"), ("GET", "/nothing"), ("POST", "/models"))
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(raises, "model_failed"), (answers_nan, "model_failed"), (answers_wrong_shape, "model_failed")],
)
def test_falls_back_from_a_failing_primary_and_gives_the_reason(serve: Serve, answer: Any, reason: str) -> None:
    server = serve(amn=answer)
    context = contexts()
    got = post(server, {"context": context[0].tolist()})
    body = got.json()
    assert (got.status_code, body["model"], body["served_by"], body["fallback_reason"]) == (
        200,
        "gru",
        "fallback",
        reason,
    )
    assert got.headers["x-fallback-reason"] == reason
    np.testing.assert_allclose(body["vector"], mean_of(context)[0], atol=1e-6)
    assert server.metric("lvm_fallbacks_total", reason=reason) == 1
    assert server.metric("lvm_requests_total", route="/predict", outcome="fallback") == 1


def test_a_further_fallback_serves_once_its_alias_is_set(serve: Serve) -> None:
    answers = iter([raises, mean_of, mean_of, mean_of])
    server = serve(amn=raises, gru=lambda batch: next(answers)(batch))
    assert "fallback-2" not in server.http.get("/models").text + server.http.get("/metrics").text
    registry = Registry(Path(server.app.state.settings.registry))
    registry.point("fallback-2", add_version(registry, "gru", "second"))
    until(lambda: "fallback-2" in server.http.get("/models").json()["aliases"], "the alias to serve")
    body = {"context": contexts()[0].tolist()}
    got = post(server, body).json()
    assert (got["served_by"], got["fallback_reason"]) == ("fallback-2", "model_failed")
    assert post(server, {**body, "model": "fallback-2"}).json()["served_by"] == "fallback-2"
    assert post(server, {**body, "profile": "batch"}).json()["served_by"] == "fallback"
    assert server.http.get("/models").json()["aliases"]["fallback-2"]["breaker"] == "closed"
    assert server.http.get("/v2/models/fallback-2/ready").status_code == 200
    scraped = server.http.get("/metrics").text.splitlines()
    assert 'lvm_breaker_open{engine="fallback-2"} 0.0' in scraped
    assert 'lvm_rejections_total{engine="fallback-2",reason="expired"} 0.0' in scraped
    assert 'lvm_rejections_total{engine="fallback",reason="model_failed"} 1.0' in scraped


def test_falls_back_from_a_hanging_primary_within_the_deadline(serve: Serve) -> None:
    gate = Gate()
    server = serve(amn=gate)
    try:
        got = post(server, {"context": contexts()[0].tolist()}, **{"X-Request-Timeout-Ms": "300"})
        assert (got.status_code, got.json()["fallback_reason"]) == (200, "expired")
    finally:
        gate.opened.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_inference_thread_fails_livez_and_every_request_is_answered(serve: Serve) -> None:
    def dies(batch: Any) -> Any:
        raise SystemExit  # nothing that a net may raise, and so the end of its thread

    server = serve(amn=dies)
    assert server.http.get("/livez").status_code == 200
    body = {"context": contexts()[0].tolist()}
    got = post(server, body, **{"X-Request-Timeout-Ms": "300"})
    assert (got.status_code, got.json()["fallback_reason"]) == (200, "expired")
    assert server.http.get("/livez").status_code == 503
    got = post(server, body)
    assert (got.status_code, got.json()["fallback_reason"]) == (200, "draining")


def test_responds_503_with_retry_after_if_both_fail(serve: Serve) -> None:
    got = post(serve(amn=raises, gru=answers_nan), {"context": contexts()[0].tolist()})
    assert (got.status_code, got.json()["type"]) == (503, "urn:lvm:problem:model_failed")
    assert got.headers["retry-after"] == "1"


def test_retry_after_is_that_of_the_breaker_that_closes_first(serve: Serve) -> None:
    server = serve(amn=raises, gru=raises, breaker_failures=2, breaker_window=2, breaker_hold_s=600)
    refusals = [post(server, {"context": contexts()[0].tolist()}) for _ in range(3)]
    assert [got.status_code for got in refusals] == [503] * 3
    assert refusals[2].json()["type"] == "urn:lvm:problem:breaker_open"
    assert 500 < int(refusals[2].headers["retry-after"]) <= 600


def test_responds_504_if_both_hang(serve: Serve) -> None:
    gate = Gate()
    try:
        got = post(serve(amn=gate, gru=gate), {"context": contexts()[0].tolist()}, **{"X-Request-Timeout-Ms": "100"})
        assert (got.status_code, got.json()["type"]) == (504, "urn:lvm:problem:expired")
    finally:
        gate.opened.set()


@pytest.mark.parametrize("timeout", ["soon", "0", "-1", "nan", "1e9"])
def test_rejects_invalid_timeout(serve: Serve, timeout: str) -> None:
    got = post(serve(), {"context": contexts()[0].tolist()}, **{"X-Request-Timeout-Ms": timeout})
    assert got.status_code == 422


def test_the_breaker_spares_a_failing_primary(serve: Serve) -> None:
    seen: list[int] = []

    def fails(batch: Any) -> Any:
        seen.append(len(batch))
        raise RuntimeError

    server = serve(amn=fails, breaker_failures=3, breaker_window=5, breaker_hold_s=600)
    reasons = [post(server, {"context": contexts()[0].tolist()}).json()["fallback_reason"] for _ in range(6)]
    assert reasons == ["model_failed"] * 3 + ["breaker_open"] * 3
    assert len(seen) == 3
    assert server.http.get("/models").json()["aliases"]["primary"]["breaker"] == "open"
    assert 'lvm_breaker_open{engine="primary"} 1.0' in server.http.get("/metrics").text


def test_a_full_queue_rejects_at_once_with_retry_after(serve: Serve) -> None:
    gate = Gate()
    server = serve(amn=gate, gru=gate, max_queue=4, max_rows=4, max_batch=4)
    with httpx.Client(base_url=server.url, timeout=60) as other:
        body = {"contexts": contexts(4).tolist(), "model": "amn"}
        waiting = threading.Thread(target=other.post, args=("/predict",), kwargs={"json": body})
        waiting.start()
        try:
            until(gate.entered.is_set, "the first batch to run")
            got = post(server, {"context": contexts()[0].tolist(), "model": "amn"})
            assert (got.status_code, got.json()["type"]) == (503, "urn:lvm:problem:overloaded")
            assert int(got.headers["retry-after"]) >= 1
        finally:
            gate.opened.set()
            waiting.join()


def test_a_row_that_poisons_its_batch_fails_alone(serve: Serve) -> None:
    def poisoned(batch: Any) -> Any:
        if (batch[:, 0, 0] > 0.9).any():
            raise RuntimeError
        return mean_of(batch)

    server = serve(amn=poisoned)
    bad = contexts()
    bad[0, 0] = [1, 0, 0, 0, 0, 0, 0, 0]
    assert post(server, {"context": bad[0].tolist()}).json()["fallback_reason"] == "model_failed"
    assert post(server, {"context": contexts()[0].tolist()}).json()["fallback_reason"] is None


def test_many_rows_run_in_several_batches_in_order(serve: Serve) -> None:
    server = serve(max_batch=4)
    batch = contexts(11)
    vectors = post(server, {"contexts": batch.tolist()}).json()["vectors"]
    np.testing.assert_allclose(vectors, mean_of(batch), atol=1e-6)


def test_keeps_plain_request_ids_and_replaces_others(serve: Serve) -> None:
    server = serve()
    context = {"context": contexts()[0].tolist()}
    assert post(server, context, **{"X-Request-ID": "abc-1_2"}).headers["x-request-id"] == "abc-1_2"
    made = post(server, context, **{"X-Request-ID": "no spaces, please"}).headers["x-request-id"]
    assert len(made) == 16
    assert server.http.get("/readyz", headers={"X-Request-ID": "xyz"}).headers["x-request-id"] == "xyz"


# ---- /retrieve


def test_a_query_finds_the_nearest_passages_with_their_text(serve: Serve) -> None:
    known = corpus()
    body = post(serve(), {"query": known.vectors[7].tolist(), "k": 3}, "/retrieve").json()
    expected = np.argsort(-(known.vectors @ known.vectors[7]))[:3]
    assert [hit["id"] for hit in body["results"]] == expected.tolist()
    assert body["results"][0] | {"score": 1} == {
        "id": 7, "score": 1, "article": 0, "title": "Article 0", "position": 7, "text": "chunk 0/7",
    }  # fmt: skip
    assert body["results"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert (body["corpus"], body["is_exact"]) == ("corpus", True)


def test_a_context_finds_passages_other_than_its_own(serve: Serve) -> None:
    server = serve()
    known = corpus()
    context = known.vectors[2:7].tolist()
    without = post(server, {"context": context, "k": 15}, "/retrieve").json()
    with_own = post(server, {"context": context, "k": 20, "exclude_context": False}, "/retrieve").json()
    assert sorted(hit["id"] for hit in without["results"]) == sorted(set(range(20)) - set(range(2, 7)))
    assert len(with_own["results"]) == 20
    assert (without["model"], without["served_by"]) == ("amn", "primary")


def test_excluded_ids_do_not_reduce_the_number_of_results(serve: Serve) -> None:
    query = corpus().vectors[0].tolist()
    body = post(serve(), {"query": query, "k": 10, "exclude": list(range(15))}, "/retrieve").json()
    assert sorted(hit["id"] for hit in body["results"]) == list(range(15, 20))


def test_retrieve_accepts_octets_with_options_in_the_query_string(serve: Serve) -> None:
    server = serve()
    known = corpus()
    for rows, options in ((known.vectors[3], {}), (known.vectors[2:7], {"context": known.vectors[2:7].tolist()})):
        raw = server.http.post("/retrieve?k=4", content=rows.tobytes(), headers=OCTETS).json()
        listed = post(server, {"k": 4, **(options or {"query": rows.tolist()})}, "/retrieve").json()
        assert [hit["id"] for hit in raw["results"]] == [hit["id"] for hit in listed["results"]]
    assert server.http.post("/retrieve?k=none", content=known.vectors[3].tobytes(), headers=OCTETS).status_code == 422


@pytest.mark.parametrize("k", [0, -1, 1001, True, 1.5, "3"])
def test_rejects_k_out_of_range(serve: Serve, k: object) -> None:
    got = post(serve(), {"query": [1.0] * D, "k": k}, "/retrieve")
    assert (got.status_code, got.json()["pointer"]) == (422, "/k")


def test_k_beyond_the_corpus_returns_all_of_it(serve: Serve) -> None:
    assert len(post(serve(), {"query": [1.0] * D, "k": 1000}, "/retrieve").json()["results"]) == 20


def test_without_a_corpus_retrieve_is_unavailable_and_predict_is_not(serve: Serve) -> None:
    server = serve(retriever=False)
    assert post(server, {"query": [1.0] * D}, "/retrieve").status_code == 503
    assert post(server, {"context": contexts()[0].tolist()}).status_code == 200


# ---- the other routes


def test_openapi_documents_every_route_and_its_errors(serve: Serve) -> None:
    document = serve().http.get("/openapi.json").json()
    assert set(document["paths"]) >= {"/predict", "/retrieve", "/models", "/metrics", "/livez", "/readyz", "/healthz"}
    predict = document["paths"]["/predict"]["post"]
    assert set(predict["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
    assert {"200", "400", "404", "413", "415", "422", "503", "504"} <= set(predict["responses"])


def test_models_lists_versions_aliases_and_cards(serve: Serve) -> None:
    body = serve().http.get("/models").json()
    assert body["aliases"]["primary"]["id"].startswith("amn/")
    assert body["aliases"]["primary"]["breaker"] == "closed"
    assert {version["model"] for version in body["versions"]} == {"amn", "gru", "corpus"}
    assert all(version["dim"] == D for version in body["versions"])


def test_outcomes_in_the_metrics_sum_up_to_the_requests_sent(serve: Serve) -> None:
    server = serve()
    good, bad = {"context": contexts()[0].tolist()}, {"context": []}
    for body in (good, bad, good):
        post(server, body)
    post(server, {"query": [1.0] * D}, "/retrieve")
    for path in ("/models", "/readyz", "/nothing", "/etc/passwd"):
        server.http.get(path)
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    counts = {
        (sample.labels["route"], sample.labels["outcome"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name == "lvm_requests_total"
    }
    assert sum(counts.values()) == 8
    assert counts["/predict", "ok"] == 2
    assert counts["/predict", "invalid"] == 1
    assert counts["other", "unknown_route"] == 2


def test_metrics_are_openmetrics_on_request(serve: Serve) -> None:
    got = serve().http.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert got.headers["content-type"].startswith("application/openmetrics-text")
    assert got.text.endswith("# EOF\n")


def test_a_client_that_disconnects_counts_as_cancelled(serve: Serve) -> None:
    gate = Gate()
    server = serve(amn=gate)
    body = json.dumps({"context": contexts()[0].tolist()})
    try:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/predict", content=body, headers={"content-type": "application/json"}, timeout=0.3)
        until(lambda: server.metric("lvm_requests_total", route="/predict", outcome="cancelled") == 1, "the count")
    finally:
        gate.opened.set()


def test_a_broken_version_is_rejected_and_the_old_one_stays(serve: Serve) -> None:
    server = serve()
    registry = server.app.state.deployments.registry
    registry.point("primary", add_version(registry, "broken"))
    until(lambda: server.metric("lvm_reloads_total", alias="primary", outcome="refused") == 1, "the refusal")
    assert post(server, {"context": contexts()[0].tolist()}).json()["model"] == "amn"
    said = server.http.get("/models").json()["aliases"]["primary"]["refused"]
    assert said["id"].startswith("broken/")
    assert "was altered" in said["reason"]


def test_a_promotion_is_picked_up_while_serving(serve: Serve) -> None:
    server = serve()
    registry = server.app.state.deployments.registry
    new = add_version(registry, "amn", "second")
    registry.point("primary", new)
    context = {"context": contexts()[0].tolist()}
    until(lambda: post(server, context).json()["version"] == new.version, "the new version")
    info = [line for line in server.http.get("/metrics").text.splitlines() if line.startswith("lvm_model_info{")]
    assert len(info) == 3
    assert any('alias="primary"' in line and new.version in line for line in info)


def test_a_broken_fallback_does_not_keep_the_service_down(serve: Serve) -> None:
    server = serve(gru=None)
    body = server.http.get("/models").json()["aliases"]
    assert "was altered" in body["fallback"]["refused"]["reason"]
    assert post(server, {"context": contexts()[0].tolist()}).json()["model"] == "amn"


def test_rows_that_fail_alone_do_not_open_the_breaker_for_others(serve: Serve) -> None:
    def poisoned(batch: Any) -> Any:
        vectors = mean_of(batch)
        vectors[batch[:, 0, 0] == 1] = np.nan
        return vectors

    server = serve(amn=poisoned, gru=poisoned)
    bad = contexts()
    bad[0, 0] = [1, 0, 0, 0, 0, 0, 0, 0]
    mixed = np.concatenate([bad, contexts()])
    with ThreadPoolExecutor(8) as pool:
        asked = [{"context": row.tolist()} for row in mixed] * 40
        statuses = [answer.status_code for answer in pool.map(lambda body: post(server, body), asked)]
    assert set(statuses[1::2]) <= {200, 503}
    assert server.http.get("/livez").status_code == 200


def test_searches_a_corpus_that_was_replaced_during_the_prediction(serve: Serve) -> None:
    gate = Gate()
    server = serve(amn=gate)
    registry = server.app.state.deployments.registry
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, server, {"context": corpus().vectors[:5].tolist()}, "/retrieve")
        until(gate.entered.is_set, "the prediction to begin")
        new = add_version(registry, "corpus", "second")
        registry.point("retriever", new)
        until(lambda: server.metric("lvm_reloads_total", alias="retriever", outcome="ok") == 1, "the swap")
        gate.opened.set()
        answer = asked.result()
    assert (answer.status_code, answer.json()["corpus_version"]) == (200, new.version)


class HangingPath(type(Path())):  # type: ignore[misc]
    """The root of a registry on a share that hangs until it is `back`."""

    back = threading.Event()

    def __truediv__(self, name: str) -> Path:
        self.back.wait(30)
        return Path(self) / name


def test_responds_503_in_time_if_the_registry_hangs(serve: Serve) -> None:
    server = serve()
    registry = server.app.state.deployments.registry
    registry.root = HangingPath(registry.root)
    try:
        assert server.http.get("/ledger").json()["detail"] == "the registry does not answer"
        body = server.http.get("/models").json()
        assert (body["versions"], body["aliases"].keys()) == ([], {"primary", "fallback", "retriever"})
        assert server.http.get("/readyz").status_code == 200
    finally:
        HangingPath.back.set()
    until(lambda: server.http.get("/models").json()["versions"], "the registry to answer again")


def test_models_and_ledger_list_broken_entries_beside_valid_ones(serve: Serve) -> None:
    server = serve()
    registry = server.app.state.deployments.registry
    known = server.http.get("/models").json()["versions"]
    odd = {name: registry.add(name, {"README.md": b"\xff"}) for name in ("deep", "piped", "bare")}
    (odd["deep"].path / "README.md").write_text(f"---\nlvm: {'[' * 60_000}\n---\n")
    (odd["piped"].path / "README.md").unlink()
    os.mkfifo(odd["piped"].path / "README.md")
    (odd["bare"].path / "README.md").unlink()
    with open(registry.root / "ledger.jsonl", "ab") as ledger:
        ledger.write(b'null\n{"alias": 7}\n')
    found = {version["id"]: version for version in server.http.get("/models").json()["versions"]}
    assert [found.pop(version["id"]) for version in known] == known
    reasons = {version["id"].split("/")[0]: version["error"] for version in found.values()}
    assert re.match(r"unreadable model card: (?s:.*)nest(ed|ing)", reasons["deep"])
    assert reasons["piped"] == "README.md: is a named pipe, expected a regular file"
    assert reasons["bare"] == "README.md: No such file or directory"
    assert server.http.get(f"/models/{odd['piped'].id}/card").status_code == 404
    told = server.http.get("/ledger").json()
    assert (told["skipped"], told["total"]) == (2, len(registry.ledger()))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_responds_503_if_the_ledger_is_not_a_file(serve: Serve, make: Callable[[Path], object]) -> None:
    server = serve()
    ledger = server.app.state.deployments.registry.root / "ledger.jsonl"
    ledger.rename(ledger.with_name("before"))
    make(ledger)
    answer = server.http.get("/ledger")
    assert (answer.status_code, "expected a regular file" in answer.json()["detail"]) == (503, True)
    assert len(server.http.get("/models").json()["versions"]) == 3


def test_a_card_that_changed_is_read_again(serve: Serve) -> None:
    server = serve()
    amn = server.app.state.deployments.registry.resolve("primary")
    before = (amn.path / "README.md").read_text()
    (amn.path / "README.md").write_text("half a copy")
    assert "unreadable model card" in server.http.get("/models").text
    (amn.path / "README.md").write_text(before)
    assert "unreadable model card" not in server.http.get("/models").text
