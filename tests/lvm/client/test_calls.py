"""The client against a live service and its faults; clock and random numbers are passed in."""

from __future__ import annotations

import asyncio
import gzip
import math
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import httpx
import numpy as np
import pytest

from lvm import errors
from lvm.client import MAX_ANSWER_BYTES, AsyncClient, BadAnswer, Client, Prediction, Unreachable, error_from
from lvm.transport import proxy_of
from service.http.messages import Request, problem
from tests.conftest import Running
from tests.fakes import D, Gate, T, contexts, corpus, mean_of, raises
from tests.lvm.client.network import (
    BOTH_WAYS,
    PASSAGE,
    SEARCHED,
    WHOLE,
    answering,
    busy,
    done,
    drips,
    passages,
    reads_slowly,
    says,
    speaking,
)

Serve = Callable[..., Running]


def test_returns_arrays_of_the_rank_of_the_request(serve: Serve) -> None:
    rows = contexts(3)
    with Client(serve().url) as client:
        many, one = client.predict(rows), client.predict(rows[0])
    np.testing.assert_allclose(many.vectors, mean_of(rows), atol=1e-6)
    np.testing.assert_allclose(one.vectors, mean_of(rows)[0], atol=1e-6)
    assert [made.served_by for made in many.made_by] == ["primary"]


def test_async_client_returns_the_same(serve: Serve) -> None:
    rows, url = contexts(3), serve().url

    async def ask() -> tuple[np.ndarray, list[int]]:
        async with AsyncClient(url) as client:
            predicted, found = await asyncio.gather(client.predict(rows), client.retrieve(rows[0], k=4))
            return predicted.vectors, [passage.id for passage in found]

    vectors, ids = asyncio.run(ask())
    with Client(url) as client:
        assert ids == [passage.id for passage in client.retrieve(rows[0], k=4)]
    np.testing.assert_allclose(vectors, mean_of(rows), atol=1e-6)


def test_splits_many_contexts_into_several_requests(serve: Serve) -> None:
    service, rows = serve(max_rows=4), contexts(10)
    with Client(service.url, rows=4) as client:
        np.testing.assert_allclose(client.predict(rows).vectors, mean_of(rows), atol=1e-6)
        assert client.predict(rows[:0]).vectors.shape == (0, 8)
    assert service.metric("lvm_requests_total", route="/predict", outcome="ok") == 3


def test_retrieve_many_returns_the_passages_of_each(serve: Serve) -> None:
    """In octets or, if the options are long, in JSON; more than `rows` in several requests."""
    server = serve()
    wanted = {"filter": {"article": np.array([1])}, "mmr": 0.5, "k": 3}
    with Client(server.url, timeout=60, rows=4) as client:
        for many in (corpus().vectors[:6], np.stack([corpus().vectors[at : at + T] for at in range(6)])):
            alone = [client.retrieve(rows, **wanted) for rows in many]
            assert client.retrieve_many(many, **wanted) == alone
            assert {passage.article for passages in alone for passage in passages} == {1}
            longer = {**wanted, "exclude": list(range(10**6, 10**6 + 1000))}
            assert client.retrieve_many(many, **longer) == alone
        assert client.retrieve_many(np.empty((0, T, D))) == []

    async def scenario() -> None:
        async with AsyncClient(server.url, timeout=60) as client:
            assert await client.retrieve_many(many, **wanted) == alone
            assert await client.retrieve(many[0], **wanted) == alone[0]

    asyncio.run(scenario())


def test_contexts_of_one_vector_are_sent_as_json() -> None:
    """As octets they would have the shape of queries."""
    network, sent = answering(passages([], []))
    with Client("http://service", transport=network) as client:
        assert client.retrieve_many(np.ones((2, 1, D))) == [[], []]
        assert client.retrieve_many(np.ones((2, D))) == [[], []]
    assert [request.headers["content-type"].partition(";")[0] for request in sent] == [
        "application/json",
        "application/octet-stream",
    ]
    assert sent[1].headers["content-type"].endswith(f"shape=2x1x{D}")


@pytest.mark.parametrize("results", [[], [[]], {}, [[], {}], [[], [1]], None])
def test_rejects_passages_that_are_not_those_of_each_query(results: Any) -> None:
    network, _ = answering(httpx.Response(200, json={**SEARCHED, "results": results}))
    with Client("http://service", transport=network) as client, pytest.raises(BadAnswer, match="response"):
        client.retrieve_many(np.ones((2, D)))


def test_retrieve_returns_passages_and_sends_options(serve: Serve) -> None:
    with Client(serve().url) as client:
        found = client.retrieve(corpus().vectors[3], k=2, exclude=[3, 4])
        assert len(found) == 2
        assert not {3, 4} & {passage.id for passage in found}
        assert all(passage.title.startswith("Article") and passage.text for passage in found)


def test_sends_model_and_profile(serve: Serve) -> None:
    with Client(serve().url) as client:
        assert client.predict(contexts()[0], profile="batch").made_by[0].model == "gru"
        assert client.predict(contexts()[0], model="gru").made_by[0].served_by == "fallback"


@pytest.mark.parametrize(
    ("asked", "options", "error"),
    [
        (np.full((5, 8), np.nan), {}, errors.Invalid),
        (np.zeros((4, 8)), {}, errors.ServiceError),
        (contexts()[0], {"model": "nobody"}, errors.UnknownModel),
    ],
)
def test_raises_the_error_classes_of_the_service(
    serve: Serve, asked: np.ndarray, options: dict[str, str], error: type[errors.ServiceError]
) -> None:
    with Client(serve().url) as client, pytest.raises(error) as raised:
        client.predict(asked, **options)
    assert raised.value.detail
    assert raised.value.request_id
    assert 400 <= raised.value.status < 500


def test_an_error_points_at_the_wrong_value(serve: Serve) -> None:
    rows = contexts(2)
    rows[1, 2, 3] = np.inf
    with Client(serve().url) as client, pytest.raises(errors.Invalid) as raised:
        client.predict(rows)
    assert raised.value.pointer == "/1/2/3"


def test_raises_model_failed_after_the_retries(serve: Serve) -> None:
    service = serve(amn=raises, gru=raises)
    with Client(service.url, retries=1, draw=lambda: 0.0) as client, pytest.raises(errors.Unavailable):
        client.predict(contexts()[0])
    assert service.metric("lvm_requests_total", route="/predict", outcome="model_failed") == 2


def test_client_and_service_share_the_deadline(serve: Serve) -> None:
    gate = Gate()
    service = serve(amn=gate, gru=gate)
    with Client(service.url, timeout=0.2) as client, pytest.raises(errors.Expired):
        client.predict(contexts()[0])
    gate.opened.set()
    assert service.metric("lvm_requests_total", route="/predict", outcome="expired") == 1


def test_retries_after_the_retry_after_of_a_rejection() -> None:
    network, sent = answering(busy(), busy(), done())
    with Client("http://x", transport=network, draw=lambda: 0.0) as client:
        assert client.predict(contexts()[0]).made_by[0].version == "1"
    assert len(sent) == 3


def test_never_pauses_beyond_the_deadline() -> None:
    network, sent = answering(busy(retry_after=60))
    with Client("http://x", transport=network, timeout=5) as client, pytest.raises(errors.Overloaded) as raised:
        client.predict(contexts()[0])
    assert len(sent) == 1
    assert (raised.value.retry_after, raised.value.request_id) == (60, "abc")


def test_pauses_are_random_and_double() -> None:
    drawn = count(1)
    network, sent = answering(busy(), busy(), busy(), done())
    with Client("http://x", transport=network, draw=lambda: next(drawn) * 1e-6) as client:
        client.predict(contexts()[0])
    assert len(sent) == 4
    assert next(drawn) >= 4


def test_retries_a_broken_connection_then_raises() -> None:
    network, sent = answering(httpx.ReadError("reset"), done())
    with Client("http://x", transport=network, draw=lambda: 0.0) as client:
        client.predict(contexts()[0])
    assert len(sent) == 2
    with Client("http://127.0.0.1:9", retries=1, draw=lambda: 0.0) as client, pytest.raises(Unreachable):
        client.predict(contexts()[0])


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500, 504])
def test_never_retries_what_cannot_succeed(status: int) -> None:
    network, sent = answering(httpx.Response(status, text="<html>a proxy</html>"))
    with Client("http://x", transport=network) as client, pytest.raises(errors.ServiceError) as raised:
        client.predict(contexts()[0])
    assert (len(sent), raised.value.status) == (1, status)


def test_each_try_sends_the_remaining_time() -> None:
    times = iter([100.0, 100.0, 101.0, 101.0, 102.0])
    network, sent = answering(busy(), done())
    with Client("http://x", transport=network, timeout=5, draw=lambda: 0.0, clock=lambda: next(times)) as client:
        client.predict(contexts()[0])
    assert [float(request.headers["x-request-timeout-ms"]) for request in sent] == [5000, 4000]


def test_sends_the_token() -> None:
    network, sent = answering(done())
    with Client("http://x", token="secret", transport=network) as client:
        client.predict(contexts()[0])
    assert sent[0].headers["authorization"] == "Bearer secret"


def test_every_service_error_keeps_its_class() -> None:
    def below(kind: type[errors.ServiceError]) -> set[type[errors.ServiceError]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    for kind in below(errors.ServiceError) - {Unreachable}:
        request = Request(b"POST", "/predict", b"", {})
        body = problem(request, kind.status, kind.reason, "why", [], pointer="/k").body
        error = error_from(httpx.Response(kind.status, content=body))
        assert (type(error), error.detail, error.pointer) == (kind, "why", "/k")


@pytest.mark.parametrize("shape", [(8,), (1, 1, 5, 8)])
def test_rejects_wrong_ranks_before_sending(shape: tuple[int, ...]) -> None:
    network, sent = answering(done())
    with Client("http://x", transport=network) as client, pytest.raises(ValueError, match="expected"):
        client.predict(np.zeros(shape))
    assert not sent


# ---- shapes


@pytest.mark.parametrize("shape", [(T, 2 * D), (2 * T, D), (T, 3, D), (1, 2 * T, D), (2, T, 2 * D), (D, T)])
def test_rejects_arrays_of_another_shape_than_the_nets(serve: Serve, shape: tuple[int, ...]) -> None:
    with Client(serve().url) as client, pytest.raises(errors.Invalid, match="expected"):
        client.predict(np.ones(shape))


@pytest.mark.parametrize("shape", [(T * D,), (1, D), (2 * D,), (2, D)])
def test_rejects_neither_query_nor_context(serve: Serve, shape: tuple[int, ...]) -> None:
    with Client(serve().url) as client, pytest.raises(errors.Invalid, match="expected"):
        client.retrieve(np.ones(shape))


@pytest.mark.parametrize(
    "given",
    [
        contexts(2).astype(">f4"),
        contexts(2).astype(np.float64),
        contexts(2).tolist(),
        np.asfortranarray(contexts(2)),
        np.concatenate([contexts(2)] * 2, axis=2)[..., :D],
        contexts(2)[::-1][::-1],
    ],
)
def test_sends_every_memory_layout_correctly(serve: Serve, given: Any) -> None:
    with Client(serve().url) as client:
        np.testing.assert_allclose(client.predict(given).vectors, mean_of(contexts(2)), atol=1e-6)


def test_float16_and_integers_are_sent_as_float32(serve: Serve) -> None:
    half, whole = contexts(2).astype(np.float16), np.arange(1, T * D + 1).reshape(1, T, D)
    with Client(serve().url) as client:
        for rows in (half, whole):
            expected = mean_of(rows.astype(np.float32))
            np.testing.assert_allclose(client.predict(rows).vectors, expected, atol=1e-6)


@pytest.mark.parametrize(
    "given",
    [
        b"text",
        [["1.5"]],
        ["text", 1],
        [[1, 2], [3]],
        None,
        {},
        contexts()[0] > 0,
        contexts()[0] * 1j,
        [],
        [[]],
        np.zeros((2, T, 0)),
    ],
)
def test_rejects_arrays_without_numbers(given: Any) -> None:
    network, sent = answering(done())
    with Client("http://x", transport=network) as client, pytest.raises(ValueError, match="contexts"):
        client.predict(given)
    assert not sent


# ---- the deadline


@BOTH_WAYS
@pytest.mark.parametrize(
    "speak",
    [
        drips(WHOLE[:-32] + bytes(32)),
        drips(b"HTTP/1.1 200 OK\r\nx-slow: " + b"a" * 100),
        drips(b"HTTP/1.1 100 Continue\r\n\r\n" * 5),
        lambda connection: [connection.sendall(WHOLE[:-32]), drips(bytes(40))(connection)],
        reads_slowly,
    ],
    ids=["answer", "head", "continue", "body", "request"],
)
def test_a_call_ends_at_its_deadline_if_bytes_arrive_slowly(
    ask: Callable[..., Prediction], speak: Callable[[socket.socket], None]
) -> None:
    rows = np.ones((100, 500, 8)) if speak is reads_slowly else contexts()[0]
    with speaking(speak) as url, pytest.raises(errors.Expired):
        ask(url, rows, timeout=0.3)


@BOTH_WAYS
@pytest.mark.parametrize("timeout", [None, math.inf, 1e300, 7200, 3600.001])
def test_accepts_no_timeout_and_long_timeouts(
    serve: Serve, ask: Callable[..., Prediction], timeout: float | None
) -> None:
    assert ask(serve().url, contexts()[0], timeout=timeout).vectors.shape == (D,)


@pytest.mark.parametrize(
    "policy",
    [
        *({"timeout": wrong} for wrong in (0, -1, math.nan, -math.inf, "soon", [])),
        *({"retries": wrong} for wrong in (-1, 1.5, True)),
        *({"rows": wrong} for wrong in (0, -1, None)),
    ],
)
def test_rejects_an_invalid_policy(policy: dict[str, Any]) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match=next(iter(policy))):
            kind("http://x", **policy)


def test_never_waits_for_a_long_pause_even_without_a_timeout() -> None:
    network, sent = answering(busy(retry_after=100_000))
    with Client("http://x", transport=network, timeout=None) as client, pytest.raises(errors.Overloaded):
        client.predict(contexts()[0])
    assert len(sent) == 1


def test_cancellation_stops_a_call() -> None:
    async def leave(url: str) -> None:
        async with AsyncClient(url) as client:
            call = asyncio.create_task(client.predict(contexts()[0]))
            await asyncio.sleep(0.1)
            call.cancel()
            await call

    with speaking(drips(WHOLE)) as url, pytest.raises(asyncio.CancelledError):
        asyncio.run(leave(url))


# ---- answers


@pytest.mark.parametrize(
    "answer",
    [
        done(rows=2),
        done(rows=0),
        done(dim=7),
        httpx.Response(200, content=np.full(8, np.nan, "<f4").tobytes()),
        httpx.Response(200, content=np.full(8, np.inf, "<f4").tobytes()),
        httpx.Response(200, json={"vector": [1.0] * 8}),
        httpx.Response(200, content=bytes(32), headers={"content-type": "application/octet-stream; shape=2x4"}),
        httpx.Response(200, content=bytes(32), headers={"content-type": "application/octet-stream; dtype=float16"}),
        httpx.Response(200, content=bytes(32), headers={"content-encoding": "other"}),
        httpx.Response(204),
        httpx.Response(299),
        httpx.Response(307, headers={"location": "http://elsewhere/"}),
    ],
)
def test_rejects_a_response_that_does_not_match_the_request(answer: httpx.Response) -> None:
    network, sent = answering(answer)
    with Client("http://x", transport=network) as client, pytest.raises(BadAnswer, match="response"):
        client.predict(contexts()[0])
    assert len(sent) == 1


def test_accepts_new_members_of_a_response() -> None:
    network, _ = answering(passages({**PASSAGE, "language": "en"}, more=1))
    with Client("http://x", transport=network) as client:
        assert client.retrieve(np.ones(8))[0].title == "Rabbit"


def test_passages_have_the_ids_and_metadata_of_the_corpus() -> None:
    network, _ = answering(passages(PASSAGE, {**PASSAGE, "source_id": "a-1", "metadata": {"lang": "en"}}))
    with Client("http://x", transport=network) as client:
        found = client.retrieve(np.ones(8), k=2)
    assert [(passage.source_id, passage.metadata) for passage in found] == [(None, None), ("a-1", {"lang": "en"})]


@pytest.mark.parametrize(
    "answer",
    [
        *(passages({name: value for name, value in PASSAGE.items() if name != lost}) for lost in PASSAGE),
        *(passages({**PASSAGE, name: wrong}) for name in PASSAGE for wrong in ([], True, {})),
        passages({**PASSAGE, "source_id": 1}),
        passages({**PASSAGE, "metadata": []}),
        passages(PASSAGE, PASSAGE, PASSAGE),
        passages(1),
        httpx.Response(200, json={}),
        httpx.Response(200, json=[1]),
        httpx.Response(200, json={"results": {}}),
        httpx.Response(200, content=b'{"results": [{"id": 1, "score": NaN}]}'),
        httpx.Response(200, content=b'{"results": [{"id": 1, "score": 1%s}]}' % (b"0" * 400)),
        httpx.Response(200, content=b"{"),
        httpx.Response(200, content=b"\xff"),
        httpx.Response(200, content=b"[" * 100_000),
    ],
)
def test_rejects_passages_with_missing_or_wrong_members(answer: httpx.Response) -> None:
    network, _ = answering(answer)
    with Client("http://x", transport=network) as client, pytest.raises(BadAnswer):
        client.retrieve(np.ones(8), k=2)


@BOTH_WAYS
@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\0" * 100,
        b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nnope",
        b"HTTP/1.1 503 No\r\nretry-after: \xb2\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 503 No\r\nretry-after: " + b"9" * 5000 + b"\r\ncontent-length: 0\r\n\r\n",
        b'HTTP/1.1 422 \xff\r\nx-request-id: \xff\r\ncontent-length: 11\r\n\r\n{"type": 1}',
        b"HTTP/1.1 400 No\r\ncontent-length: 9000\r\n\r\n" + b"[" * 9000,
        b"HTTP/1.1 999 No\r\ncontent-length: 2\r\n\r\n\xff\xfe",
    ],
)
def test_any_response_becomes_a_service_error(ask: Callable[..., Prediction], said: bytes) -> None:
    with speaking(says(said)) as url, pytest.raises(errors.ServiceError) as raised:
        ask(url, contexts()[0], retries=1, draw=lambda: 0.0)
    assert str(raised.value)


@BOTH_WAYS
def test_rejects_a_decompression_bomb(ask: Callable[..., Prediction]) -> None:
    body = gzip.compress(bytes(MAX_ANSWER_BYTES + 10_000))
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(body)
    with speaking(says(head + body)) as url, pytest.raises(BadAnswer, match="more than"):
        ask(url, contexts()[0], timeout=None)


def test_reads_a_compressed_response() -> None:
    body = gzip.compress(np.ones(8, "<f4").tobytes())
    network, _ = answering(httpx.Response(200, content=body, headers={"content-encoding": "gzip"}))
    with Client("http://x", transport=network) as client:
        assert client.predict(contexts()[0]).vectors.tolist() == [1.0] * 8


@pytest.mark.parametrize("failure", [RuntimeError("odd"), OSError("odd"), httpx.PoolTimeout("odd"), KeyError("odd")])
def test_network_errors_become_service_errors(failure: Exception) -> None:
    network, _ = answering(failure)
    with Client("http://x", transport=network, retries=0) as client, pytest.raises(errors.ServiceError):
        client.predict(contexts()[0])


def test_an_error_has_pointer_and_request_id(serve: Serve) -> None:
    with Client(serve().url) as client, pytest.raises(errors.Invalid) as raised:
        client.predict(np.full((T, D), np.nan))
    assert raised.value.pointer in str(raised.value)
    assert raised.value.request_id in str(raised.value)


# ---- options, addresses, proxies


@pytest.mark.parametrize(
    "ids",
    [list(range(10_000)), np.arange(10_000), {3, 4}, (3, 4), [np.int64(3)], (i for i in (3, 4)), np.array([3]), []],
)
def test_accepts_many_ids_to_exclude_of_any_type(serve: Serve, ids: Any) -> None:
    with Client(serve().url) as client:
        left = {passage.id for passage in client.retrieve(corpus().vectors[3], k=np.int64(20), exclude=ids)}
    assert 3 not in left or len(left) == 20


def test_accepts_numpy_booleans(serve: Serve) -> None:
    with Client(serve().url) as client:
        assert len(client.retrieve(corpus().vectors[2:7], k=20, exclude_context=np.bool_(False))) == 20


@pytest.mark.parametrize(
    ("options", "what"),
    [({"model": object()}, "model"), ({"model": b"amn"}, "model"), ({"traceparent": "a\r\nb: c"}, "sent")],
)
def test_rejects_options_that_cannot_be_sent(serve: Serve, options: dict[str, Any], what: str) -> None:
    with Client(serve().url) as client, pytest.raises(ValueError, match=what):
        client.predict(contexts()[0], **options)


@pytest.mark.parametrize(
    "url",
    ["", "x", "127.0.0.1:80", "ftp://x", "http://", "http://x?a=1", "http://x#a", "http://x:70000", "http://[::1", 5],
)
def test_rejects_an_invalid_url(url: Any) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="URL"):
            kind(url)


@pytest.mark.parametrize("token", ["a\nb", "caf\u00e9", 5])
def test_rejects_a_token_that_is_not_printable(token: Any) -> None:
    with pytest.raises(ValueError, match="token"):
        Client("http://x", token=token)


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://x", "http://x/predict"),
        ("http://x/", "http://x/predict"),
        ("http://x/lvm", "http://x/lvm/predict"),
        ("http://x/a/b/", "http://x/a/b/predict"),
        ("http://[::1]:81/a", "http://[::1]:81/a/predict"),
    ],
)
def test_the_path_of_the_url_is_a_prefix(url: str, asked: str) -> None:
    network, sent = answering(done())
    with Client(url, transport=network) as client:
        client.predict(contexts()[0])
    assert str(sent[0].url) == asked


@BOTH_WAYS
def test_errors_name_the_proxy_and_not_its_password(
    ask: Callable[..., Prediction], monkeypatch: pytest.MonkeyPatch
) -> None:
    with speaking(says(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n")) as proxy:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy.replace("//", "//user:secret@"))
        with pytest.raises(Unreachable) as raised:
            ask("http://service.test", contexts()[0], retries=0)
    assert f"http://service.test through the proxy {proxy}" in str(raised.value)
    assert "secret" not in str(raised.value)


@BOTH_WAYS
def test_uses_no_proxy_for_this_machine(
    serve: Serve, ask: Callable[..., Prediction], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert ask(serve().url, contexts()[0]).vectors.shape == (D,)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "a.localhost", "127.0.0.2", "[::1]", "[::ffff:127.0.0.1]"])
def test_uses_no_proxy_for_any_name_of_this_machine(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.test")
    assert proxy_of(httpx.URL(f"http://{host}:8000")) is None
    assert proxy_of(httpx.URL("http://service.test:8000")) is not None


@pytest.mark.parametrize("proxy", ["gopher://x", "http://[::1"])
def test_rejects_an_invalid_proxy(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="proxy"):
            kind("http://service.test")


# ---- lifetime


def test_rejects_calls_of_a_closed_client(serve: Serve) -> None:
    client = Client(serve().url)
    client.close()
    client.close()
    with pytest.raises(ValueError, match="closed"):
        client.predict(contexts()[0])

    async def late() -> None:
        client = AsyncClient("http://x")
        await client.close()
        await client.retrieve(np.ones(8))

    with pytest.raises(ValueError, match="closed"):
        asyncio.run(late())


def test_threads_share_a_client(serve: Serve) -> None:
    rows = contexts(40)
    with Client(serve().url, timeout=None) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: client.predict(one).vectors, rows))
    np.testing.assert_allclose(answers, mean_of(rows), atol=1e-6)
