"""What a socket can bring: smuggled requests, slow and silent callers, giants; each is answered or closed, counted."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import until
from tests.fakes import D, T, contexts
from tests.faults.conftest import Injected, Target, drain, sizes

Start = Callable[..., Target]
POST = b"POST /predict HTTP/1.1\r\nhost: x\r\n"
GET = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
SMUGGLED = {
    "two lengths": POST + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
    "one length twice": POST + b"content-length: 3\r\ncontent-length: 3\r\n\r\nabc",
    "a list of lengths": POST + b"content-length: 3, 3\r\n\r\nabc",
    "length and chunks": POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": POST + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
    "chunks not last": POST + b"transfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "unknown coding": POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": POST + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
    "a tab before the colon": POST + b"content-length\t: 3\r\n\r\nabc",
    "a folded header": POST + b"x: y\r\n content-length: 3\r\n\r\nabc",
    "a length with a sign": POST + b"content-length: +3\r\n\r\nabc",
    "a negative length": POST + b"content-length: -3\r\n\r\nabc",
    "a length in hexadecimal": POST + b"content-length: 0x3\r\n\r\nabc",
    "a length of 5,000 digits": POST + b"content-length: " + b"9" * 5000 + b"\r\n\r\nabc",
    "a length over 64 bits": POST + b"content-length: 18446744073709551617\r\n\r\nabc",
    "no length's value": POST + b"content-length: \r\n\r\n",
    "a chunk of 2^64 bytes": POST + b"transfer-encoding: chunked\r\n\r\n10000000000000000\r\nabc\r\n0\r\n\r\n",
    "a negative chunk": POST + b"transfer-encoding: chunked\r\n\r\n-1\r\nabc\r\n0\r\n\r\n",
    "a chunk that is longer than it says": POST + b"transfer-encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n",
    "a NUL in a header": POST + b"x: a\0b\r\ncontent-length: 0\r\n\r\n",
    "a bare carriage return": POST + b"x: a\rb: c\r\ncontent-length: 0\r\n\r\n",
    "no host": b"POST /predict HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
    "two hosts": POST + b"host: y\r\ncontent-length: 0\r\n\r\n",
    "no such version": b"GET / HTTP/3.7\r\nhost: x\r\n\r\n",
    "HTTP/2 at once": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "no method": b" / HTTP/1.1\r\nhost: x\r\n\r\n",
    "no target": b"GET HTTP/1.1\r\nhost: x\r\n\r\n",
    "a header without a name": b"GET / HTTP/1.1\r\nhost: x\r\n: y\r\n\r\n",
    "an upgrade with length and chunks": POST
    + b"connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a tunnel": b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n",
    "chunks below HTTP/1.1": b"POST /predict HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks of another coding": POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "no one host": b"GET / HTTP/1.1\r\nhost: x y\r\n\r\n",
    "a fragment": b"GET /livez#x HTTP/1.1\r\nhost: x\r\n\r\n",
}


def responses(said: bytes) -> list[int]:
    """Return the status of every answer in what a server said."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", said)]


def predict(server: Target) -> int:
    body = contexts()[0].tobytes()
    return server.http.post("/predict", content=body, headers={"content-type": "application/octet-stream"}).status_code


def test_a_request_that_could_be_read_in_two_ways_is_read_in_none(target: Start, injected: Injected) -> None:
    """A good request behind it on the connection is not answered either: it may be a part of the bad one."""
    server = target()
    for what, bad in SMUGGLED.items():
        for before in (b"", GET.replace(b"connection: close\r\n", b"")):
            said = server.exchange(before + bad + GET, requests=2 if before else 1)
            assert responses(said) == ([200, 400] if before else [400]), (what, said)
            injected("a request that could be smuggled", "400, closed, counted once")
    assert predict(server) == 200


def giants() -> dict[str, tuple[bytes, bytes, int]]:
    """Return paths, bodies and the status that each deserves, by what is large in them."""
    row = b"[" + b",".join([b"0.5"] * D) + b"]"
    rows = b"[" + b",".join([row] * T) + b"]"
    digits, infer = b"9" * 5000, b'{"inputs": [{"name": "context", "datatype": "FP32", "shape": [1, %d, %d], "data": '
    infer %= (T, D)
    return {
        "a number of 5,000 digits": (b"/predict", b'{"context": ' + rows.replace(b"0.5", digits, 1) + b"}", 422),
        "a whole number of 5,000 digits for k": (b"/retrieve", b'{"query": ' + row + b', "k": ' + digits + b"}", 503),
        "5,000 digits of a name": (b"/predict", b'{"context": ' + rows + b', "model": "' + digits + b'"}', 422),
        "5,000 digits in a query string": (b"/predict?model=" + digits, bytes(4 * T * D), 422),
        "5,000 digits in a tensor": (b"/v2/models/amn/infer", infer + rows.replace(b"0.5", digits, 1) + b"}]}", 422),
        "5,000 digits of a shape": (
            b"/v2/models/amn/infer",
            b'{"inputs": [{"name": "context", "datatype": "FP32", "shape": [' + digits + b', 5, 8], "data": []}]}',
            422,
        ),
        "an exponent of 5,000 digits": (
            b"/predict",
            b'{"context": ' + rows.replace(b"0.5", b"1e" + digits, 1) + b"}",
            422,
        ),
        "100,000 nested brackets": (b"/predict", b'{"context": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        "100,000 open brackets": (b"/predict", b"[" * 100_000, 400),
        "100,000 nested objects": (b"/predict", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400),
        "100,000 nested brackets in a tensor": (
            b"/v2/models/amn/infer",
            infer + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
            400,
        ),
        "100,000 names": (b"/predict", b"{" + b",".join(b'"%d":1' % n for n in range(100_000)) + b"}", 422),
        "one name 1,000 times": (b"/predict", b"{" + b",".join([b'"a":1'] * 1_000) + b"}", 400),
        "one name 100,000 times": (b"/predict", b"{" + b",".join([b'"a":1'] * 100_000) + b"}", 422),
        "a string of a megabyte": (b"/predict", b'{"context": "' + b"A" * 1_000_000 + b'"}', 422),
        "a body over the limit": (b"/predict", b" " * 2_100_000, 413),
    }


def test_giants_are_refused_in_their_own_words(target: Start, injected: Injected) -> None:
    server = target(environment={"LVM_MAX_BODY_MB": "2"})
    for what, (path, body, status) in giants().items():
        kind = b"octet-stream" if b"?" in path else b"json"
        head = b"POST %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/%s\r\n" % (path, kind)
        for framed in (
            head + b"content-length: %d\r\n\r\n" % len(body) + body,
            head + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n",
        ):
            said = server.exchange(framed)
            assert responses(said) == [status], (what, said[:300])
            assert b"9999" not in said, "the value is echoed"
            injected(f"{what}", f"{status}")
    for name, value in ((b"x-request-timeout-ms", b"9" * 5000), (b"inference-header-content-length", b"9" * 5000)):
        head = b"POST /v2/models/amn/infer HTTP/1.1\r\nhost: x\r\nconnection: close\r\n%s: %s\r\n" % (name, value)
        said = server.exchange(head + b"content-length: 2\r\n\r\n{}")
        assert responses(said) in ([400], [422]), said[:300]
        injected("a header of 5,000 digits", "400 or 422")
    assert predict(server) == 200


def descriptors(server: Target) -> int:
    return len(list(Path(f"/proc/{server.popen.pid}/fd").iterdir()))


@sizes(20, 500)
def test_silent_and_slow_callers_are_closed_on_while_others_are_served(
    count: int, target: Start, injected: Injected
) -> None:
    """Silent sockets end without a word, slow headers and bodies with 408, whatever drips in meanwhile."""
    server = target(environment={"LVM_RECEIVE_S": "2"})
    slow, begun = count // 5, {b"": 0, POST + b"x: ": 408, POST + b"content-length: 1000\r\n\r\n": 408}
    with ExitStack() as stack:
        sockets = {
            start: [stack.enter_context(server.connect()) for _ in range(slow if start else count)] for start in begun
        }
        for start, connections in sockets.items():
            server.sent += slow if start else 0
            for connection in connections:
                connection.sendall(start)
        for _ in range(5):
            assert predict(server) == 200
            for connection in (each for start, some in sockets.items() if start for each in some):
                with suppress(OSError):
                    connection.send(b"y")
        for start, status in begun.items():
            for connection in sockets[start]:
                assert responses(drain(connection)) == ([status] if status else []), start
    assert server.http.get("/livez").status_code == 200
    injected("silent sockets", "closed, and no request", count)
    injected("headers that drip", "408, closed", slow)
    injected("bodies that drip", "408, closed", slow)


@pytest.mark.faults
def test_callers_who_do_not_read_are_closed_on(target: Start, injected: Injected) -> None:
    patience = {"LVM_RECEIVE_S": "2", "LVM_TIMEOUT_MS": "60000", "LVM_MAX_QUEUE": "10000000"}
    patience |= {"LVM_CONCURRENCY": "10000000", "LVM_MAX_IN_FLIGHT_MB": "1000"}
    server = target(environment={**patience, "LVM_MAX_ROWS": "40000", "LVM_MAX_BATCH": "8192"})
    rows = contexts(40_000).astype("<f2").tobytes()  # whose answer is more than the kernel holds for a caller
    head = POST + b"content-type: application/octet-stream; dtype=float16; shape=40000x5x8\r\n"
    head += b"content-length: %d\r\n\r\n" % len(rows)
    whole = len(server.exchange(head.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n") + rows))
    before = descriptors(server)
    with ExitStack() as stack:
        deaf = [stack.enter_context(socket.socket()) for _ in range(100)]
        for connection in deaf:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.connect(server.address)
            connection.sendall(head + rows)
            server.sent += 1
        until(lambda: server.counted()["/predict", "ok"] >= 101, "every answer to be on its way")
        assert predict(server) == 200
        until(lambda: descriptors(server) <= before + 2, "the deaf to be closed on")
        assert all(len(drain(connection)) < whole for connection in deaf)
    injected("callers who do not read their answer", "closed, others are served", 100)


@pytest.mark.faults
def test_callers_who_leave_are_counted_and_not_run_for(target: Start, injected: Injected) -> None:
    """They go by a reset: before the last byte, behind it, or having waited for a while."""
    server = target(answers={"amn": "hangs", "gru": "mean_of"}, environment={"LVM_TIMEOUT_MS": "3000000"})
    body = contexts()[0].tobytes()
    request = POST + b"content-type: application/octet-stream\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    for number in range(300):
        with server.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(request[: len(request) - number % 2])
            server.sent += 1
            until(partial(is_read, connection), "the request to be read")
    assert server.http.post("/predict", json={"context": contexts()[0].tolist(), "model": "gru"}).status_code == 200
    assert server.counted()["/predict", "cancelled"] == 300
    injected("callers who leave, before or behind the last byte", "counted as cancelled, the next is served", 300)


def is_read(connection: socket.socket) -> bool:
    """Whether the server has taken in all that was sent: nothing waits in its socket's queue."""
    mine = f"{connection.getsockname()[1]:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[2].endswith(f":{mine}") and row[4].endswith(":00000000") for row in rows)
