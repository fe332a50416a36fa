"""Options: null is absent, 10.0 is 10, query strings count for JSON too, and what has no effect is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from service.http.auth import PROBES
from tests.conftest import Running
from tests.fakes import D, HashEncoder, bundle, contexts, corpus

Serve = Callable[..., Running]
CONTEXT = contexts()[0].tolist()
QUERY = corpus().vectors[3].tolist()
OCTETS = {"content-type": "application/octet-stream"}
PREDICT = {"context": CONTEXT}


def refused(answer: httpx.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json().get("pointer")


# ---- null and numbers


@pytest.mark.parametrize("name", ["contexts", "text", "texts", "model", "profile", "encoding"])
def test_null_is_absent_from_a_prediction(serve: Serve, name: str) -> None:
    answer = serve().http.post("/predict", json={**PREDICT, name: None})
    assert (answer.status_code, answer.json()["model"]) == (200, "amn")


@pytest.mark.parametrize("name", ["context", "text", "texts", "k", "exclude", "exclude_context", "rerank", "model"])
def test_null_is_absent_from_a_search(serve: Serve, name: str) -> None:
    answer = serve().http.post("/retrieve", json={"query": QUERY, name: None})
    assert (answer.status_code, len(answer.json()["results"])) == (200, 10)


@pytest.mark.parametrize("body", [{"context": None}, {"nonsense": None}, {**PREDICT, "nonsense": None}])
def test_null_stands_for_nothing_that_is_needed_or_unknown(serve: Serve, body: dict[str, Any]) -> None:
    assert serve().http.post("/predict", json=body).status_code == 422


@pytest.mark.parametrize("k", ["10", "10.0", "1e1", "100e-1"])
def test_takes_a_whole_number_however_it_is_written(serve: Serve, k: str) -> None:
    server = serve()
    in_body = server.http.post("/retrieve", content=f'{{"query": {json.dumps(QUERY)}, "k": {k}}}')
    in_query = server.http.post(f"/retrieve?k={k}", json={"query": QUERY})
    assert [len(answer.json()["results"]) for answer in (in_body, in_query)] == [10, 10]


@pytest.mark.parametrize("k", ["10.5", "true", '"10"', "NaN", "Infinity", "1e400", "0.0", "[10]", "{}"])
def test_rejects_what_is_no_whole_number(serve: Serve, k: str) -> None:
    server = serve()
    in_body = server.http.post("/retrieve", content=f'{{"query": {json.dumps(QUERY)}, "k": {k}}}')
    in_query = server.http.post("/retrieve", params={"k": k}, json={"query": QUERY})
    assert [refused(answer) for answer in (in_body, in_query)] == [(422, "/k")] * 2


def test_ids_to_exclude_may_be_written_with_a_point(serve: Serve) -> None:
    answer = serve().http.post("/retrieve", json={"query": QUERY, "exclude": [3.0], "k": 20})
    assert 3 not in [hit["id"] for hit in answer.json()["results"]]


# ---- the query string


@pytest.mark.parametrize("query", ["model=fallback", "model=gru", "profile=batch"])
def test_options_of_the_query_string_count_for_json(serve: Serve, query: str) -> None:
    answer = serve().http.post(f"/predict?{query}", json={**PREDICT, "model": None})
    assert (answer.status_code, answer.json()["model"]) == (200, "gru")


def test_options_may_stand_in_the_body_and_others_in_the_query_string(serve: Serve) -> None:
    answer = serve().http.post("/retrieve?k=3", json={"query": QUERY, "exclude": [3]})
    ids = [hit["id"] for hit in answer.json()["results"]]
    assert (len(ids), 3 in ids) == (3, False)


@pytest.mark.parametrize("body", [{**PREDICT, "model": "primary"}, {"text": "words", "model": "primary"}])
def test_rejects_an_option_that_body_and_query_string_give(serve: Serve, body: dict[str, Any]) -> None:
    assert refused(serve().http.post("/predict?model=primary", json=body)) == (422, "/model")


@pytest.mark.parametrize("query", ["nonsense=1", "nonsense", "MODEL=gru", "context=1", "k=3"])
def test_rejects_an_unknown_option_on_every_wire(serve: Serve, query: str) -> None:
    server, pointer = serve(), f"/{query.partition('=')[0]}"
    by_json = server.http.post(f"/predict?{query}", json=PREDICT)
    by_octets = server.http.post(f"/predict?{query}", content=contexts().tobytes(), headers=OCTETS)
    by_oip = server.http.post(f"/v2/models/amn/infer?{query}", json={})
    assert [refused(answer) for answer in (by_json, by_octets, by_oip)] == [(422, pointer)] * 3
    assert pointer[1:] in by_json.json()["detail"]


def test_a_name_in_the_query_string_may_look_like_a_number(serve: Serve) -> None:
    answer = serve().http.post("/predict?model=123", json=PREDICT)
    assert (answer.status_code, "123" in answer.json()["detail"]) == (404, True)


def test_rejects_an_unknown_option_on_every_route_that_is_read_but_the_probes(serve: Serve) -> None:
    server = serve(text=HashEncoder())
    version = server.app.state.deployments.registry.resolve("primary")
    names = {
        "/v1/models/{model}": "/v1/models/fake",
        "{article}": "0",
        "{model}": "amn",
        "{version}": version.version,
        "{name}": version.name,
    }
    paths = [path for path, item in server.http.get("/openapi.json").json()["paths"].items() if "get" in item]
    assert len(paths) >= 16
    for path in paths:
        for name, value in names.items():
            path = path.replace(name, value)
        assert server.http.get(path).status_code == 200, path
        answer = server.http.get(f"{path}?nonsense=1")
        if path in PROBES:
            assert answer.status_code == 200, path
        else:
            assert refused(answer) == (422, "/nonsense"), path


def test_rejects_an_option_that_is_given_twice(serve: Serve) -> None:
    server = serve()
    assert server.http.get("/articles?limit=1&limit=2").status_code == 400
    assert server.http.post("/predict?model=amn&model=gru", json=PREDICT).status_code == 400


def test_points_at_the_page_that_is_none(serve: Serve) -> None:
    assert refused(serve().http.get("/articles?offset=0&limit=0")) == (422, "/limit")


# ---- options without effect


@pytest.mark.parametrize("profile", ["realtime", "batch"])
@pytest.mark.parametrize("model", ["amn", "fallback"])
def test_rejects_a_profile_beside_the_only_model_that_is_asked(serve: Serve, profile: str, model: str) -> None:
    server = serve()
    asked = {"profile": profile, "model": model}
    by_json = server.http.post("/predict", json={**PREDICT, **asked})
    by_octets = server.http.post("/predict", params=asked, content=contexts().tobytes(), headers=OCTETS)
    assert [refused(answer) for answer in (by_json, by_octets)] == [(422, "/profile")] * 2


def test_a_profile_orders_the_nets_beside_the_primary(serve: Serve) -> None:
    answer = serve().http.post("/predict", json={**PREDICT, "profile": "batch", "model": "primary"})
    assert answer.json()["served_by"] == "fallback"


@pytest.mark.parametrize(
    "asked", [{"model": "primary"}, {"exclude_context": True}, {"exclude_context": False}, {"rerank": True}]
)
def test_rejects_what_a_query_has_no_use_for(serve: Serve, asked: dict[str, Any]) -> None:
    server, (name,) = serve(corpus=bundle), asked
    params = {name: json.dumps(value).strip('"') for name, value in asked.items()}
    by_json = server.http.post("/retrieve", json={"query": QUERY, **asked})
    by_octets = server.http.post("/retrieve", params=params, content=np.float32(QUERY).tobytes(), headers=OCTETS)
    assert [refused(answer) for answer in (by_json, by_octets)] == [(422, f"/{name}")] * 2


def test_a_query_needs_no_net(serve: Serve) -> None:
    assert len(QUERY) == D
    assert serve().http.post("/retrieve", json={"query": QUERY, "rerank": False}).status_code == 200


def test_an_encoding_that_is_asked_for_is_an_encoding_of_json(serve: Serve) -> None:
    both = {**OCTETS, "accept": "application/octet-stream"}
    answer = serve().http.post("/predict?encoding=base64", content=contexts().tobytes(), headers=both)
    assert (answer.headers["content-type"], type(answer.json()["vector"])) == ("application/json", str)
