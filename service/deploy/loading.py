"""Loading: how a version of the registry becomes an engine."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from models.predictor import Predictor, build_predictor, load_net
from models.registry.alias import Alias
from models.registry.checkpoint import BadCheckpoint, Checkpoint
from models.registry.registry import Version
from models.retrieval.milvus import IndexUnavailable, MilvusCollection, MilvusIndex
from models.retrieval.retriever import Retriever, load_retriever
from models.runtimes import NoSuchDevice, find_device
from models.runtimes.priority import lower_priority
from models.text.encoder import Encoder, open_encoder
from models.trial import CHOICES_DIRECTORY, choose_for
from service.engines.engine import Engine
from service.engines.external_index import ExternalSearchAdapter
from service.engines.predict import make_predict_engine
from service.engines.remote import RemoteSearch, RemoteSearchAdapter
from service.engines.search import SearchAdapter, make_search_engine
from service.engines.text import TextAdapter, make_text_engine
from service.settings import Settings
from service.tasks import SerialExecutor
from service.telemetry.log import logger
from service.telemetry.metrics import Metrics


class ModelLoader:
    """Loads the models of versions, with the runtime of the settings; tests pass in a fake."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def load_predictor(self, version: Version) -> Predictor:
        """Load and warm a net; raises `BadCheckpoint`."""
        settings, checkpoint = self._settings, load_net(version.path)
        precision = self._choose_precision(version, checkpoint) if settings.precision == "auto" else settings.precision
        try:
            predictor = build_predictor(checkpoint, settings.device, settings.threads, precision)
        except (BadCheckpoint, NoSuchDevice, OSError) as error:  # OpenVINO reads weights from a temporary file
            if settings.precision != "auto" or precision == "float32":
                raise
            logger().warning("precision not usable", version=version.id, precision=precision, reason=str(error))
            predictor = build_predictor(checkpoint, settings.device, settings.threads)
        predictor.warm_up(settings.max_batch)
        # It takes milliseconds, and its first reader is an event loop.
        _ = predictor.reference_stats
        return predictor

    def _choose_precision(self, version: Version, checkpoint: Checkpoint) -> str:
        """Return the precision that is fastest for a net here; an accelerator computes in float32."""
        if find_device(self._settings.device) != "cpu":
            return "float32"
        choice, is_new = choose_for(version, checkpoint, self._settings.cache.expanduser() / CHOICES_DIRECTORY)
        for each in choice.tried if is_new else ():
            if each.rejected:
                logger().info("precision rejected", version=version.id, precision=each.precision, reason=each.rejected)
        logger().info("precision chosen", version=version.id, precision=choice.precision)
        return choice.precision

    def load_retriever(self, version: Version) -> Retriever:
        """Load and warm a corpus; raises `BadCheckpoint`."""
        retriever = load_retriever(version.path, self._settings.threads)
        retriever.warm_up()
        return retriever

    def search_model(self, retriever: Retriever) -> SearchAdapter:
        """Return what searches the corpus: Milvus first if LVM_MILVUS_URI is set, connected if it answers."""
        settings = self._settings
        if not settings.milvus_uri:
            return SearchAdapter(retriever)
        token = settings.milvus_token.get_secret_value()
        collection = MilvusCollection(settings.milvus_uri, token, retriever.sha256, len(retriever.corpus))
        indexes = {name: MilvusIndex(collection, name, index) for name, index in retriever.indexes.items()}
        with suppress(IndexUnavailable):
            collection.set_timeout(settings.timeout_ms / 1000)
            collection.open()
        return ExternalSearchAdapter(retriever, retriever.with_indexes(indexes), collection, settings)

    def load_encoder(self) -> Encoder:
        """Load the encoder of text; raises `EncoderError` if there is none."""
        # one core stays free for requests with vectors
        threads = max(1, self._settings.threads - 1)
        return open_encoder(self._settings.encoder, threads, may_use_bf16=self._settings.precision != "float32")


class EngineLoader:
    """Loads versions, one at a time in a thread of its own, and makes engines of them."""

    def __init__(self, models: ModelLoader, settings: Settings, metrics: Metrics) -> None:
        # searches the corpus in another process, if there is one for that
        self.remote_search: RemoteSearch | None = None
        self._models = models
        self._settings = settings
        self._metrics = metrics
        self._executor = SerialExecutor()

    async def load(self, alias: Alias, version: Version) -> Engine[Any]:
        """Return the engine that serves `version` as `alias`; raises `BadCheckpoint`."""
        if alias == Alias.RETRIEVER:
            return make_search_engine(await self._load_search_model(version), self._settings, self._metrics)
        predictor = await self._executor.run(self._models.load_predictor, version)
        may_run_inline = alias != Alias.CANDIDATE
        return make_predict_engine(predictor, alias, self._settings, self._metrics, may_run_inline=may_run_inline)

    async def load_encoder(self) -> Engine[TextAdapter]:
        """Return the engine of the encoder; raises `EncoderError` if there is none."""
        return make_text_engine(await asyncio.to_thread(self._models.load_encoder), self._settings, self._metrics)

    def check(self, alias: str, version: Version) -> None:
        """Load a version as `alias` would serve it, and drop it; raises `BadCheckpoint`."""
        (self._models.load_retriever if alias == Alias.RETRIEVER else self._models.load_predictor)(version)

    async def lower_priority(self) -> None:
        """Load later versions at a lower priority than callers are answered at."""
        await self._executor.run(lower_priority)

    async def shutdown(self, timeout: float) -> None:
        """Wait `timeout` seconds at most for what is being loaded; load nothing more."""
        await self._executor.shutdown(timeout)

    async def _load_search_model(self, version: Version) -> SearchAdapter:
        retriever = await self._executor.run(self._models.load_retriever, version)
        if self.remote_search:
            return RemoteSearchAdapter(retriever, self.remote_search)
        # not in the thread that loads: threads that gRPC starts would inherit its low priority
        return await asyncio.to_thread(self._models.search_model, retriever)
