"""Deployments over a registry of tiny versions, with a watcher, a router, and a clock that tests move."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic
from typing import Any

from models.registry.registry import Version
from models.vectors import Floats
from service.deploy.canary import COMPARE_EVERY_S
from service.deploy.deployments import Deployments
from service.deploy.watcher import Watcher
from service.engines.engine import Deployed
from service.engines.router import make_router
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.conftest import PATIENCE_S
from tests.fakes import FakeLoader, add_version, contexts, mean_of, raises, registry_of

WINDOW_S = 1e6
SETTINGS: dict[str, Any] = {"reload_s": 0.005, "breaker_hold_s": 0.001, "watch_s": WINDOW_S}


def opposite(batch: Floats) -> Floats:
    """Answer the opposite of what the other nets answer."""
    return -mean_of(batch)


class Harness:
    """Serves `amn` as primary and `gru` as fallback; `promote` adds and deploys a version of another net."""

    def __init__(self, root: Path, loader: type[FakeLoader] = FakeLoader, **settings: Any) -> None:
        known = Settings(**{**SETTINGS, **settings})
        self.later_s = 0.0
        self.metrics = Metrics()
        self.registry = registry_of(root, primary="amn", fallback="gru")
        self.first = self.registry.resolve("primary")
        self.loader = loader(amn=mean_of, gru=mean_of, good=mean_of, fails=raises, opposes=opposite)
        clock = lambda: monotonic() + self.later_s  # noqa: E731
        self.deployments = Deployments(self.registry, self.loader, known, self.metrics, clock)
        self.watcher = Watcher(self.deployments, known.reload_s, self.metrics, clock)
        self.router = make_router(self.deployments.engines, known, self.metrics)

    @property
    def primary(self) -> Deployed:
        """What is known of the version that serves as primary."""
        return self.deployments.slots["primary"].deployed

    async def promote(self, name: str) -> Version:
        """Add a version of a net, point the primary at it, and wait until it serves."""
        version = add_version(self.registry, name)
        self.registry.point("primary", version)
        await self.until(lambda: self.primary.version == version.id)
        return version

    async def ask(self, count: int = 1) -> set[str]:
        """Route requests, each a comparison of a canary later than the last; return the models that answered."""
        served = set()
        for _ in range(count):
            routed = await self.router.predict(contexts(), self.router.chain(None, "realtime").engines, monotonic() + 9)
            served.add(routed.prediction.model)
            self.later_s += COMPARE_EVERY_S
            await asyncio.sleep(0.002)
        return served

    async def ask_until(self, condition: Callable[[], object]) -> None:
        """Route requests until `condition` holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await self.ask()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until `condition` holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.005)

    def count(self, outcome: str, alias: str = "primary") -> float:
        """Return `lvm_reloads_total`."""
        return self.metrics.reloads.value(alias, outcome)


def run(root: Path, scenario: Callable[[Harness], Awaitable[None]], **settings: Any) -> None:
    """Run a scenario while the watcher runs."""

    async def play() -> None:
        harness = Harness(root, **settings)
        await harness.watcher.start()
        watching = asyncio.create_task(harness.watcher.run())
        try:
            await scenario(harness)
        finally:
            watching.cancel()
            await harness.deployments.close(1)

    asyncio.run(play())
