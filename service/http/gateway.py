"""The gateway: the one place that authenticates, admits, times, counts, traces and logs requests, forms the headers of
responses and turns exceptions into problems (RFC 9457)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from time import monotonic, perf_counter, time

from lvm.errors import ServiceError, Unavailable
from service.http import content_coding
from service.http.auth import Tokens
from service.http.messages import (
    ClientDisconnected,
    Handler,
    Headers,
    Request,
    Response,
    problem_of,
)
from service.overload.admission import Admission, Permit
from service.telemetry.log import AccessLog, logger
from service.telemetry.metrics import STAGES, Metrics
from service.telemetry.tracing import Attributes, Tracer, current_span, parse

OTHER = "other"  # the route label of requests that reached no route
CANCELLED = "cancelled"  # the outcome of requests whose client disconnected
CLIENT_CLOSED_REQUEST = 499  # nginx's status for them; it is never sent
CLOSING = (401, 408, 413)  # after these the rest of the body is not read
WITHOUT_CONTENT = (204, 304)
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


class Route:
    """How the requests to a path are treated.

    Attributes:
        label: its name in metrics, logs and traces.
        max_body: the longest body it reads, in bytes.
        is_admitted: whether its requests are admitted, timed by stage and traced; its handler sets their rows.
        is_open: whether it needs no token.
        is_logged: whether its requests may have a line in the access log.
    """

    def __init__(
        self,
        label: str,
        handler: Handler,
        *,
        max_body: int,
        is_admitted: bool = False,
        is_open: bool = False,
        is_logged: bool = True,
    ) -> None:
        self.label = label
        self.handler = handler
        self.max_body = max_body
        self.is_admitted = is_admitted
        self.is_open = is_open
        self.is_logged = is_logged


class Gateway:
    """Answers every request, whatever the transport.

    Args:
        find: returns the route of a method and a path.
        timeout_ms: time limit of a request without X-Request-Timeout-Ms.
        state: whether the process is draining, and headers of every response.
        tracer: records spans, if they are exported.
    """

    def __init__(
        self,
        find: Callable[[bytes, str], Route],
        *,
        timeout_ms: float,
        state: State,
        tokens: Tokens,
        admission: Admission,
        metrics: Metrics,
        access: AccessLog,
        tracer: Tracer | None = None,
    ) -> None:
        self._find = find
        self._timeout_s = timeout_ms / 1000
        self._state = state
        self._tokens = tokens
        self._admission = admission
        self._metrics = metrics
        self._access = access
        self._tracer = tracer
        metrics.in_flight.precreate(STAGES)
        metrics.requests.precreate(STAGES, ("ok", "fallback"))
        self._seconds = {
            route: {stage: metrics.seconds.labels(route, stage) for stage in stages} for route, stages in STAGES.items()
        }
        self._refused = Route(OTHER, _unreachable, max_body=0)

    async def handle(self, request: Request) -> Response:
        """Return the complete response to `request`. It is counted, and what it held is released.

        Raises:
            ClientDisconnected, asyncio.CancelledError: the client is gone, so there is no response; counted, too.
        """
        route = self._refused if request.failure else self._find(request.method, request.path)
        try:
            response = await self._respond(route, request)
        except (ClientDisconnected, asyncio.CancelledError):
            if request.failure is None:
                self._count(route, request, CLIENT_CLOSED_REQUEST, CANCELLED)
                if request.permit is not None:
                    request.permit.release()
                raise
            response = problem_of(request.failure, request)
        except Exception as error:
            response = self._problem(route, request, error)
        self._complete(route, request, response)
        self._count(route, request, response.status, response.outcome, response)
        if request.permit is not None:
            request.permit.release()
        return response

    async def _respond(self, route: Route, request: Request) -> Response:
        """Return the response of a route; raises what the handler raises, and what keeps the request from it."""
        if request.failure:
            raise request.failure
        if not route.is_open:
            request.client = self._tokens.client_of(request.headers) or request.client
        request.max_body = route.max_body
        if not route.is_admitted:
            if not request.is_ready:
                await request.wait_for_turn()
            return await route.handler(request)
        if self._tracer is not None or b"traceparent" in request.headers:
            self._begin_trace(request)
        request.check_size(request.declared or len(request.body))
        if request.is_ready:
            self._admission.check_row(request.client)
        permit = request.permit = Permit(self._admission, request.client)
        permit.reserve(len(request.body), request.declared)
        if not request.is_ready:
            await self._receive(request)
        permit.set_rows(1)
        request.arrived = monotonic()
        request.deadline = request.arrived + self._timeout_s
        in_flight = self._metrics.in_flight
        in_flight.inc(route.label)
        try:
            if b"x-request-timeout-ms" in request.headers:
                request.read_timeout()
            if b"content-encoding" in request.headers:
                await self._decode(request)
            return await route.handler(request)
        finally:
            in_flight.dec(route.label)

    async def _receive(self, request: Request) -> None:
        """Wait for the turn and the body of a request; it is rejected before its body is sent, if there is no room."""
        await request.wait_for_turn()
        self._admission.check_row(request.client)
        await request.read()
        self._admission.check_row(request.client)
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
        if self._tracer is not None:
            request.span = self._tracer.start(request.trace, request.headers.get(b"tracestate", b""))
            current_span.set(request.span)
            if request.span is not None:
                request.trace = request.span.trace

    def _problem(self, route: Route, request: Request, error: Exception) -> Response:
        """Return the response to an exception, whose traceback would hold the request until a garbage collection."""
        if isinstance(error, ServiceError):
            return problem_of(error.with_traceback(None), request)
        if isinstance(error, OSError) and not route.is_admitted:
            # Out of file descriptors, or a disk is away: the file may be readable in a moment.
            logger().error("file not read", route=request.path, **request.log_fields(), reason=str(error))
            return problem_of(Unavailable("a file that the answer needs cannot be read now"), request)
        logger().error("unexpected", route=request.path, **request.log_fields(), exc_info=error)
        return problem_of(ServiceError(UNEXPECTED), request)

    def _complete(self, route: Route, request: Request, response: Response) -> None:
        """Add the headers that every response has, and drop the body of a response to HEAD."""
        guards = [NOSNIFF] if route.is_admitted else _guards_beside(response.headers)
        headers = [(b"x-request-id", request.id.encode()), *guards, *response.headers, *self._state.headers]
        if response.status not in WITHOUT_CONTENT:
            headers.append((b"content-type", response.media_type))
            headers.append((b"content-length", b"%d" % len(response.body)))
        response.headers = headers
        response.closes = self._state.is_draining or response.status in CLOSING
        if request.method == b"HEAD":
            response.body = b""

    def _count(
        self, route: Route, request: Request, status: int, outcome: str, response: Response | None = None
    ) -> None:
        """Count a request, and log and trace it if it is to be. It is counted before the client has the response."""
        self._metrics.requests.inc(route.label, outcome)
        ended = perf_counter()
        if response is not None and status == 200 and route.is_admitted:  # a quick rejection must not look fast
            self._time(route, request, response, ended - request.started)
        if route.is_logged and self._access.wants(status):
            self._log(route, request, status, outcome, response, ended)
        if request.span is not None:
            self._trace(route, request, status, outcome, response, ended)

    def _time(self, route: Route, request: Request, response: Response, seconds: float) -> None:
        self._admission.record_served(route.label, response.served_by, request.rows, seconds)
        histograms = self._seconds[route.label]
        stages = (*response.stages, (response.total, seconds))
        for stage, stage_s in stages:
            histograms[stage].observe(stage_s)
        if request.trace is not None and request.trace.is_sampled:
            now = time()
            for stage, stage_s in stages:
                histograms[stage].add_exemplar(stage_s, request.trace.trace_id, now)

    def _log(
        self, route: Route, request: Request, status: int, outcome: str, response: Response | None, ended: float
    ) -> None:
        if not route.is_admitted:
            request.trace = parse(request.headers.get(b"traceparent", b""))
        fields: dict[str, str | float] = {**request.log_fields(), "client": request.client}
        fields["ms"] = round((ended - request.started) * 1e3, 3)
        if route.is_admitted:
            fields["rows"] = request.rows
            fields["served_by"] = response.served_by if response else ""
        self._access.write(status, route=route.label, outcome=outcome, **fields)

    def _trace(
        self, route: Route, request: Request, status: int, outcome: str, response: Response | None, ended: float
    ) -> None:
        span = request.span
        assert span is not None
        seconds = dict(response.stages) if response else {}
        starts = {"decode": request.started, "encode": ended - seconds.get("encode", 0.0)}
        for stage, start in starts.items():
            if stage in seconds:
                span.add_child(stage, start, start + seconds[stage], {})
        attributes: Attributes = {
            "http.request.method": "POST",
            "http.route": route.label,
            "lvm.request_id": request.id,
            "http.response.status_code": status,
            "lvm.outcome": outcome,
            "lvm.rows": request.rows,
        }
        span.finish(f"POST {route.label}", request.started, ended, attributes, outcome if status >= 500 else None)


def _guards_beside(headers: Headers) -> Headers:
    """Return the guards that a handler did not set itself."""
    names = dict(headers)
    return [guard for guard in GUARDS if guard[0] not in names]


async def _unreachable(request: Request) -> Response:
    """Stand in for the handler of requests that the transport rejects."""
    raise AssertionError("a rejected request has no handler")


def routes_by_path(
    admitted: Mapping[str, Route], pattern: Callable[[str], Route | None], others: Mapping[str, Route], unknown: Route
) -> Callable[[bytes, str], Route]:
    """Return the function that finds the route of a method and a path.

    Args:
        admitted: the routes of POST, by path.
        pattern: returns the route of a POST whose path is not in `admitted`, if it has one.
        others: all other routes, by path.
        unknown: the route of all other paths.
    """

    def find(method: bytes, path: str) -> Route:
        route = None
        if method == b"POST":
            route = admitted.get(path) or pattern(path)
        return route or others.get(path, unknown)

    return find
