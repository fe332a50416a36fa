"""Every call of the client against a live service: what is sent, and what the answers carry."""

from __future__ import annotations

import asyncio
import base64
import json
from inspect import signature
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lvm import errors
from lvm.client import (
    AsyncClient,
    BadAnswer,
    Client,
    Embeddings,
    Passage,
    Prediction,
    Retrieval,
    UnknownRoute,
    Unreachable,
)
from tests.fakes import D, HashEncoder, T, contexts, corpus, mean_of, prose, raises
from tests.lvm.client.network import PASSAGE, answering, passages
from tests.lvm.client.test_calls import Serve

CHUNKS = ["one two", "three", "four five six", "seven", "eight nine"]


def encoded(*vectors: np.ndarray) -> list[str]:
    """Return vectors as the service sends them in JSON."""
    return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]


def embedded(count: int, **members: Any) -> httpx.Response:
    """Return a response of /embed."""
    vectors = encoded(*np.arange(count * D).reshape(count, D))
    known = {"vectors": vectors, "encoder": "fake", "dimensions": D}
    return httpx.Response(200, json={**known, "truncated": [False] * count, "unread": [0.0] * count, **members})


def test_a_prediction_says_who_made_it_and_how_long_it_took(serve: Serve) -> None:
    with Client(serve().url) as client:
        predicted = client.predict(contexts(2))
    assert (predicted.model, predicted.served_by, predicted.fallback_reason) == ("amn", "primary", None)
    assert predicted.version == predicted.made_by[0].version
    assert predicted.request_id
    assert predicted.timings.keys() >= {"decode", "queue", "infer"}
    assert all(milliseconds >= 0 for milliseconds in predicted.timings.values())


def test_a_prediction_says_why_a_fallback_made_it(serve: Serve) -> None:
    with Client(serve(amn=raises).url) as client:
        predicted = client.predict(contexts()[0])
    assert (predicted.model, predicted.served_by) == ("gru", "fallback")
    assert predicted.fallback_reason


def test_a_prediction_unpacks_as_vectors_and_made_by(serve: Serve) -> None:
    with Client(serve().url) as client:
        vectors, made_by = client.predict(contexts())
    assert (vectors.shape, len(made_by)) == ((1, D), 1)


def test_timings_of_several_requests_are_added(serve: Serve) -> None:
    headers = {"server-timing": "queue;dur=1.5, infer;dur=2", "x-request-id": "of-the-service"}
    network, _ = answering(httpx.Response(200, content=bytes(4 * D), headers=headers))
    with Client("http://x", transport=network, rows=1) as client:
        predicted = client.predict(contexts(3))
    assert predicted.timings == {"queue": 4.5, "infer": 6.0}
    assert predicted.request_id == "of-the-service"


@pytest.mark.parametrize(
    "header", ["", ",,;", "edge;dur=soon", "edge;dur=nan, edge;dur=-1", "edge", 'a;desc="b";dur=1e999', "=;dur"]
)
def test_malformed_timings_are_left_out(header: str) -> None:
    network, _ = answering(httpx.Response(200, content=bytes(4 * D), headers={"server-timing": header}))
    with Client("http://x", transport=network) as client:
        assert client.predict(contexts()[0]).timings == {}


def test_predicts_the_context_that_a_text_is_cut_into(serve: Serve) -> None:
    vectors = np.stack([HashEncoder().vector(chunk) for chunk in CHUNKS])
    with Client(serve(text=HashEncoder()).url) as client:
        of_chunks = client.predict(CHUNKS)
        of_passage = client.predict(prose([60] * 8))
    np.testing.assert_allclose(of_chunks.vectors, mean_of(vectors[None])[0], atol=1e-6)
    assert (of_chunks.read_as, of_chunks.chunks, of_chunks.model) == ("context", None, "amn")
    assert of_passage.chunks is not None
    assert len(of_passage.chunks) == T


def test_an_answer_says_which_texts_were_not_read_whole(serve: Serve) -> None:
    long, odd = " ".join(["word"] * 300), "?what is this"
    with Client(serve(text=HashEncoder()).url) as client:
        predicted = client.predict([*CHUNKS[:3], long, odd])
    assert predicted.truncated == (3,)
    assert predicted.unread == {4: pytest.approx(1 / 3, abs=1e-3)}


def test_a_retrieval_is_a_list_that_says_who_found_it(serve: Serve) -> None:
    with Client(serve().url) as client:
        of_query = client.retrieve(corpus().vectors[3], k=2)
        of_context = client.retrieve(contexts()[0], k=2, model="gru")
    assert isinstance(of_query, list)
    assert of_query[0] == Passage(*of_query[0])
    assert (of_query.made_by, of_query.model, of_query.served_by) == ((), None, None)
    assert (of_context.model, of_context.served_by) == ("gru", "fallback")
    assert of_query.is_exact
    assert not of_query.reranked
    assert of_query.corpus
    assert of_query.corpus_version
    assert of_query.request_id
    assert of_query.timings["search"] >= 0


def test_retrieves_by_text(serve: Serve) -> None:
    """A query, a context as a passage, and one as ready chunks."""
    with Client(serve(text=HashEncoder()).url) as client:
        query = client.retrieve("chunk 0/3", k=1)
        passage = client.retrieve(prose([60] * 8), k=1)
        ready = client.retrieve(CHUNKS, k=1)
        many = client.retrieve_many(["chunk 0/3", CHUNKS], k=1)
    assert (query.read_as, query.chunks) == ("query", ("chunk 0/3",))
    assert (passage.read_as, ready.read_as) == ("context", "context")
    assert many == [query, ready]


def test_many_queries_in_text_are_one_request(serve: Serve) -> None:
    service, texts = serve(text=HashEncoder()), ["chunk 0/3", "?odd word chunk", " ".join(["word"] * 300), "chunk 1/3"]
    with Client(service.url, rows=2) as client:
        many = client.retrieve_many(texts, k=2, read_as="query")
        alone = [client.retrieve(text, k=2, read_as="query") for text in texts]
    assert many == alone
    assert [found.read_as for found in many] == ["query"] * 4
    assert [(found.truncated, found.unread) for found in many] == [(each.truncated, each.unread) for each in alone]
    assert (many[1].unread.keys(), many[2].truncated) == ({0}, (0,))
    assert service.metric("lvm_requests_total", route="/retrieve", outcome="ok") == 2 + 4


def test_many_queries_in_text_are_sent_in_parts_of_bounded_length() -> None:
    sent: list[int] = []

    def reply(request: httpx.Request) -> httpx.Response:
        texts = json.loads(request.content)["texts"]
        sent.append(sum(map(len, texts)))
        return passages(*([] for _ in texts))

    with Client("http://x", transport=httpx.MockTransport(reply)) as client:
        assert client.retrieve_many(["a" * 20_000] * 5, read_as="query") == [[]] * 5
    assert sent == [40_000, 40_000, 20_000]


def test_rejects_many_queries_where_one_is_expected() -> None:
    with Client("http://x") as client, pytest.raises(ValueError, match="retrieve_many"):
        client.retrieve(["a", "b"], read_as="query")


def test_reads_text_of_fewer_chunks_than_a_context(serve: Serve) -> None:
    with Client(serve(text=HashEncoder()).url) as client:
        found, predicted = client.retrieve(CHUNKS[:3], k=1), client.predict(CHUNKS[:3])
    assert (found.read_as, predicted.read_as) == ("partial_context", "partial_context")


def test_passages_have_the_score_of_the_reranker() -> None:
    network, _ = answering(passages({**PASSAGE, "rerank_score": -2.5}, PASSAGE, reranked=True))
    with Client("http://x", transport=network) as client:
        found = client.retrieve(np.ones(D))
    assert [passage.rerank_score for passage in found] == [-2.5, None]
    assert found.reranked


def test_embeds_one_text_many_and_the_chunks_of_one() -> None:
    network, sent = answering(embedded(1), embedded(2), embedded(3, chunks=["a", "b", "c"]))
    with Client("http://x", transport=network) as client:
        one = client.embed("a", model="primary")
        many = client.embed(["a", "\u4e2d\u6587"])
        chunks = client.embed("a b c", chunks=True)
    assert [found.vectors.shape for found in (one, many, chunks)] == [(D,), (2, D), (3, D)]
    assert (one.encoder, one.chunks, chunks.chunks) == ("fake", None, ("a", "b", "c"))
    assert [json.loads(request.content) for request in sent] == [
        {"text": "a", "model": "primary", "encoding": "base64"},
        {"texts": ["a", "\u4e2d\u6587"], "encoding": "base64"},
        {"text": "a b c", "chunks": True, "encoding": "base64"},
    ]


def test_many_texts_are_embedded_in_parts_of_bounded_length() -> None:
    def reply(request: httpx.Request) -> httpx.Response:
        texts = json.loads(request.content)["texts"]
        assert len(texts) <= 2
        assert len(texts) == 1 or sum(map(len, texts)) <= 2000
        unread = [0.5 if text == "odd" else 0.0 for text in texts]
        return embedded(len(texts), unread=unread, truncated=[len(text) > 1000 for text in texts])

    texts = ["a", "odd", "c" * 1500, "d" * 600, "e" * 5000, "odd"]
    with Client("http://x", transport=httpx.MockTransport(reply), rows=2) as client:
        found = client.embed(texts)
    assert found.vectors.shape == (6, D)
    assert (found.truncated, found.unread) == ((2, 4), {1: 0.5, 5: 0.5})


@pytest.mark.parametrize("texts", [[], 5, [1], ["a", 1], b"a", None, np.ones(3), {"a": 1}])
def test_rejects_what_is_no_text_to_embed(texts: Any) -> None:
    network, sent = answering(embedded(1))
    with Client("http://x", transport=network) as client, pytest.raises(ValueError, match="texts"):
        client.embed(texts)
    assert not sent


def test_rejects_text_that_has_no_utf_8() -> None:
    network, sent = answering(embedded(1))
    with Client("http://x", transport=network) as client, pytest.raises(ValueError, match="surrogates"):
        client.embed("\ud800")
    assert not sent


def test_accepts_texts_in_arrays() -> None:
    network, sent = answering(embedded(2))
    with Client("http://x", transport=network) as client:
        client.embed(np.array(["a", "b"]))
        client.embed(np.array(["a", "b"], object))
    assert json.loads(sent[0].content)["texts"] == json.loads(sent[1].content)["texts"] == ["a", "b"]


def test_lists_articles_in_pages(serve: Serve) -> None:
    with Client(serve().url) as client:
        whole, page, none = client.articles(), client.articles("ARTICLE", offset=1, limit=1), client.articles("none")
    assert [(entry.article, entry.title, entry.chunks) for entry in whole] == [
        (0, "Article 0", 10),
        (1, "Article 1", 10),
    ]
    assert (page, page.total, page.corpus) == (whole[1:], 2, whole.corpus)
    assert (none, none.total) == ([], 0)


def test_an_article_has_its_windows(serve: Serve) -> None:
    with Client(serve().url) as client:
        article = client.article(1)
        windows = article.windows()
        found = client.retrieve(windows.next_vectors[0], k=1)
    np.testing.assert_allclose(article.vectors, corpus().vectors[10:], atol=1e-6)
    assert (windows.contexts.shape, windows.next_vectors.shape) == ((10 - T, T, D), (10 - T, D))
    np.testing.assert_array_equal(windows.contexts[2], article.vectors[2 : 2 + T])
    np.testing.assert_array_equal(windows.next_vectors[2], article.vectors[2 + T])
    assert windows.next_ids == [passage.id for passage in article.passages[T:]]
    assert found[0].id == windows.next_ids[0]


def test_a_short_article_has_no_windows(serve: Serve) -> None:
    with Client(serve(corpus=lambda version: short_corpus(version)).url) as client:
        windows = client.article(0).windows()
        assert (windows.contexts.shape, windows.next_vectors.shape, windows.next_ids) == ((0, T, D), (0, D), [])
        assert client.predict(windows.contexts).vectors.shape == (0, D)


def short_corpus(version: str) -> Any:
    """Return a retriever over articles of three chunks."""
    from models.retrieval.index import FlatIndex
    from models.retrieval.retriever import Retriever
    from tests.fakes import card

    known = corpus(6)
    return Retriever(version, "1" * 64, card("corpus", kind="corpus"), known, FlatIndex(known.vectors))


def test_models_are_those_of_the_registry(serve: Serve) -> None:
    with Client(serve(text=HashEncoder()).url) as client:
        models = client.models()
    assert models.aliases["primary"].id.startswith("amn/")
    assert models.aliases["primary"].refused is None
    assert {version.id for version in models.versions} >= {alias.id for alias in models.aliases.values()}
    assert models.encoder == "fake"


def test_health_and_wait_ready_ask_the_probes(serve: Serve) -> None:
    with Client(serve().url) as client:
        client.wait_ready(timeout=30)
        health = client.health()
    assert (health.is_live, health.is_ready, health.reason) == (True, True, None)


def test_health_says_what_is_not_ready() -> None:
    problem = {"type": "urn:lvm:problem:draining", "detail": "the process is shutting down"}
    network, _ = answering(httpx.Response(200, json={"status": "live"}), httpx.Response(503, json=problem))
    with Client("http://x", transport=network) as client:
        health = client.health()
    assert (health.is_live, health.is_ready, health.reason) == (True, False, "the process is shutting down")


def test_wait_ready_asks_until_the_service_is_ready() -> None:
    ready = httpx.Response(200, json={"status": "ready"})
    network, sent = answering(httpx.ConnectError("refused"), httpx.Response(503), httpx.Response(502), ready)
    with Client("http://x", transport=network) as client:
        client.wait_ready(timeout=60)
    assert [request.url.path for request in sent] == ["/readyz"] * 4


def test_wait_ready_ends_with_the_last_failure() -> None:
    network, sent = answering(httpx.Response(503, json={"detail": "no net is loaded"}))
    with Client("http://x", transport=network) as client, pytest.raises(errors.Expired, match="no net is loaded"):
        client.wait_ready(timeout=0.2)
    assert len(sent) > 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (httpx.Response(404), UnknownRoute),
        (httpx.Response(200, text="<html>"), BadAnswer),
        (httpx.Response(200, json={"status": "live"}), BadAnswer),
        (httpx.Response(301, headers={"location": "https://x"}), BadAnswer),
    ],
)
def test_wait_ready_ends_at_once_if_the_address_is_not_that_of_a_service(
    answer: httpx.Response, error: type[errors.ServiceError]
) -> None:
    network, sent = answering(answer)
    with Client("http://x", transport=network) as client, pytest.raises(error):
        client.wait_ready(timeout=None)
    assert len(sent) == 1


def test_an_unknown_route_names_its_address() -> None:
    network, _ = answering(httpx.Response(404, json={"type": "urn:lvm:problem:unknown_route", "detail": "Not Found"}))
    with Client("http://x/lvm", transport=network) as client, pytest.raises(UnknownRoute) as raised:
        client.embed("a")
    assert "Not Found for POST /embed (http://x/lvm" in str(raised.value)
    assert not isinstance(raised.value, errors.UnknownModel)


def test_an_unknown_article_is_named_as_such(serve: Serve) -> None:
    with Client(serve().url) as client, pytest.raises(errors.UnknownArticle) as raised:
        client.article(99)
    assert raised.value.request_id in str(raised.value)


@pytest.mark.parametrize("failed", [httpx.ReadError("reset"), httpx.Response(200, text="<html>")])
def test_every_error_has_the_id_that_was_sent(failed: httpx.Response | Exception) -> None:
    network, sent = answering(failed)
    with Client("http://x", transport=network, retries=0) as client:
        for ask in (lambda: client.retrieve(np.ones(D)), client.models, lambda: client.embed("a"), client.health):
            with pytest.raises((Unreachable, BadAnswer)) as raised:
                ask()
            assert sent[-1].headers["x-request-id"] in str(raised.value)


def test_each_call_has_its_own_id(serve: Serve) -> None:
    with Client(serve().url) as client:
        one, other = client.predict(contexts()), client.predict(contexts())
    assert one.request_id != other.request_id


def test_an_error_has_the_id_of_its_body_if_a_proxy_removes_the_header() -> None:
    network, _ = answering(httpx.Response(422, json={"detail": "why", "pointer": "/k", "request_id": "abc"}))
    with Client("http://x", transport=network) as client, pytest.raises(errors.Invalid) as raised:
        client.retrieve("text")
    assert str(raised.value) == "why (at /k, request abc)"


def test_errors_point_at_items_of_the_call_not_of_one_of_its_requests(serve: Serve) -> None:
    """In octets, in JSON (long options), and in text."""
    rows, longer = contexts(7), list(range(10**6, 10**6 + 1000))
    rows[5, 2, 3] = np.inf
    texts = ["a", "b", "c", "\n", "d"]
    with Client(serve(text=HashEncoder()).url, rows=2) as client:
        for ask, pointer in (
            (lambda: client.predict(rows), "/5/2/3"),
            (lambda: client.retrieve_many(rows), "/5/2/3"),
            (lambda: client.retrieve_many(rows, exclude=longer), "/contexts/5/2/3"),
            (lambda: client.retrieve_many(texts, read_as="query"), "/texts/3"),
            (lambda: client.retrieve_many(texts), "/3/text"),
            (lambda: client.embed(texts), "/texts/3"),
            (lambda: client.retrieve_many(rows[:5], k=0), "/k"),
        ):
            with pytest.raises(errors.Invalid) as raised:
                ask()
            assert raised.value.pointer == pointer


def test_contexts_of_a_mapped_file_are_read_part_by_part(tmp_path: Path, serve: Serve) -> None:
    rows = np.memmap(tmp_path / "contexts", ">f8", "w+", shape=(7, T, D))
    rows[:] = contexts(7)
    with Client(serve().url, rows=3) as client:
        np.testing.assert_allclose(client.predict(rows).vectors, mean_of(contexts(7)), atol=1e-6)


def test_each_call_may_have_its_own_timeout() -> None:
    network, sent = answering(httpx.Response(200, content=bytes(4 * D)))
    with Client("http://x", transport=network, timeout=5, clock=lambda: 1.0) as client:
        client.predict(contexts()[0])
        client.predict(contexts()[0], timeout=9)
        client.predict(contexts()[0], timeout=None)
    assert [request.headers["x-request-timeout-ms"] for request in sent] == ["5000.000", "9000.000", "3600000.000"]


@pytest.mark.parametrize("timeout", [0, -1, np.nan, "soon", [1]])
def test_rejects_an_invalid_timeout_of_a_call(timeout: Any) -> None:
    network, sent = answering(passages())
    with Client("http://x", transport=network) as client:
        for ask in (client.models, client.articles, client.health, client.wait_ready):
            with pytest.raises(ValueError, match="timeout"):
                ask(timeout=timeout)
    assert not sent


def test_rejects_an_option_that_no_call_has() -> None:
    with Client("http://x") as client, pytest.raises(TypeError, match="reranked"):
        client.retrieve(np.ones(D), reranked=True)


def test_both_clients_have_the_same_calls() -> None:
    def signatures(kind: type) -> dict[str, list[Any]]:
        calls = {name: call for name, call in vars(kind).items() if not name.startswith("_") and name != "map"}
        return {name: [*signature(call).parameters.values()] for name, call in calls.items()}

    assert signatures(Client) == signatures(AsyncClient)


def test_async_client_has_every_call(serve: Serve) -> None:
    async def scenario(url: str) -> list[Any]:
        async with AsyncClient(url, timeout=60) as client:
            await client.wait_ready(60)
            article = await client.article(1)
            return [
                await client.health(),
                await client.models(),
                await client.articles(limit=1),
                await client.predict(CHUNKS),
                await client.retrieve("chunk 0/3", k=1),
                await client.retrieve_many(article.windows().contexts, k=1),
            ]

    health, models, articles, predicted, found, many = asyncio.run(scenario(serve(text=HashEncoder()).url))
    assert health.is_ready
    assert models.aliases
    assert articles.total == 2
    assert isinstance(predicted, Prediction)
    assert isinstance(found, Retrieval)
    assert len(many) == 10 - T


def test_async_client_embeds() -> None:
    async def scenario() -> Embeddings:
        network, _ = answering(embedded(2))
        async with AsyncClient("http://x", transport=network) as client:
            return await client.embed(["a", "b"])

    assert asyncio.run(scenario()).vectors.shape == (2, D)
