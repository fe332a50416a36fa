"""The gateway: the one place that authenticates, admits, times, counts, traces and logs requests, forms the headers of
responses and turns exceptions into problems (RFC 9457)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from random import getrandbits
from time import monotonic, perf_counter, time

from lvm.errors import Expired, Invalid, ServiceError, Unavailable
from service.engines.pairing import is_declined
from service.http import content_coding
from service.http.auth import Tokens
from service.http.headers import decimal
from service.http.messages import (
    ClientDisconnected,
    Handler,
    Headers,
    Request,
    Response,
    Stages,
    caller_id,
    head_of,
    problem_of,
)
from service.overload.admission import Admission, Permit
from service.telemetry.log import AccessLog, logger
from service.telemetry.metrics import STAGES, Metrics
from service.telemetry.tracing import Attributes, RequestSpan, TraceContext, Tracer, current_span, parse

OTHER = "other"  # the route label of requests that reached no route
CANCELLED = "cancelled"  # the outcome of requests whose client disconnected
CLIENT_CLOSED_REQUEST = 499  # nginx's status for them; it is never sent
GONE = Response(b"", b"", [], CLIENT_CLOSED_REQUEST, CANCELLED)
LATE = Response(b"", b"", [], Expired.status, Expired.reason)  # the client left at the deadline that it had given
CLOCKS_S = 0.005
MAX_TIMEOUT_MS = 3_600_000
CLOSING = (401, 408, 413)  # after these the rest of the body is not read
NOSNIFF = (b"x-content-type-options", b"nosniff")  # a browser must not guess the type of a response
GUARDS: Headers = [  # against what a browser may do with a response; a page brings its own policy
    NOSNIFF,
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
]
UNEXPECTED = "an unexpected error; the log has more under this id"


class State:
    """The state of the process: draining (503 on /readyz, connections close), or why it did not start."""

    def __init__(self) -> None:
        self.is_draining = False
        self.failure: Exception | None = None
        self.headers: Headers = []  # added to every response


@dataclass(frozen=True)
class Route:
    """How the requests to a path are treated.

    Attributes:
        label: its name in metrics, logs and traces.
        max_body: the longest body it reads, in bytes.
        is_admitted: whether its requests are admitted, timed by stage and traced; its handler sets their rows.
        is_open: whether it needs no token.
        is_logged: whether its requests may have a line in the access log.
    """

    label: str
    handler: Handler
    max_body: int
    is_admitted: bool = False
    is_open: bool = False
    is_logged: bool = True


Find = Callable[[bytes, str], Route]
"""Returns the route of a method and a path."""
Respond = Callable[[ServiceError, Request], Response]
"""Returns the response to an error."""


@dataclass(eq=False)
class Gateway:
    """Answers every request, whatever the transport.

    Args:
        find: returns the route of a method and a path that is not in `hot`.
        timeout_ms: time limit of a request without X-Request-Timeout-Ms.
        state: whether the process is draining, and headers of every response.
        tracer: records spans, if they are exported.
        stages: what the requests of each admitted route are timed by.
        respond: returns the response to an error.
    """

    find: Find
    _: KW_ONLY
    timeout_ms: float
    state: State
    tokens: Tokens
    admission: Admission
    metrics: Metrics
    access: AccessLog
    hot: Mapping[tuple[bytes, str], Route] = field(default_factory=dict)
    tracer: Tracer | None = None
    stages: Mapping[str, Iterable[str]] = field(default_factory=lambda: STAGES)
    respond: Respond = problem_of

    def __post_init__(self) -> None:
        self._needs_token = len(self.tokens) > 0
        self._refused = Route(OTHER, _unreachable, max_body=0)
        self.metrics.in_flight.precreate(self.stages)
        self.metrics.requests.precreate(self.stages, ("ok", "fallback"))
        labels = self.metrics.seconds.labels
        self._seconds = {
            route: {stage: labels(route, stage) for stage in names} for route, names in self.stages.items()
        }

    async def handle(self, request: Request) -> Response:
        """Return the complete response to `request`. It is counted, and what it held is released.

        Raises:
            ClientDisconnected, asyncio.CancelledError: the client is gone, so there is no response; counted, too.
        """
        given = request.headers.get(b"x-request-id")
        # quicker than an f-string
        request.id = (caller_id(given) if given else "") or "%016x" % getrandbits(64)  # noqa: UP031
        if request.failure:
            route = self._refused
        else:
            route = self.hot.get((request.method, request.path)) or self.find(request.method, request.path)
        request.max_body = route.max_body
        try:
            if request.failure:
                raise request.failure
            if self._needs_token and not route.is_open:
                request.client = self.tokens.client_of(request.headers)
            if route.is_admitted:
                await self._admit(route, request)
            elif not request.is_ready:
                await request.wait_for_turn()
            response = await route.handler(request)
        except (ClientDisconnected, asyncio.CancelledError):
            if request.failure is None:
                self._end(route, request, LATE if _gave_up(request) else GONE)
                raise
            response = self.respond(request.failure, request)
        except Exception as error:
            response = self._problem(route, request, error)
        self._complete(route, request, response)
        self._end(route, request, response)
        return response

    async def _admit(self, route: Route, request: Request) -> None:
        """Take the permit of a request, wait for its body, and start its clock."""
        if self.tracer is not None or b"traceparent" in request.headers:
            self._begin_trace(request)
        if request.is_ready and len(request.body) <= route.max_body:
            request.permit = self.admission.admit(request.client, len(request.body))
        else:
            await self._receive(request)
        self.metrics.in_flight.inc(route.label)
        request.arrived = monotonic()
        request.deadline = request.until or request.arrived + self.timeout_ms / 1000
        if b"x-request-timeout-ms" in request.headers:
            request.set_timeout(_timeout_ms(request))
        if b"x-live-score" in request.headers:
            is_declined.set(not _allows_score(request))
        if b"content-encoding" in request.headers:
            await self._decode(request)

    async def _receive(self, request: Request) -> None:
        """Wait for the turn and the body of a request; it is rejected before its body is sent, if there is no room."""
        request.check_size(request.declared or len(request.body))
        permit = request.permit = Permit(self.admission, request.client)
        permit.reserve(len(request.body), request.declared)
        await request.wait_for_turn()
        self.admission.check_row(request.client)
        await request.read()
        self.admission.check_row(request.client)
        permit.set_rows(1)
        request.started = perf_counter()

    async def _decode(self, request: Request) -> None:
        codings = request.headers[b"content-encoding"]
        reserve = request.permit.reserve if request.permit else lambda size: None
        request.body = await content_coding.decode(request.body, codings, request.max_body, reserve)

    def _begin_trace(self, request: Request) -> None:
        """Start the span of a request, if it is sampled. Unauthenticated requests are not traced."""
        traceparent = request.headers.get(b"traceparent")
        if traceparent is not None:
            request.trace = parse(traceparent)
        if self.tracer is not None:
            request.span = self.tracer.start(request.trace, request.headers.get(b"tracestate", b""))
            current_span.set(request.span)
            if request.span is not None:
                request.trace = request.span.trace

    def _problem(self, route: Route, request: Request, error: Exception) -> Response:
        """Return the response to an exception, whose traceback would hold the request until a garbage collection."""
        if isinstance(error, ServiceError):
            return self.respond(error.with_traceback(None), request)
        if isinstance(error, OSError) and not route.is_admitted:
            # Out of file descriptors, or a disk is away: the file may be readable in a moment.
            logger().error("file not read", route=request.path, **request.log_fields(), reason=str(error))
            return self.respond(Unavailable("a file that the answer needs cannot be read now"), request)
        logger().error("unexpected", route=request.path, **request.log_fields(), exc_info=error)
        return self.respond(ServiceError(UNEXPECTED), request)

    def _complete(self, route: Route, request: Request, response: Response) -> None:
        """Form the head of a response, and drop its body if it is one to HEAD."""
        guards = [NOSNIFF] if route.is_admitted else _guards_beside(response.headers)
        response.head = head_of(response, request.id, guards + self.state.headers)
        response.closes = self.state.is_draining or response.status in CLOSING
        if request.method == b"HEAD":
            response.body = b""

    def _end(self, route: Route, request: Request, response: Response) -> None:
        """Count a request, release what it held, log and trace it if it is to be, all before the client has it."""
        ended = perf_counter()
        seconds = ended - request.started
        is_served = response.status == 200 and route.is_admitted  # a quick rejection must not look fast
        if request.arrived:
            self.metrics.in_flight.dec(route.label)
        self.metrics.requests.inc(route.label, response.outcome)
        if is_served:
            response.stages[response.total] = seconds
            self.metrics.seconds.observe_each(self._seconds[route.label], response.stages)
            if request.trace is not None and request.trace.is_sampled:
                self._add_exemplars(route, request.trace, response.stages)
        permit = request.permit
        if permit is not None:
            permit.release()
            if is_served:
                self.admission.record_served(route.label, response.served_by, permit.rows, seconds)
        is_logged = route.is_logged and (self.access.share or response.status >= 500)
        if is_logged and self.access.wants(response.status):
            self._log(route, request, response, ended)
        if request.span is not None:
            self._trace(route, request, response, ended, request.span)

    def _add_exemplars(self, route: Route, trace: TraceContext, stages: Stages) -> None:
        now = time()
        for stage, seconds in stages.items():
            self._seconds[route.label][stage].add_exemplar(seconds, trace.trace_id, now)

    def _log(self, route: Route, request: Request, response: Response, ended: float) -> None:
        if not route.is_admitted:
            request.trace = parse(request.headers.get(b"traceparent", b""))
        fields: dict[str, str | float] = {**request.log_fields(), "client": request.client}
        fields["ms"] = round((ended - request.started) * 1e3, 3)
        if route.is_admitted:
            fields["rows"] = request.rows
            fields["served_by"] = response.served_by
        self.access.write(response.status, route=route.label, outcome=response.outcome, **fields)

    def _trace(self, route: Route, request: Request, response: Response, ended: float, span: RequestSpan) -> None:
        seconds = response.stages
        starts = {"decode": request.started, "encode": ended - seconds.get("encode", 0.0)}
        for stage, start in starts.items():
            if stage in seconds:
                span.add_child(stage, start, start + seconds[stage], {})
        attributes: Attributes = {
            "http.request.method": "POST",
            "http.route": route.label,
            "lvm.request_id": request.id,
            "http.response.status_code": response.status,
            "lvm.outcome": response.outcome,
            "lvm.rows": request.rows,
        }
        error = response.outcome if response.status >= 500 else None
        span.finish(f"POST {route.label}", request.started, ended, attributes, error)


def _guards_beside(headers: Headers) -> Headers:
    """Return the guards that a handler did not set itself."""
    names = dict(headers)
    return [guard for guard in GUARDS if guard[0] not in names]


async def _unreachable(request: Request) -> Response:
    """Stand in for the handler of requests that the transport rejects."""
    raise AssertionError("a rejected request has no handler")


def _timeout_ms(request: Request) -> float:
    """Return what X-Request-Timeout-Ms asks for; raises `Invalid` if it is malformed."""
    milliseconds = decimal(request.headers[b"x-request-timeout-ms"])
    if not 0 < milliseconds <= MAX_TIMEOUT_MS:
        raise Invalid(f"malformed X-Request-Timeout-Ms; expected milliseconds, over 0 and up to {MAX_TIMEOUT_MS}")
    return milliseconds


def _gave_up(request: Request) -> bool:
    """Return whether the client left because its time was over; its clock may be a few milliseconds ahead."""
    return request.until is not None and monotonic() >= request.until - CLOCKS_S


def _allows_score(request: Request) -> bool:
    """Return what X-Live-Score allows; raises `Invalid` if it is neither `on` nor `off`."""
    value = request.headers[b"x-live-score"].strip().lower()
    if value not in (b"on", b"off"):
        raise Invalid("malformed X-Live-Score; expected `on` or `off`")
    return value == b"on"
