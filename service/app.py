"""create_app: the only wiring. The lifespan loads, warms, watches and drains."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from functools import partial
from importlib.metadata import version
from mmap import mmap
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
from service.deploy.live import Live
from service.deploy.loading import ModelLoader
from service.deploy.registry_sync import deployment_lifespan, sync_loop
from service.deploy.shadow import Shadow
from service.deploy.watcher import Watcher
from service.engines.remote import EngineProvider
from service.engines.router import make_router
from service.http import asgi, checks, schemas
from service.http.auth import PROBES, read_tokens
from service.http.gateway import OTHER, Find, Gateway, Respond, Route, State
from service.http.messages import Handler, problem_of
from service.http.routes import articles, console, docs, health, lnsp, oip, openai, registry
from service.http.routes.common import document_route
from service.http.routes.embed import Embed
from service.http.routes.predict import Predict
from service.http.routes.retrieve import Retrieve
from service.overload.admission import Admission
from service.overload.fairness import Slicer
from service.overload.limiter import AdaptiveLimit, FixedLimit, Limit
from service.settings import BadSettings, Settings
from service.telemetry.log import AccessLog, log_writer
from service.telemetry.metrics import GRPC_STAGES, LNSP_STAGES, STAGES, Metrics
from service.telemetry.shared_memory import MetricValues
from service.telemetry.tracing import Tracer

if TYPE_CHECKING:
    from service.grpc.server import GrpcServer
    from service.telemetry.otlp import Exporter

# of them, /health exists only with LVM_COMPAT=lnsp
OPEN = PROBES | {lnsp.HEALTH}
MAX_COLD_BODY = oip.MAX_INDEX_BODY  # bytes of a body of a route that FastAPI answers


class Parts:
    """The parts of the service, wired. Nothing is loaded before the lifespan starts; arguments as of `create_app`."""

    def __init__(
        self,
        settings: Settings,
        loaders: ModelLoader | None,
        metric_values: MetricValues | None,
        provider: EngineProvider | None,
        pair_memory: mmap | None,
    ) -> None:
        self.settings = settings
        self.state = State()
        self.tokens = read_tokens(settings)
        self.slicer = Slicer()
        self.metrics = metrics = Metrics(settings.slo_ms, metric_values)
        self.exporter = _exporter(settings)
        self.provider = provider
        store = Registry(local_directory(settings.registry, settings.cache))
        aliases = (Alias.RETRIEVER,) if provider else ALIASES
        self.deployments = Deployments(store, loaders or ModelLoader(settings), settings, metrics, aliases=aliases)
        self.watcher = Watcher(self.deployments, settings.reload_s, metrics)
        self.sync = sync_loop(self.deployments, settings, metrics)
        self.live = Live(settings, metrics, self.deployments, pair_memory) if settings.truth_share else None
        self.router = make_router(
            self.deployments.engines, settings, metrics, self.live.predictions if self.live else None
        )
        self.admission = Admission(_limit(settings), settings, metrics)
        self.shadow = Shadow(
            self.deployments.slots,
            settings.shadow_share,
            metrics,
            seconds=settings.truth_s,
            size=round(settings.truth_mb * 1e6) if settings.truth_share else 0,
        )
        self.access = AccessLog(settings.access_log)
        self.tracer = Tracer(self.exporter, settings.trace_share) if self.exporter else None

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Load, serve and watch until the context ends; then drain."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                if self.provider:
                    await self.provider.open(self.deployments.set_remote_engines)
                    stack.push_async_callback(self.provider.close)
                if self.exporter:
                    stack.callback(self.exporter.close)
                deployed = deployment_lifespan(self.watcher, self.sync, self.settings.grace_s)
                await stack.enter_async_context(deployed)
            except Exception as error:
                self.state.failure = error
                raise
            yield
            self.state.is_draining = True

    def update_gauges(self) -> None:
        """Bring every gauge up to date."""
        self.deployments.update_gauges()
        self.router.update_gauges()
        self.admission.update_gauges()
        if self.sync:
            self.sync.update_gauges()
        self.metrics.ready.set(float(self.deployments.is_ready and not self.state.is_draining))


class Service(FastAPI):
    """The application: FastAPI with a gateway before it, which answers the hot routes itself."""

    gateway: Gateway
    grpc: GrpcServer | None = None

    def __init__(self, parts: Parts) -> None:
        super().__init__(
            title="LVM Serve",
            version=version("lvm-serve"),
            description="Predicts next vectors and retrieves passages. The examples send text, which requires the "
            "extra `text`.",
            lifespan=parts.lifespan,
            docs_url=None,  # FastAPI's pages load scripts from elsewhere
            redoc_url=None,
            openapi_url=None,  # FastAPI would make the document on the event loop: routes/docs.py
            redirect_slashes=False,
            dependencies=[Depends(_reject_unknown_query)],
            # exceptions leave FastAPI as they are: the gateway makes problems of them
            exception_handlers=dict.fromkeys((HTTPException, RequestValidationError), asgi.reraise),
        )
        self.metrics = parts.metrics
        self.tokens = parts.tokens
        self.slicer = parts.slicer
        self.state.process, self.state.settings, self.state.deployments = parts.state, parts.settings, parts.deployments
        self.state.admission, self.state.update_gauges = parts.admission, parts.update_gauges

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, with what requests and errors name."""
        if self.openapi_schema is None:
            document = super().openapi()
            document["components"]["schemas"].update(schemas.COMPONENTS)
            schemas.summarise(document)
            if len(self.tokens):
                schemas.require_token(document, OPEN)
        assert self.openapi_schema
        return self.openapi_schema

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
    pair_memory: mmap | None = None,
) -> Service:
    """Return the service for `settings`. Nothing is loaded before the lifespan starts.

    Args:
        settings: all settings.
        loaders: what loads models; tests pass fakes.
        metric_values: the values of the metrics, shared among workers.
        provider: supplies the nets, if they run in another process; the corpus and the encoder always run here.
        pair_memory: where predictions are kept for live scores, shared among workers.

    `app.state.process` holds whether the process is draining; setting it drains.
    """
    parts = Parts(settings, loaders, metric_values, provider, pair_memory)
    log_writer().on_drop(parts.metrics.log_dropped.inc)
    app = Service(parts)
    _add_routes(app, parts)
    app.gateway = _gateway(app, parts)
    if settings.grpc_port is not None:
        app.grpc = _grpc_server(app, parts)
    return app


def _add_routes(app: FastAPI, parts: Parts) -> None:
    """Add the routes that FastAPI answers, and document the hot ones."""
    document_route(app, "/predict", schemas.PREDICT)
    document_route(app, "/retrieve", schemas.RETRIEVE)
    document_route(app, "/embed", schemas.EMBED)
    registry.add_routes(app, parts.router, parts.deployments, parts.sync, parts.live)
    articles.add_routes(app, parts.deployments)
    console.add_routes(app)
    docs.add_routes(app)
    health.add_routes(
        app, parts.deployments, parts.state, parts.settings, parts.metrics, parts.update_gauges, parts.slicer
    )
    oip.add_routes(app, parts.router, parts.deployments, parts.state, parts.settings)
    openai.add_routes(app, parts.deployments)
    if parts.settings.compat == "lnsp":
        lnsp.add_routes(app, parts.router, parts.deployments, parts.state)


def _gateway(app: Service, parts: Parts) -> Gateway:
    """Return the gateway: it answers the hot routes by their handlers, the others by FastAPI."""
    settings = parts.settings
    max_body = round(settings.max_body_mb * 1e6)
    hot = {path: Route(path, handler, max_body, is_admitted=True) for path, handler in _handlers(parts).items()}
    cold, unknown = _cold_routes(app)

    def find(method: bytes, path: str) -> Route:
        return hot[oip.INFER] if method == b"POST" and oip.is_infer(path) else cold.get(path, unknown)

    stages = STAGES | LNSP_STAGES if settings.compat == "lnsp" else STAGES
    return _gateway_of(parts, find, hot, stages, problem_of)


def _gateway_of(
    parts: Parts, find: Find, hot: Mapping[str, Route], stages: Mapping[str, Iterable[str]], respond: Respond
) -> Gateway:
    """Return a gateway before some routes, with the limits, tokens and counters that all gateways share."""
    return Gateway(
        find,
        hot={(b"POST", path): route for path, route in hot.items()},
        timeout_ms=parts.settings.timeout_ms,
        state=parts.state,
        tokens=parts.tokens,
        admission=parts.admission,
        metrics=parts.metrics,
        access=parts.access,
        tracer=parts.tracer,
        stages=stages,
        respond=respond,
    )


def _grpc_server(app: Service, parts: Parts) -> GrpcServer:
    """Return the server of remote calls. Only now is grpc imported."""
    from service.grpc import routes
    from service.grpc.health import Health
    from service.grpc.server import GrpcServer
    from service.grpc.status import status_of

    deployments, state, settings = parts.deployments, parts.state, parts.settings
    health_service = Health()
    needs = routes.Parts(parts.router, deployments, parts.shadow, state, settings, parts.slicer, app.version)
    found = routes.routes(needs, health_service)
    gateway = _gateway_of(parts, lambda *_: routes.UNKNOWN_METHOD, found, GRPC_STAGES, status_of)
    return GrpcServer(gateway, health_service, lambda: deployments.is_ready and not state.is_draining, settings)


def _handlers(parts: Parts) -> dict[str, Handler]:
    """Return the handlers of the hot routes, by path."""
    router, deployments, settings, slicer = parts.router, parts.deployments, parts.settings, parts.slicer
    shadow = parts.shadow
    handlers: dict[str, Handler] = {
        "/predict": Predict(router, deployments, shadow, settings, slicer),
        "/retrieve": Retrieve(router, deployments, settings, parts.metrics, slicer, parts.live),
        "/embed": Embed(router, deployments, settings, slicer),
        openai.EMBEDDINGS: openai.Embeddings(router, deployments, settings, slicer),
        oip.INFER: oip.Infer(router, shadow, settings, slicer),
    }
    if settings.compat == "lnsp":
        handlers[lnsp.INFER] = lnsp.Infer(router, shadow, settings, slicer, many=False)
        handlers[lnsp.INFER_BATCH] = lnsp.Infer(router, shadow, settings, slicer, many=True)
    return handlers


def _cold_routes(app: Service) -> tuple[dict[str, Route], Route]:
    """Return the routes that FastAPI answers, by path, and the one of all other paths."""
    handler = asgi.AsgiHandler(partial(FastAPI.__call__, app), app.methods_of, _explain)
    without_token = (
        OPEN | console.places().keys() | docs.places().keys()
    )  # a page asks for the token that its requests then carry
    paths = [route.path for route in app.routes if isinstance(route, StarletteRoute)]
    cold = {
        path: Route(path, handler, MAX_COLD_BODY, is_open=path in without_token, is_logged=path not in OPEN)
        for path in paths
    }
    return cold, Route(OTHER, handler, MAX_COLD_BODY)


def _explain(path: str) -> str | None:
    """Return why there is no such path, if there is more to say."""
    return oip.missing(path) or docs.missing(path)


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
