"""The line-up: which engine serves each alias right now. Swaps, drains, watches the aliases.

What replaces an engine that callers are answered by is on trial: the incumbent stays warm, and comes back by itself.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from lvm.errors import NoEncoder, Unavailable
from models.registry.alias import ALIASES, PREDICTORS, Alias
from models.registry.registry import (
    AliasMoved,
    BrokenAlias,
    Registry,
    RegistryError,
    RegistryLocked,
    UnknownVersion,
    Version,
)
from models.runtimes.priority import give_way
from models.text.encoder import EncoderError, is_same_model
from service.deploy.canary import Probation, Witness
from service.deploy.loading import Loaders
from service.engines.breaker import STATES, Breaker
from service.engines.engine import Engine, Identity, Live
from service.engines.predict import predict_engine
from service.engines.remote import EngineSet, PredictEngine, RemoteEngine, RemoteSearch, RemoteSearchModel
from service.engines.search import SearchModel, search_engine
from service.engines.text import TextModel, text_engine
from service.settings import Settings
from service.tasks import SerialExecutor, catch_and_log, repeat
from service.telemetry.log import logger
from service.telemetry.metrics import Metrics

RETRY_S = 60.0  # between two tries to load what was refused: it may have been the machine
TRIES = 20  # looks at a lock that somebody else holds, one every `reload_s`


@dataclass(frozen=True)
class Trial:
    """A version on probation: who serves, who would come back, what the alias said of that one."""

    engine: Engine[Any]
    incumbent: Engine[Any]
    live: Live
    task: asyncio.Task[None]


class Lineup:
    """Engines by alias. Read by the router at every request; only this class writes it.

    It loads and follows `aliases`; the nets of others may be borrowed. Text is read where the corpus is searched.
    """

    def __init__(
        self,
        registry: Registry,
        loaders: Loaders,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], float] = monotonic,
        *,
        aliases: Sequence[str] = ALIASES,
    ) -> None:
        self.registry, self._loaders, self._clock = registry, loaders, clock
        self._settings, self._metrics, self.aliases = settings, metrics, aliases
        self.executor = SerialExecutor()  # where the registry is read while serving: it may be on a share that hangs
        self.inventory_executor = (
            SerialExecutor()
        )  # where the cards are: thousands take seconds, for which no alias may wait
        self.engines: dict[str, PredictEngine] = {}
        self.candidate: PredictEngine | None = None
        self.search: Engine[SearchModel] | None = None
        self._remote_search: RemoteSearch | None = None
        self.encoder: Engine[TextModel] | None = None
        self.no_encoder: str | None = None  # why there is none
        self.live: dict[str, Live] = {}
        self._seen: dict[str, str] = {}  # the ids that the aliases pointed at when last looked at
        self._unseen: set[str] = set()  # aliases that could not be looked at
        self._retry: dict[str, float] = {}  # when to try again what could not be loaded
        self._trials: dict[str, Trial] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._loading = SerialExecutor()

    async def start(self) -> None:
        """Load what the aliases point at; only the primary must be there and fit to be served.

        Raises:
            UnknownVersion: `primary` is not set.
            BadCheckpoint: the primary must not be served.
        """
        if Alias.PRIMARY in self.aliases:
            first = await self.executor.run(self.registry.resolve, Alias.PRIMARY)
            await self._load(Alias.PRIMARY, first)
            self._seen[Alias.PRIMARY] = first.id
        for alias in self.aliases:
            await self._look(alias)
        if Alias.RETRIEVER in self.aliases:
            await self._open_encoder()
        await self._loading.run(give_way)  # from now on there are callers

    def set_engines(self, remote: EngineSet) -> None:
        """Serve by these remote engines, in place of those of the last call."""
        self.candidate = remote.engines.get(Alias.CANDIDATE)
        self.engines.clear()
        self.engines.update({alias: remote.engines[alias] for alias in PREDICTORS if alias in remote.engines})
        ours = {alias: live for alias, live in self.live.items() if alias in self.aliases}
        self.live = {**remote.live, **ours}
        self._remote_search = remote.search

    async def _open_encoder(self) -> None:
        try:
            found = await asyncio.to_thread(self._loaders.encoder)
            self.encoder = text_engine(found, self._settings, self._metrics)
        except EncoderError as error:  # a service of vectors is whole without
            self.no_encoder = str(error)
            logger().info("no encoder", reason=self.no_encoder)

    def encoder_engine(self, wanted: str, pointer: str) -> Engine[TextModel]:
        """Return the engine of the encoder `wanted`, a name on a card; `pointer` is to the text that needs it.

        Raises:
            NoEncoder: there is none, or it is another.
        """
        if self.encoder is None:
            raise NoEncoder(self.no_encoder or "no encoder", pointer=pointer)
        if not is_same_model(self.encoder.info.name, wanted):
            reads = f"the model reads vectors of {wanted}"
            raise NoEncoder(f"{reads}, and this service encodes with {self.encoder.info.name}", pointer=pointer)
        return self.encoder

    def search_engine(self) -> Engine[SearchModel]:
        """Return the engine of the corpus.

        Raises:
            Unavailable: no corpus is promoted, or its vectors are of another space than the nets'.
        """
        if self.search is None:
            raise Unavailable("no corpus is promoted as `retriever`")
        ours = self.search.info
        for engine in self.engines.values():
            theirs = engine.info
            if (ours.shape[1], ours.encoder) != (theirs.shape[1], theirs.encoder):
                raise Unavailable(f"the corpus is of another vector space than `{theirs.alias}`")
        return self.search

    @property
    def is_ready(self) -> bool:
        """Whether a net is loaded and warm."""
        return bool(self.engines)

    def stuck_s(self) -> float:
        """Return the longest time, in seconds, that a batch has been running; infinite for a dead thread."""
        return max((engine.batcher.stuck_s() for engine in self._local()), default=0.0)

    def identity(self, alias: str) -> Identity | None:
        """Return who serves `alias`, or None."""
        engine = self._all().get(alias)
        return engine.info.identity if engine else None

    def breaker(self, alias: str) -> Breaker | None:
        """Return the breaker before the store that `alias` is searched in, or None."""
        return self.search.model.breaker if alias == Alias.RETRIEVER and self.search else None

    def warning(self, alias: str) -> str | None:
        """Return what is wrong with the last inputs of `alias`, None where nothing is."""
        engine = self._all().get(alias)
        return engine.warning() if engine else None

    async def watch(self) -> None:
        """Look at the aliases every `reload_s` seconds, for ever, and follow where they point."""
        await repeat("follow aliases", self._look_at_all, self._settings.reload_s)

    async def _look_at_all(self) -> None:
        for alias in self.aliases:
            await self._look(alias)

    async def _look(self, alias: str) -> None:
        try:
            await self.follow(alias)
            self._unseen.discard(alias)
        except Exception as error:  # a file system that hiccups must not keep the others from being looked at
            self._miss(alias, error)

    def _miss(self, alias: str, error: Exception) -> None:
        """Count that an alias could not be looked at, and tell it once until it can."""
        self._metrics.reloads.inc(alias, "failed")
        if alias not in self._unseen:
            self._unseen.add(alias)
            logger().error("look at alias failed", alias=alias, exc_info=error)

    async def follow(self, alias: str) -> None:
        """Serve what `alias` points at now; what must not be served leaves the old version serving.

        Raises:
            UnknownVersion: nothing, where something serves: somebody took it away, or the registry's share is.
            BrokenAlias: something that is no alias, as in a copy that lost its links.
            OSError: the registry cannot be read.
        """
        try:
            version = await self.executor.run(self.registry.resolve, alias)
        except UnknownVersion as error:
            self._dismiss(alias)
            if isinstance(error, BrokenAlias) or (alias != Alias.CANDIDATE and self.identity(alias)):
                raise
            return
        known = self.live.get(alias)
        if version.id == self._seen.get(alias) and self._clock() < self._retry.get(alias, math.inf):
            return
        self._seen[alias] = version.id
        self._retry.pop(alias, None)
        if known and version.id == known.version:
            return  # back from a version that was refused
        try:
            await self._load(alias, version)
            if known:
                self._metrics.reloads.inc(alias, "ok")
        except Exception as error:  # whatever it is, the old version goes on serving
            self._retry[alias] = self._clock() + RETRY_S
            self.refuse(alias, version.id, error)

    def check(self, alias: str, version: Version) -> None:
        """Load a version as `alias` would serve it, and let it go; raises `BadCheckpoint`."""
        (self._loaders.retriever if alias == Alias.RETRIEVER else self._loaders.predictor)(version)

    def refuse(self, alias: str, version: str, error: Exception) -> None:
        """Take note that `alias` cannot serve `version`, an id, and why."""
        self._metrics.reloads.inc(alias, "refused")
        logger().error("version refused", alias=alias, version=version, reason=f"{type(error).__name__}: {error}")
        serving = self.live.get(alias) or Live("", now())
        self.live[alias] = replace(serving, refused=version, reason=str(error))

    def _dismiss(self, alias: str) -> None:
        """Let go of a candidate whose alias is gone; what answers callers stays, whatever became of its alias."""
        if alias == Alias.CANDIDATE and isinstance(self.candidate, Engine):
            self._retire(self.candidate)
            self.candidate = None
            del self.live[alias], self._seen[alias]

    async def close(self, timeout: float) -> None:
        """Answer what was taken, refuse what comes, within `timeout` seconds."""
        for trial in self._trials.values():
            trial.task.cancel()
        engines = [*self._local(), *(trial.incumbent for trial in self._trials.values())]
        ends: list[Awaitable[object]] = [engine.batcher.close(timeout) for engine in engines]
        ends.append(self._loading.shutdown(timeout))
        if self._ending:
            ends.append(asyncio.wait([*self._ending], timeout=timeout))  # it empties itself
        await asyncio.gather(*ends)
        self.executor.close()
        self.inventory_executor.close()

    def observe(self) -> None:
        """Bring the gauges of the process, of queues and versions up to date."""
        self._metrics.observe_process()
        self._metrics.model.label_sets = [(alias, *engine.info.identity) for alias, engine in self._all().items()]
        for engine in self._local():
            engine.observe()
        if breaker := self.breaker(Alias.RETRIEVER):
            self._metrics.breaker.set(STATES[breaker.state], Alias.RETRIEVER)

    def _all(self) -> dict[str, Engine[Any] | RemoteEngine]:
        others = {Alias.CANDIDATE: self.candidate, Alias.RETRIEVER: self.search}
        return {**self.engines, **{alias: engine for alias, engine in others.items() if engine}}

    def _ours(self) -> dict[str, Engine[Any]]:
        return {alias: engine for alias, engine in self._all().items() if isinstance(engine, Engine)}

    def _local(self) -> list[Engine[Any]]:
        return [*self._ours().values(), *([self.encoder] if self.encoder else [])]

    async def _load(self, alias: str, version: Version) -> None:
        trial = self._trials.get(alias)
        if trial and version.id == trial.live.version:  # somebody else went back
            self._reinstate(alias, trial)
            return
        engine = await self._make(alias, version)
        old, known, trial = self._ours().get(alias), self.live.get(alias), self._end_trial(alias)
        self._put(alias, engine)
        self.live[alias] = Live(version.id, now())
        logger().info("version live", alias=alias, version=version.id)
        if trial and old:
            self._retire(old)
            old, known = trial.incumbent, trial.live
        if old and known:
            self._try_out(alias, engine, old, known)

    async def _make(self, alias: str, version: Version) -> Engine[Any]:
        if alias == Alias.RETRIEVER:
            return search_engine(await self._search_model(version), self._settings, self._metrics)
        net = await self._loading.run(self._loaders.predictor, version)
        return predict_engine(net, alias, self._settings, self._metrics, may_run_inline=alias != Alias.CANDIDATE)

    async def _search_model(self, version: Version) -> SearchModel:
        corpus = await self._loading.run(self._loaders.retriever, version)
        if self._remote_search:
            return RemoteSearchModel(corpus, self._remote_search)
        # in a thread of normal priority, which gRPC's threads inherit
        return await asyncio.to_thread(self._loaders.search_model, corpus)

    def _put(self, alias: str, engine: Engine[Any]) -> None:
        if alias == Alias.RETRIEVER:
            self.search = engine
        elif alias == Alias.CANDIDATE:
            self.candidate = engine
        else:
            self.engines[alias] = engine

    def _retire(self, old: Engine[Any]) -> None:
        self._see_to(old.batcher.close(self._settings.grace_s))

    def _see_to(self, end: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(catch_and_log("retire", end))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    # ---- trials

    def _try_out(self, alias: str, engine: Engine[Any], incumbent: Engine[Any], live: Live) -> None:
        if alias == Alias.CANDIDATE:
            self._retire(incumbent)
            return
        probation = Probation(incumbent.stats, engine.stats, self._settings, self._clock)
        if alias != Alias.RETRIEVER and engine.info.input_space == incumbent.info.input_space:
            engine.on_answer = Witness(incumbent.run, probation.compare, self._clock).consider
        task = asyncio.create_task(catch_and_log("probation", self._judge(alias, probation)))
        self._trials[alias] = Trial(engine, incumbent, live, task)

    def _end_trial(self, alias: str) -> Trial | None:
        trial = self._trials.pop(alias, None)
        if trial:
            trial.engine.on_answer = None
        if trial and trial.task is not asyncio.current_task():
            trial.task.cancel()
        return trial

    async def _judge(self, alias: str, probation: Probation) -> None:
        while (fault := probation.fault()) is None and not probation.is_over:
            await asyncio.sleep(self._settings.reload_s)
        trial = self._trials[alias]
        if fault:
            self._roll_back(alias, trial, fault)
        else:
            self._end_trial(alias)
            self._retire(trial.incumbent)

    def _reinstate(self, alias: str, trial: Trial) -> None:
        self._end_trial(alias)
        self._put(alias, trial.incumbent)
        self._retire(trial.engine)
        self.live[alias] = replace(trial.live, since=now())
        logger().info("version live", alias=alias, version=trial.live.version)

    def _roll_back(self, alias: str, trial: Trial, fault: str) -> None:
        """Serve the incumbent again, at once; then have the registry say so."""
        failed = self.live[alias].version
        self._reinstate(alias, trial)
        self.live[alias] = replace(self.live[alias], refused=failed, reason=f"rolled back: {fault}")
        self._metrics.reloads.inc(alias, "rolled_back")
        logger().error("version rolled back", alias=alias, version=failed, reason=fault)
        self._see_to(self._record(alias, failed, trial.live.version, fault))

    async def _record(self, alias: str, failed: str, incumbent: str, fault: str) -> None:
        """Move the alias back too, unless somebody moved it on meanwhile."""

        def move() -> None:
            target = self.registry.find(incumbent)
            self.registry.point(alias, target, why=f"automatic: {fault}", action="rollback", expected={alias: failed})

        try:
            await self._when_free(move)
        except AliasMoved:
            return
        except (OSError, RegistryError) as error:  # a registry that cannot be written
            self._metrics.reloads.inc(alias, "unrecorded")
            logger().error("alias not moved back", alias=alias, version=failed, reason=str(error))

    async def _when_free(self, move: Callable[[], None]) -> None:
        for _ in range(TRIES):
            with suppress(RegistryLocked):
                return await self.executor.run(move)
            await asyncio.sleep(self._settings.reload_s)
        raise RegistryLocked("somebody else holds the registry's lock")


def now() -> str:
    """Return the time in UTC, as the ledger writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
