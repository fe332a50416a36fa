"""The line-up: which engine serves each alias right now. Loads, warms, swaps, drains, watches the aliases."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from models import predictor, retriever
from models.encoder import EncoderError, is_same, open_encoder
from models.registry import Registry, UnknownVersion, Version
from service.batching import MicroBatcher
from service.encoding import EncoderEngine, EncoderLike
from service.engine import Engine, Identity, PredictorLike
from service.errors import NoEncoder, Unavailable
from service.guard import Guard
from service.log import logger
from service.metrics import Metrics
from service.search import RetrieverLike, SearchEngine
from service.settings import Settings

PREDICTORS = ("primary", "fallback")
CANDIDATE = "candidate"  # answers nobody: the shadow asks it
RETRIEVER = "retriever"


class Loaders(Protocol):
    """How a version becomes something that runs; tests hand in fakes."""

    def predictor(self, version: Version) -> PredictorLike:
        """Load and warm a net; raises `BadCheckpoint`."""
        ...

    def retriever(self, version: Version) -> RetrieverLike:
        """Load and warm a corpus; raises `BadCheckpoint`."""
        ...

    def encoder(self) -> EncoderLike:
        """Find, and load where that was asked for, what turns text into vectors; raises `EncoderError`."""
        ...


class RealLoaders:
    """Loads versions with the runtimes of this machine."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def predictor(self, version: Version) -> PredictorLike:
        """Load and warm a net; raises `BadCheckpoint`."""
        known = self._settings
        loaded = predictor.load(version.path, known.device, known.threads, known.precision)
        loaded.warm_up(known.max_batch)
        return loaded

    def retriever(self, version: Version) -> RetrieverLike:
        """Load and warm a corpus; raises `BadCheckpoint`."""
        loaded = retriever.load(version.path, self._settings.threads)
        loaded.warm_up()
        return loaded

    def encoder(self) -> EncoderLike:
        """Find, and load where that was asked for, what turns text into vectors; raises `EncoderError`."""
        spared = max(1, self._settings.threads - 1)  # a core stays with those who bring vectors
        return open_encoder(self._settings.encoder, spared)


@dataclass(frozen=True)
class Live:
    """What an alias serves, since when, and the version it was last asked to serve but refused."""

    version: str
    since: str
    refused: str | None = None
    reason: str | None = None


class Lineup:
    """Engines by alias. Read by the router at every request; only this class writes it."""

    def __init__(self, registry: Registry, loaders: Loaders, settings: Settings, metrics: Metrics) -> None:
        self.registry, self._loaders = registry, loaders
        self._settings, self._metrics = settings, metrics
        self.engines: dict[str, Engine] = {}
        self.candidate: Engine | None = None
        self.search: SearchEngine | None = None
        self.encoder: EncoderEngine | None = None
        self.no_encoder: str | None = None  # why there is none
        self.live: dict[str, Live] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load what the aliases point at; only the primary must be there and fit to be served.

        Raises:
            UnknownVersion: `primary` is not set.
            BadCheckpoint: the primary must not be served.
        """
        await self._load(PREDICTORS[0], self.registry.resolve(PREDICTORS[0]))
        for alias in (*PREDICTORS[1:], CANDIDATE, RETRIEVER):
            await self.follow(alias)
        await self._open_encoder()

    async def _open_encoder(self) -> None:
        try:
            found = await asyncio.to_thread(self._loaders.encoder)
            self.encoder = EncoderEngine(found, self._settings, self._metrics)
        except EncoderError as error:  # a service of vectors is whole without
            self.no_encoder = str(error)
            logger().info("no encoder", reason=self.no_encoder)

    def encoder_engine(self, wanted: str, pointer: str) -> EncoderEngine:
        """Return the engine of the encoder `wanted`, a name on a card; `pointer` is to the text that needs it.

        Raises:
            NoEncoder: there is none, or it is another.
        """
        if self.encoder is None:
            raise NoEncoder(self.no_encoder or "no encoder", pointer=pointer)
        if not is_same(self.encoder.name, wanted):
            reads = f"the model reads vectors of {wanted}"
            raise NoEncoder(f"{reads}, and this service encodes with {self.encoder.name}", pointer=pointer)
        return self.encoder

    def search_engine(self) -> SearchEngine:
        """Return the engine of the corpus.

        Raises:
            Unavailable: no corpus is promoted, or its vectors are of another space than the nets'.
        """
        if self.search is None:
            raise Unavailable("no corpus is promoted as `retriever`")
        ours = self.search.retriever.card
        for engine in self.engines.values():
            theirs = engine.predictor.card
            if (ours.dim, ours.encoder) != (theirs.dim, theirs.encoder):
                raise Unavailable(f"the corpus is of another vector space than `{engine.alias}`")
        return self.search

    @property
    def is_ready(self) -> bool:
        """Whether a net is loaded and warm."""
        return bool(self.engines)

    def stuck_s(self) -> float:
        """Return the longest time, in seconds, that a batch has been running; infinite for a dead thread."""
        return max((batcher.stuck_s() for batcher in self._batchers().values()), default=0.0)

    def identity(self, alias: str) -> Identity | None:
        """Return who serves `alias`, or None."""
        engine = self._all().get(alias)
        return engine.identity if engine else None

    def guard(self, alias: str) -> Guard | None:
        """Return what watches the inputs of `alias`, or None."""
        engine = self._all().get(alias)
        return engine.guard if engine else None

    async def watch(self) -> None:
        """Look at the aliases every `reload_s` seconds, for ever, and follow where they point."""
        while True:
            await asyncio.sleep(self._settings.reload_s)
            for alias in (*PREDICTORS, CANDIDATE, RETRIEVER):
                try:
                    await self.follow(alias)
                except Exception as error:  # a file system that hiccups must not end the watch
                    self._metrics.reloads.add(alias, "failed")
                    logger().error("look at alias failed", alias=alias, exc_info=error)

    async def follow(self, alias: str) -> None:
        """Serve what `alias` points at now; what must not be served leaves the old version serving."""
        known = self.live.get(alias)
        try:
            version = self.registry.resolve(alias)
        except UnknownVersion:
            self._dismiss(alias)
            return
        if known and version.id in (known.version, known.refused):
            return
        try:
            await self._load(alias, version)
            if known:
                self._metrics.reloads.add(alias, "ok")
        except Exception as error:  # whatever it is, the old version goes on serving
            self._metrics.reloads.add(alias, "refused")
            logger().error(
                "version refused", alias=alias, version=version.id, reason=f"{type(error).__name__}: {error}"
            )
            self.live[alias] = replace(known or Live("", now()), refused=version.id, reason=str(error))

    def _dismiss(self, alias: str) -> None:
        """Let go of a candidate whose alias is gone; what answers callers stays, whatever became of its alias."""
        if alias == CANDIDATE and self.candidate:
            self._retire(self.candidate)
            self.candidate = None
            del self.live[alias]

    async def close(self, timeout: float) -> None:
        """Answer what was taken, refuse what comes, within `timeout` seconds."""
        closing = [batcher.close(timeout) for batcher in self._batchers().values()]
        await asyncio.gather(*closing, *self._retiring)

    def observe(self) -> None:
        """Bring the gauges of queues and versions up to date."""
        self._metrics.model.clear()
        for alias, batcher in self._batchers().items():
            self._metrics.queue_rows.set(batcher.pending_rows, alias)
        for alias, engine in self._all().items():
            self._metrics.model.set(1, alias, *engine.identity)
            if engine.guard:
                engine.guard.observe()

    def _all(self) -> dict[str, Engine | SearchEngine]:
        others = {CANDIDATE: self.candidate, RETRIEVER: self.search}
        return {**self.engines, **{alias: engine for alias, engine in others.items() if engine}}

    def _batchers(self) -> dict[str, MicroBatcher[Any, Any]]:
        batchers: dict[str, MicroBatcher[Any, Any]] = {alias: engine.batcher for alias, engine in self._all().items()}
        return batchers | ({EncoderEngine.alias: self.encoder.batcher} if self.encoder else {})

    async def _load(self, alias: str, version: Version) -> None:
        old = self._all().get(alias)
        if alias == RETRIEVER:
            corpus = await asyncio.to_thread(self._loaders.retriever, version)
            self.search = SearchEngine(corpus, self._settings, self._metrics)
        else:
            net = await asyncio.to_thread(self._loaders.predictor, version)
            engine = Engine(net, alias, self._settings, self._metrics, on_loop=alias != CANDIDATE)
            if alias == CANDIDATE:
                self.candidate = engine
            else:
                self.engines[alias] = engine
        self.live[alias] = Live(version.id, now())
        logger().info("version live", alias=alias, version=version.id)
        if old:
            self._retire(old)

    def _retire(self, old: Engine | SearchEngine) -> None:
        task = asyncio.create_task(old.batcher.close(self._settings.grace_s))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)


def now() -> str:
    """Return the time in UTC, as the ledger writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
