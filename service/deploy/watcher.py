"""The watcher: polls the aliases of the registry, and deploys the versions that they point at."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from models.registry.alias import EXPECTED, Alias
from models.registry.registry import BrokenAlias, UnknownVersion, Version
from service.deploy.deployments import Deployments
from service.tasks import repeat
from service.telemetry.log import logger
from service.telemetry.metrics import Metrics

RETRY_S = 60.0  # before a version that was refused is loaded again: the fault may have been the machine's


class Seen(NamedTuple):
    """The version, an id, that an alias pointed at when last polled; and when to load it again, if it was refused."""

    version: str
    retry_at: float = math.inf


class Watcher:
    """Has `deployments` serve what the aliases point at; polls them every `poll_s` seconds."""

    def __init__(
        self,
        deployments: Deployments,
        poll_s: float,
        metrics: Metrics,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        # aliases whose last poll failed
        self.failing: set[Alias] = set()
        self.deployments = deployments
        self._poll_s = poll_s
        self._metrics = metrics
        self._clock = clock
        self._seen: dict[Alias, Seen] = {}

    async def start(self) -> None:
        """Deploy what the aliases point at, and the encoder; of these, only the primary must be there.

        Raises:
            UnknownVersion: `primary` is not set.
            BadCheckpoint: the primary must not be served.
        """
        if Alias.PRIMARY in self.deployments.aliases:
            version = await self._resolve(Alias.PRIMARY)
            await self.deployments.deploy(Alias.PRIMARY, version)
            self._seen[Alias.PRIMARY] = Seen(version.id)
        await self._poll_all()
        if Alias.RETRIEVER in self.deployments.aliases:
            await self.deployments.open_encoder()
        await self.deployments.loader.lower_priority()

    async def run(self) -> None:
        """Poll the aliases until cancelled."""
        await repeat("poll aliases", self._poll_all, self._poll_s)

    async def _poll_all(self) -> None:
        for alias in self.deployments.aliases:
            try:
                await self.poll(alias)
            except Exception as error:  # a file system may raise anything; the other aliases are polled nevertheless
                # a registry that cannot be read is reported for the aliases in use
                if not (isinstance(error, OSError) and self._is_unused(alias)):
                    self._record_failure(alias, error)
            else:
                self.failing.discard(alias)

    def _is_unused(self, alias: Alias) -> bool:
        return alias not in EXPECTED and alias not in self.deployments.slots

    def _record_failure(self, alias: Alias, error: Exception) -> None:
        """Count a failed poll; log the first of several in a row."""
        self._metrics.reloads.inc(alias, "failed")
        if alias not in self.failing:
            self.failing.add(alias)
            logger().error("look at alias failed", alias=alias, exc_info=error)

    async def poll(self, alias: Alias) -> None:
        """Deploy what `alias` points at, if that is new or to be tried again. If it cannot be served, nothing changes.

        Raises:
            UnknownVersion: the alias is not set, and something serves: the alias was removed, or its share is away.
            BrokenAlias: the alias is no link to a version, as in a copy that lost its links.
            OSError: the registry cannot be read.
        """
        try:
            version = await self._resolve(alias)
        except UnknownVersion as error:
            self._on_unset(alias)
            if isinstance(error, BrokenAlias) or self.deployments.engine(alias):
                raise
            return
        seen = self._seen.get(alias)
        if seen is None or version.id != seen.version or self._clock() >= seen.retry_at:
            await self._deploy(alias, version)

    async def _resolve(self, alias: Alias) -> Version:
        return await self.deployments.registry_executor.run(self.deployments.registry.resolve, alias)

    def _on_unset(self, alias: Alias) -> None:
        """Forget what answers no caller: a candidate, and a version that was refused; what answers callers stays."""
        if alias == Alias.CANDIDATE or not self.deployments.engine(alias):
            self.deployments.withdraw(alias)
            self._seen.pop(alias, None)

    async def _deploy(self, alias: Alias, version: Version) -> None:
        self._seen[alias] = Seen(version.id)
        before = self.deployments.slots.get(alias)
        if before and before.deployed.version == version.id:
            return  # moved back to what serves already, from a version that was refused
        try:
            await self.deployments.deploy(alias, version)
        except Exception as error:  # a model may raise anything; what serves stays
            self._seen[alias] = Seen(version.id, self._clock() + RETRY_S)
            self.deployments.refuse(alias, version.id, error)
        else:
            if before:
                self._metrics.reloads.inc(alias, "ok")
