"""HTTP as the RFCs say, on a socket: what a well-behaved client may send is understood, on every route."""

from __future__ import annotations

import gzip
import json
import re
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime

import pytest

from service.http.auth import PROBES
from tests.conftest import Running, until
from tests.fakes import Gate, contexts

Serve = Callable[..., Running]
CONTEXT = contexts()[0]
BODY = CONTEXT.tobytes()
JSON = json.dumps({"context": CONTEXT.tolist()}).encode()
TENSOR = {"name": "context", "datatype": "FP32", "shape": [1, *CONTEXT.shape], "data": CONTEXT.ravel().tolist()}
INFER = json.dumps({"inputs": [TENSOR]}).encode()
ROUTES = {"/predict": JSON, "/retrieve": JSON, "/v2/models/primary/infer": INFER}
OFFERS = (
    b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n",
    b"connection: keep-alive, Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: x\r\n",
)


def get(path: str = "/livez", more: bytes = b"", method: str = "GET", version: str = "1.1") -> bytes:
    return f"{method} {path} HTTP/{version}\r\nhost: x\r\n".encode() + more + b"\r\n"


def post(path: str = "/predict", more: bytes = b"", body: bytes = BODY, version: str = "1.1") -> bytes:
    kind = b"content-type: application/octet-stream\r\n" if body is BODY else b"content-type: application/json\r\n"
    return get(path, kind + b"content-length: %d\r\n" % len(body) + more, "POST", version) + body


LAST = get("/livez", b"connection: close\r\n")


@contextmanager
def connected(server: Running) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        yield connection


def read(connection: socket.socket) -> bytes:
    """Read until the server closes."""
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def exchange(server: Running, *parts: bytes, half_close: bool = False) -> bytes:
    with connected(server) as connection:
        for part in parts:
            connection.sendall(part)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return read(connection)


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def fields(answer: bytes) -> dict[str, str]:
    """Return the headers of the first answer; none may be repeated."""
    lines = answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    found = dict(line.split(": ", 1) for line in lines)
    assert len(found) == len(lines), lines
    return found


# ---- upgrades


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("size", [1, 7, 10**6])
def test_an_offer_to_upgrade_is_ignored(serve: Serve, offer: bytes, size: int) -> None:
    """The offers of a pipeline, too, however the bytes come in."""
    chunked = get("/predict", offer + b"content-type: application/octet-stream\r\n", "POST")
    chunked = chunked[:-2] + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"
    requests = [get(more=offer), post(more=offer), post(), chunked, post("/retrieve", offer), get("/no", offer), LAST]
    sent = b"".join(requests)
    server = serve()
    answer = exchange(server, *(sent[at : at + size] for at in range(0, len(sent), size)))
    assert statuses(answer) == [200, 200, 200, 200, 200, 404, 200]
    assert server.metric("lvm_requests_total", route="/predict", outcome="ok") == 3


def test_reads_the_body_of_a_request_that_offers_an_upgrade(serve: Serve) -> None:
    assert statuses(exchange(serve(), post(more=OFFERS[0], body=get()) + LAST)) == [400, 200]


def test_bounds_a_pipeline_of_upgrade_offers(serve: Serve) -> None:
    answer = exchange(serve(), get(more=b"connection: upgrade\r\nupgrade: h2c\r\n") * 2000)
    assert statuses(answer) == [200] * 65 + [503]


def test_rejects_a_tunnel(serve: Serve) -> None:
    assert statuses(exchange(serve(), b"CONNECT x:80 HTTP/1.1\r\nhost: x:80\r\n\r\n" + get())) == [400]


# ---- callers that close their side


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (post(), [200]),
        (get("/models"), [200]),
        (post("/retrieve"), [200]),
        (post(version="1.0"), [200]),
        (post() * 3 + get("/models") + post("/retrieve") + get(), [200] * 6),
        (post() + get()[:-2], [200]),
        (post(body=b"{"), [400]),
    ],
    ids=["hot", "cold", "retrieve", "1.0", "pipelined", "with a torn head", "malformed"],
)
def test_a_half_closed_client_gets_its_responses(serve: Serve, sent: bytes, expected: list[int]) -> None:
    assert statuses(exchange(serve(), sent, half_close=True)) == expected


def half_close_while_it_runs(server: Running, connection: socket.socket, gate: Gate) -> None:
    """Send a request and close our side; return when it runs and the server has read our FIN."""
    connection.sendall(post())
    connection.shutdown(socket.SHUT_WR)
    until(gate.entered.is_set, "the request to run")
    assert server.http.get("/livez").status_code == 200


def test_waits_for_the_response_to_a_half_closed_client(serve: Serve) -> None:
    gate = Gate()
    server = serve(amn=gate, gru=gate, timeout_ms=60_000)
    with connected(server) as connection:
        half_close_while_it_runs(server, connection, gate)
        gate.opened.set()
        answer = read(connection)
    assert statuses(answer) == [200]
    assert fields(answer)["connection"] == "close"


def test_cancels_the_request_of_a_half_closed_client_that_resets(serve: Serve) -> None:
    gate = Gate()
    server = serve(amn=gate, gru=gate, timeout_ms=60_000)
    with connected(server) as connection:
        half_close_while_it_runs(server, connection, gate)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until(lambda: server.metric("lvm_requests_total", route="/predict", outcome="cancelled") == 1, "the count")
    until(lambda: server.app.state.admission.clients == {}, "the release")
    gate.opened.set()


@pytest.mark.parametrize("sent", [b"", post()[:-5], post()[:40], post(more=b"expect: 100-continue\r\n")[: -len(BODY)]])
def test_a_client_that_closes_within_its_request_gets_no_response(serve: Serve, sent: bytes) -> None:
    server = serve()
    assert statuses(exchange(server, sent, half_close=True)) in ([], [100])
    until(lambda: server.app.state.admission.clients == {}, "the release")


# ---- methods


@pytest.mark.parametrize("http", ["", "h11"])
def test_head_is_get_without_its_body(serve: Serve, http: str) -> None:
    server = serve(http=http)
    varies = {"date", "x-request-id"}
    for path in (
        "/",
        "/console/console.js",
        "/livez",
        "/models",
        "/openapi.json",
        "/v2/models/primary",
        "/no",
        "/predict",
    ):
        head, whole = server.http.head(path), server.http.get(path)
        assert (head.status_code, head.content) == (whole.status_code, b""), path
        assert {k: v for k, v in head.headers.items() if k not in varies} == {
            k: v for k, v in whole.headers.items() if k not in varies
        }, path
    assert server.http.head("/metrics").headers["content-length"].isdigit()
    raw = exchange(server, get("/models", method="HEAD") + LAST)
    assert statuses(raw) == [200, 200]
    assert raw.partition(b"\r\n\r\n")[2].startswith(b"HTTP/1.1 ")


def test_responds_405_with_the_allowed_methods(serve: Serve) -> None:
    server = serve()
    for path, allowed in {"/models": "GET, HEAD", "/predict": "POST", "/": "GET, HEAD"}.items():
        for method in ("OPTIONS", "PUT", "TRACE"):
            answer = server.http.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed), (method, path)


# ---- every answer


@pytest.mark.parametrize(
    "sent",
    [
        *(get(), get("/no"), get("/predict"), get(method="HEAD"), post(), post(body=b"{"), get(version="2.0")),
        *(b"nonsense\r\n\r\n", get(more=b"x: " + b"y" * 20_000 + b"\r\n"), post(more=b"expect: gold\r\n")),
        post(more=b"content-encoding: br\r\n"),
        get("/predict", b"content-length: 999999999999\r\n", "POST"),
    ],
)
def test_every_response_has_one_date(serve: Serve, sent: bytes) -> None:
    date = fields(exchange(serve(), sent, half_close=True))["date"]
    assert parsedate_to_datetime(date).tzinfo is not None
    assert date.endswith(" GMT")


def test_rejections_have_one_date(serve: Serve) -> None:
    gate = Gate()
    server = serve(amn=gate, gru=gate, timeout_ms=60_000, concurrency=1)
    with connected(server) as connection:
        connection.sendall(post())
        until(gate.entered.is_set, "the first request to run")
        for _ in range(2):
            answer = server.http.post("/predict", content=BODY, headers={"content-type": "application/octet-stream"})
            assert answer.status_code == 503
            assert len(answer.headers.get_list("date")) == 1
        gate.opened.set()


# ---- expectations and versions


def test_sends_100_continue_only_if_a_body_is_to_come(serve: Serve) -> None:
    server, expects = serve(), b"expect: 100-Continue\r\n"
    whole = post(more=expects)
    with connected(server) as connection:
        connection.sendall(whole[: -len(BODY)])
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY + LAST)
        assert statuses(read(connection)) == [200, 200]
    assert statuses(exchange(server, get(more=expects) + LAST)) == [200, 200]


@pytest.mark.parametrize("sent", [post, get], ids=["hot", "cold"])
def test_100_continue_is_not_sent_to_http_1_0(serve: Serve, sent: Callable[..., bytes]) -> None:
    request = sent(more=b"expect: 100-continue\r\n", version="1.0")
    assert statuses(exchange(serve(), request)) == [200]


@pytest.mark.parametrize("sent", [post, get], ids=["hot", "cold"])
def test_rejects_other_expectations(serve: Serve, sent: Callable[..., bytes]) -> None:
    server = serve()
    for expects in (
        b"expect: gold\r\n",
        b"expect: 100-continue, gold\r\n",
        b"expect: 100-continue\r\nexpect: gold\r\n",
    ):
        assert statuses(exchange(server, sent(more=expects))) == [417]
    assert statuses(exchange(server, sent(more=b"expect: gold\r\n", version="1.0"))) == [200]


@pytest.mark.parametrize("version", ["0.9", "2.0"])
def test_rejects_other_versions(serve: Serve, version: str) -> None:
    assert statuses(exchange(serve(), get(version=version))) == [505]


@pytest.mark.parametrize("sent", [post, get], ids=["hot", "cold"])
def test_http_1_0_stays_connected_if_it_asks_to(serve: Serve, sent: Callable[..., bytes]) -> None:
    server = serve()
    kept = exchange(server, sent(more=b"connection: Keep-Alive\r\n", version="1.0") * 2 + sent(version="1.0"))
    assert statuses(kept) == [200, 200, 200]
    assert fields(kept)["connection"] == "keep-alive"
    assert fields(exchange(server, sent(version="1.0")))["connection"] == "close"


def test_connection_is_a_list(serve: Serve) -> None:
    assert statuses(exchange(serve(), post(more=b"connection: foo , CLOSE\r\n") + get())) == [200]


# ---- the same on both transports


@pytest.fixture(params=["", "h11"], ids=["socket", "asgi"])
def server(serve: Serve, request: pytest.FixtureRequest) -> Running:
    """A service at the socket, and as plain ASGI below another protocol."""
    return serve(http=request.param, max_body_mb=0.1)


def ask(server: Running, path: str = "/predict", body: bytes = JSON, **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in {"content_type": "application/json", **headers}.items()}
    answer = server.http.post(path, content=body, headers=named)
    if answer.status_code != 200:
        assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code


@pytest.mark.parametrize("path", ROUTES)
def test_a_gzip_body_is_decoded(server: Running, path: str) -> None:
    body = ROUTES[path]
    assert ask(server, path, gzip.compress(body), content_encoding="gzip") == 200
    assert ask(server, path, gzip.compress(body), content_encoding="identity, X-GZIP") == 200
    assert ask(server, path, body, content_encoding="identity") == 200
    assert ask(server, path, body, content_encoding="gzip") == 400
    assert ask(server, path, gzip.compress(body)[:-1], content_encoding="gzip") == 400
    assert ask(server, path, gzip.compress(b" " * 10**6), content_encoding="gzip") == 413
    until(lambda: server.app.state.admission.clients == {}, "all to be given back")


def test_the_repository_index_reads_gzip(server: Running) -> None:
    path, body = "/v2/repository/index", b'{"ready": true}'
    assert ask(server, path, gzip.compress(body), content_encoding="gzip") == 200
    assert ask(server, path, gzip.compress(b" " * 10**6), content_encoding="gzip") == 413
    assert ask(server, path, body, content_encoding="br") == 415


@pytest.mark.parametrize("coding", ["deflate", "br", "gzip, gzip"])
def test_rejects_other_content_codings(server: Running, coding: str) -> None:
    answer = server.http.post("/predict", content=JSON, headers={"content-encoding": coding})
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip")


def test_octets_may_be_gzip_and_tensors_keep_their_length(server: Running) -> None:
    assert (
        ask(server, body=gzip.compress(BODY), content_type="application/octet-stream", content_encoding="gzip") == 200
    )
    tensor = {key: value for key, value in TENSOR.items() if key != "data"}
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(BODY)}}]}).encode()
    named = {"content_encoding": "gzip", "inference_header_content_length": str(len(head))}
    assert ask(server, "/v2/models/primary/infer", gzip.compress(head + BODY), **named) == 200


@pytest.mark.parametrize(
    ("media_type", "status"),
    [
        *(("Application/JSON", 200), ('application/json; charset="UTF-8"', 200), ("application/json;x=y ;", 200)),
        *(("application/json; charset=latin-1", 415), ("text/json", 415), ("application/x+json", 415)),
        *(("application/json, application/json", 415), ("json", 415), ("", 415)),
    ],
)
def test_a_media_type_is_read_by_its_grammar(server: Running, media_type: str, status: int) -> None:
    assert ask(server, content_type=media_type) == status
    assert ask(server, "/retrieve", content_type=media_type) == status


@pytest.mark.parametrize(
    ("media_type", "status"),
    [
        *(("APPLICATION/Octet-Stream", 200), ('application/octet-stream; DType="float32"', 200)),
        *(('application/octet-stream;x="dtype=float16"', 200), ("application/octet-stream;dtype=float64", 415)),
    ],
)
def test_parameters_of_octets_are_read_by_their_grammar(server: Running, media_type: str, status: int) -> None:
    assert ask(server, body=BODY, content_type=media_type) == status


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "application/json"),
        ("Application/Octet-Stream", "application/octet-stream; dtype=float32"),
        ('application/octet-stream; dtype="float16"', "application/octet-stream; dtype=float16"),
        ("application/octet-stream;q=0", "application/json"),
        ("application/octet-stream;q=0.5, application/json", "application/json"),
        ('text/plain;x="application/octet-stream"', "application/json"),
    ],
)
def test_accept_is_read_by_its_grammar(server: Running, accept: str, media_type: str) -> None:
    answer = server.http.post("/predict", content=JSON, headers={"accept": accept})
    assert answer.headers["content-type"].partition("; shape=")[0] == media_type


def test_the_format_of_the_metrics_is_negotiated(server: Running) -> None:
    for accept, is_openmetrics in {
        "application/openmetrics-text;version=1.0.0;q=0.6, text/plain;version=0.0.4;q=0.3, */*;q=0.1": True,
        'APPLICATION/OpenMetrics-Text; version="1.0.0"': True,
        "application/openmetrics-text;version=nonsense": True,
        "application/openmetrics-text;q=0, text/plain": False,
        "application/openmetrics-text;q=0.1, text/plain": False,
    }.items():
        answer = server.http.get("/metrics", headers={"accept": accept})
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("application/openmetrics-text") is is_openmetrics, accept


@pytest.mark.parametrize("timeout", ["1_000", "+5", "0x10", "inf", "nan", "5, 5", "-1", "0", ""])
def test_rejects_timeouts_that_are_not_decimal_numbers(server: Running, timeout: str) -> None:
    assert ask(server, x_request_timeout_ms=timeout) == 422


def test_a_repeated_header_is_one_list(server: Running) -> None:
    """A header of one value that comes twice is refused, whatever the values are."""

    def answer(*headers: tuple[str, str]) -> tuple[int, str]:
        got = server.http.post("/predict", content=JSON, headers=[*headers])
        return got.status_code, got.headers["content-type"].partition(";")[0]

    preferred = ("accept", "application/octet-stream"), ("accept", "application/json;q=0.5")
    assert answer(*preferred) == answer(*reversed(preferred)) == (200, "application/octet-stream")
    assert answer(("content-type", "application/json"), ("content-type", "application/octet-stream"))[0] == 415
    assert answer(("x-request-timeout-ms", "5000"), ("x-request-timeout-ms", "6000"))[0] == 422
    etag = server.http.get("/").headers["etag"]
    known = [("if-none-match", '"x"'), ("if-none-match", etag)]
    assert server.http.get("/", headers=known).status_code == 304


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        *(("POST", "/%70redict", 200), ("POST", "/v2/models/pri%6Dary/%69nfer", 200), ("GET", "/%6Dodels", 200)),
        *(("GET", "/v2/models/pri%6Dary", 200), ("POST", "/predict%2f", 404), ("GET", "/v2%2Fmodels/primary", 404)),
        *(("POST", "/v2/models/a%2Fprimary/infer", 404), ("POST", "//predict", 404), ("POST", "/x/../predict", 404)),
        *(("POST", "/%2e/predict", 404), ("GET", "/livez%00", 404), ("GET", "/livez/", 404), ("GET", "/%ff", 404)),
    ],
)
def test_percent_encoding_does_not_change_a_path(server: Running, method: str, target: str, status: int) -> None:
    body = INFER if "v2" in target else JSON
    sent = post(target, b"connection: close\r\n", body) if method == "POST" else get(target, b"connection: close\r\n")
    assert statuses(exchange(server, sent)) == [status]


def test_accepts_an_absolute_target(serve: Serve) -> None:
    server = serve()
    for target in ("http://x/predict", "HTTPS://x:8000/%70redict?model=primary"):
        assert statuses(exchange(server, post(target) + LAST)) == [200, 200]
    assert statuses(exchange(server, get("http://x/livez") + get("http://x") + LAST)) == [200, 200, 200]
    assert statuses(exchange(server, get("*", method="OPTIONS") + LAST)) == [405, 200]
    assert statuses(exchange(server, get("*"))) == [400]


@pytest.mark.parametrize("path", sorted(PROBES))
def test_a_probe_is_answered_whatever_its_query_string(server: Running, path: str) -> None:
    assert server.http.get(f"{path}?x=/models&x=2").status_code == 200


@pytest.mark.parametrize("path", ROUTES)
def test_ignores_a_byte_order_mark(server: Running, path: str) -> None:
    mark = b"\xef\xbb\xbf"
    assert ask(server, path, mark + ROUTES[path]) == 200
    assert ask(server, path, mark + mark + ROUTES[path]) == 400
