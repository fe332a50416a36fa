"""What the console reads beside /models: articles with their vectors, cards, the ledger."""

from __future__ import annotations

import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from models.retrieval.fields import Column, Fields, Texts
from models.retrieval.index import FlatIndex
from models.retrieval.retriever import Retriever
from models.vectors import Floats
from tests.conftest import Running, until
from tests.fakes import D, T, add_version, card, corpus

Serve = Callable[..., Running]


def test_the_list_of_articles_is_paged_and_searched_by_title(serve: Serve) -> None:
    server = serve()
    both = server.http.get("/articles").json()
    assert (both["corpus"], both["total"]) == ("corpus", 2)
    assert both["articles"] == [{"article": n, "title": f"Article {n}", "chunks": 10} for n in (0, 1)]
    assert server.http.get("/articles?offset=1&limit=1").json()["articles"] == both["articles"][1:]
    found = server.http.get("/articles", params={"search": "aRTICLE 1"}).json()
    assert (found["total"], found["articles"]) == (1, both["articles"][1:])


def test_an_article_comes_in_reading_order_with_the_ids_and_vectors_that_retrieve_knows(serve: Serve) -> None:
    server = serve()
    article, known = server.http.get("/articles/1").json(), corpus()
    assert (article["title"], article["dim"], article["context_length"], article["encoder"]) == (
        "Article 1",
        D,
        T,
        "fake",
    )
    assert [chunk["position"] for chunk in article["chunks"]] == list(range(10))
    assert [chunk["text"] for chunk in article["chunks"]] == [f"chunk 1/{n}" for n in range(10)]
    rows = [chunk["id"] for chunk in article["chunks"]]
    vectors = [np.frombuffer(base64.b64decode(chunk["vector"]), "<f4") for chunk in article["chunks"]]
    np.testing.assert_array_equal(vectors, known.vectors[rows])
    hit = server.http.post("/retrieve", json={"query": vectors[3].tolist(), "k": 1}).json()["results"][0]
    assert (hit["id"], hit["article"], hit["position"]) == (rows[3], 1, 3)


@pytest.mark.parametrize("article", ["7", str(2**31 - 1)])
def test_an_article_that_is_not_there_is_404(serve: Serve, article: str) -> None:
    answer = serve().http.get(f"/articles/{article}")
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:lvm:problem:unknown_article")


@pytest.mark.parametrize(
    "path",
    [
        *("/articles/x", "/articles/-1", f"/articles/{2**31}", "/articles/" + "9" * 5000, "/articles/1.5"),
        *("/articles?offset=-1", "/articles?limit=0", "/articles?limit=1001", "/articles?search=" + "x" * 201),
        "/ledger?limit=x",
    ],
)
def test_ids_and_pages_that_are_none_are_a_problem_that_echoes_nothing(serve: Serve, path: str) -> None:
    answer = serve().http.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert "99999" not in answer.text
    assert answer.json()["detail"].split(":")[0] in path.replace("/articles/", "article:")


def decoded(text: str) -> Floats:
    return np.frombuffer(base64.b64decode(text), "<f4")


def test_the_map_places_passages_where_its_axes_place_their_vectors(serve: Serve) -> None:
    server = serve()
    drawn, known = server.http.get("/articles/map").json(), corpus()
    assert (drawn["corpus"], drawn["total"], drawn["dim"], len(drawn["passages"])) == ("corpus", 20, D, 20)
    mean, axes = decoded(drawn["mean"]), decoded(drawn["axes"]).reshape(2, D)
    places = [[passage["x"], passage["y"]] for passage in drawn["passages"]]
    np.testing.assert_allclose(places, (known.vectors - mean) @ axes.T, atol=1e-3)
    assert 0 < sum(drawn["explained"]) <= 1
    facts = {name: drawn["passages"][13][name] for name in ("id", "article", "title", "position", "text")}
    assert facts == {"id": 13, "article": 1, "title": "Article 1", "position": 3, "text": "chunk 1/3"}


def test_passages_are_placed_on_the_same_map_by_their_ids(serve: Serve) -> None:
    server = serve()
    sample = server.http.get("/articles/map").json()
    chosen = server.http.get("/articles/map", params={"ids": "[13,2]"}).json()
    assert chosen["passages"] == [sample["passages"][13], sample["passages"][2]]
    assert (chosen["mean"], chosen["axes"]) == (sample["mean"], sample["axes"])


@pytest.mark.parametrize(
    "ids", ["", "[]", "13", "[x]", "[-1]", "[20]", "[9999999999]", "[1.5]", "[007]", "[" + "1," * 2000 + "1]"]
)
def test_ids_that_the_map_cannot_place_are_a_problem(serve: Serve, ids: str) -> None:
    answer = serve().http.get("/articles/map", params={"ids": ids})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")


def test_the_map_of_a_new_corpus_is_its_own(serve: Serve) -> None:
    server = serve()
    before = server.http.get("/articles/map").json()
    registry = server.app.state.deployments.registry
    registry.point("retriever", add_version(registry, "corpus", "second"), why="to see it")
    until(lambda: server.http.get("/articles").json()["corpus_version"] != before["corpus_version"], "the new corpus")
    assert server.http.get("/articles/map").json()["corpus_version"] != before["corpus_version"]


def test_callers_at_once_share_one_map(serve: Serve) -> None:
    server = serve()
    with ThreadPoolExecutor(8) as pool:
        bodies = list(pool.map(lambda _: server.http.get("/articles/map").content, range(16)))
    assert len(set(bodies)) == 1


def test_without_a_corpus_there_are_no_articles(serve: Serve) -> None:
    server = serve(retriever=False)
    assert [server.http.get(path).status_code for path in ("/articles", "/articles/0", "/articles/map")] == [
        *(503, 503, 503)
    ]


def test_a_card_is_the_file_of_the_version(serve: Serve) -> None:
    server = serve()
    version = server.app.state.deployments.registry.resolve("primary")
    answer = server.http.get(f"/models/{version.id}/card")
    assert answer.headers["content-type"] == "text/markdown; charset=utf-8"
    assert answer.content == (version.path / "README.md").read_bytes()


@pytest.mark.parametrize(
    "name", ["nothing/20260101-000000000000", "%2e%2e/%2e%2e", "..%2famn/x", "amn%00/x", "amn/primary"]
)
def test_no_other_name_opens_a_file(serve: Serve, name: str) -> None:
    answer = serve().http.get(f"/models/{name}/card")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


def test_the_ledger_comes_newest_first_and_paged(serve: Serve) -> None:
    server = serve()
    registry = server.app.state.deployments.registry
    registry.point("fallback", add_version(registry, "gru", "second"), why="to see it")
    told = server.http.get("/ledger").json()
    assert (told["total"], told["moves"][0]["alias"], told["moves"][0]["why"]) == (4, "fallback", "to see it")
    assert [move["after"] for move in told["moves"]] == [move.after for move in reversed(registry.ledger())]
    assert server.http.get("/ledger?offset=1&limit=2").json()["moves"] == told["moves"][1:3]


def test_ids_and_metadata_of_the_corpus_are_in_the_answers(serve: Serve) -> None:
    fields = Fields(Texts.of(f"id-{row}" for row in range(20)), {"lang": Column.of(["en", None] * 10)})
    known = replace(corpus(), fields=fields)
    facts = card("corpus", kind="corpus")
    server = serve(corpus=lambda version: Retriever(version, "1" * 64, facts, known, FlatIndex(known.vectors)))
    hits = server.http.post("/retrieve", json={"query": known.vectors[3].tolist(), "k": 20}).json()["results"]
    assert hits[0]["source_id"] == "id-3"
    assert {hit["id"]: hit["metadata"] for hit in hits} == {row: {} if row % 2 else {"lang": "en"} for row in range(20)}
    chunks = server.http.get("/articles/1").json()["chunks"]
    assert [chunk["source_id"] for chunk in chunks] == [f"id-{row}" for row in range(10, 20)]
    assert chunks[0]["metadata"] == {"lang": "en"}


def test_a_corpus_without_ids_answers_without_them(serve: Serve) -> None:
    server = serve()
    assert "source_id" not in server.http.get("/articles/1").json()["chunks"][0]
    assert "metadata" not in server.http.post("/retrieve", json={"query": [1.0] * D}).json()["results"][0]
