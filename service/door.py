"""The door: every request comes in here and every answer goes out, counted once.

Hot routes are plain ASGI: body in, bytes out, no framework between. All others go on to FastAPI.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from secrets import token_hex
from time import monotonic, perf_counter
from typing import Any
from urllib.parse import parse_qsl

from service.errors import (
    PROBLEM,
    Invalid,
    Malformed,
    ServiceError,
    TooLarge,
    UnsupportedMediaType,
    problem,
)
from service.log import logger
from service.metrics import Metrics
from service.settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

CANCELLED = "cancelled"
CLOSING = (408, 413)  # the rest of the body is not worth reading


class State:
    """What became of the process: on its way out (503 on /readyz, connections close), or why it did not start."""

    def __init__(self) -> None:
        self.is_draining = False
        self.failure: Exception | None = None


class Call:
    """One request to a hot route: its headers, body, deadline (monotonic seconds) and identity."""

    __slots__ = ("body", "deadline", "headers", "id", "query", "started")

    def __init__(self, scope: Scope, timeout_ms: float) -> None:
        self.started = perf_counter()
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.query: bytes = scope["query_string"]
        self.body = b""
        self.id = request_id(self.headers.get(b"x-request-id"))
        self.deadline = monotonic() + timeout_ms / 1000

    def take_timeout(self, most_ms: float) -> None:
        """Move the deadline to what X-Request-Timeout-Ms asks for; raises `Invalid` where it is none."""
        asked = self.headers.get(b"x-request-timeout-ms")
        if asked is None:
            return
        try:
            timeout = float(asked)
        except ValueError:
            timeout = math.nan
        if not 0 < timeout <= 3_600_000:
            raise Invalid("X-Request-Timeout-Ms wants milliseconds from 0 to 3600000")
        self.deadline += (timeout - most_ms) / 1000

    def media_type(self) -> bytes:
        """Return the media type of the body, lower case, without parameters."""
        return self.headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()

    def options(self) -> dict[str, str]:
        """Return the options of the query string; raises `Malformed` where one stands twice."""
        if not self.query:
            return {}
        pairs = parse_qsl(self.query.decode("latin-1"), keep_blank_values=True)
        if len(dict(pairs)) != len(pairs):
            raise Malformed("an option stands twice in the query string")
        return dict(pairs)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: body, media type, more headers, how it counts, and seconds by stage."""

    body: bytes
    media_type: bytes
    headers: Headers = field(default_factory=list)
    outcome: str = "ok"
    stages: tuple[tuple[str, float], ...] = ()
    status: int = 200


Handler = Callable[[Call], Awaitable[Reply]]


def request_id(given: bytes | None) -> str:
    """Return the caller's request id where it is a plain short word, else a new one."""
    if given and len(given) <= 64 and given.replace(b"-", b"").replace(b"_", b"").isalnum():
        return given.decode("ascii")
    return token_hex(8)


class HotRoute:
    """One hot route as an ASGI application: reads the body, calls the handler, answers, counts."""

    def __init__(self, path: str, handler: Handler, settings: Settings, metrics: Metrics, state: State) -> None:
        self.path, self._handler, self._metrics, self._state = path, handler, metrics, state
        self._timeout_ms = settings.timeout_ms
        self._max_body = round(settings.max_body_mb * 1e6)
        self._flying = 0
        self._total = metrics.seconds.of(path, "total")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        call = Call(scope, self._timeout_ms)
        scope["lvm.departed"] = _canceller()
        self._fly(1)
        try:
            reply = await self._reply(call, receive)
            scope["lvm.departed"] = None
            await self._send(reply, call, send)
            self._count(reply, call)
        except asyncio.CancelledError:
            self._metrics.requests.add(self.path, CANCELLED)
        finally:
            self._fly(-1)

    async def _reply(self, call: Call, receive: Receive) -> Reply:
        try:
            call.take_timeout(self._timeout_ms)
            call.body = await read_body(call.headers, receive, self._max_body)
            return await self._handler(call)
        except ServiceError as error:
            return problem_reply(error, call.id)
        except Exception as error:
            logger().error("unexpected", route=self.path, request_id=call.id, exc_info=error)
            return problem_reply(ServiceError("an unexpected error; the log has more under this id"), call.id)

    async def _send(self, reply: Reply, call: Call, send: Send) -> None:
        headers = [
            (b"content-type", reply.media_type),
            (b"content-length", b"%d" % len(reply.body)),
            (b"x-request-id", call.id.encode()),
            *reply.headers,
        ]
        if self._state.is_draining or reply.status in CLOSING:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": reply.body})

    def _count(self, reply: Reply, call: Call) -> None:
        self._metrics.requests.add(self.path, reply.outcome)
        for stage, seconds in reply.stages:
            self._metrics.seconds.of(self.path, stage).observe(seconds)
        self._total.observe(perf_counter() - call.started)

    def _fly(self, step: int) -> None:
        self._flying += step
        self._metrics.in_flight.set(self._flying, self.path)


def _canceller() -> Callable[[], object] | None:
    task = asyncio.current_task()
    return task.cancel if task else None


def problem_reply(error: ServiceError, identity: str) -> Reply:
    """Return the RFC 9457 answer to an error, with Retry-After where it has one."""
    headers = [(b"retry-after", b"%d" % error.retry_after)] if error.retry_after else []
    body = problem(error.status, error.reason, error.detail, identity, pointer=error.pointer)
    return Reply(body, PROBLEM, headers, error.reason, status=error.status)


async def read_body(headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """Return the whole body.

    Raises:
        TooLarge: it is, or says it is, longer than `limit` bytes.
        CancelledError: the caller left before it was whole.
    """
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > limit:
        raise TooLarge(f"a body of {int(declared)} bytes, at most {limit}")
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise TooLarge(f"a body of more than {limit} bytes")
        parts.append(part)
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def want_media_type(call: Call, *known: bytes) -> bytes:
    """Return the media type of the body; raises `UnsupportedMediaType` where it is not one of `known`."""
    media_type = call.media_type()
    if media_type not in known:
        raise UnsupportedMediaType(f"want {b' or '.join(known).decode()}")
    return media_type
