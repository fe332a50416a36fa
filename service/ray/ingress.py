"""The ingress: the app as it is, over the deployments of a graph."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from service.app import create_app
from service.http.gateway import (
    Message,
    Receive,
    Scope,
    Send,
)
from service.http.routes.hot import check_live
from service.ray.books import Books, home_of_books
from service.ray.line import Line, Lines
from service.settings import Settings
from service.telemetry.log import configure

ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


@serve.ingress()
class Ingress:
    """The app as it is, over the deployments of a graph by alias."""

    def __init__(self, settings: Settings, graph: dict[str, DeploymentHandle[Any]]) -> None:
        self._settings, self._graph = settings, graph

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the app; Serve runs its lifespan."""
        known = self._settings
        configure(known.log_level)
        lender = Lines({alias: Line(handle) for alias, handle in self._graph.items()}, known.reload_s)
        self._books = Books(known.slo_ms, home_of_books())
        self._app = create_app(known, metric_values=self._books.row(), lender=lender)
        where = serve.get_replica_context().replica_id.unique_id
        self._app.state.process.headers = [(b"x-worker", where.encode())]
        return _without_request_id(self._app)

    def check_health(self) -> None:
        """Raise where an inference thread hangs; bring the books of this node up to date."""
        check_live(self._app.state.lineup, self._settings)
        self._app.state.observe()
        self._books.close_dead()


def _without_request_id(inner: ASGIApp) -> ASGIApp:
    """Return an app that leaves X-Request-ID to Serve's proxy, which sets it whatever we do, and to the same."""

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if header[0] != b"x-request-id"]
            await send(message)

        await inner(scope, receive, tell)

    return outer
