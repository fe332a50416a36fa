"""Servers that lie: whatever a response holds, a call returns what it promises, or raises a `ServiceError`."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import partial, reduce
from operator import getitem
from typing import Any

import httpx
import numpy as np
import pytest

from lvm.client import BadAnswer, Client, ServiceError
from tests.fakes import D, T, contexts
from tests.lvm.client.network import PASSAGE, SEARCHED, answering, says, speaking
from tests.lvm.client.test_routes import encoded

MAKER = {"model": "amn", "version": "1", "served_by": "primary", "fallback_reason": None}
TEXT = {"read_as": "context", "chunks": ["a"], "truncated": [{"index": 0}], "unread": [{"index": 0, "share": 0.5}]}
FOUND = {**PASSAGE, "source_id": "a", "metadata": {"lang": "en", "year": 5}, "rerank_score": 0.5}
CHUNK = {"id": 1, "position": 0, "text": None, "source_id": "a", "metadata": {"a": 1}, "vector": encoded(np.ones(D))[0]}
VECTORS = encoded(np.ones(D), np.ones(D))
ALIAS = {"id": "amn/1", "since": "now", "breaker": "closed", "warning": None, "refused": {"id": "a", "reason": "b"}}
VERSION = {"id": "amn/1", "model": "amn", "version": "1", "kind": "net", "dim": 8}
CALLS: dict[str, tuple[Callable[[Client], Any], dict[str, Any]]] = {
    "predict": (lambda client: client.predict("a"), {"vector": encoded(np.ones(D))[0], **MAKER, **TEXT}),
    "retrieve": (lambda client: client.retrieve(np.ones(D), k=2), {"results": [FOUND], **SEARCHED, **MAKER, **TEXT}),
    "retrieve_many": (lambda client: client.retrieve_many(np.ones((1, D))), {"results": [[FOUND]], **SEARCHED}),
    "embed": (
        lambda client: client.embed(["a", "b"]),
        {"vectors": VECTORS, "encoder": "fake", "dimensions": D, "truncated": [True, False], "unread": [0.5, 0]},
    ),
    "chunks": (
        lambda client: client.embed("a b", chunks=True),
        {"vectors": VECTORS, "encoder": "fake", "dimensions": D, "truncated": [True, False], "unread": [0.5, 0]}
        | {"chunks": ["a", "b"]},
    ),
    "articles": (
        lambda client: client.articles(limit=2),
        {"corpus": "wiki", "corpus_version": "1", "total": 1}
        | {"articles": [{"article": 1, "title": "Rabbit", "chunks": 5}]},
    ),
    "article": (
        lambda client: client.article(1).windows(),
        {"corpus": "wiki", "corpus_version": "1", "article": 1, "title": "Rabbit", "encoder": "fake", "dim": D}
        | {"context_length": T, "chunks": [CHUNK] * (T + 1)},
    ),
    "models": (
        lambda client: client.models(),
        {"aliases": {"primary": ALIAS}, "encoder": {"name": "fake", "missing": None}, "versions": [VERSION]},
    ),
    "health": (lambda client: client.health(), {"status": "live"}),
}
WRONG = [
    None,
    True,
    -1,
    0,
    7,
    0.5,
    2**70,
    10**400,
    math.nan,
    math.inf,
    "",
    "x",
    "\u00e9",
    [],
    [[]],
    [None],
    {},
    {"a": {}},
]


def places(found: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value in JSON, the whole included."""
    yield place
    items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for name, value in items:
        yield from places(value, (*place, name))


def lies(body: Any) -> Iterator[bytes]:
    """Yield bodies with a value that is wrong, missing or there twice, at every place."""
    for *path, last in ((0, *place) for place in places(body)):
        for change in (*(partial(_put, wrong) for wrong in WRONG), _remove, _repeat):
            whole = [copy.deepcopy(body)]
            change(reduce(getitem, path, whole), last)
            yield json.dumps(whole[0] if whole else None).encode()


def _put(value: Any, parent: Any, name: Any) -> None:
    parent[name] = value


def _remove(parent: Any, name: Any) -> None:
    del parent[name]


def _repeat(parent: Any, name: Any) -> None:
    if isinstance(parent, list):
        parent.append(parent[name])


@pytest.mark.parametrize("name", CALLS)
def test_a_response_with_one_wrong_value_is_an_answer_or_an_error(name: str) -> None:
    ask, body = CALLS[name]
    current = [b""]
    network = httpx.MockTransport(lambda request: httpx.Response(200, content=current[0]))
    rejected = 0
    with Client("http://x", transport=network, retries=0) as client:
        for current[0] in lies(body):
            try:
                ask(client)
            except BadAnswer:
                rejected += 1
    assert rejected > len(WRONG)


@pytest.mark.parametrize("vector", [np.full(D, np.nan), np.full(D, np.inf), np.ones(D - 1), np.ones(D + 1), np.ones(0)])
@pytest.mark.parametrize("name", ["embed", "chunks", "article"])
def test_rejects_vectors_that_are_not_finite_or_have_another_length(name: str, vector: np.ndarray) -> None:
    ask, body = CALLS[name]
    network, _ = answering(httpx.Response(200, text=json.dumps(body).replace(VECTORS[0], encoded(vector)[0], 1)))
    with Client("http://x", transport=network) as client, pytest.raises(BadAnswer, match="vector"):
        ask(client)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "health"])
def test_the_response_before_it_is_changed_is_an_answer(name: str) -> None:
    ask, body = CALLS[name]
    network, _ = answering(httpx.Response(200, json=body))
    with Client("http://x", transport=network) as client:
        ask(client)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"\xff", b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}", b'"' + b"x" * 10_000]
)
def test_a_response_that_is_no_object_is_an_error(name: str, content: bytes) -> None:
    network, _ = answering(httpx.Response(200, content=content))
    with Client("http://x", transport=network, retries=0) as client, pytest.raises(BadAnswer) as raised:
        CALLS[name][0](client)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"HTTP/1.1 503 No\r\nretry-after: -1\r\ncontent-length: 4\r\n\r\nnull",
        b"HTTP/1.1 500 No\r\ncontent-length: 33\r\n\r\n" + b'{"detail": [1], "request_id": {}}',
    ],
)
def test_half_a_response_is_an_error_of_every_call(name: str, said: bytes) -> None:
    if name == "health" and b" 503 " in said:
        pytest.skip("health says that the service is not ready")
    with speaking(says(said)) as url, Client(url, retries=0) as client, pytest.raises(ServiceError) as raised:
        CALLS[name][0](client)
    assert raised.value.request_id


def test_what_a_response_says_is_cut_and_free_of_control_characters() -> None:
    problem = {"detail": "\x1b[31mred\n" + "x" * 10**6, "pointer": "/" + "y" * 10**6, "request_id": "\0" * 10**4}
    network, _ = answering(httpx.Response(422, json=problem))
    with Client("http://x", transport=network) as client, pytest.raises(ServiceError) as raised:
        client.predict(contexts())
    assert len(str(raised.value)) < 6000
    assert str(raised.value).isprintable()


def test_vectors_of_an_answer_can_be_changed() -> None:
    """Other libraries warn of arrays that they could not change."""
    network, _ = answering(httpx.Response(200, content=np.ones(D, "<f4").tobytes()))
    with Client("http://x", transport=network) as client:
        vectors = client.predict(contexts()[0]).vectors
    vectors *= 2
    assert vectors.tolist() == [2.0] * D
