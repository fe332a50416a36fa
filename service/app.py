"""create_app: the only wiring. The lifespan loads, warms, watches and drains."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from lvm.errors import (
    Invalid,
    ServiceError,
    Unauthorised,
    Unavailable,
)
from models.registry.alias import ALIASES, Alias
from models.registry.registry import Registry
from models.registry.remote import local_directory
from service.deploy.deployments import Deployments
from service.deploy.loading import ModelLoader
from service.deploy.registry_sync import keep_deployed, sync_loop
from service.deploy.watcher import Watcher
from service.engines.remote import EngineProvider
from service.engines.router import Router
from service.http import schemas
from service.http.auth import PROBES, Tokens, read_tokens
from service.http.connection import OTHER
from service.http.gateway import (
    CANCELLED,
    DEPARTED,
    NOSNIFF,
    Door,
    HotRoute,
    Message,
    Receive,
    Scope,
    Send,
    State,
    marks,
    problem_reply,
    request_id,
)
from service.http.headers import combine, path_of
from service.http.problems import PROBLEM, problem
from service.http.routes import console, oip
from service.http.routes.hot import DocumentedHotRoute, add_routes, refuse_unknown_query
from service.overload.admission import Admission, Limit
from service.overload.fairness import Slicer
from service.overload.limiter import AdaptiveLimit, FixedLimit
from service.settings import BadSettings, Settings
from service.telemetry.log import AccessLog, log_writer, logger
from service.telemetry.metrics import Metrics
from service.telemetry.shared_memory import MetricValues
from service.telemetry.tracing import Tracer, parse

if TYPE_CHECKING:
    from service.telemetry.otlp import Exporter

STATUS_REASONS = {401: "unauthorised", 404: "unknown_route", 405: "method_not_allowed", 500: "internal"}
GUARDS = (  # against what a browser may make of an answer; a page brings its own policy
    NOSNIFF,
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)


class Service(FastAPI):
    """FastAPI with a short cut: a POST to a hot route goes straight to it, past router and middleware."""

    def __init__(self, metrics: Metrics, tokens: Tokens, access: AccessLog, **options: Any) -> None:
        super().__init__(**options)
        self.metrics, self.tokens, self.access = metrics, tokens, access
        self.hot: dict[str, HotRoute] = {}
        self.infer: HotRoute | None = None
        self.labels: set[str] = set()
        self.slicer = Slicer()
        self.open: frozenset[str] = PROBES

    def short_cut(self) -> None:
        """Learn the routes; to be called once they are all there."""
        self.hot = {route.path: route.hot for route in self.routes if isinstance(route, DocumentedHotRoute)}
        self.open = PROBES | console.places().keys()  # a page asks for the token that its requests then carry
        self.labels = {route.path for route in self.routes if isinstance(route, Route)}

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, with what requests and errors name."""
        document = super().openapi()
        document["components"]["schemas"].update(schemas.COMPONENTS)
        return document

    def hot_route(self, path: str) -> HotRoute | None:
        """Return the hot route of a path, if it is one."""
        route = self.hot.get(path)
        return self.infer if route is None and oip.is_infer(path) else route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or run the lifespan."""
        if scope["type"] != "http":
            return await super().__call__(scope, receive, send)
        raw_path = scope.get("raw_path") or b""
        if b"%" in raw_path and unquote(raw_path) == scope["path"]:
            scope = {**scope, "path": path_of(raw_path)}
        hot = self.hot_route(scope["path"]) if scope["method"] == "POST" else None
        if hot is not None:
            return await hot(scope, receive, send)
        return await self._counted(scope, receive, send)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = combine(scope["headers"])
        scope = {**scope, "headers": list(headers.items())}
        if is_head := scope["method"] == "HEAD":
            scope["method"] = "GET"  # the same answer, without its body
        identity = scope["lvm.request_id"] = request_id(headers.get(b"x-request-id"))
        outcome, status, began = CANCELLED, DEPARTED, perf_counter()

        async def tell(message: Message) -> None:
            nonlocal outcome, status
            if message["type"] == "http.response.start":
                status = message["status"]
                outcome = _outcome(status)
                set_already = {name for name, _ in message["headers"]}
                guards = (guard for guard in GUARDS if guard[0] not in set_already)
                message["headers"] = [
                    *message["headers"],
                    *guards,
                    (b"x-request-id", identity.encode()),
                    *self.state.process.headers,
                ]
            elif is_head and message["type"] == "http.response.body":
                message["body"] = b""
            await send(message)

        client, *_ = scope.get("client") or ("",)
        try:
            if scope["path"] not in self.open:
                client = self.tokens.client_of(headers) or client
            await super().__call__(scope, receive, tell)
        except Unauthorised as error:
            await _response(error, identity, scope["path"])(scope, receive, tell)
        finally:
            label = scope["path"] if scope["path"] in self.labels else OTHER
            self.metrics.requests.inc(label, outcome)
            if scope["path"] not in PROBES and self.access.wants(status):
                ms, trace = round((perf_counter() - began) * 1e3, 3), parse(headers.get(b"traceparent", b""))
                said = {**marks(identity, trace), "client": client}
                self.access.write(status, route=label, outcome=outcome, ms=ms, **said)


def create_app(
    settings: Settings,
    loaders: ModelLoader | None = None,
    metric_values: MetricValues | None = None,
    provider: EngineProvider | None = None,
) -> Service:
    """Return the service for `settings`; `loaders` stands in for the real ones in tests, workers share `metric_values`.

    With a `provider`, the nets are its; the corpus and the encoder are loaded here all the same.

    Nothing is loaded before the lifespan starts. `app.state.process` tells and decides whether the
    process is draining.
    """
    metrics, state, tokens = Metrics(settings.slo_ms, metric_values), State(), read_tokens(settings)
    log_writer().on_drop(metrics.log_dropped.inc)
    access, exporter = AccessLog(settings.access_log), _exporter(settings)
    aliases = (Alias.RETRIEVER,) if provider else ALIASES
    registry = Registry(local_directory(settings.registry, settings.cache))
    lineup = Deployments(registry, loaders or ModelLoader(settings), settings, metrics, aliases=aliases)
    watcher = Watcher(lineup, settings.reload_s, metrics)
    follower = sync_loop(lineup, settings, metrics)
    router = Router(lineup.engines, settings, metrics)
    admission = Admission(_limit(settings), settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            try:
                if provider:
                    await provider.open(lineup.set_engines)
                    stack.push_async_callback(provider.close)
                if exporter:
                    stack.callback(exporter.close)
                await stack.enter_async_context(keep_deployed(watcher, follower, settings.grace_s))
            except Exception as error:
                state.failure = error
                raise
            yield
            state.is_draining = True

    app = Service(
        metrics,
        tokens,
        access,
        title="LVM Serve",
        version=version("lvm-serve"),
        lifespan=lifespan,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(refuse_unknown_query)],
    )
    app.state.process, app.state.settings, app.state.lineup = state, settings, lineup
    tracer = Tracer(exporter, settings.trace_share) if exporter else None
    door = Door(settings, metrics, state, tokens, admission, access, tracer, app.slicer)
    app.state.observe = add_routes(app, router, lineup, door, follower)
    app.infer = oip.add_routes(app, router, lineup, door)
    app.state.admission = admission
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_bad_parameter)
    app.add_exception_handler(OSError, _on_os_error)
    app.add_exception_handler(Exception, _on_anything_else)
    app.short_cut()
    return app


def _limit(settings: Settings) -> Limit:
    if settings.concurrency == "adaptive":
        return AdaptiveLimit(min(settings.max_queue, 4 * settings.max_batch), monotonic())
    return FixedLimit(settings.concurrency)


def _exporter(settings: Settings) -> Exporter | None:
    if settings.otlp_endpoint is None:
        return None
    try:
        from service.telemetry.otlp import Exporter
    except ImportError as error:
        raise BadSettings("LVM_OTLP_ENDPOINT requires OpenTelemetry: pip install 'lvm-serve[otlp]'") from error
    return Exporter(settings.otlp_endpoint)


def _outcome(status: int) -> str:
    return "ok" if status < 400 else STATUS_REASONS.get(status, "unavailable" if status == 503 else "other")


async def _on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return _response(error, request.scope["lvm.request_id"], request.url.path)


def _response(error: ServiceError, identity: str, path: str) -> Response:
    reply = problem_reply(error, identity, path)
    headers = {name.decode(): value.decode() for name, value in reply.headers}
    return Response(reply.body, reply.status, headers, reply.media_type.decode())


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = error.headers
    if error.status_code == 405:
        headers = {"allow": ", ".join(sorted(_methods(request)))}
    reason = STATUS_REASONS.get(error.status_code, "other")
    path = request.url.path
    detail = (oip.missing(path) if error.status_code == 404 else None) or str(error.detail)
    body = problem(error.status_code, reason, detail, request.scope["lvm.request_id"], path=path)
    return Response(body, error.status_code, headers, PROBLEM.decode())


def _methods(request: Request) -> set[str]:
    """Return the methods that the path of a request allows."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    found = [route.methods or () for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    allowed = set[str]().union(*found)
    return allowed | {"HEAD"} if "GET" in allowed else allowed


async def _on_bad_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    said = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in faults)
    return await _on_service_error(request, Invalid(said, pointer=f"/{faults[0]['loc'][-1]}"))


async def _on_os_error(request: Request, error: Exception) -> Response:
    """Files that cannot be read now, for want of descriptors or of their disk, may be read in a moment."""
    identity = request.scope["lvm.request_id"]
    logger().error("file not read", route=request.url.path, request_id=identity, reason=str(error))
    return await _on_service_error(request, Unavailable("a file that the answer needs cannot be read now"))


async def _on_anything_else(request: Request, error: Exception) -> Response:
    identity = request.scope["lvm.request_id"]
    logger().error("unexpected", route=request.url.path, request_id=identity, exc_info=error)
    return await _on_service_error(request, ServiceError("an unexpected error; the log has more under this id"))
