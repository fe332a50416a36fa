"""The door under pressure: who is refused, how, on what connection, and that nothing stays reserved."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from service.http.asgi import Message, serve
from service.http.auth import Tokens
from service.http.connection import Incoming
from service.http.gateway import Gateway, Route, State
from service.http.messages import Request, Response
from service.overload.admission import Admission, Permit
from service.overload.limiter import FixedLimit
from service.settings import Settings
from service.telemetry.log import AccessLog
from service.telemetry.metrics import Metrics
from tests.conftest import Running, until
from tests.fakes import Gate, contexts, octets_of

Serve = Callable[..., Running]
HEAD = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\n"
BODY = contexts()[0].tobytes()
LENGTH = b"content-length: %d\r\n"
REQUEST = HEAD + LENGTH % len(BODY) + b"\r\n" + BODY
OTHER = "127.0.0.2"


@contextmanager
def connected(server: Running, address: str = "") -> Iterator[socket.socket]:
    """Connect, from the loopback `address` if one is given."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60, source_address=(address, 0)) as connection:
        yield connection


def answer(connection: socket.socket) -> tuple[int, dict[bytes, bytes], bytes]:
    """Read one whole answer and no more: status, headers, body."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connection.recv(1) or b"\r\n\r\n"
    lines = head.split(b"\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines[1:])}
    body = connection.recv(int(headers[b"content-length"]), socket.MSG_WAITALL)
    return int(lines[0].split()[1]), headers, body


@contextmanager
def saturated(serve: Serve, **settings: Any) -> Iterator[Running]:
    """Serve with room for one row, which a request of a net that does not answer takes."""
    gate = Gate()
    server = serve(amn=gate, gru=gate, timeout_ms=60_000, **{"concurrency": 1, **settings})
    try:
        with connected(server) as connection:
            connection.sendall(REQUEST)
            until(gate.entered.is_set, "the first request to run")
            yield server
            gate.opened.set()
            assert answer(connection)[0] == 200
    finally:
        gate.opened.set()
    is_empty(server)


def is_empty(server: Running) -> None:
    """Wait until nothing is reserved."""
    known = server.app.state.admission
    until(lambda: (known.rows, known.size, known.clients) == (0, 0, {}), "all to be given back")


def test_rejects_on_the_head_and_keeps_the_connection(serve: Serve) -> None:
    with saturated(serve) as server, connected(server) as connection:
        connection.sendall(HEAD + LENGTH % len(BODY) + b"\r\n")
        status, headers, body = answer(connection)
        assert (status, json.loads(body)["type"]) == (503, "urn:lvm:problem:overloaded")
        assert int(headers[b"retry-after"]) >= 1
        assert json.loads(body)["request_id"] == headers[b"x-request-id"].decode()
        connection.sendall(BODY + REQUEST)
        status, again, body = answer(connection)
        assert (status, json.loads(body)["request_id"]) == (503, again[b"x-request-id"].decode())
        assert again[b"x-request-id"] != headers[b"x-request-id"]
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert answer(connection)[0] == 200
        assert server.metric("lvm_requests_total", route="/predict", outcome="overloaded") == 2
        assert server.metric("lvm_refusals_total", reason="rows") == 2


@pytest.mark.parametrize("is_full", [True, False])
@pytest.mark.parametrize("body", [BODY, BODY[:-4], BODY[:-4] + b"\0\0\xc0\x7f"], ids=["right", "short", "nan"])
def test_a_request_leaves_nothing_to_the_garbage_collector(serve: Serve, body: bytes, is_full: bool) -> None:
    """Garbage in cycles, a little a request, stops all the others for a tenth of a second every few."""
    with ExitStack() as stack:
        server = stack.enter_context(saturated(serve)) if is_full else serve()
        connection = stack.enter_context(connected(server))

        expected = 503 if is_full else {BODY: 200, BODY[:-4]: 400}.get(body, 422)

        def ask(count: int) -> None:
            for _ in range(count):
                connection.sendall(HEAD + LENGTH % len(body) + b"\r\n" + body)
                assert answer(connection)[0] == expected

        gc.collect()
        stack.callback(gc.enable)
        gc.disable()
        ask(100)
        left = sum(isinstance(each, Incoming) for each in gc.get_objects())
        assert left < 10, "requests that only the collector would let go of"


def test_a_rejection_keeps_the_request_id_and_the_protocols_error_member(serve: Serve) -> None:
    with saturated(serve) as server:
        got = server.http.post("/v2/models/primary/infer", json={}, headers={"X-Request-ID": "mine"})
        assert (got.status_code, got.headers["x-request-id"], got.json()["request_id"]) == (503, "mine", "mine")
        assert got.json()["error"]


@pytest.mark.parametrize(
    "head",
    [
        LENGTH % 2_000_000 + b"\r\n" + b"x" * 5000,
        LENGTH % len(BODY) + b"expect: 100-continue\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n",
    ],
    ids=["long", "expecting", "chunked"],
)
def test_closes_after_a_rejection_if_the_body_may_be_long_or_never_arrive(serve: Serve, head: bytes) -> None:
    with saturated(serve) as server, connected(server) as connection:
        connection.sendall(HEAD + head)
        status, headers, _ = answer(connection)
        assert (status, headers[b"connection"]) == (503, b"close")
        assert connection.recv(1) == b""


def test_a_pipelined_request_holds_no_rows_before_its_turn(serve: Serve) -> None:
    gate = Gate()
    server = serve(amn=gate, gru=gate, timeout_ms=60_000, concurrency=1)
    with connected(server) as connection:
        connection.sendall(REQUEST * 2)
        until(gate.entered.is_set, "the first request to run")
        gate.opened.set()
        assert [answer(connection)[0] for _ in range(2)] == [200, 200]
    is_empty(server)


def test_probes_models_and_metrics_are_answered_under_overload(serve: Serve) -> None:
    with saturated(serve) as server:
        for path in ("/livez", "/readyz", "/healthz", "/models", "/v2/health/ready", "/metrics"):
            assert server.http.get(path).status_code == 200
        text = server.http.get("/metrics").text
        assert "lvm_in_flight_rows 1.0" in text or "lvm_in_flight_rows 1" in text
        assert "lvm_limit_rows 1" in text


def test_rejects_a_chunked_body_that_outgrows_the_room(serve: Serve) -> None:
    server = serve(max_in_flight_mb=0.001)
    with connected(server) as first, connected(server) as second:
        first.sendall(HEAD + LENGTH % 900 + b"\r\n")
        until(lambda: server.app.state.admission.size == 900, "the first body to be reserved")
        second.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n40\r\n" + b"x" * 64 + b"\r\n")
        until(lambda: server.app.state.admission.size == 964, "the chunk to be reserved")
        second.sendall(b"40\r\n" + b"x" * 64 + b"\r\n")
        status, headers, body = answer(second)
        assert (status, json.loads(body)["type"]) == (503, "urn:lvm:problem:overloaded")
        assert headers[b"connection"] == b"close"
        assert server.metric("lvm_refusals_total", reason="bytes") == 1
    is_empty(server)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127/8 on its loopback")
def test_rejects_a_client_over_its_share_and_admits_one_below(serve: Serve) -> None:
    gate = Gate()
    server = serve(amn=gate, gru=gate, timeout_ms=60_000, concurrency=4, max_batch=1)
    many = len(BODY) * 4
    with connected(server) as hog, connected(server) as again, connected(server, OTHER) as small:
        head = HEAD.replace(b"octet-stream", b"octet-stream; shape=4x5x8")
        hog.sendall(head + LENGTH % many + b"\r\n" + BODY * 4)
        until(gate.entered.is_set, "the first request to run")
        small.sendall(REQUEST)
        until(lambda: server.app.state.admission.rows == 5, "the other client to be let in")
        again.sendall(REQUEST)
        status, headers, body = answer(again)
        assert (status, json.loads(body)["type"]) == (429, "urn:lvm:problem:client_limit")
        assert int(headers[b"retry-after"]) >= 1
        gate.opened.set()
        assert (answer(hog)[0], answer(small)[0]) == (200, 200)
        assert server.metric("lvm_requests_total", route="/predict", outcome="client_limit") == 1
    is_empty(server)


def test_every_request_is_released_and_counted_once_however_it_ends(serve: Serve) -> None:
    server = serve(receive_s=0.3, max_body_mb=0.01)
    fates = {
        "ok": REQUEST,
        "malformed": HEAD + LENGTH % 3 + b"\r\nabc",
        "unsupported_media_type": REQUEST.replace(b"octet-stream", b"elsewhat"),
        "too_large": HEAD + LENGTH % 10**6 + b"\r\n",
        "too_slow": HEAD + LENGTH % len(BODY) + b"\r\n" + BODY[:9],
        "invalid": REQUEST.replace(b"\r\nhost", b"\r\nx-request-timeout-ms: 0\r\nhost"),
        "cancelled": HEAD + LENGTH % len(BODY) + b"\r\n" + BODY[:9],
    }
    for fate, sent in fates.items():
        with connected(server) as connection:
            connection.sendall(sent)
            if fate != "cancelled":
                answer(connection)
            else:
                until(lambda: server.app.state.admission.size == len(BODY), "the body to be reserved")
    until(lambda: server.metric("lvm_requests_total", route="/predict", outcome="cancelled"), "the last to be counted")
    assert {f: server.metric("lvm_requests_total", route="/predict", outcome=f) for f in fates} == dict.fromkeys(
        fates, 1
    )
    is_empty(server)


def test_releases_everything_of_clients_that_disconnect(serve: Serve) -> None:
    gate = Gate()
    server = serve(amn=gate, gru=gate, timeout_ms=60_000)

    def counted() -> float:
        return sum(server.metric("lvm_requests_total", route="/predict", outcome=o) for o in ("ok", "cancelled"))

    with connected(server) as pipelined:
        with connected(server) as running, connected(server) as sending:
            running.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it leaves by a reset
            running.sendall(REQUEST)
            pipelined.sendall(REQUEST * 5)
            sending.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n")
            until(lambda: server.app.state.admission.size == 6 * len(BODY) + 5, "all to be reserved")
            assert server.app.state.admission.rows == 2
        until(lambda: server.app.state.admission.size == 5 * len(BODY), "those who left to be noticed")
        assert server.app.state.admission.rows == 1
    gate.opened.set()  # a pipeline that waits for an answer is not read, and not seen to end
    is_empty(server)
    until(lambda: counted() == 7, "all to be counted")
    assert server.metric("lvm_requests_total", route="/predict", outcome="cancelled") >= 2


def test_concurrent_requests_are_answered_or_rejected_and_counted(serve: Serve) -> None:
    server = serve(concurrency=3)

    async def storm() -> list[int]:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            sent = [(rows.tobytes(), octets_of(rows)) for rows in map(contexts, [1, 2, 3] * 20)]
            posts = [client.post("/predict", content=content, headers=headers) for content, headers in sent]
            return [reply.status_code for reply in await asyncio.gather(*posts)]

    statuses = asyncio.run(storm())
    assert set(statuses) <= {200, 503}
    for outcome, status in (("ok", 200), ("overloaded", 503)):
        assert server.metric("lvm_requests_total", route="/predict", outcome=outcome) == statuses.count(status)
    is_empty(server)


def test_admission_holds_under_asgi() -> None:
    known = Admission(FixedLimit(1), Settings(), Metrics())

    async def handler(request: Request) -> Response:
        assert (known.rows, known.size) == (1, len(request.body))
        request.set_rows(2)
        return Response(b"{}", b"application/json", [])

    route = Route("/predict", handler, max_body=1000, is_admitted=True)
    gateway = Gateway(
        lambda method, path: route,
        timeout_ms=1000,
        state=State(),
        tokens=Tokens({}),
        admission=known,
        metrics=Metrics(),
        access=AccessLog(0),
    )

    async def ask(*bodies: bytes) -> int:
        parts = [{"type": "http.request", "body": body, "more_body": True} for body in bodies]
        messages: list[Any] = [*parts, {"type": "http.disconnect"}] if b"gone" in bodies else [*parts]
        if b"gone" not in bodies:
            messages[-1]["more_body"] = False
        sent: list[Message] = []

        async def receive() -> Message:
            return messages.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/octet-stream")]
        scope = {
            "method": "POST",
            "path": "/predict",
            "query_string": b"",
            "headers": headers,
            "client": ("192.0.2.1", 1),
        }
        await serve(gateway, scope, receive, send)
        return sent[0]["status"] if sent else 0

    assert asyncio.run(ask(b"x" * 40, b"x" * 40)) == 200
    assert asyncio.run(ask(b"x", b"gone")) == 0
    other = Permit(known, "192.0.2.1")
    other.set_rows(1)
    assert asyncio.run(ask(b"x")) == 503
    other.release()
    assert (known.rows, known.size, known.clients) == (0, 0, {})
