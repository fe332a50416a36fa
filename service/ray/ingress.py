"""The ingress: the app, with Ray deployments as its engine provider."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from service.app import create_app
from service.http.asgi import Message, Receive, Scope, Send
from service.http.routes.health import check_live
from service.ray.deployment_client import DeploymentClient, DeploymentClients
from service.ray.node_metrics import NodeMetrics, metrics_home
from service.settings import Settings
from service.telemetry.log import configure

ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


@serve.ingress()
class Ingress:
    """The app, over the deployments of a graph by alias."""

    def __init__(self, settings: Settings, graph: dict[str, DeploymentHandle[Any]]) -> None:
        self._settings = settings
        self._graph = graph

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the app; Serve runs its lifespan."""
        known = self._settings
        configure(known.log_level)
        clients = {alias: DeploymentClient(handle) for alias, handle in self._graph.items()}
        provider = DeploymentClients(clients, known.reload_s)
        self._node_metrics = NodeMetrics(known.slo_ms, metrics_home())
        self._app = create_app(known, metric_values=self._node_metrics.values(), provider=provider)
        replica = serve.get_replica_context().replica_id.unique_id
        self._app.state.process.headers = [(b"x-worker", replica.encode())]
        return _without_request_id(self._app)

    def check_health(self) -> None:
        """Raise `Unavailable` if an inference thread hangs; bring the metrics of this node up to date."""
        check_live(self._app.state.deployments, self._settings)
        self._app.state.update_gauges()
        self._node_metrics.finalize_dead()


def _without_request_id(inner: ASGIApp) -> ASGIApp:
    """Return an app that leaves X-Request-ID to Serve's proxy, which sets it to the same value in any case."""

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if header[0] != b"x-request-id"]
            await send(message)

        await inner(scope, receive, send_without)

    return outer
