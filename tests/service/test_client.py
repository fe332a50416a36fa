"""The client against the live service, its faults included; time and chance passed in where they decide."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count

import httpx
import numpy as np
import pytest

from service import errors
from service.client import AsyncClient, Client, Unreachable, error_of
from tests.conftest import Running
from tests.fakes import Gate, contexts, corpus, mean_of, raises

Serve = Callable[..., Running]


def answering(*replies: httpx.Response | Exception) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    """Return a network that gives `replies` in turn, and what was sent over it."""
    sent: list[httpx.Request] = []

    def reply(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        answer = replies[min(len(sent), len(replies)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return httpx.MockTransport(reply), sent


def busy(retry_after: int = 0) -> httpx.Response:
    """Return a refusal as the service gives it."""
    body = {"type": "urn:lvm:problem:overloaded", "detail": "the queue is full"}
    return httpx.Response(503, json=body, headers={"retry-after": str(retry_after), "x-request-id": "abc"})


def done(rows: int = 1, dim: int = 8) -> httpx.Response:
    """Return next vectors of zeros."""
    headers = {"x-model": "amn", "x-model-version": "1", "x-served-by": "primary"}
    return httpx.Response(200, content=np.zeros((rows, dim), "<f4").tobytes(), headers=headers)


def test_arrays_go_in_and_arrays_of_the_same_rank_come_out(serve: Serve) -> None:
    rows = contexts(3)
    with Client(serve().url) as client:
        many, one = client.predict(rows), client.predict(rows[0])
    np.testing.assert_allclose(many.vectors, mean_of(rows), atol=1e-6)
    np.testing.assert_allclose(one.vectors, mean_of(rows)[0], atol=1e-6)
    assert [made.served_by for made in many.made_by] == ["primary"]


def test_asyncio_gets_the_same_answers(serve: Serve) -> None:
    rows, url = contexts(3), serve().url

    async def ask() -> tuple[np.ndarray, list[int]]:
        async with AsyncClient(url) as client:
            predicted, found = await asyncio.gather(client.predict(rows), client.retrieve(rows[0], k=4))
            return predicted.vectors, [passage.id for passage in found]

    vectors, ids = asyncio.run(ask())
    with Client(url) as client:
        assert ids == [passage.id for passage in client.retrieve(rows[0], k=4)]
    np.testing.assert_allclose(vectors, mean_of(rows), atol=1e-6)


def test_more_contexts_than_a_request_takes_are_sent_in_several(serve: Serve) -> None:
    service, rows = serve(max_rows=4), contexts(10)
    with Client(service.url, rows=4) as client:
        np.testing.assert_allclose(client.predict(rows).vectors, mean_of(rows), atol=1e-6)
        assert client.predict(rows[:0]).vectors.shape == (0, 8)
    assert service.metric("lvm_requests_total", route="/predict", outcome="ok") == 3


def test_passages_have_names_and_options_are_the_routes(serve: Serve) -> None:
    with Client(serve().url) as client:
        found = client.retrieve(corpus().vectors[3], k=2, exclude=[3, 4])
        assert len(found) == 2
        assert not {3, 4} & {passage.id for passage in found}
        assert all(passage.title.startswith("Article") and passage.text for passage in found)


def test_the_model_and_the_profile_are_passed_on(serve: Serve) -> None:
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
def test_errors_are_the_classes_that_the_service_raised(
    serve: Serve, asked: np.ndarray, options: dict[str, str], error: type[errors.ServiceError]
) -> None:
    with Client(serve().url) as client, pytest.raises(error) as raised:
        client.predict(asked, **options)
    assert raised.value.detail
    assert raised.value.request_id
    assert 400 <= raised.value.status < 500


def test_a_pointer_says_which_value_is_wrong(serve: Serve) -> None:
    rows = contexts(2)
    rows[1, 2, 3] = np.inf
    with Client(serve().url) as client, pytest.raises(errors.Invalid) as raised:
        client.predict(rows)
    assert raised.value.pointer == "/1/2/3"


def test_both_nets_failing_is_told_after_the_retries(serve: Serve) -> None:
    service = serve(amn=raises, gru=raises)
    with Client(service.url, retries=1, draw=lambda: 0.0) as client, pytest.raises(errors.Unavailable):
        client.predict(contexts()[0])
    assert service.metric("lvm_requests_total", route="/predict", outcome="model_failed") == 2


def test_a_deadline_is_the_callers_and_the_services(serve: Serve) -> None:
    gate = Gate()
    service = serve(amn=gate, gru=gate)
    with Client(service.url, timeout=0.2) as client, pytest.raises(errors.Expired):
        client.predict(contexts()[0])
    gate.opened.set()
    assert service.metric("lvm_requests_total", route="/predict", outcome="expired") == 1


def test_a_refusal_is_asked_again_after_what_it_asks_for() -> None:
    network, sent = answering(busy(), busy(), done())
    with Client("http://x", transport=network, draw=lambda: 0.0) as client:
        assert client.predict(contexts()[0]).made_by[0].version == "1"
    assert len(sent) == 3


def test_no_pause_outlives_the_deadline() -> None:
    network, sent = answering(busy(retry_after=60))
    with Client("http://x", transport=network, timeout=5) as client, pytest.raises(errors.Overloaded) as raised:
        client.predict(contexts()[0])
    assert len(sent) == 1
    assert (raised.value.retry_after, raised.value.request_id) == (60, "abc")


def test_pauses_are_random_and_may_double() -> None:
    drawn = count(1)
    network, sent = answering(busy(), busy(), busy(), done())
    with Client("http://x", transport=network, draw=lambda: next(drawn) * 1e-6) as client:
        client.predict(contexts()[0])
    assert len(sent) == 4
    assert next(drawn) >= 4


def test_a_broken_connection_is_asked_again_and_then_told() -> None:
    network, sent = answering(httpx.ReadError("reset"), done())
    with Client("http://x", transport=network, draw=lambda: 0.0) as client:
        client.predict(contexts()[0])
    assert len(sent) == 2
    with Client("http://127.0.0.1:9", retries=1, draw=lambda: 0.0) as client, pytest.raises(Unreachable):
        client.predict(contexts()[0])


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500, 504])
def test_what_cannot_pass_is_asked_once(status: int) -> None:
    network, sent = answering(httpx.Response(status, text="<html>a proxy</html>"))
    with Client("http://x", transport=network) as client, pytest.raises(errors.ServiceError) as raised:
        client.predict(contexts()[0])
    assert (len(sent), raised.value.status) == (1, status)


def test_each_try_carries_the_time_that_is_left() -> None:
    times = iter([100.0, 100.0, 101.0, 101.0, 102.0])
    network, sent = answering(busy(), done())
    with Client("http://x", transport=network, timeout=5, draw=lambda: 0.0, clock=lambda: next(times)) as client:
        client.predict(contexts()[0])
    assert [float(request.headers["x-request-timeout-ms"]) for request in sent] == [5000, 4000]


def test_a_token_goes_along() -> None:
    network, sent = answering(done())
    with Client("http://x", token="secret", transport=network) as client:
        client.predict(contexts()[0])
    assert sent[0].headers["authorization"] == "Bearer secret"


def test_every_error_of_the_service_comes_back_as_itself() -> None:
    def below(kind: type[errors.ServiceError]) -> set[type[errors.ServiceError]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    for kind in below(errors.ServiceError) - {Unreachable}:
        body = errors.problem(kind.status, kind.reason, "why", "id", pointer="/k")
        error = error_of(httpx.Response(kind.status, content=body))
        assert (type(error), error.detail, error.pointer) == (kind, "why", "/k")


@pytest.mark.parametrize("shape", [(8,), (1, 1, 5, 8)])
def test_other_ranks_are_refused_before_anything_is_sent(shape: tuple[int, ...]) -> None:
    network, sent = answering(done())
    with Client("http://x", transport=network) as client, pytest.raises(ValueError, match="want"):
        client.predict(np.zeros(shape))
    assert not sent
