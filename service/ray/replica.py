"""A replica of a deployment: the engine of one alias. Serve batches its requests; it follows the registry itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, NamedTuple

from ray import serve

from lvm.errors import ServiceError, Unavailable
from models.registry.alias import Alias
from models.registry.registry import Registry
from service.deploy.deployments import Deployments
from service.deploy.loading import ModelLoader
from service.deploy.watcher import Watcher
from service.engines.engine import Deployed, Engine, EngineInfo
from service.engines.predict import Prediction
from service.engines.search import SearchResult
from service.http.routes.health import check_live
from service.ray.node_metrics import NodeMetrics, metrics_home
from service.ray.scaling import LoadStats
from service.settings import Settings
from service.telemetry.log import configure, log_writer
from service.telemetry.metrics import Metrics

Result = Prediction | SearchResult | ServiceError


class Call(NamedTuple):
    """Contexts `(n, T, D)` or a list of searches, and the deadline on this machine's monotonic clock."""

    item: Any
    deadline: float


class Replica:
    """Serves one alias: Serve forms the batches, the engine runs them, the registry decides which version."""

    async def __init__(self, alias: Alias, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        self._alias = alias
        self._settings = settings
        self._load = LoadStats()
        self._replica_id: str = serve.get_replica_context().replica_id.unique_id
        configure(settings.log_level)
        self.run_batch.set_max_batch_size(settings.max_batch)
        self.run_batch.set_batch_wait_timeout_s(settings.max_wait_ms / 1000)
        own = settings.model_copy(update={"max_wait_ms": 0.0})  # Serve has waited already
        metrics = Metrics(settings.slo_ms, NodeMetrics(settings.slo_ms, metrics_home()).values())
        log_writer().on_drop(metrics.log_dropped.inc)
        registry = Registry(Path(settings.registry))
        self._deployments = Deployments(registry, ModelLoader(own), own, metrics, aliases=(alias,))
        watcher = Watcher(self._deployments, own.reload_s, metrics)
        await watcher.start()
        if self._deployments.engine(alias) is None:
            slot = self._deployments.slots.get(alias)
            reason = (slot and slot.deployed.reason) or "no version is set"
            raise Unavailable(f"the version of `{alias}` cannot be served: {reason}")
        self._watch = asyncio.create_task(watcher.run())

    async def ask(self, item: Any, left_s: float) -> Result:
        """Return the answer to contexts `(n, T, D)` or to a list of searches within `left_s` seconds, or the error.

        The time counts from here, since clocks of nodes differ; the caller cancels what took longer to get here.
        """
        began = perf_counter()
        answer, requests = await self.run_batch(Call(item, monotonic() + left_s))
        if not isinstance(answer, ServiceError):
            self._load.add(perf_counter() - began - answer.infer_s, answer.infer_s, requests)
        return answer  # type: ignore[no-any-return]

    @serve.batch()
    async def run_batch(self, calls: list[Call]) -> list[tuple[Result, int]]:
        """Answer what Serve put together; the engine makes one batch of what comes in one turn of the loop."""
        answers = await asyncio.gather(*map(self._answer, calls))
        return [(answer, len(calls)) for answer in answers]

    async def describe(self) -> tuple[EngineInfo, Deployed]:
        """Return what serves here, and since when."""
        engine = self._deployments.engines[self._alias]
        assert isinstance(engine, Engine)
        return engine.describe(), self._deployments.slots[self._alias].deployed

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what `QueueWait` reads."""
        return self._load.read()

    def check_health(self) -> None:
        """Raise `Unavailable` if a batch hangs; Ray then replaces this replica."""
        check_live(self._deployments, self._settings)
        self._deployments.update_gauges()

    async def _answer(self, call: Call) -> Result:
        try:
            return await (self._search(call) if isinstance(call.item, list) else self._predict(call))
        except ServiceError as error:
            return error  # Ray would log it with a traceback if it were raised

    async def _search(self, call: Call) -> SearchResult:
        found = await self._deployments.require_retriever_engine().run(call.item, call.deadline)
        return found._replace(searched=found.searched._replace(replica=self._replica_id))

    async def _predict(self, call: Call) -> Prediction:
        engine = self._deployments.engines[self._alias]
        if call.item.shape[1:] != engine.info.shape:
            raise Unavailable("model was replaced by one with a different input shape")
        prediction = await engine.run(call.item, call.deadline)
        return prediction._replace(replica=self._replica_id)
