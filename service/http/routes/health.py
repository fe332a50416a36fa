"""Probes and /metrics: whether this process is live and ready, and what it counts."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI, Request, Response

from lvm.errors import Draining, Unavailable
from service.deploy.deployments import Deployments
from service.http import schemas
from service.http.gateway import State
from service.http.headers import exposition_format
from service.overload.fairness import Slicer
from service.settings import Settings
from service.telemetry.metrics import Metrics

# The client in whose name scrapes take turns with long requests.
SCRAPE = object()


def check_live(deployments: Deployments, settings: Settings) -> None:
    """Raise `Unavailable` if an inference thread is dead or hangs."""
    if deployments.stuck_s() > settings.hang_s:
        raise Unavailable("an inference thread is dead or hangs")


def check_ready(deployments: Deployments, state: State) -> None:
    """Raise `Draining` or `Unavailable` if no request should come here."""
    if state.is_draining:
        raise Draining("the process is shutting down")
    if not deployments.is_ready:
        raise Unavailable("no net is loaded")


def add_routes(
    app: FastAPI,
    deployments: Deployments,
    state: State,
    settings: Settings,
    metrics: Metrics,
    update_gauges: Callable[[], None],
    slicer: Slicer,
) -> None:
    """Add the probes and /metrics to `app`; `update_gauges` updates the gauges."""

    @app.get("/metrics", response_class=Response, responses=schemas.METRICS)
    async def scrape(request: Request) -> Response:
        """Prometheus text, or OpenMetrics when asked for."""
        update_gauges()
        work = metrics.scrape(exposition_format(request.headers.get("accept", "")))
        text, media_type = await slicer.run(SCRAPE, work)
        return Response(text, headers={"content-type": media_type})

    @app.get("/livez", responses=schemas.PROBLEMS)
    async def livez() -> dict[str, str]:
        """200 while the process and every inference thread beat."""
        check_live(deployments, settings)
        return {"status": "live"}

    @app.get("/readyz", responses=schemas.PROBLEMS)
    @app.get("/healthz", responses=schemas.PROBLEMS)
    async def readyz() -> dict[str, str]:
        """200 while a net is loaded, warm, and the process is not draining."""
        check_ready(deployments, state)
        return {"status": "ready"}
