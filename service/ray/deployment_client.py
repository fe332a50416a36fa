"""Deployment clients: engines that run in Ray deployments.

They keep deadlines, ask a second replica if the first is lost, and turn Ray's errors into those of `lvm.errors`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import monotonic
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from lvm.errors import Expired, ModelFailed, Overloaded, ServiceError, Unavailable
from models.registry.alias import PREDICTORS, Alias
from models.retrieval.retriever import Search
from models.vectors import Floats
from service.engines.engine import Deployed, EngineInfo
from service.engines.predict import Prediction
from service.engines.remote import EngineSet, RemoteEngine
from service.engines.search import SearchResult
from service.tasks import repeat
from service.telemetry.log import logger

DESCRIBE_TIMEOUT_S = 30.0


class DeploymentClient:
    """Calls the replicas of one deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._mean_s = 0.0  # of a call, smoothed

    async def describe(self) -> tuple[EngineInfo, Deployed]:
        """Return what the deployment serves, as one of its replicas describes it."""
        described: tuple[EngineInfo, Deployed] = await self._handle.describe.remote()
        return described

    async def predict(self, contexts: Floats, deadline: float) -> Prediction:
        """Return the next vectors of contexts `(n, T, D)`; raises `Unavailable` and `Expired`."""
        prediction: Prediction
        prediction, seconds = await self._ask(contexts, deadline)
        return prediction._replace(queue_s=seconds - prediction.infer_s)

    async def search(self, searches: list[Search], deadline: float) -> SearchResult:
        """Return what the searches of one request find; raises `Unavailable` and `Expired`."""
        found: SearchResult
        found, seconds = await self._ask(searches, deadline)
        return found._replace(queue_s=seconds - found.infer_s)

    async def _ask(self, item: Any, deadline: float) -> tuple[Any, float]:
        """Return the answer of a replica and the seconds that it took."""
        began = monotonic()
        try:
            async with asyncio.timeout(deadline - began):
                answer = await self._ask_twice(item, deadline)
        except TimeoutError as error:
            raise Expired("the deadline passed before there was an answer") from error
        if isinstance(answer, ServiceError):
            raise answer
        seconds = monotonic() - began
        self._mean_s += (seconds - self._mean_s) * 0.1
        return answer, seconds

    async def _ask_twice(self, item: Any, deadline: float) -> Any:
        """Ask again if the replica is lost: a request changes nothing there, so it may run twice."""
        try:
            return await self._ask_once(item, deadline)
        except RayError:
            logger().warning("replica lost", deployment=self._handle.deployment_name)
        try:
            return await self._ask_once(item, deadline)
        except RayError as error:
            raise Unavailable("two replicas were lost during the request", retry_after=self._backlog_s()) from error

    async def _ask_once(self, item: Any, deadline: float) -> Any:
        try:
            answer = self._handle.ask.remote(item, deadline - monotonic())
            return await answer
        except asyncio.CancelledError:  # late, or left by its caller: the replica would answer in vain
            answer.cancel()
            raise
        except BackPressureError as error:
            raise Overloaded("every replica is busy and its queue is full", retry_after=self._backlog_s()) from error
        except RayServeException as error:
            raise Unavailable("no replica is available", retry_after=self._backlog_s()) from error
        except RayTaskError as error:
            raise ModelFailed(f"the replica raised {type(error.cause).__name__}") from error

    def _backlog_s(self) -> int:
        """Return in how many seconds the calls in flight are answered: by Little's law, the mean of one."""
        return max(1, math.ceil(self._mean_s))


class DeploymentClients:
    """Provides the engines of the deployments, by alias, to the ingress."""

    def __init__(self, clients: Mapping[str, DeploymentClient], reload_s: float) -> None:
        self._clients = clients
        self._reload_s = reload_s
        self._known: dict[str, tuple[EngineInfo, Deployed]] = {}

    async def open(self, set_remote_engines: Callable[[EngineSet], None]) -> None:
        """Set what serves, now and after each change; raises `Unavailable` if no replica of the primary answers."""
        await self._poll(set_remote_engines)
        if Alias.PRIMARY not in self._known:
            raise Unavailable(f"no replica of `{Alias.PRIMARY}` answers")
        self._task = asyncio.create_task(
            repeat("ask the replicas", lambda: self._poll(set_remote_engines), self._reload_s)
        )

    async def close(self) -> None:
        """Stop polling."""
        self._task.cancel()

    async def _poll(self, set_remote_engines: Callable[[EngineSet], None]) -> None:
        aliases = [alias for alias in PREDICTORS if alias in self._clients]
        described = await asyncio.gather(*map(self._describe, aliases))
        found = {alias: self._without_noise(*each) for alias, each in zip(aliases, described, strict=True) if each}
        known = self._known | found
        if known != self._known:
            self._known = known
            set_remote_engines(self._engine_set())

    def _engine_set(self) -> EngineSet:
        engines = {alias: RemoteEngine(info, self._clients[alias].predict) for alias, (info, _) in self._known.items()}
        deployed = {alias: each for alias, (_, each) in self._known.items()}
        retriever = self._clients.get(Alias.RETRIEVER)
        return EngineSet(engines, deployed, retriever.search if retriever else None)

    def _without_noise(self, info: EngineInfo, deployed: Deployed) -> tuple[EngineInfo, Deployed]:
        """Return a description without what differs by replica: the time of its start, the figures of its warning."""
        before, first = self._known.get(info.alias, (info, deployed))
        if (before.name, before.version) != (info.name, info.version):
            return info, deployed
        is_news = _without_figures(before.warning) != _without_figures(info.warning)
        return info if is_news else before, replace(deployed, since=first.since)

    async def _describe(self, alias: str) -> tuple[EngineInfo, Deployed] | None:
        """Return what serves an alias, or None if no replica answers: the router's breakers judge that."""
        try:
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                return await self._clients[alias].describe()
        except Exception as error:  # no error of Ray may end the polling
            logger().warning("no facts", alias=alias, reason=type(error).__name__)
            return None


def _without_figures(warning: str | None) -> str:
    return (warning or "").partition(":")[0]
