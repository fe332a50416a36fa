"""The socket: limits on what callers may send and how slowly, over raw connections."""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep

import pytest

from service.app import create_app
from service.http.connection import Incoming
from service.settings import Settings
from tests.conftest import PATIENCE_S, Running, running, until
from tests.fakes import FakeLoader, Gate, contexts, octets_of, registry_of

Serve = Callable[..., Running]


def exchange(server: Running, *parts: bytes) -> bytes:
    """Send `parts` and read until the server closes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        for part in parts:
            connection.sendall(part)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return received


def problem(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["type"].rpartition(":")[2]


@pytest.mark.parametrize("header", [b"x: " + b"y" * 20_000, b"\r\n".join(b"h%d: v" % i for i in range(3000))])
def test_rejects_headers_over_16_kib(serve: Serve, header: bytes) -> None:
    server = serve()
    answer = exchange(server, b"POST /predict HTTP/1.1\r\nhost: x\r\n", header, b"\r\n\r\n")
    assert problem(answer) == (431, "headers_too_large")
    assert server.metric("lvm_requests_total", route="other", outcome="headers_too_large") == 1


def test_a_client_that_sends_all_before_it_reads_gets_its_rejection(serve: Serve) -> None:
    host, port = serve().url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n")
        for _ in range(20):
            sleep(0.04)
            connection.sendall(b" " * 1000)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    assert problem(received) == (413, "too_large")


def test_a_rejection_of_head_has_no_body(serve: Serve) -> None:
    answer = exchange(serve(), b"HEAD /livez HTTP/1.1\r\nx: " + b"y" * 20_000 + b"\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert body == b""


def test_rejects_an_endless_header_before_it_ends(serve: Serve) -> None:
    assert problem(exchange(serve(), b"GET / HTTP/1.1\r\nx: " + b"y" * 40_000)) == (431, "headers_too_large")


def test_a_request_that_is_complete_in_time_is_not_too_slow(serve: Serve) -> None:
    """The last byte arrives in the very turn of the event loop in which the request is found to be late."""
    server = serve()
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"context": contexts(1)[0].tolist()}).encode()
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as caller:
        caller.sendall(head % len(body) + body[:-1])
        until(lambda: server.app.state.admission.size > 0, "the body")
        connection = next(iter(server.server.server_state.connections))
        late = monotonic() + 1
        connection.loop.call_soon_threadsafe(
            lambda: (connection.close_if_slow(late, 0), connection.data_received(body[-1:]))
        )
        assert caller.recv(65536).startswith(b"HTTP/1.1 200")
        caller.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert caller.recv(65536).startswith(b"HTTP/1.1 200")
    assert server.metric("lvm_requests_total", route="other", outcome="too_slow") == 0


def test_a_rejection_reaches_a_client_that_sends_more_behind_its_request(serve: Serve) -> None:
    """To close on unread bytes would reset the connection, and the reset would discard the response."""
    server = serve(tokens="a:0123456789abcdef")
    request = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
    assert problem(exchange(server, request * 2000)[:2000])[0] == 401


@pytest.mark.parametrize(
    "sent",
    [b"POST /predict HTTP/1.1\r\nhost: x\r\n", b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"],
)
def test_answers_slow_clients_and_closes(serve: Serve, sent: bytes) -> None:
    assert problem(exchange(serve(receive_s=0.2), sent)) == (408, "too_slow")


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabc",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: +3\r\n\r\nabc",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: -3\r\n\r\nabc",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 0x3\r\n\r\nabc",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 3 3\r\n\r\nabc",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 3, 3\r\n\r\nabc",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: " + b"9" * 30 + b"\r\n\r\nabc",
        b"POST /predict HTTP/1.1\r\nhost: x\r\nx: a\r\n b\r\ncontent-length: 3\r\n\r\nabc",
        b"POST /predict HTTP/1.1\nhost: x\ncontent-length: 3\n\nabc",
        b"POST /predict HTTP/1.1\r\nhost: x\r\nx: a\rcontent-length: 3\r\n\r\nabc",
        b"POST /predict HTTP/1.1\r\nhost: x\r\nx: a\0b\r\ncontent-length: 3\r\n\r\nabc",
        b"POST /predict HTTP/1.1\r\nhost: x\r\nhost: y\r\ncontent-length: 3\r\n\r\nabc",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n+3\r\nabc\r\n0\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3 \r\nabc\r\n0\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        + b"f" * 17
        + b"\r\nabc\r\n0\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\nabc\n0\n\n",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n",
    ],
)
def test_rejects_malformed_and_smuggled_requests(serve: Serve, sent: bytes) -> None:
    assert problem(exchange(serve(), sent)) == (400, "malformed")


def test_closes_hundreds_of_silent_sockets_while_others_are_served(serve: Serve) -> None:
    server = serve(receive_s=0.5)
    host, port = server.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        address = host, int(port)
        silent = [stack.enter_context(socket.create_connection(address, timeout=PATIENCE_S)) for _ in range(400)]
        assert server.http.get("/readyz").status_code == 200
        assert [connection.recv(1) for connection in silent] == [b""] * 400
    assert server.app.state.admission.clients == {}


def test_accepts_a_body_longer_than_the_head_limit(serve: Serve) -> None:
    batch = contexts(400)
    answer = serve().http.post("/predict", content=batch.tobytes(), headers=octets_of(batch))
    assert len(answer.json()["vectors"]) == 400


def test_pipelined_requests_are_answered_in_order(serve: Serve) -> None:
    server = serve()
    body = contexts()[0].tobytes()
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\nx-request-id: %s\r\n"
    head += b"content-length: %d\r\n" % len(body)
    answer = exchange(
        server,
        b"".join(head % b"n%d" % n + b"\r\n" + body for n in range(4))
        + head % b"n4"
        + b"connection: close\r\n\r\n"
        + body,
    )
    ids = [line for line in answer.split(b"\r\n") if line.startswith(b"x-request-id")]
    assert ids == [b"x-request-id: n%d" % n for n in range(5)]


HEAD = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\n"


def test_a_lone_surrogate_in_a_key_is_answered_and_counted(serve: Serve) -> None:
    server = serve()
    got = server.http.post("/predict", content=b'{"\\ud800": 1}', headers={"content-type": "application/json"})
    assert (got.status_code, got.json()["pointer"]) == (422, "/?")
    assert server.metric("lvm_requests_total", route="/predict", outcome="invalid") == 1


@pytest.mark.parametrize(
    ("method", "path", "more"),
    [
        (b"POST", b"/predict", b"accept: application/octet-stream\r\n"),
        (b"POST", b"/pre%64ict?model=fallback", b"x-request-id: mine\r\nx: a\r\nx: b\r\n"),
        (b"POST", b"/predict", b"upgrade: h2c\r\nconnection: upgrade\r\n"),
        (b"POST", b"/predict", b"expect: 100-continue\r\n"),
        (b"POST", b"/unknown", b""),
        (b"GET", b"/livez", b""),
    ],
)
def test_answers_a_head_that_is_sent_again_as_the_first_time(
    serve: Serve, method: bytes, path: bytes, more: bytes
) -> None:
    server = serve()
    host, port = server.url.removeprefix("http://").split(":")
    bodies = [contexts(3, seed=seed)[0].tobytes() for seed in (1, 1, 2, 1, 1)]
    head = method + b" " + path + HEAD.removeprefix(b"POST /predict") + more
    head += b"content-length: %d\r\n\r\n" % len(bodies[0])
    answers = []
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        for body in bodies:
            connection.sendall(head + body)
            answers.append(read_response(connection))
        connection.sendall(head)
        connection.sendall(bodies[0])
        answers.append(read_response(connection))
    (status, first), (_, again), (_, other), *rest = answers
    assert first == again
    assert {answer[0] for answer in answers} == {status}
    assert (other != first) == (status == 200 and method == b"POST")
    assert [body for _, body in rest] == [first] * len(rest)


def read_response(connection: socket.socket) -> tuple[int, object]:
    """Return the status and body of the next response; of JSON, without what differs between requests."""
    with connection.makefile("rb") as received:
        while (status := int(received.readline().split()[1])) == 100:
            assert received.readline() == b"\r\n"
        headers = dict(line.rstrip().split(b": ", 1) for line in iter(received.readline, b"\r\n"))
        body = received.read(int(headers[b"content-length"]))
    if not headers[b"content-type"].endswith(b"json"):
        return status, body
    changing = ("request_id", "timing_ms")
    return status, {name: value for name, value in json.loads(body).items() if name not in changing}


def test_a_head_is_known_only_from_its_start(serve: Serve) -> None:
    """What an earlier request left behind does not turn other bytes into a request."""
    body = contexts()[0].tobytes()
    request = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    first = HEAD + b"content-length: 2\r\n\r\n{}"
    server = serve()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        for sent in (first, b"\r\n\r\n\r\n", b"\r\n\r\n" + request, b"\r\n\r\n" + request):
            connection.sendall(sent)
            sleep(0.05)
        assert read_response(connection)[0] == 400
    assert server.metric("lvm_requests_total", route="/predict", outcome="malformed") == 1
    until(lambda: server.metric("lvm_requests_total", route="/predict", outcome="ok") == 2, "the others")


def test_rejects_a_request_without_a_host(serve: Serve) -> None:
    assert problem(exchange(serve(), b"GET /livez HTTP/1.1\r\n\r\n")) == (400, "malformed")


def test_rejects_endless_trailers(serve: Serve) -> None:
    body = contexts()[0].tobytes()
    chunked = HEAD + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n"
    answer = exchange(serve(), chunked, b"t: " + b"x" * 9000 + b"\r\n", b"t: " + b"x" * 9000 + b"\r\n\r\n")
    assert problem(answer) == (431, "headers_too_large")


def test_closes_a_silent_connection_and_counts_no_request(serve: Serve) -> None:
    server = serve(receive_s=0.2)
    assert exchange(server) == b""
    assert server.metric("lvm_requests_total", route="other", outcome="too_slow") == 0


def test_counts_a_slow_body_once_on_its_route(serve: Serve) -> None:
    server = serve(receive_s=0.2)
    answer = exchange(server, HEAD + b"x-request-id: slow\r\ncontent-length: 9\r\n\r\nabc")
    assert problem(answer) == (408, "too_slow")
    assert b"x-request-id: slow" in answer
    assert server.metric("lvm_requests_total", route="/predict", outcome="too_slow") == 1
    assert server.metric("lvm_requests_total", route="/predict", outcome="cancelled") == 0
    assert server.metric("lvm_requests_total", route="other", outcome="too_slow") == 0


@pytest.mark.parametrize(
    ("second", "status", "reason"),
    [
        (HEAD + b"content-length: 100000\r\n\r\n", 413, "too_large"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n2000\r\n" + b"x" * 0x2000 + b"\r\n", 413, "too_large"),
        (b"nonsense\r\n\r\n", 400, "malformed"),
    ],
)
def test_answers_a_faulty_pipelined_request_after_the_good_one(
    serve: Serve, second: bytes, status: int, reason: str
) -> None:
    body = contexts()[0].tobytes()
    first = HEAD + b"x-request-id: first\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    good, bad = exchange(serve(max_body_mb=0.004), first + second).split(b"HTTP/1.1 ")[1:]
    assert good.startswith(b"200")
    assert b"x-request-id: first" in good
    assert problem(b"HTTP/1.1 " + bad) == (status, reason)


def test_bounds_the_pipeline_of_a_connection(serve: Serve) -> None:
    gate = Gate()
    server = serve(amn=gate, gru=gate)
    body = contexts()[0].tobytes()
    request = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(request * 100)
        until(gate.entered.is_set, "the first request to run")
        gate.opened.set()
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    assert received.count(b"HTTP/1.1 200 OK") == 65
    assert received.count(b"HTTP/1.1 503") == 1


def test_answers_every_one_of_many_pipelined_rejections(serve: Serve) -> None:
    gate = Gate()
    server = serve(amn=gate, gru=gate)
    body = contexts()[0].tobytes()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        until(gate.entered.is_set, "the first request to run")
        assert server.metric("lvm_in_flight_requests", route="/predict") == 1
        connection.sendall((HEAD + b"content-length: 1\r\n\r\nx") * 64)
        gate.opened.set()
        received = b""
        while received.count(b"HTTP/1.1 ") < 65:
            received += connection.recv(65536)
    assert received.count(b"HTTP/1.1 400") == 64
    assert server.metric("lvm_in_flight_requests", route="/predict") == 0


def test_closes_an_idle_connection_and_keeps_a_busy_one(serve: Serve) -> None:
    server = serve(keep_alive_s=0.5)
    body = contexts()[0].tobytes()
    request = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    answer = exchange(server, request)
    assert answer.count(b"HTTP/1.1 200 OK") == 1
    assert b"connection: close" not in answer
    gate = Gate()
    busy = serve(keep_alive_s=0.1, timeout_ms=60_000, amn=gate, gru=gate)
    host, port = busy.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(request)
        connection.settimeout(1.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(60)
        gate.opened.set()
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")


def test_answers_requests_that_outlast_the_grace_period(tmp_path: Path) -> None:
    gate = Gate()
    registry = registry_of(tmp_path / "registry", primary="amn", fallback="gru")
    settings = Settings(registry=registry.root, grace_s=0.2)
    body = contexts()[0].tobytes()
    with socket.socket() as connection:
        with running(create_app(settings, FakeLoader(amn=gate, gru=gate)), settings) as server:
            host, port = server.url.removeprefix("http://").split(":")
            connection.connect((host, int(port)))
            connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
            until(gate.entered.is_set, "the request to run")
        assert problem(connection.recv(65536)) == (503, "draining")
    gate.opened.set()


def test_an_idle_connection_holds_nothing_of_its_last_request(serve: Serve) -> None:
    server = serve()
    rows = contexts(50)
    assert server.http.post("/predict", content=rows.tobytes(), headers=octets_of(rows)).status_code == 200
    gc.collect()
    requests = [made for made in gc.get_objects() if isinstance(made, Incoming)]
    assert all(request.body == b"" and request.task is None for request in requests)


def chunked(body: bytes, size: int) -> bytes:
    """Return a body in chunks of `size` bytes."""
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 5_000, 100_000])
def test_reads_chunks_of_any_size_and_the_request_behind_them(serve: Serve, size: int) -> None:
    server, batch = serve(), contexts(20)
    head = HEAD.replace(b"octet-stream", b"octet-stream; shape=20x5x8")
    first = head + b"accept: application/octet-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    body = batch.tobytes()
    last = head + b"x-request-id: last\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    answer = exchange(server, (first + chunked(body, size)) * 3 + last)
    told = server.http.post(
        "/predict", content=body, headers={**octets_of(batch), "accept": "application/octet-stream"}
    )
    assert answer.count(told.content) == 3
    assert answer.count(b"HTTP/1.1 200 OK") == 4
    assert server.app.state.admission.size == 0


def test_a_declared_body_that_is_not_sent_reserves_little(serve: Serve) -> None:
    server = serve(max_in_flight_mb=1)
    host, port = server.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        for _ in range(8):
            greedy = stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE_S))
            greedy.sendall(HEAD + b"content-length: 300000\r\n\r\nx")
        until(lambda: len(server.app.state.admission.clients) == 1, "the bodies to begin")
        until(lambda: server.app.state.admission.clients["127.0.0.1"].requests == 8, "all of them to begin")
        answer = server.http.post("/predict", content=contexts(9).tobytes(), headers=octets_of(contexts(9)))
        assert answer.status_code == 200
    until(lambda: server.app.state.admission.size == 0, "all to be released")


def test_rejects_a_long_body_without_room_on_its_head(serve: Serve) -> None:
    server = serve(max_in_flight_mb=1)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as other:
        other.sendall(HEAD + b"content-length: 500000\r\n\r\n" + b"x" * 400_000)
        until(lambda: server.app.state.admission.size == 400_000, "the first body to come")
        refused = exchange(server, HEAD + b"content-length: 2000000\r\n\r\n")
    assert problem(refused) == (503, "overloaded")
