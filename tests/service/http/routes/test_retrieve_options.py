"""The options of /retrieve: filter, mmr, and many queries in one request."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from models.retrieval.corpus import Corpus
from models.retrieval.fields import Column, Fields
from models.retrieval.index import FlatIndex
from models.retrieval.milvus import IndexUnavailable
from models.retrieval.retriever import Retriever, Search
from service.settings import Settings
from tests.conftest import Running, until
from tests.fakes import D, FakeBuild, HashEncoder, T, bundle, card, contexts, corpus, octets_of

Serve = Callable[..., Running]
KNOWN = corpus()
QUERY = KNOWN.vectors[7].tolist()
CONTEXT = KNOWN.vectors[2 : 2 + T].tolist()


def with_fields(version: str = "20260101-000000000000") -> Retriever:
    """Return the fake corpus of 20 passages, whose languages alternate and whose years ascend by passage."""
    fields = Fields(
        metadata={
            "lang": Column.of(["en", "de"] * 10),
            "year": Column.of(list(range(2000, 2020))),
            "a/b~c": Column.of([True, False] * 10),
            "caf\u00e9": Column.of(["na\u00efve"] * 20),
        }
    )
    known = Corpus(KNOWN.vectors, KNOWN.article, KNOWN.position, KNOWN.articles, fields)
    return Retriever(version, "1" * 64, card("corpus", kind="corpus"), known, FlatIndex(known.vectors))


def post(server: Running, body: Any, **headers: str) -> httpx.Response:
    return server.http.post("/retrieve", json=body, headers=headers)


def ids(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return [hit["id"] for hit in answer.json()["results"]]


def ranked(among: Any) -> list[int]:
    order = np.argsort(-(KNOWN.vectors @ KNOWN.vectors[7]), kind="stable").tolist()
    return [row for row in order if row in set(among)]


# ---- filter


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        ({"article": 1}, range(10, 20)),
        ({"article": [0, 1.0]}, range(20)),
        ({"article": []}, []),
        ({"article": 12}, []),
        ({"lang": "de"}, range(1, 20, 2)),
        ({"lang": ["de", "en", "fr"], "article": 0}, range(10)),
        ({"year": [2003, 2019.0, 1]}, [3, 19]),
        ({"a/b~c": True, "lang": "de"}, []),
        ({"a/b~c": True, "lang": "en"}, range(0, 20, 2)),
        ({"caf\u00e9": "na\u00efve"}, range(20)),
        ({"caf\u00e9": "nai\u0308ve"}, []),
        ({}, range(20)),
        (None, range(20)),
    ],
)
def test_a_filter_leaves_the_best_passages_that_match(serve: Serve, wanted: Any, rows: Any) -> None:
    server = serve(corpus=with_fields)
    for k in (1, 4, 20):
        assert ids(post(server, {"query": QUERY, "k": k, "filter": wanted})) == ranked(rows)[:k]


def test_a_filter_holds_for_octets_in_the_query_string_and_for_the_towers(serve: Serve) -> None:
    server = serve(corpus=bundle)
    listed = ids(post(server, {"context": CONTEXT, "filter": {"article": 0}}))
    assert sorted(listed) == [0, 1, 7, 8, 9]
    context = np.array(CONTEXT, np.float32)
    sent = server.http.post(
        "/retrieve", params={"filter": '{"article": [0]}'}, content=context.tobytes(), headers=octets_of(context)
    )
    assert ids(sent) == listed
    assert ids(post(server, {"context": CONTEXT, "filter": {"article": 0}, "exclude": listed})) == []
    assert len(ids(post(server, {"context": CONTEXT, "filter": {"article": 0}, "exclude_context": False}))) == 10


@pytest.mark.parametrize(
    ("wanted", "pointer"),
    [
        ([], "/filter"),
        ("en", "/filter"),
        (3, "/filter"),
        ({"language": "en"}, "/filter/language"),
        ({"x/y~z": "en"}, "/filter/x~1y~0z"),
        ({"lang": 3}, "/filter/lang"),
        ({"lang": True}, "/filter/lang"),
        ({"year": "2003"}, "/filter/year"),
        ({"year": True}, "/filter/year"),
        ({"a/b~c": 1}, "/filter/a~1b~0c"),
        ({"article": "1"}, "/filter/article"),
        ({"article": 1.5}, "/filter/article"),
        ({"lang": None}, "/filter/lang"),
        ({"lang": ["de", None]}, "/filter/lang/1"),
        ({"lang": [["de"]]}, "/filter/lang/0"),
        ({"lang": {"not": "de"}}, "/filter/lang"),
        ({"lang": "x" * 1001}, "/filter/lang"),
        ({"article": list(range(10_000))}, "/filter/article"),
        ({"article": list(range(600)), "year": list(range(600))}, "/filter"),
        ({f"field{n}": 1 for n in range(17)}, "/filter"),
    ],
)
def test_rejects_a_filter_that_is_not_understood(serve: Serve, wanted: Any, pointer: str) -> None:
    answer = post(serve(corpus=with_fields), {"query": QUERY, "filter": wanted})
    assert (answer.status_code, answer.json()["pointer"]) == (422, pointer)


def test_a_field_with_half_of_a_surrogate_pair_is_answered_and_counted(serve: Serve) -> None:
    server = serve(corpus=with_fields)
    body = json.dumps({"query": QUERY, "filter": {"\ud800": 1}})
    answer = server.http.post("/retrieve", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["pointer"]) == (422, "/filter/?")
    assert server.metric("lvm_requests_total", route="/retrieve", outcome="invalid") == 1
    assert server.metric("lvm_in_flight_rows") == 0


def test_an_unknown_field_is_answered_with_those_that_there_are(serve: Serve) -> None:
    answer = post(serve(corpus=with_fields), {"query": QUERY, "filter": {"language": "en"}})
    assert answer.json()["detail"] == 'unknown field "language"; the corpus has article, lang, year, a/b~c, caf\u00e9'


@pytest.mark.parametrize("text", ['{"article": NaN}', '{"article": 1e999}', '{"article": 1, "article": 2}', "{"])
def test_rejects_a_filter_that_is_not_json(serve: Serve, text: str) -> None:
    server = serve()
    body = f'{{"query": {json.dumps(QUERY)}, "filter": {text}}}'
    assert server.http.post("/retrieve", content=body, headers={"content-type": "application/json"}).is_client_error
    query = np.array(QUERY, np.float32)
    sent = server.http.post("/retrieve", params={"filter": text}, content=query.tobytes(), headers=octets_of(query))
    assert sent.status_code == 422


def test_a_filter_is_searched_here_while_the_external_index_is_away(serve: Serve) -> None:
    """A search that did not ask the external index does not close its breaker."""
    build = FakeBuild()
    server = serve(corpus=bundle, search_model=lambda known: build.search_model(known, Settings(breaker_failures=1)))
    few = {"query": QUERY, "filter": {"article": [0]}, "k": 10}
    expected = ids(post(server, few))
    build.fault = IndexUnavailable("gone")
    assert post(server, {"query": QUERY}).json()["fallback_reason"] == "index_away"
    assert ids(post(server, few)) == expected
    until(lambda: server.http.get("/models").json()["aliases"]["retriever"]["breaker"] != "closed", "the breaker")


# ---- mmr


@pytest.mark.parametrize("weight", [-0.1, 1.1, True, "0.5", [0.5], {}])
def test_rejects_an_mmr_that_is_no_weight(serve: Serve, weight: Any) -> None:
    answer = post(serve(), {"query": QUERY, "mmr": weight})
    assert (answer.status_code, answer.json()["pointer"]) == (422, "/mmr")


@pytest.mark.parametrize("k", [1, 20, 1000])
def test_mmr_returns_as_many_results_with_their_scores(serve: Serve, k: int) -> None:
    server = serve(corpus=bundle)
    plain = {hit["id"]: hit["score"] for hit in post(server, {"query": QUERY, "k": 1000}).json()["results"]}
    for weight in (0, 0.5, 1):
        results = post(server, {"query": QUERY, "k": k, "mmr": weight}).json()["results"]
        assert len(results) == min(k, 20)
        assert results[0]["id"] == 7
        assert all(hit["score"] == pytest.approx(plain[hit["id"]], abs=1e-6) for hit in results)
    assert ids(post(server, {"query": QUERY, "k": k, "mmr": 1})) == ids(post(server, {"query": QUERY, "k": k}))


def test_mmr_keeps_the_first_of_the_reranked(serve: Serve) -> None:
    server = serve(corpus=bundle)
    reranked = post(server, {"context": CONTEXT}).json()
    answer = post(server, {"context": CONTEXT, "mmr": 0.5, "rerank": True}).json()
    assert answer["reranked"]
    assert answer["results"][0] == reranked["results"][0]
    assert not post(server, {"context": CONTEXT, "mmr": 0.5, "rerank": False}).json()["reranked"]


# ---- the reranker's score


def test_the_rerankers_score_stands_beside_that_of_the_search(serve: Serve) -> None:
    server, known = serve(corpus=bundle), bundle()
    hits = post(server, {"context": CONTEXT, "k": 20}).json()["results"]
    (candidates,) = known.find_candidates([Search(None, 20, (), np.array(CONTEXT), np.array(CONTEXT))])
    assert known.reranker
    judged = known.reranker.score(known.candidate_features(np.array(CONTEXT, np.float32), *candidates))
    expected = dict(zip(candidates[1].tolist(), judged.tolist(), strict=True))
    assert {hit["id"]: hit["rerank_score"] for hit in hits} == pytest.approx(expected, abs=1e-6)
    assert [hit["rerank_score"] for hit in hits] == sorted(expected.values(), reverse=True)
    plain = {hit["id"]: hit["score"] for hit in post(server, {"context": CONTEXT, "rerank": False}).json()["results"]}
    assert all(hit["score"] == pytest.approx(plain.get(hit["id"], hit["score"]), abs=1e-6) for hit in hits)


def test_passages_that_the_reranker_did_not_judge_have_no_score_of_it(serve: Serve) -> None:
    server = serve(corpus=bundle)
    for body in ({"query": QUERY}, {"context": CONTEXT, "rerank": False}, {"context": CONTEXT, "model": "gru"}):
        assert not any("rerank_score" in hit for hit in post(server, body).json()["results"])
    with_own = post(server, {"context": CONTEXT, "k": 20, "exclude_context": False}).json()["results"]
    assert ["rerank_score" in hit for hit in with_own] == [True] * (20 - T) + [False] * T


def test_diverse_results_keep_the_rerankers_scores(serve: Serve) -> None:
    server = serve(corpus=bundle)
    plain = {hit["id"]: hit["rerank_score"] for hit in post(server, {"context": CONTEXT, "k": 20}).json()["results"]}
    for hit in post(server, {"context": CONTEXT, "k": 20, "mmr": 0.5}).json()["results"]:
        assert hit["rerank_score"] == pytest.approx(plain[hit["id"]], abs=1e-6)


# ---- many


@pytest.mark.parametrize("made", [bundle, with_fields])
@pytest.mark.parametrize(
    "options", [{}, {"k": 3, "exclude": [1, 8]}, {"filter": {"article": [1]}, "mmr": 0.5}, {"exclude_context": False}]
)
def test_many_contexts_are_answered_as_each_of_them(serve: Serve, made: Any, options: dict[str, Any]) -> None:
    server = serve(corpus=made)
    many = np.concatenate([contexts(30), [KNOWN.vectors[2 : 2 + T]]])
    answer = post(server, {"contexts": many.tolist(), **options})
    alone = [post(server, {"context": context.tolist(), **options}).json() for context in many]
    body = answer.json()
    assert body["results"] == [each["results"] for each in alone]
    assert body.keys() == alone[0].keys()
    sent = server.http.post(
        "/retrieve", params={name: json.dumps(value) for name, value in options.items()},
        content=many.tobytes(), headers=octets_of(many),
    )  # fmt: skip
    assert sent.json()["results"] == body["results"]


def test_many_queries_are_answered_as_each_of_them(serve: Serve) -> None:
    server = serve()
    many = contexts(40)[:, 0]
    body = {"queries": many.tolist(), "k": 3}
    results = post(server, body).json()["results"]
    assert results == [post(server, {"query": query.tolist(), "k": 3}).json()["results"] for query in many]
    octets = server.http.post("/retrieve?k=3", content=many.tobytes(), headers=octets_of(many[:, None]))
    assert octets.json()["results"] == results
    coded = [base64.b64encode(query.tobytes()).decode() for query in many]
    assert post(server, {"queries": coded, "k": 3}).json()["results"] == results
    assert post(server, {"queries": many[:1].tolist(), "k": 3}).json()["results"] == results[:1]


@pytest.mark.parametrize(
    ("body", "status", "pointer"),
    [
        ({"queries": []}, 422, "/queries"),
        ({"queries": QUERY}, 422, "/queries/0"),
        ({"queries": [QUERY, [*QUERY[:3], None, *QUERY[4:]]]}, 422, "/queries/1/3"),
        ({"contexts": [CONTEXT, [*CONTEXT[:3], [1e10] * D, *CONTEXT[4:]]]}, 422, "/contexts/1/3/0"),
        ({"contexts": [CONTEXT, CONTEXT[:2]]}, 422, "/contexts/1"),
        ({"contexts": [CONTEXT], "queries": [QUERY]}, 422, ""),
        ({"queries": [QUERY], "query": QUERY}, 422, ""),
        ({"queries": [QUERY], "model": "amn"}, 422, "/model"),
        ({"queries": [QUERY], "exclude_context": True}, 422, "/exclude_context"),
        ({"queries": [QUERY], "filter": {"lang": "en"}}, 422, "/filter/lang"),
        ({"queries": [QUERY] * 9}, 413, "/queries"),
        ({"queries": [QUERY] * 6, "exclude": list(range(9000))}, 413, "/k"),
    ],
)
def test_rejects_one_of_many_with_its_place(serve: Serve, body: Any, status: int, pointer: str) -> None:
    answer = post(serve(max_rows=8), body)
    assert (answer.status_code, answer.json().get("pointer")) == (status, pointer)


def test_many_count_as_many_rows_and_as_one_request(serve: Serve) -> None:
    server = serve(max_queue=32)
    assert post(server, {"queries": [QUERY] * 32}).status_code == 200
    assert post(server, {"queries": [QUERY] * 33}).status_code == 503
    assert server.metric("lvm_requests_total", route="/retrieve", outcome="ok") == 1
    assert server.metric("lvm_batch_rows_sum", engine="retriever") == 32


@pytest.mark.parametrize("options", [{"k": 1000}, {"k": 1, "mmr": 0.5}])
def test_queries_of_many_candidates_run_a_few_at_a_time(serve: Serve, options: dict[str, Any]) -> None:
    server = serve()
    assert post(server, {"queries": [QUERY] * 12, "k": 20}).status_code == 200
    assert server.metric("lvm_batch_rows_count", engine="retriever") == 1
    assert post(server, {"queries": [QUERY] * 12, **options}).status_code == 200
    assert server.metric("lvm_batch_rows_count", engine="retriever") > 2


def test_a_text_takes_filter_and_mmr(serve: Serve) -> None:
    server = serve(corpus=with_fields, text=HashEncoder())
    answer = post(server, {"text": "one two three", "filter": {"lang": "de"}, "mmr": 0.7, "k": 20})
    assert sorted(ids(answer)) == list(range(1, 20, 2))
