"""Requests and responses, and the response to an error: what both transports and all handlers share."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from time import perf_counter
from typing import Any
from urllib.parse import parse_qsl

import orjson

from lvm.errors import Malformed, ServiceError, TooLarge, UnsupportedMediaType
from service.http.headers import media_type
from service.overload.admission import Permit
from service.telemetry.tracing import RequestSpan, TraceContext

Header = tuple[bytes, bytes]
Headers = list[Header]
Stages = dict[str, float]  # seconds, in the order of the stages

CLOSE = (b"connection", b"close")
WITHOUT_CONTENT = (204, 304)
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}".encode() for status in HTTPStatus}
JSON = b"application/json"
PROBLEM = b"application/problem+json"
JSON_CHARSETS = frozenset({b"utf-8", b"utf8", b"us-ascii"})  # ASCII is a part of UTF-8
MAX_DIGITS = 18  # of a length in bytes; Python refuses to parse thousands


class ClientDisconnected(Exception):
    """The client closed the connection before it was answered."""


@dataclass(eq=False)
class Request:
    """One request: its head, its body as far as it has arrived, and what the gateway knows about it.

    A transport whose bodies arrive in parts makes a subclass that waits for them in `wait_for_turn` and `read`.

    Attributes:
        path: without percent-encoding.
        headers: names in lower case.
        client: the address of the caller; the gateway sets the name of its token instead.
        declared: the Content-Length, 0 if there is none.
        started: when it arrived, or its body if that came later, in seconds of `perf_counter`.
        id: the caller's, or a new one; set by the gateway.
        body: bytes, or a bytearray if it arrived in several parts.
        is_ready: whether the body is complete and the request may be answered now.
        failure: why the transport rejects the request; set by `fail`.
        permit: what it holds of the rows and bytes in flight.
        max_body: the limit of its route, in bytes.
        until: until when the client waits for the answer, if the transport knows, in seconds of `monotonic`.
        arrived, deadline: when its body was complete, and until when it is to be answered, in seconds of `monotonic`.
        trace: its place in a trace, if it is part of one.
        span: its span, if it is sampled.
    """

    method: bytes
    path: str
    query: bytes
    headers: dict[bytes, bytes]
    client: str = ""
    declared: int = 0
    started: float = field(default_factory=perf_counter)

    id: str = field(default="", init=False)
    body: bytes = field(default=b"", init=False)
    is_ready: bool = field(default=True, init=False)
    failure: ServiceError | None = field(default=None, init=False)
    permit: Permit | None = field(default=None, init=False)
    max_body: int = field(default=0, init=False)
    until: float | None = field(default=None, init=False)
    arrived: float = field(default=0.0, init=False)
    deadline: float = field(default=0.0, init=False)
    trace: TraceContext | None = field(default=None, init=False)
    span: RequestSpan | None = field(default=None, init=False)

    async def wait_for_turn(self) -> None:
        """Wait until every earlier request of the connection is answered; raises as `read`."""

    async def read(self) -> None:
        """Wait until the body is complete.

        Raises:
            ServiceError: the transport or `add` rejected it.
            ClientDisconnected: the client left before.
        """

    def add(self, part: bytes, unread: int = 0) -> None:
        """Append a part of the body; `unread` bytes more have been received.

        Raises:
            TooLarge: the body is longer than `max_body`.
            Overloaded, ClientLimit: there is no room for it.
        """
        self.body = joined(self.body, part) if self.body else part
        if not self.max_body:
            return  # the gateway has not begun: it will check
        self.check_size(len(self.body))
        if self.permit is not None:
            self.permit.reserve(len(self.body) + unread)

    def check_size(self, size: int) -> None:
        """Raise `TooLarge` if a body of `size` bytes is longer than `max_body`."""
        if size > self.max_body:
            raise TooLarge(f"the body is longer than {self.max_body} bytes")

    def set_timeout(self, milliseconds: float) -> None:
        """Set the deadline, from the time when the body was complete, but not after the client has given up."""
        self.deadline = self.arrived + milliseconds / 1000
        if self.until is not None and self.until < self.deadline:
            self.deadline = self.until

    def set_rows(self, rows: int) -> None:
        """Tell the permit how many rows were decoded."""
        if self.permit is not None:
            self.permit.set_rows(rows)

    @property
    def rows(self) -> int:
        """The rows that it holds."""
        return self.permit.rows if self.permit is not None else 0

    def log_fields(self) -> dict[str, str]:
        """Return the fields that lines of the log about this request are found by."""
        return {"request_id": self.id} | ({"trace_id": self.trace.trace_id} if self.trace else {})

    def options(self) -> dict[str, str]:
        """Return the options of the query string; raises `Malformed` if one is repeated."""
        if not self.query:
            return {}
        pairs = parse_qsl(self.query.decode("latin-1"), keep_blank_values=True)
        options = dict(pairs)
        if len(options) != len(pairs):
            raise Malformed("duplicate option in the query string")
        return options


@lru_cache(maxsize=256)
def media_type_of(header: bytes, known: tuple[bytes, ...]) -> bytes:
    """Return the media type that a Content-Type names.

    Raises:
        UnsupportedMediaType: it is not one of `known`, or JSON in a charset other than UTF-8.
    """
    parsed = media_type(header)
    if parsed is None or parsed.name not in known:
        raise UnsupportedMediaType(f"unsupported media type; expected {b' or '.join(known).decode()}")
    if parsed.name == JSON and not JSON_CHARSETS.issuperset(value.lower() for value in parsed.values(b"charset")):
        raise UnsupportedMediaType("unsupported charset of application/json; expected utf-8")
    return parsed.name


@dataclass(eq=False)
class Response:
    """One response: what a handler answers, and what the gateway adds.

    Attributes:
        headers: the handler's own.
        outcome: how it is counted.
        stages: how long each stage took.
        served_by: the alias that answered, if one did.
        total: the stage that its whole time is counted as.
        closes: whether the connection closes after it.
        head: the lines of its status and of all its headers, set by the gateway.
    """

    body: bytes
    media_type: bytes
    headers: Headers
    status: int = 200
    outcome: str = "ok"
    stages: Stages = field(default_factory=dict)
    served_by: str = ""
    total: str = field(default="total", init=False)
    closes: bool = field(default=False, init=False)
    head: bytes = field(default=b"", init=False)

    def all_headers(self) -> Headers:
        """Return the headers that `head` holds."""
        return [(name, value) for name, _, value in (line.partition(b": ") for line in self.head.split(b"\r\n")[1:])]


def head_of(response: Response, request_id: str, more: Headers) -> bytes:
    """Return the lines of the status and of the headers of a response: its own, `more`, and those about its body."""
    stages = response.stages
    template = _head(response.status, (*more, *response.headers), response.media_type, tuple(stages))
    milliseconds = [1e3 * seconds for seconds in stages.values()]
    if response.status in WITHOUT_CONTENT:
        return template % (request_id.encode(), *milliseconds)
    return template % (request_id.encode(), *milliseconds, len(response.body))


@lru_cache(maxsize=1024)
def _head(status: int, headers: tuple[Header, ...], media_type: bytes, stages: tuple[str, ...]) -> bytes:
    """Return the lines with formats for the request id, the milliseconds of the stages, and the length of the body.

    Few differ in anything else.
    """
    known = b"\r\n".join([STATUS_LINES[status], *map(b": ".join, headers)]).replace(b"%", b"%%")
    lines = [known, b"x-request-id: %b"]
    if stages:
        lines.append(b"server-timing: " + ", ".join([f"{stage};dur=%.3f" for stage in stages]).encode())
    if status not in WITHOUT_CONTENT:
        lines += [b"content-type: " + media_type.replace(b"%", b"%%"), b"content-length: %d"]
    return b"\r\n".join(lines)


Handler = Callable[[Request], Coroutine[Any, Any, Response]]
"""What answers the requests to a route: an ordinary coroutine function.

It runs in an `EagerTask`: `asyncio.timeout`, `asyncio.sleep(0)`, `asyncio.current_task` and `asyncio.TaskGroup` work as
in any task. What it may await are asyncio's futures, as in any task; another object is rejected with a RuntimeError.
"""


def problem(
    request: Request, status: int, reason: str, detail: str, headers: Headers, pointer: str | None = None
) -> Response:
    """Return an RFC 9457 response, with a JSON pointer if there is one.

    The member `error` is what clients of other protocols read: below /v2 the detail, for the Open Inference Protocol;
    below /v1 an object as OpenAI's.
    """
    protocol = request.path[:3] if request.path[3:4] in ("", "/") else ""
    before_id, after_id = _problem_body(status, reason, detail, pointer, protocol)
    return Response(before_id + request.id.encode() + after_id, PROBLEM, headers, status, reason)


@lru_cache(maxsize=64)
def _problem_body(status: int, reason: str, detail: str, pointer: str | None, protocol: str) -> tuple[bytes, bytes]:
    """Return the body of a problem before and after the request id. Overload repeats a few of them many times."""
    placeholder = "-" * 20
    detail = _encodable(detail)
    pointer = None if pointer is None else _encodable(pointer)
    body: dict[str, Any] = {
        "request_id": placeholder,
        "type": f"urn:lvm:problem:{reason}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    }
    if protocol == "/v2":
        body["error"] = detail
    if protocol == "/v1":
        kind = "invalid_request_error" if status < 500 else "server_error"
        body["error"] = {"message": detail, "type": kind, "param": (pointer and pointer[1:]) or None, "code": reason}
    if pointer is not None:
        body["pointer"] = pointer
    before, _, after = orjson.dumps(body).partition(placeholder.encode())
    return before, after


def _encodable(text: str) -> str:
    """Return a text with `?` for each half of a surrogate pair: JSON may escape one, but UTF-8 has none."""
    return text.encode("utf-8", "replace").decode()


def problem_of(error: ServiceError, request: Request) -> Response:
    """Return the response to an error, with its headers, and Retry-After if it has one."""
    headers = [*error.headers]
    if error.retry_after:
        headers.append((b"retry-after", b"%d" % error.retry_after))
    return problem(request, error.status, error.reason, error.detail, headers, error.pointer)


def caller_id(given: bytes) -> str:
    """Return a caller's request id if it is a short word of letters, digits, `-` and `_`, else an empty string."""
    is_word = len(given) <= 64 and given.replace(b"-", b"").replace(b"_", b"").isalnum()
    return given.decode("ascii") if is_word else ""


def joined(body: bytes, part: bytes) -> bytes:
    """Return a body with one more part, in place from the third on: parts may be tiny."""
    whole: Any = body
    if isinstance(whole, bytes):
        whole = bytearray(whole)
    whole += part
    return whole  # type: ignore[no-any-return]  # readers of a body take either
