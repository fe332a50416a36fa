"""What the registry holds: /models, /models/{name}/{version}/card, /ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

from fastapi import FastAPI, Response

from lvm.errors import Unavailable
from service.deploy.deployments import Deployments
from service.deploy.live import Live
from service.deploy.registry_sync import SyncLoop
from service.engines.router import Router
from service.http import codec, schemas
from service.http.routes import articles
from service.http.routes.models import VersionListing, card_text, ledger_body, models_body
from service.tasks import SingleFlight

T = TypeVar("T")
TIMEOUT_S = 2.0  # of reading the registry, which may be on a network share that hangs


def add_routes(
    app: FastAPI,
    router: Router,
    deployments: Deployments,
    sync: SyncLoop | None,
    live: Live | None,
) -> None:
    """Add the routes to `app`."""
    listing = VersionListing(deployments.registry)
    refresh = SingleFlight(deployments.card_executor, listing.refresh)

    @app.get("/models", response_model=schemas.Models, responses=schemas.UNAUTHORISED)
    async def models() -> Response:
        """Versions, aliases, cards, what is live since when, the breakers."""
        with suppress(Unavailable):  # what was read before is good enough
            await _in_time(refresh())
        body = models_body(router, deployments, sync, listing.summaries())
        body["live"] = live.summary() if live else None
        return Response(codec.encode_json(body), media_type="application/json")

    @app.get("/models/{name}/{version}/card", response_class=Response, responses=schemas.CARD)
    async def card(name: str, version: str) -> Response:
        """The model card of a version, in Markdown."""
        text = await _in_time(deployments.registry_executor.run(card_text, deployments.registry, name, version))
        return Response(text, media_type="text/markdown; charset=utf-8")

    @app.get("/ledger", response_model=schemas.Ledger, responses=schemas.PAGED)
    async def moves(offset: articles.Offset = 0, limit: articles.Limit = 100) -> Response:
        """Who moved which alias, when and why, newest first."""
        body = await _in_time(deployments.registry_executor.run(ledger_body, deployments.registry, offset, limit))
        return Response(codec.encode_json(body), media_type="application/json")


async def _in_time(reading: Awaitable[T]) -> T:
    """Return what is read from the registry; raises `Unavailable` if it cannot be read, or not in time."""
    try:
        return await asyncio.wait_for(reading, TIMEOUT_S)
    except TimeoutError as error:
        raise Unavailable("the registry does not answer") from error
    except OSError as error:
        raise Unavailable(f"the registry cannot be read: {error.filename} {error.strerror}") from error
