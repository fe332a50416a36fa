"""create_app: the only wiring. The lifespan loads, warms, watches and drains."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from importlib.metadata import version
from time import monotonic
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI
from fastapi import Request as FastAPIRequest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.routing import Route as StarletteRoute

from lvm.errors import Malformed
from models.registry.alias import ALIASES, Alias
from models.registry.registry import Registry
from models.registry.remote import local_directory
from service.deploy.deployments import Deployments
from service.deploy.loading import ModelLoader
from service.deploy.registry_sync import deployment_lifespan, sync_loop
from service.deploy.shadow import Shadow
from service.deploy.watcher import Watcher
from service.engines.remote import EngineProvider
from service.engines.router import make_router
from service.http import asgi, checks, schemas
from service.http.auth import PROBES, Tokens, read_tokens
from service.http.gateway import OTHER, Gateway, Route, State
from service.http.messages import Handler
from service.http.routes import articles, console, health, lnsp, oip, registry
from service.http.routes.common import document_route
from service.http.routes.predict import Predict
from service.http.routes.retrieve import Retrieve
from service.overload.admission import Admission
from service.overload.fairness import Slicer
from service.overload.limiter import AdaptiveLimit, FixedLimit, Limit
from service.settings import BadSettings, Settings
from service.telemetry.log import AccessLog, log_writer
from service.telemetry.metrics import LNSP_STAGES, STAGES, Metrics
from service.telemetry.shared_memory import MetricValues
from service.telemetry.tracing import Tracer

if TYPE_CHECKING:
    from service.telemetry.otlp import Exporter

# of them, /health exists only with LVM_COMPAT=lnsp
OPEN = PROBES | {lnsp.HEALTH}
MAX_COLD_BODY = oip.MAX_INDEX_BODY  # bytes of a body of a route that FastAPI answers


class Service(FastAPI):
    """The application: FastAPI with a gateway before it, which answers the hot routes itself."""

    gateway: Gateway

    def __init__(self, metrics: Metrics, tokens: Tokens, slicer: Slicer, **options: Any) -> None:
        # Exceptions leave FastAPI as they are: the gateway makes problems of them.
        unhandled: dict[Any, Any] = dict.fromkeys((HTTPException, RequestValidationError), asgi.reraise)
        super().__init__(exception_handlers=unhandled, **options)
        self.metrics = metrics
        self.tokens = tokens
        self.slicer = slicer

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, with what requests and errors name."""
        document = super().openapi()
        document["components"]["schemas"].update(schemas.COMPONENTS)
        return document

    def methods_of(self, scope: asgi.Scope) -> set[str]:
        """Return the methods that the path of a scope allows."""
        routes = [route for route in self.routes if isinstance(route, StarletteRoute)]
        found = [route.methods or () for route in routes if route.matches(scope)[0] is not Match.NONE]
        allowed = set[str]().union(*found)
        return allowed | {"HEAD"} if "GET" in allowed else allowed

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """Answer one request of another server, or run the lifespan."""
        if scope["type"] == "http":
            await asgi.serve(self.gateway, scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(
    settings: Settings,
    loaders: ModelLoader | None = None,
    metric_values: MetricValues | None = None,
    provider: EngineProvider | None = None,
) -> Service:
    """Return the service for `settings`. Nothing is loaded before the lifespan starts.

    Args:
        settings: all settings.
        loaders: what loads models; tests pass fakes.
        metric_values: the values of the metrics, shared among workers.
        provider: supplies the nets, if they run in another process; the corpus and the encoder always run here.

    `app.state.process` holds whether the process is draining; setting it drains.
    """
    metrics, state, tokens = Metrics(settings.slo_ms, metric_values), State(), read_tokens(settings)
    log_writer().on_drop(metrics.log_dropped.inc)
    access, exporter, slicer = AccessLog(settings.access_log), _exporter(settings), Slicer()
    aliases = (Alias.RETRIEVER,) if provider else ALIASES
    store = Registry(local_directory(settings.registry, settings.cache))
    deployments = Deployments(store, loaders or ModelLoader(settings), settings, metrics, aliases=aliases)
    watcher = Watcher(deployments, settings.reload_s, metrics)
    sync = sync_loop(deployments, settings, metrics)
    router = make_router(deployments.engines, settings, metrics)
    admission = Admission(_limit(settings), settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            try:
                if provider:
                    await provider.open(deployments.set_remote_engines)
                    stack.push_async_callback(provider.close)
                if exporter:
                    stack.callback(exporter.close)
                await stack.enter_async_context(deployment_lifespan(watcher, sync, settings.grace_s))
            except Exception as error:
                state.failure = error
                raise
            yield
            state.is_draining = True

    def update_gauges() -> None:
        deployments.update_gauges()
        router.update_gauges()
        if sync:
            sync.update_gauges()
        admission.update_gauges()
        metrics.ready.set(float(deployments.is_ready and not state.is_draining))

    app = Service(
        metrics,
        tokens,
        slicer,
        title="LVM Serve",
        version=version("lvm-serve"),
        lifespan=lifespan,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(_reject_unknown_query)],
    )
    app.state.process, app.state.settings, app.state.deployments = state, settings, deployments
    app.state.admission, app.state.update_gauges = admission, update_gauges
    document_route(app, "/predict", schemas.PREDICT)
    document_route(app, "/retrieve", schemas.RETRIEVE)
    registry.add_routes(app, router, deployments, sync)
    articles.add_routes(app, deployments)
    console.add_routes(app)
    health.add_routes(app, deployments, state, settings, metrics, update_gauges)
    oip.add_routes(app, router, deployments, state, settings)
    shadow = Shadow(deployments.slots, settings.shadow_share, metrics)
    hot: dict[str, Handler] = {
        "/predict": Predict(router, deployments, shadow, settings, slicer),
        "/retrieve": Retrieve(router, deployments, settings, metrics, slicer),
        oip.INFER: oip.Infer(router, settings, slicer),
    }
    stages = STAGES
    if settings.compat == "lnsp":
        stages = STAGES | LNSP_STAGES
        lnsp.add_routes(app, router, deployments, state)
        hot[lnsp.INFER] = lnsp.Infer(router, shadow, settings, slicer, many=False)
        hot[lnsp.INFER_BATCH] = lnsp.Infer(router, shadow, settings, slicer, many=True)
    find, admitted = _routes(app, hot, settings)
    app.gateway = Gateway(
        find,
        hot=admitted,
        timeout_ms=settings.timeout_ms,
        state=state,
        tokens=tokens,
        admission=admission,
        metrics=metrics,
        access=access,
        tracer=Tracer(exporter, settings.trace_share) if exporter else None,
        stages=stages,
    )
    return app


def _routes(
    app: Service, hot: dict[str, Handler], settings: Settings
) -> tuple[Callable[[bytes, str], Route], dict[tuple[bytes, str], Route]]:
    """Return what finds the route of a request, and the hot routes by method and path; FastAPI answers the others."""
    max_body = round(settings.max_body_mb * 1e6)
    admitted = {path: Route(path, handler, max_body=max_body, is_admitted=True) for path, handler in hot.items()}
    infer = admitted.pop(oip.INFER)
    handler = asgi.AsgiHandler(partial(FastAPI.__call__, app), app.methods_of, oip.missing)
    without_token = OPEN | console.places().keys()  # a page asks for the token that its requests then carry
    others = {
        route.path: Route(
            route.path,
            handler,
            max_body=MAX_COLD_BODY,
            is_open=route.path in without_token,
            is_logged=route.path not in OPEN,
        )
        for route in app.routes
        if isinstance(route, StarletteRoute)
    }
    unknown = Route(OTHER, handler, max_body=MAX_COLD_BODY)

    def find(method: bytes, path: str) -> Route:
        if method == b"POST" and oip.is_infer(path):
            return infer
        return others.get(path, unknown)

    return find, {(b"POST", path): route for path, route in admitted.items()}


async def _reject_unknown_query(request: FastAPIRequest) -> None:
    """Raise `Malformed` or `Invalid` if an option of the query string is repeated, or unknown to the route.

    Probes ignore the query string: balancers may add what they like.
    """
    if request.scope["path"] in OPEN:
        return
    names = [name for name, _ in request.query_params.multi_items()]
    if len(set(names)) < len(names):
        raise Malformed("duplicate option in the query string")
    checks.reject_unknown(names, {field.alias for field in request.scope["route"].dependant.query_params}, "option")


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
        detail = "LVM_OTLP_ENDPOINT requires OpenTelemetry: pip install 'lvm-serve[otlp]'"
        raise BadSettings(detail) from error
    return Exporter(settings.otlp_endpoint)
