"""The way to a deployment: deadlines kept, a lost replica made good for once, Ray's errors told as ours."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import replace
from time import monotonic
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from lvm.errors import (
    Expired,
    ModelFailed,
    Overloaded,
    ServiceError,
    Unavailable,
)
from models.registry.alias import PREDICTORS, Alias
from models.retrieval.retriever import Search
from models.vectors import Floats
from service.engines.engine import (
    Live,
    Prediction,
)
from service.engines.remote import (
    Borrow,
    Facts,
    Loan,
    Remote,
)
from service.engines.search import Found
from service.tasks import repeat
from service.telemetry.log import logger

LOOK_S = 30.0


class Line:
    """The way to one deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle, self._took_s = handle, 0.0

    async def facts(self) -> tuple[Facts, Live]:
        """Return what serves there, as one of its replicas says."""
        told: tuple[Facts, Live] = await self._handle.facts.remote()
        return told

    async def predict(self, contexts: Floats, deadline: float) -> Prediction:
        """Return the next vectors of contexts `(n, T, D)`; raises `Unavailable` and `Expired`."""
        made: Prediction
        made, took_s = await self._ask(contexts, deadline)
        return made._replace(queue_s=took_s - made.infer_s)

    async def search(self, search: Search, deadline: float) -> Found:
        """Return what `search` finds; raises `Unavailable` and `Expired`."""
        found: Found
        found, took_s = await self._ask(search, deadline)
        return found._replace(queue_s=took_s - found.infer_s)

    async def _ask(self, item: Any, deadline: float) -> tuple[Any, float]:
        began = monotonic()
        try:
            async with asyncio.timeout(deadline - began):
                answer = await self._ask_twice(item, deadline)
        except TimeoutError as error:
            raise Expired("the deadline passed before there was an answer") from error
        if isinstance(answer, ServiceError):
            raise answer
        took_s = monotonic() - began
        self._took_s += (took_s - self._took_s) * 0.1
        return answer, took_s

    async def _ask_twice(self, item: Any, deadline: float) -> Any:
        """Ask again where the replica is lost: what is asked here leaves no trace, so twice does no harm."""
        try:
            return await self._ask_once(item, deadline)
        except RayError:
            logger().warning("replica lost", deployment=self._handle.deployment_name)
        try:
            return await self._ask_once(item, deadline)
        except RayError as error:
            raise Unavailable("who was to answer is gone, twice", retry_after=self._backlog_s()) from error

    async def _ask_once(self, item: Any, deadline: float) -> Any:
        try:
            answer = self._handle.ask.remote(item, deadline - monotonic())
            return await answer
        except asyncio.CancelledError:  # late, or left by its caller: the replica would answer for nobody
            answer.cancel()
            raise
        except BackPressureError as error:
            raise Overloaded("every replica is busy, and so is the queue", retry_after=self._backlog_s()) from error
        except RayServeException as error:
            raise Unavailable("no replica is to be had", retry_after=self._backlog_s()) from error
        except RayTaskError as error:
            raise ModelFailed(f"the replica raised {type(error.cause).__name__}") from error

    def _backlog_s(self) -> int:
        """Return in how many seconds what is out will be answered: by Little's law, what one takes."""
        return max(1, math.ceil(self._took_s))


class Lines:
    """Lends what the deployments serve to the ingress's line-up."""

    def __init__(self, lines: Mapping[str, Line], reload_s: float) -> None:
        self._lines, self._reload_s = lines, reload_s
        self._known: dict[str, tuple[Facts, Live]] = {}

    async def open(self, borrow: Borrow) -> None:
        """Borrow what serves, and again whenever that changes; raises `Unavailable` where there is no primary."""
        await self._look(borrow)
        if Alias.PRIMARY not in self._known:
            raise Unavailable(f"no replica of `{Alias.PRIMARY}` answers")
        self._watch = asyncio.create_task(repeat("ask the replicas", lambda: self._look(borrow), self._reload_s))

    async def close(self) -> None:
        """Look no more."""
        self._watch.cancel()

    async def _look(self, borrow: Borrow) -> None:
        aliases = [alias for alias in PREDICTORS if alias in self._lines]
        told = await asyncio.gather(*map(self._facts, aliases))
        known = self._known | {alias: self._steady(*each) for alias, each in zip(aliases, told, strict=True) if each}
        if known != self._known:
            self._known = known
            engines = {alias: Remote(facts, self._lines[alias].predict) for alias, (facts, _) in known.items()}
            searcher = self._lines.get(Alias.RETRIEVER)
            borrow(Loan(engines, {a: live for a, (_, live) in known.items()}, searcher.search if searcher else None))

    def _steady(self, facts: Facts, live: Live) -> tuple[Facts, Live]:
        """Return what a replica tells, but for what each tells otherwise: since when, how far off its inputs are."""
        before, first = self._known.get(facts.alias, (facts, live))
        if (before.name, before.version) != (facts.name, facts.version):
            return facts, live
        is_news = _without_figures(before.warning) != _without_figures(facts.warning)
        return facts if is_news else before, replace(live, since=first.since)

    async def _facts(self, alias: str) -> tuple[Facts, Live] | None:
        """Return what serves an alias, None where nobody says: the router's breakers judge that."""
        try:
            async with asyncio.timeout(LOOK_S):
                return await self._lines[alias].facts()
        except Exception as error:  # whatever lies between must not end the watch
            logger().warning("no facts", alias=alias, reason=type(error).__name__)
            return None


def _without_figures(warning: str | None) -> str:
    return (warning or "").partition(":")[0]
