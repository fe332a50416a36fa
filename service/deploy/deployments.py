"""Deployments: the engine behind each alias, and how one version takes the place of another.

The version that is replaced, the incumbent, stays warm while the new one is a canary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from time import monotonic
from typing import Any

from lvm.errors import NoEncoder, Unavailable
from models.registry.alias import ALIASES, NET_ALIASES, PREDICTORS, Alias
from models.registry.registry import Registry, RegistryError, Version
from models.text.encoder import EncoderError, is_same_model
from service.deploy.canary import Canary, Rollback
from service.deploy.loading import EngineLoader, ModelLoader
from service.engines.breaker import STATES
from service.engines.engine import Deployed, Engine
from service.engines.remote import EngineSet, PredictEngine, RemoteEngine
from service.engines.search import SearchAdapter
from service.engines.text import TextAdapter
from service.settings import Settings
from service.tasks import CatchAndLog, SerialExecutor, catch_and_log
from service.telemetry.log import logger
from service.telemetry.metrics import Metrics


@dataclass(frozen=True)
class Rollout:
    """A canary in progress: the slot to go back to, and the task that decides."""

    incumbent: Slot
    task: asyncio.Task[None]


@dataclass(frozen=True)
class Slot:
    """What an alias serves: an engine, if any version could be loaded; the version; and its rollout, while it lasts."""

    engine: Engine[Any] | RemoteEngine | None
    deployed: Deployed
    rollout: Rollout | None = None


class EncoderSlot:
    """The engine that encodes text, or why there is none."""

    def __init__(self) -> None:
        self.engine: Engine[TextAdapter] | None = None
        self.missing: str | None = None

    def require_engine(self, wanted: str, pointer: str) -> Engine[TextAdapter]:
        """Return the engine of the encoder `wanted`, a name on a card; `pointer` is to the text that needs it.

        Raises:
            NoEncoder: there is none, or it is another.
        """
        if self.engine is None:
            raise NoEncoder(self.missing or "no encoder", pointer=pointer)
        if not is_same_model(self.engine.info.name, wanted):
            reads = f"the model reads vectors of {wanted}"
            raise NoEncoder(f"{reads}, and this service encodes with {self.engine.info.name}", pointer=pointer)
        return self.engine


class Deployments:
    """The slot of each alias. This class alone writes them.

    It loads the versions of `aliases`; the other nets may be remote engines. It records a rollback in `registry`.
    """

    def __init__(
        self,
        registry: Registry,
        models: ModelLoader,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], float] = monotonic,
        *,
        aliases: Sequence[Alias] = ALIASES,
    ) -> None:
        self.registry = registry
        self.loader = EngineLoader(models, settings, metrics)
        self.aliases = aliases
        self.slots: dict[str, Slot] = {}
        # of the slots, the engines that the router sends requests to
        self.engines: dict[str, PredictEngine] = {}
        self.encoder = EncoderSlot()
        # reads the registry, which may be on a share that hangs
        self.registry_executor = SerialExecutor()
        # reads the cards: thousands take seconds, which no alias may wait for
        self.card_executor = SerialExecutor()
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._background: set[asyncio.Task[None]] = set()

    # ---- what serves

    @property
    def is_ready(self) -> bool:
        """Whether a net is loaded and warm."""
        return bool(self.engines)

    def engine(self, alias: Alias) -> Engine[Any] | RemoteEngine | None:
        """Return the engine that serves `alias`, or None."""
        slot = self.slots.get(alias)
        return slot.engine if slot else None

    @property
    def retriever_engine(self) -> Engine[SearchAdapter] | None:
        """The engine of the corpus."""
        engine = self.engine(Alias.RETRIEVER)
        return engine if isinstance(engine, Engine) else None

    def require_retriever_engine(self) -> Engine[SearchAdapter]:
        """Return the engine of the corpus.

        Raises:
            Unavailable: there is none, or its vectors are of another encoder or size than a net's.
        """
        retriever = self.retriever_engine
        if retriever is None:
            raise Unavailable("no corpus is promoted as `retriever`")
        *_, dim, encoder = retriever.info.input_space
        for engine in self.engines.values():
            if (dim, encoder) != engine.info.input_space[1:]:
                name = engine.info.alias
                corpus = "the corpus in `retriever` has vectors of another encoder or size"
                raise Unavailable(f"{corpus} than `{name}`; promote a matching one")
        return retriever

    def local_engines(self) -> dict[str, Engine[Any]]:
        """Return the engines by alias that run in this process."""
        return {alias: slot.engine for alias, slot in self.slots.items() if isinstance(slot.engine, Engine)}

    def stuck_s(self) -> float:
        """Return the longest time, in seconds, that a batch has been running; infinite for a dead thread."""
        return max((engine.batcher.stuck_s() for engine in self._with_encoder()), default=0.0)

    def update_gauges(self) -> None:
        """Update the gauges of the process, of queues and of versions."""
        self._metrics.observe_process()
        engines = {alias: slot.engine for alias, slot in self.slots.items() if slot.engine}
        self._metrics.model.label_sets = [(alias, *engine.info.identity) for alias, engine in engines.items()]
        self._metrics.card_cosine.values = {
            (alias, engine.info.name, engine.info.version): engine.info.card_cosine
            for alias, engine in engines.items()
            if engine.info.card_cosine is not None
        }
        for engine in self._with_encoder():
            engine.update_gauges()
        if self.retriever_engine and self.retriever_engine.model.breaker:
            self._metrics.breaker.set(STATES[self.retriever_engine.model.breaker.state], Alias.RETRIEVER)

    # ---- how that changes

    async def deploy(self, alias: Alias, version: Version) -> None:
        """Serve `version` as `alias`; the version before it serves on if this raises.

        Raises:
            BadCheckpoint: the version must not be served.
            Exception: it cannot be loaded.
        """
        slot = self.slots.get(alias)
        if slot and slot.rollout and slot.rollout.incumbent.deployed.version == version.id:
            slot.rollout.task.cancel()
            self._go_back(alias, slot, slot.rollout.incumbent)
            return
        engine = await self.loader.load(alias, version)
        incumbent = self._take_incumbent(alias)
        rollout = self._start_canary(alias, engine, incumbent) if incumbent else None
        self._set(alias, Slot(engine, Deployed(version.id, now()), rollout))
        logger().info("version live", alias=alias, version=version.id)

    def refuse(self, alias: Alias, version: str, error: Exception) -> None:
        """Record that `alias` cannot serve `version`, an id, because of `error`; what it serves stays."""
        self._metrics.reloads.inc(alias, "refused")
        logger().error("version refused", alias=alias, version=version, reason=f"{type(error).__name__}: {error}")
        slot = self.slots.get(alias) or Slot(None, Deployed("", now()))
        self._set(alias, replace(slot, deployed=replace(slot.deployed, refused=version, reason=str(error))))

    def withdraw(self, alias: Alias) -> None:
        """Let go of what `alias` has, which answers no caller."""
        slot = self.slots.pop(alias, None)
        if slot:
            self._retire(slot.engine)

    def set_remote_engines(self, remote: EngineSet) -> None:
        """Serve nets that run in another process, instead of those before; none if `remote` is empty."""
        for alias in NET_ALIASES:
            self.slots.pop(alias, None)
            self.engines.pop(alias, None)
        for name, deployed in remote.deployed.items():
            self._set(Alias(name), Slot(remote.engines.get(name), deployed))
        self.loader.remote_search = remote.search

    async def open_encoder(self) -> None:
        """Load the encoder, if there is one: without it, the service takes vectors alone."""
        try:
            self.encoder.engine = await self.loader.load_encoder()
        except EncoderError as error:
            self.encoder.missing = str(error)
            logger().info("no encoder", reason=str(error))

    async def close(self, timeout: float) -> None:
        """Answer what was accepted and reject what comes, within `timeout` seconds."""
        rollouts = [slot.rollout for slot in self.slots.values() if slot.rollout]
        for rollout in rollouts:
            rollout.task.cancel()
        incumbents = [rollout.incumbent.engine for rollout in rollouts]
        engines = [*self._with_encoder(), *(engine for engine in incumbents if isinstance(engine, Engine))]
        closing = [engine.batcher.close(timeout) for engine in engines]
        # a copy: tasks leave the set when they end
        background = [asyncio.wait([*self._background], timeout=timeout)] if self._background else []
        await asyncio.gather(*closing, *background, self.loader.shutdown(timeout))
        self.registry_executor.close()
        self.card_executor.close()

    def _set(self, alias: Alias, slot: Slot) -> None:
        if alias not in self.slots:
            self._metrics.precreate_alias(alias)
        self.slots[alias] = slot
        if alias in PREDICTORS and slot.engine:
            self.engines[alias] = slot.engine

    # ---- canaries

    def _take_incumbent(self, alias: Alias) -> Slot | None:
        """Return the slot that a new version is judged by; retire the engine that is neither."""
        slot = self.slots.get(alias)
        if slot is None or slot.engine is None:
            return None
        if alias == Alias.CANDIDATE:
            self._retire(slot.engine)
            return None
        if slot.rollout is None:
            return slot
        slot.rollout.task.cancel()
        self._retire(slot.engine)
        return slot.rollout.incumbent

    def _start_canary(self, alias: Alias, engine: Engine[Any], incumbent: Slot) -> Rollout:
        before = incumbent.engine
        assert isinstance(before, Engine)
        canary = Canary(engine.stats, before.stats, self._settings, self._clock)
        if alias in PREDICTORS and engine.info.input_space == before.info.input_space:
            engine.on_answer = partial(canary.observe, before.run)
        return Rollout(incumbent, asyncio.create_task(self._judge(alias, canary)))

    async def _judge(self, alias: Alias, canary: Canary) -> None:
        with CatchAndLog("canary"):
            fault = await canary.verdict(self._settings.reload_s)
            slot = self.slots[alias]
            assert slot.rollout
            if fault:
                self._roll_back(alias, slot, slot.rollout.incumbent, fault)
            else:
                self._keep(alias, slot, slot.rollout.incumbent)

    def _keep(self, alias: Alias, slot: Slot, incumbent: Slot) -> None:
        assert isinstance(slot.engine, Engine)
        slot.engine.on_answer = None
        self._retire(incumbent.engine)
        self._set(alias, replace(slot, rollout=None))

    def _go_back(self, alias: Alias, slot: Slot, incumbent: Slot) -> None:
        self._retire(slot.engine)
        self._set(alias, replace(incumbent, deployed=replace(incumbent.deployed, since=now())))
        logger().info("version live", alias=alias, version=incumbent.deployed.version)

    def _roll_back(self, alias: Alias, slot: Slot, incumbent: Slot, fault: str) -> None:
        """Serve the incumbent again at once; then record that in the registry."""
        failed = slot.deployed.version
        refused = replace(incumbent.deployed, refused=failed, reason=f"rolled back: {fault}")
        self._go_back(alias, slot, replace(incumbent, deployed=refused))
        self._metrics.reloads.inc(alias, "rolled_back")
        logger().error("version rolled back", alias=alias, version=failed, reason=fault)
        self._run_in_background(self._record(Rollback(alias, failed, incumbent.deployed.version, fault)))

    async def _record(self, rollback: Rollback) -> None:
        try:
            await rollback.record(self.registry, self.registry_executor, self._settings.reload_s)
        except (OSError, RegistryError) as error:
            self._metrics.reloads.inc(rollback.alias, "unrecorded")
            logger().error("alias not moved back", alias=rollback.alias, version=rollback.version, reason=str(error))

    # ---- helpers

    def _with_encoder(self) -> list[Engine[Any]]:
        """Return every engine that runs in this process."""
        return [*self.local_engines().values(), *([self.encoder.engine] if self.encoder.engine else [])]

    def _retire(self, engine: Engine[Any] | RemoteEngine | None) -> None:
        if isinstance(engine, Engine):
            self._run_in_background(engine.batcher.close(self._settings.grace_s))

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(catch_and_log("retire", work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def now() -> str:
    """Return the time in UTC, as the ledger writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
