"""A corpus with towers reads contexts itself, orders what it finds anew, and says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import Running
from tests.fakes import T, bundle, corpus, mean_of, raises

Serve = Callable[..., Running]
CONTEXT = corpus().vectors[2 : 2 + T]


@pytest.fixture
def server(serve: Serve) -> Running:
    return serve(corpus=bundle)


def retrieve(server: Running, **body: Any) -> httpx.Response:
    return server.http.post("/retrieve", json=body)


def ids(answer: httpx.Response) -> list[int]:
    return [hit["id"] for hit in answer.json()["results"]]


def stages(answer: httpx.Response) -> list[str]:
    return [part.split(";")[0] for part in answer.headers["server-timing"].split(", ")]


def best(query: Any) -> list[int]:
    order = np.argsort(-(corpus().vectors @ query), kind="stable").tolist()
    return [row for row in order if row not in range(2, 2 + T)]


def test_a_context_becomes_a_query_by_the_towers_and_is_reranked(server: Running) -> None:
    answer = retrieve(server, context=CONTEXT.tolist(), k=5)
    body = answer.json()
    assert ids(answer) == best(CONTEXT[-1])[:5]  # as the fake reranker wants it
    assert (body["model"], body["version"], body["served_by"]) == ("towers", "20260202-000000000000", "retriever")
    assert (body["reranked"], body["fallback_reason"]) == (True, None)
    assert list(body["timing_ms"]) == ["decode", "queue", "infer", "search", "rerank"]
    assert stages(answer) == ["decode", "queue", "infer", "search", "rerank", "encode"]
    made_by = [answer.headers[f"x-{name}"] for name in ("model", "model-version", "served-by")]
    assert made_by == ["towers", "20260202-000000000000", "retriever"]


def test_reranking_can_be_declined(server: Running) -> None:
    answer = retrieve(server, context=CONTEXT.tolist(), k=5, rerank=False)
    assert ids(answer) == best(mean_of(CONTEXT[None])[0])[:5]
    assert not answer.json()["reranked"]
    assert "rerank" not in stages(answer)


def test_scores_stay_inner_products_with_the_query(server: Running) -> None:
    hits = retrieve(server, context=CONTEXT.tolist(), k=5).json()["results"]
    query = mean_of(CONTEXT[None])[0]
    found = [float(corpus().vectors[hit["id"]] @ query) for hit in hits]
    assert [hit["score"] for hit in hits] == pytest.approx(found, abs=1e-5)


def test_a_query_is_searched_as_it_is(server: Running) -> None:
    answer = retrieve(server, query=CONTEXT[0].tolist(), k=3)
    assert ids(answer) == np.argsort(-(corpus().vectors @ CONTEXT[0]), kind="stable")[:3].tolist()
    assert (answer.json().get("model"), answer.json()["reranked"]) == (None, False)


def test_a_net_that_is_named_makes_the_query(server: Running) -> None:
    answer = retrieve(server, context=CONTEXT.tolist(), k=3, model="primary")
    assert (answer.json()["model"], answer.json()["served_by"], answer.json()["reranked"]) == ("amn", "primary", False)
    assert ids(answer) == best(mean_of(CONTEXT[None])[0])[:3]


def test_no_net_is_needed(serve: Serve) -> None:
    assert retrieve(serve(corpus=bundle, amn=raises, gru=raises), context=CONTEXT.tolist()).status_code == 200


def test_octets_are_read_as_json_is(server: Running) -> None:
    octets = {"content-type": "application/octet-stream"}
    raw = server.http.post("/retrieve?k=4&rerank=false", content=CONTEXT.tobytes(), headers=octets)
    assert ids(raw) == ids(retrieve(server, context=CONTEXT.tolist(), k=4, rerank=False))


@pytest.mark.parametrize("body", [{"query": CONTEXT[0].tolist()}, {"context": CONTEXT.tolist(), "model": "primary"}])
def test_what_the_towers_did_not_find_cannot_be_reranked(server: Running, body: dict[str, Any]) -> None:
    answer = retrieve(server, **body, rerank=True)
    assert (answer.status_code, answer.json()["pointer"]) == (422, "/rerank")


def test_without_a_reranker_reranking_is_refused_when_asked_for(serve: Serve) -> None:
    server = serve()
    answer = retrieve(server, context=CONTEXT.tolist(), rerank=True)
    assert (answer.status_code, answer.json()["pointer"]) == (422, "/rerank")
    assert not retrieve(server, context=CONTEXT.tolist()).json()["reranked"]


def test_the_stage_is_counted(server: Running) -> None:
    retrieve(server, context=CONTEXT.tolist())
    assert server.metric("lvm_request_seconds_count", route="/retrieve", stage="rerank") == 1


def test_the_option_is_documented(server: Running) -> None:
    document = server.http.get("/openapi.json").json()
    body = document["paths"]["/retrieve"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "rerank" in body["properties"]
    assert "reranked" in document["components"]["schemas"]["RetrieveResponse"]["properties"]
