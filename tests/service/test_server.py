"""The socket: limits on what callers may send and how slowly, over raw connections."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable

import pytest

from tests.conftest import Running
from tests.fakes import contexts

Serve = Callable[..., Running]


def exchange(server: Running, *parts: bytes) -> bytes:
    """Send `parts` and read until the server closes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
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
def test_headers_over_16_kib_are_refused(serve: Serve, header: bytes) -> None:
    server = serve()
    answer = exchange(server, b"POST /predict HTTP/1.1\r\nhost: x\r\n", header, b"\r\n\r\n")
    assert problem(answer) == (431, "headers_too_large")
    assert server.metric("lvm_requests_total", route="other", outcome="headers_too_large") == 1


def test_an_endless_header_is_refused_before_it_ends(serve: Serve) -> None:
    assert problem(exchange(serve(), b"GET / HTTP/1.1\r\nx: " + b"y" * 40_000)) == (431, "headers_too_large")


@pytest.mark.parametrize(
    "sent", [b"", b"POST /predict HTTP/1.1\r\nhost: x\r\n", b"POST /predict HTTP/1.1\r\ncontent-length: 9\r\n\r\n{"]
)
def test_silent_and_slow_callers_are_closed_on(serve: Serve, sent: bytes) -> None:
    assert problem(exchange(serve(receive_s=0.2), sent)) == (408, "too_slow")


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabc",
        b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_http_or_could_smuggle_is_malformed(serve: Serve, sent: bytes) -> None:
    assert problem(exchange(serve(), sent)) == (400, "malformed")


def test_a_body_longer_than_the_head_limit_is_fine(serve: Serve) -> None:
    batch = contexts(400)
    answer = serve().http.post(
        "/predict", content=batch.tobytes(), headers={"content-type": "application/octet-stream"}
    )
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
