"""The sync loop: keeps the local registry like a remote one while the service runs, and reports if that is away."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, NamedTuple

from models.registry.alias import Alias
from models.registry.registry import RegistryLocked
from models.registry.remote import (
    AliasRecord,
    BadAliasRecord,
    RegistrySync,
    RemoteRegistry,
    RemoteUnavailable,
    is_url,
)
from models.runtimes.priority import lower_priority
from service.deploy.deployments import Deployments, now
from service.deploy.watcher import RETRY_S, Watcher
from service.settings import Settings
from service.tasks import SerialExecutor, catch_and_log, repeat
from service.telemetry.log import logger
from service.telemetry.metrics import Metrics

# without an answer for so long, the remote registry counts as away
HANG_S = 30.0


@asynccontextmanager
async def deployment_lifespan(watcher: Watcher, sync: SyncLoop | None, grace_s: float) -> AsyncIterator[None]:
    """Deploy what the aliases point at, and every change, until the context ends; then close within `grace_s` seconds.

    Raises:
        RemoteUnavailable, UnknownVersion, BadCheckpoint: there is no primary, or it must not be served.
    """
    tasks: list[asyncio.Task[None]] = []
    try:
        if sync:
            await sync.start()
        await watcher.start()
        # what is loaded by now stays: the garbage collector need not look at it again
        gc.collect()
        gc.freeze()
        tasks += [asyncio.create_task(each.run()) for each in (watcher, sync) if each]
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*(each.close(grace_s) for each in (watcher.deployments, sync) if each))


class Refused(NamedTuple):
    """A record of an alias that was refused, why, and when to try it again."""

    record: bytes | None
    error: Exception
    retry_at: float


class SyncLoop:
    """Applies the alias records of a remote registry every `poll_s` seconds, for the aliases of `deployments`.

    While the remote registry is away, or holds what must not be served, the local registry stays as it is.
    """

    def __init__(
        self,
        sync: RegistrySync,
        deployments: Deployments,
        poll_s: float,
        metrics: Metrics,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._sync = sync
        self._deployments = deployments
        self._poll_s = poll_s
        self._metrics = metrics
        self._clock = clock
        self._executor = SerialExecutor()
        # when the poll began that has no answer yet
        self._asked_at = math.inf
        # when the remote registry last answered: by the clock, and for people
        self._answered_at = clock()
        self._answered: str | None = None
        self._away: RemoteUnavailable | None = None
        self._refused: dict[str, Refused] = {}
        metrics.store_looks.precreate(("ok", "failed"))

    async def start(self) -> None:
        """Poll once. If a primary was mirrored before, or this process needs none, the remote registry may be away.

        Raises:
            RemoteUnavailable: it is away, and there is no primary.
            Exception: the only primary must not be served.
        """
        await self.poll(HANG_S)
        if self._has_primary():
            return
        if refused := self._refused.get(Alias.PRIMARY):
            raise refused.error
        raise self._away or RemoteUnavailable(f"{self._sync.remote.name}: no {Alias.PRIMARY} is there")

    async def run(self) -> None:
        """Poll until cancelled, at a lower priority than that of the threads that answer requests."""
        await catch_and_log("lower the priority", self._executor.run(lower_priority))
        await repeat("sync the registry", self.poll, self._poll_s)

    async def close(self, timeout: float) -> None:
        """Wait `timeout` seconds at most for a version that is being checked, but for no answer."""
        await self._executor.shutdown(timeout if math.isinf(self._asked_at) else 0)

    async def poll(self, timeout: float | None = None) -> None:
        """Apply the records of the aliases that this process serves.

        Wait `timeout` seconds at most; without a primary, only for the records: the versions in them are needed.
        """
        try:
            async with asyncio.timeout(timeout) as limit:
                records = await self._fetch()
                if not self._has_primary():
                    limit.reschedule(None)
                for alias in self._deployments.aliases:
                    if alias in records:
                        await self._apply(alias, records[alias])
        except TimeoutError:
            self._on_away(RemoteUnavailable(f"{self._sync.remote.name}: no answer in time"))
        except RemoteUnavailable as error:
            self._on_away(error)
        else:
            self._on_answer()

    def update_gauges(self) -> None:
        """Update the gauge of the remote registry."""
        self._metrics.store_age.set(self._clock() - self._answered_at)

    def describe(self) -> dict[str, Any]:
        """Return what /models says of the remote registry."""
        waited_s = self._clock() - self._asked_at
        error = f"no answer for {waited_s:.0f} s" if waited_s > HANG_S else str(self._away or "") or None
        return {"url": self._sync.remote.name, "is_stale": bool(error), "answered": self._answered, "error": error}

    def _has_primary(self) -> bool:
        """Return whether a primary is here, or is not for this process."""
        return Alias.PRIMARY not in self._deployments.aliases or Alias.PRIMARY in self._sync.registry.aliases()

    async def _fetch(self) -> dict[str, bytes | None]:
        self._asked_at = self._clock()
        try:
            return await self._executor.run(self._sync.poll)
        finally:
            self._asked_at = math.inf

    async def _apply(self, alias: Alias, record: bytes | None) -> None:
        refused = self._refused.get(alias)
        if refused and refused.record == record and self._clock() < refused.retry_at:
            return
        try:
            await self._executor.run(self._sync.apply, alias, record)
            self._refused.pop(alias, None)
        except RegistryLocked:
            return  # a rollback is being recorded: the next poll is soon enough
        except RemoteUnavailable:
            raise
        except Exception as error:  # a model may raise anything; what serves stays
            self._refused[alias] = Refused(record, error, self._clock() + RETRY_S)
            self._deployments.refuse(alias, _version_in(record), error)

    def _on_away(self, error: RemoteUnavailable) -> None:
        self._metrics.store_looks.inc("failed")
        if not self._away:
            logger().warning("registry store away", reason=str(error))
        self._away = error

    def _on_answer(self) -> None:
        self._metrics.store_looks.inc("ok")
        if self._away:
            logger().info("registry store back", url=self._sync.remote.name)
        self._away = None
        self._answered_at = self._clock()
        self._answered = now()


def sync_loop(deployments: Deployments, settings: Settings, metrics: Metrics) -> SyncLoop | None:
    """Return the sync loop with the remote registry of the settings, or None if the registry is a local directory."""
    if not is_url(settings.registry):
        return None
    sync = RegistrySync(RemoteRegistry(settings.registry), deployments.registry, deployments.loader.check)
    return SyncLoop(sync, deployments, settings.store_s, metrics)


def _version_in(record: bytes | None) -> str:
    try:
        return AliasRecord.from_json(record or b"").version
    except BadAliasRecord:
        return "unreadable"
