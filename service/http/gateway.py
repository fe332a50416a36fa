"""The door: every request comes in here and every answer goes out, counted once.

Hot routes are plain ASGI: body in, bytes out, no framework between. All others go on to FastAPI.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from random import getrandbits
from time import monotonic, perf_counter, time
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from lvm.errors import (
    Invalid,
    Malformed,
    ServiceError,
    TooLarge,
    UnsupportedMediaType,
)
from service.http import content_coding
from service.http.auth import Tokens
from service.http.headers import combine, decimal, media_type
from service.http.problems import PROBLEM, problem
from service.overload.admission import Admission, Place
from service.overload.fairness import Slicer
from service.settings import Settings
from service.telemetry.log import AccessLog, logger
from service.telemetry.metrics import STAGES, Metrics
from service.telemetry.tracing import (
    Attributes,
    RequestSpan,
    TraceContext,
    Tracer,
    current_span,
    parse,
)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

CANCELLED, DEPARTED = "cancelled", 499  # nginx's status of callers who left; it is sent to nobody
NOSNIFF = (b"x-content-type-options", b"nosniff")  # a browser shall not guess what an answer is
JSON = b"application/json"
CHARSETS = frozenset({b"utf-8", b"utf8", b"us-ascii"})  # of JSON: ASCII is UTF-8, too
CLOSING = (401, 408, 413)  # the rest of the body is not worth reading
MAX_DIGITS = 18  # of a length in bytes; Python refuses to read thousands
BLANK = "0" * 16  # where the id of a request goes


class Departed(Exception):
    """The caller left before the request was whole."""


class State:
    """What became of the process: on its way out (503 on /readyz, connections close), or why it did not start."""

    def __init__(self) -> None:
        self.is_draining = False
        self.failure: Exception | None = None
        self.headers: Headers = []  # of every answer


@dataclass(frozen=True)
class Door:
    """What every hot route lies behind."""

    settings: Settings
    metrics: Metrics
    state: State
    tokens: Tokens
    admission: Admission
    access: AccessLog
    tracer: Tracer | None = None
    slicer: Slicer = field(default_factory=Slicer)


class Call:
    """One request to a hot route: its headers, body, deadline (monotonic seconds), identity, and place among all.

    `trace` is its place in a trace, where it is part of one; `recorded` its record, where its spans are exported.

    Fairness knows its client by the name of its token, where tokens are wanted, else by its address.
    """

    __slots__ = ("body", "deadline", "headers", "id", "path", "place", "query", "recorded", "started", "trace")

    def __init__(
        self, headers: dict[bytes, bytes], query: bytes, path: str, timeout_ms: float, peer: str, admission: Admission
    ) -> None:
        self.started = perf_counter()
        self.headers = headers
        self.query, self.path = query, path
        self.body: bytes = b""
        self.place = Place(admission, peer)
        self.id = request_id(self.headers.get(b"x-request-id"))
        self.deadline = monotonic() + timeout_ms / 1000
        traceparent = headers.get(b"traceparent")
        self.trace: TraceContext | None = None if traceparent is None else parse(traceparent)
        self.recorded: RequestSpan | None = None

    def restart(self) -> None:
        """Start the clock anew: the body is whole, what was before was the caller's time."""
        waited = perf_counter() - self.started
        self.started += waited
        self.deadline += waited

    def record(self, tracer: Tracer) -> None:
        """Begin to record it, if it is sampled."""
        self.recorded = tracer.start(self.trace, self.headers.get(b"tracestate", b""))
        if self.recorded is not None:
            self.trace = self.recorded.trace

    def marks(self) -> dict[str, str]:
        """Return what its lines in the log are found by."""
        return marks(self.id, self.trace)

    def take_timeout(self, most_ms: float) -> None:
        """Move the deadline to what X-Request-Timeout-Ms asks for; raises `Invalid` where it is none."""
        asked = self.headers.get(b"x-request-timeout-ms")
        if asked is None:
            return
        timeout = decimal(asked)
        if not 0 < timeout <= 3_600_000:
            raise Invalid("X-Request-Timeout-Ms wants milliseconds, more than 0 and at most 3600000")
        self.deadline += (timeout - most_ms) / 1000

    def options(self) -> dict[str, str]:
        """Return the options of the query string; raises `Malformed` where one stands twice."""
        if not self.query:
            return {}
        pairs = parse_qsl(self.query.decode("latin-1"), keep_blank_values=True)
        if len(dict(pairs)) != len(pairs):
            raise Malformed("an option stands twice in the query string")
        return dict(pairs)


class Reply(NamedTuple):
    """An answer: body, media type, more headers, how it counts, seconds by stage, who made it, and the stage that
    its whole time counts as."""

    body: bytes
    media_type: bytes
    headers: Sequence[tuple[bytes, bytes]] = ()
    outcome: str = "ok"
    stages: tuple[tuple[str, float], ...] = ()
    status: int = 200
    made_by: str = ""
    total: str = "total"


Handler = Callable[[Call], Coroutine[Any, Any, Reply]]


def request_id(given: bytes | None) -> str:
    """Return the caller's request id where it is a plain short word, else a new one."""
    if given and len(given) <= 64 and given.replace(b"-", b"").replace(b"_", b"").isalnum():
        return given.decode("ascii")
    return f"{getrandbits(64):016x}"


def marks(identity: str, trace: TraceContext | None) -> dict[str, str]:
    """Return what lines in the log about a request are found by."""
    return {"request_id": identity} | ({"trace_id": trace.trace_id} if trace else {})


class HotRoute:
    """One hot route: takes a call, gives a reply, counts it once. Runs below uvicorn, or as plain ASGI."""

    def __init__(self, path: str, handler: Handler, door: Door) -> None:
        self.path, self._handler, self._door = path, handler, door
        self.timeout_ms = door.settings.timeout_ms
        self.max_body = round(door.settings.max_body_mb * 1e6)
        self._refusals: dict[tuple[str, int | None], list[bytes]] = {}
        self._refused_at: Headers = []
        metrics = door.metrics
        self._in_flight = metrics.in_flight.precreate((path,))
        self._requests = metrics.requests.precreate((path,), ("ok", "fallback"))
        self._seconds = {stage: metrics.seconds.labels(path, stage) for stage in STAGES[path]}
        self._tracer, self._access = door.tracer, door.access
        self._is_told = self._tracer is not None or self._access.share > 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request as an ASGI application."""
        peer = scope.get("client") or ("",)
        call = self.call(combine(scope["headers"]), scope["query_string"], scope["path"], peer[0])
        try:
            self.knock(call, declared_length(call.headers))
            await read_body(call, receive, self.max_body)
            reply = await self.answer(call)
        except Departed:
            self.depart(call)
            return
        except ServiceError as error:
            reply = self.problem(error, call.id)
        finally:
            call.place.leave()
        headers = self.headers(reply, call.id)
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": reply.body})
        self.count(reply, call)

    @property
    def closes(self) -> bool:
        """Whether every answer closes its connection."""
        return self._door.state.is_draining

    def call(self, headers: dict[bytes, bytes], query: bytes, path: str, peer: str) -> Call:
        """Return a call to this route from the address `peer`."""
        return Call(headers, query, path, self.timeout_ms, peer, self._door.admission)

    def knock(self, call: Call, length: int) -> None:
        """Learn from the head of a call whose it is, and whether there is room for the `length` bytes that it declares.

        Strangers leave no trace.

        Raises:
            Unauthorised: its token is not known.
            TooLarge: they are too many.
            Overloaded, ClientLimit: there is no room for them.
        """
        call.place.client = self._door.tokens.client_of(call.headers) or call.place.client
        if self._tracer is not None:
            call.record(self._tracer)
        if length > self.max_body:
            raise TooLarge(f"a body of {length} bytes, at most {self.max_body}")
        call.place.expect(length)

    async def answer(self, call: Call) -> Reply:
        """Return the reply to a call whose body is whole."""
        self._in_flight.inc(self.path)
        if self._tracer is not None:
            current_span.set(call.recorded)
        try:
            call.take_timeout(self.timeout_ms)
            if b"content-encoding" in call.headers:
                codings = call.headers[b"content-encoding"]
                call.body = await content_coding.decode(call.body, codings, self.max_body, call.place.grow)
            return await self._handler(call)
        except ServiceError as error:
            return self.problem(error, call.id)
        except Exception as error:
            logger().error("unexpected", route=self.path, **call.marks(), exc_info=error)
            return self.problem(ServiceError("an unexpected error; the log has more under this id"), call.id)
        finally:
            self._in_flight.dec(self.path)

    def count(self, reply: Reply, call: Call) -> None:
        """Count a reply that is sent now."""
        self._requests.inc(self.path, reply.outcome)
        if reply.status == 200:  # a quick refusal must not make the service look fast
            taken_s = perf_counter() - call.started
            self._door.admission.serve(self.path, reply.made_by, call.place.rows, taken_s)
            for stage, seconds in reply.stages:
                self._seconds[stage].observe(seconds)
            self._seconds[reply.total].observe(taken_s)
            if call.trace is not None and call.trace.is_sampled:
                self._exemplify(((reply.total, taken_s), *reply.stages), call.trace.trace_id)
        if self._is_told or reply.status >= 500:
            self._tell(call, reply.status, reply.outcome, reply)

    def refuse(self, error: ServiceError, call: Call) -> None:
        """Count a refusal that is sent now."""
        self._requests.inc(self.path, error.reason)
        if self._is_told or error.status >= 500:
            self._tell(call, error.status, error.reason)

    def depart(self, call: Call) -> None:
        """Count a caller who left before the answer."""
        self._requests.inc(self.path, CANCELLED)
        self._tell(call, DEPARTED, CANCELLED)

    def _exemplify(self, stages: Iterable[tuple[str, float]], trace_id: str) -> None:
        now = time()
        for stage, seconds in stages:
            self._seconds[stage].add_exemplar(seconds, trace_id, now)

    def _tell(self, call: Call, status: int, outcome: str, reply: Reply | None = None) -> None:
        """Tell the log and the trace how a call ended, where they want to know."""
        ended, rows, made_by = perf_counter(), call.place.rows, reply.made_by if reply else ""
        if self._access.wants(status):
            ms, client = round((ended - call.started) * 1e3, 3), call.place.client
            said = {**call.marks(), "client": client, "served_by": made_by}
            self._access.write(status, route=self.path, outcome=outcome, ms=ms, rows=rows, **said)
        if call.recorded is not None:
            spent = dict(reply.stages) if reply else {}
            for stage, start in (("decode", call.started), ("encode", ended - spent.get("encode", 0.0))):
                if stage in spent:
                    call.recorded.add_child(stage, start, start + spent[stage], {})
            known: Attributes = {"http.response.status_code": status, "lvm.outcome": outcome, "lvm.rows": rows}
            name = {"http.request.method": "POST", "http.route": self.path, "lvm.request_id": call.id}
            failed = outcome if status >= 500 else None
            call.recorded.finish(f"POST {self.path}", call.started, ended, {**name, **known}, failed)

    def refusal(
        self, error: ServiceError, call: Call, dated: Headers, write: Callable[[Reply, Headers], bytes]
    ) -> bytes:
        """Return the answer, as `write` writes it, to one for whom there is no room: made before but for the id.

        It begins with the headers `dated`, and is made again if these change.
        """
        if dated is not self._refused_at:
            self._refusals.clear()
            self._refused_at = dated
        known = error.detail, error.retry_after
        pieces = self._refusals.get(known)
        if pieces is None:
            reply = self.problem(error, BLANK)
            pieces = write(reply, dated + self.headers(reply, BLANK)).split(BLANK.encode())
            self._refusals[known] = pieces
        return call.id.encode().join(pieces)

    def headers(self, reply: Reply, identity: str) -> Headers:
        """Return all headers of a reply."""
        headers = [
            (b"content-type", reply.media_type),
            (b"content-length", b"%d" % len(reply.body)),
            (b"x-request-id", identity.encode()),
            NOSNIFF,
            *reply.headers,
            *self._door.state.headers,
        ]
        if self.closes or reply.status in CLOSING:
            headers.append((b"connection", b"close"))
        return headers

    def problem(self, error: ServiceError, identity: str) -> Reply:
        """Return the answer to an error."""
        return problem_reply(error, identity, self.path)


def problem_reply(error: ServiceError, identity: str, path: str) -> Reply:
    """Return the RFC 9457 answer to an error of a request for `path`, with Retry-After where it has one."""
    retry = [(b"retry-after", b"%d" % error.retry_after)] if error.retry_after else []
    body = problem(error.status, error.reason, error.detail, identity, path=path, pointer=error.pointer)
    return Reply(body, PROBLEM, [*error.headers, *retry], error.reason, status=error.status)


def declared_length(headers: dict[bytes, bytes]) -> int:
    """Return the bytes of a body as its head declares them, 0 where it does not."""
    said = headers.get(b"content-length", b"")
    return int(said) if said.isdigit() and len(said) <= MAX_DIGITS else 0


def joined(body: bytes, part: bytes) -> bytes:
    """Return a body with one more part; in place from the second on, for parts may be tiny, and each has a head."""
    if not body:
        return part
    whole: Any = body
    if isinstance(whole, bytes):
        whole = bytearray(whole)
    whole += part
    return whole  # type: ignore[no-any-return]  # readers of a body take either


async def read_body(call: Call, receive: Receive, limit: int) -> None:
    """Read the whole body of a call, and let its rows in.

    Raises:
        TooLarge: it is longer than `limit` bytes.
        Overloaded, ClientLimit: there is no room.
        Departed: the caller left before it was whole.
    """
    call.place.check()
    body: bytes = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Departed
        body = joined(body, message.get("body", b""))
        if len(body) > limit:
            raise TooLarge(f"a body of more than {limit} bytes")
        call.place.grow(len(body))
        if not message.get("more_body"):
            break
    call.body = body
    call.place.enter()


def want_media_type(call: Call, *known: bytes) -> bytes:
    """Return the media type of the body, JSON if none is named.

    Raises:
        UnsupportedMediaType: it is not one of `known`, or JSON in a charset other than UTF-8.
    """
    header = call.headers.get(b"content-type", JSON)
    if header in known:
        return header
    named = media_type(header)
    if named is None or named.name not in known:
        raise UnsupportedMediaType(f"want {b' or '.join(known).decode()}")
    if named.name == JSON and not CHARSETS.issuperset(value.lower() for value in named.values(b"charset")):
        raise UnsupportedMediaType("the charset is not utf-8, which JSON is in")
    return named.name
