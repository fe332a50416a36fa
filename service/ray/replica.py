"""A replica of what serves an alias: its engine, batched by Serve, following the registry as a server does."""

from __future__ import annotations

import asyncio
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, NamedTuple

from ray import serve

from lvm.errors import ServiceError, Unavailable
from models.registry.registry import Registry
from models.retrieval.retriever import Search
from service.deploy.deployments import Lineup
from service.deploy.loading import RealLoaders
from service.engines.engine import Engine, Live, Prediction
from service.engines.remote import Facts
from service.engines.search import Found
from service.http.routes.hot import check_live
from service.ray.books import Books, home_of_books
from service.ray.scaling import Load
from service.settings import Settings
from service.telemetry.log import configure, log_writer
from service.telemetry.metrics import Metrics


class Asked(NamedTuple):
    """Contexts `(n, T, D)` or a search, and the deadline on this machine's monotonic clock."""

    item: Any
    deadline: float


class Replica:
    """One alias's engine: Serve batches what comes, the engine runs it, the registry says which version."""

    async def __init__(self, alias: str, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        self._alias, self._settings, self._load = alias, settings, Load()
        self._where: str = serve.get_replica_context().replica_id.unique_id
        configure(settings.log_level)
        self.together.set_max_batch_size(settings.max_batch)
        self.together.set_batch_wait_timeout_s(settings.max_wait_ms / 1000)
        own = settings.model_copy(update={"max_wait_ms": 0.0})  # Serve has waited already
        metrics = Metrics(settings.slo_ms, Books(settings.slo_ms, home_of_books()).row())
        log_writer().on_drop(metrics.log_dropped.inc)
        self._lineup = Lineup(Registry(Path(settings.registry)), RealLoaders(own), own, metrics, aliases=(alias,))
        await self._lineup.start()
        if self._lineup.identity(alias) is None:
            raise Unavailable(f"what `{alias}` points at cannot be served: {self._lineup.live.get(alias)}")
        self._watch = asyncio.create_task(self._lineup.watch())

    async def ask(self, item: Any, left_s: float) -> Prediction | Found | ServiceError:
        """Return the answer to contexts `(n, T, D)` or to a `Search`, or why there is none within `left_s` seconds.

        These are counted from here, for clocks of nodes differ; whoever asks calls off what took longer to get here.
        """
        began = perf_counter()
        answer, requests = await self.together(Asked(item, monotonic() + left_s))
        if not isinstance(answer, ServiceError):
            self._load.note(perf_counter() - began - answer.infer_s, answer.infer_s, requests)
        return answer  # type: ignore[no-any-return]

    @serve.batch()
    async def together(self, batch: list[Asked]) -> list[tuple[Prediction | Found | ServiceError, int]]:
        """Answer what Serve put together; the engine makes one batch of what comes in one turn of the loop."""
        answers = await asyncio.gather(*map(self._answer, batch))
        return [(answer, len(batch)) for answer in answers]

    async def facts(self) -> tuple[Facts, Live]:
        """Return what serves here, and since when."""
        engine = self._lineup.engines[self._alias]
        assert isinstance(engine, Engine)
        return Facts.of(engine), self._lineup.live[self._alias]

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what `QueueWait` goes by."""
        return self._load.tell()

    def check_health(self) -> None:
        """Raise where a batch hangs; Ray then puts another replica in place of this one."""
        check_live(self._lineup, self._settings)
        self._lineup.observe()

    async def _answer(self, asked: Asked) -> Prediction | Found | ServiceError:
        try:
            return await (self._search(asked) if isinstance(asked.item, Search) else self._predict(asked))
        except ServiceError as error:
            return error

    async def _search(self, asked: Asked) -> Found:
        found = await self._lineup.search_engine().search(asked.item, asked.deadline)
        return found._replace(searched=found.searched._replace(replica=self._where))

    async def _predict(self, asked: Asked) -> Prediction:
        engine = self._lineup.engines[self._alias]
        if asked.item.shape[1:] != engine.shape:
            raise Unavailable("a version of another shape went live just now")
        made = await engine.predict(asked.item, asked.deadline)
        return made._replace(replica=self._where)
