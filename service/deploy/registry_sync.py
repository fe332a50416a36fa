"""The follower: has the registry here follow an object store while the service runs; tells when that is away."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

from models.registry.alias import Alias
from models.registry.registry import RegistryLocked
from models.registry.remote import AliasRecord, BadAliasRecord, RegistrySync, RemoteRegistry, RemoteUnavailable, is_url
from models.runtimes.priority import give_way
from service.deploy.deployments import (
    RETRY_S,
    Lineup,
    now,
)
from service.settings import Settings
from service.tasks import SerialExecutor, catch_and_log, repeat
from service.telemetry.log import logger
from service.telemetry.metrics import Metrics

HANG_S = 30.0  # seconds after which a store that has not answered yet is taken for one that is away


def follower_of(lineup: Lineup, settings: Settings, metrics: Metrics) -> Follower | None:
    """Return what has the registry of `lineup` follow the store that the settings name, None where they name none."""
    if not is_url(settings.registry):
        return None
    mirror = RegistrySync(RemoteRegistry(settings.registry), lineup.registry, lineup.check)
    return Follower(mirror, lineup, settings, metrics)


@asynccontextmanager
async def following(lineup: Lineup, follower: Follower | None, grace_s: float) -> AsyncIterator[None]:
    """Start a line-up and the mirror that it reads, have both follow meanwhile, and close within `grace_s` seconds.

    Raises:
        RemoteUnavailable, UnknownVersion, BadCheckpoint: there is no primary, or it must not be served.
    """
    watchers: list[asyncio.Task[None]] = []
    try:
        if follower:
            await follower.start()
        await lineup.start()
        gc.collect()
        gc.freeze()  # what is loaded stays: no later collection need look at it
        watchers += [asyncio.create_task(each.watch()) for each in (lineup, follower) if each]
        yield
    finally:
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*(each.close(grace_s) for each in (lineup, follower) if each))


class Follower:
    """Asks the store every `store_s` seconds; what is away or damaged there leaves what is here serving."""

    def __init__(
        self,
        mirror: RegistrySync,
        lineup: Lineup,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._mirror, self._lineup, self._clock = mirror, lineup, clock
        self._settings, self._metrics, self._executor = settings, metrics, SerialExecutor()
        metrics.store_looks.precreate(("ok", "failed"))
        self._asked = math.inf  # when the question was put that is open now
        self._answered = clock()  # when the store last did
        self._since: str | None = None  # the same by the calendar
        self._away: RemoteUnavailable | None = None
        self._refused: dict[str, tuple[bytes | None, Exception, float]] = {}  # what was said, why not, when to retry

    async def start(self) -> None:
        """Look once; a store that is away does no harm where a primary was mirrored before, or is another's to mirror.

        Raises:
            RemoteUnavailable: none was.
            Exception: the only primary there is must not be served.
        """
        await self.look(HANG_S)
        if self._may_start():
            return
        if Alias.PRIMARY in self._refused:
            raise self._refused[Alias.PRIMARY][1]
        raise self._away or RemoteUnavailable(f"{self._mirror.remote.name}: no {Alias.PRIMARY} is there")

    async def watch(self) -> None:
        """Look every `store_s` seconds, for ever, and give way to those who answer callers meanwhile."""
        await catch_and_log("give way", self._executor.run(give_way))
        await repeat("follow the store", self.look, self._settings.store_s)

    async def close(self, timeout: float) -> None:
        """Let go of the store; wait `timeout` seconds at most for a version that is being checked, for no answer."""
        await self._executor.shutdown(timeout if math.isinf(self._asked) else 0)

    async def look(self, patience_s: float | None = None) -> None:
        """Ask the store what the aliases are, and follow those that are the line-up's.

        Wait `patience_s` seconds at most, for the answer alone where nothing can be served until what it names is here.
        """
        try:
            async with asyncio.timeout(patience_s) as limit:
                told = await self._ask()
                if not self._may_start():
                    limit.reschedule(None)
                for alias in self._lineup.aliases:
                    if alias in told:
                        await self._follow(alias, told[alias])
        except TimeoutError:
            self._miss(RemoteUnavailable(f"{self._mirror.remote.name}: no answer in time"))
        except RemoteUnavailable as error:
            self._miss(error)
        else:
            self._meet()

    def _may_start(self) -> bool:
        """Whether a primary is here, or is another's to mirror."""
        return Alias.PRIMARY not in self._lineup.aliases or Alias.PRIMARY in self._mirror.registry.aliases()

    def observe(self) -> None:
        """Bring the gauge of the store up to date."""
        self._metrics.store_age.set(self._clock() - self._answered)

    def describe(self) -> dict[str, Any]:
        """Return what /models says of the store."""
        waited = self._clock() - self._asked
        error = f"no answer for {waited:.0f} s" if waited > HANG_S else str(self._away or "") or None
        return {"url": self._mirror.remote.name, "is_stale": bool(error), "answered": self._since, "error": error}

    async def _ask(self) -> dict[str, bytes | None]:
        self._asked = self._clock()
        try:
            return await self._executor.run(self._mirror.poll)
        finally:
            self._asked = math.inf

    async def _follow(self, alias: str, said: bytes | None) -> None:
        known = self._refused.get(alias)
        if known and known[0] == said and self._clock() < known[2]:
            return
        try:
            await self._executor.run(self._mirror.apply, alias, said)
            self._refused.pop(alias, None)
        except RegistryLocked:
            return  # the line-up is writing; the next look is soon enough
        except RemoteUnavailable:
            raise
        except Exception as error:  # whatever it is, what is here goes on serving
            self._refused[alias] = said, error, self._clock() + RETRY_S
            self._lineup.refuse(alias, _named(said), error)

    def _miss(self, error: RemoteUnavailable) -> None:
        self._metrics.store_looks.inc("failed")
        if not self._away:
            logger().warning("registry store away", reason=str(error))
        self._away = error

    def _meet(self) -> None:
        self._metrics.store_looks.inc("ok")
        if self._away:
            logger().info("registry store back", url=self._mirror.remote.name)
        self._away, self._answered, self._since = None, self._clock(), now()


def _named(said: bytes | None) -> str:
    try:
        return AliasRecord.from_json(said or b"").move.after
    except BadAliasRecord:
        return "unreadable"
