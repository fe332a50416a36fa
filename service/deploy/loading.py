"""Loading: how a version of the registry becomes something that runs."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

from models.predictor import load_predictor
from models.registry.registry import Version
from models.retrieval.milvus import IndexUnavailable, MilvusCollection, MilvusIndex
from models.retrieval.retriever import load_retriever
from models.text.encoder import open_encoder
from service.engines.engine import PredictorLike
from service.engines.external_index import IndexStore
from service.engines.search import RetrieverLike
from service.engines.text import EncoderLike
from service.settings import Settings


class Loaders(Protocol):
    """How a version becomes something that runs; tests hand in fakes."""

    def predictor(self, version: Version) -> PredictorLike:
        """Load and warm a net; raises `BadCheckpoint`."""
        ...

    def retriever(self, version: Version) -> RetrieverLike:
        """Load and warm a corpus; raises `BadCheckpoint`."""
        ...

    def index_store(self, corpus: RetrieverLike) -> IndexStore | None:
        """Return where else the corpus is searched, None where it is only here."""
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
        loaded = load_predictor(version.path, known.device, known.threads, known.precision)
        loaded.warm_up(known.max_batch)
        return loaded

    def retriever(self, version: Version) -> RetrieverLike:
        """Load and warm a corpus; raises `BadCheckpoint`."""
        loaded = load_retriever(version.path, self._settings.threads)
        loaded.warm_up()
        return loaded

    def index_store(self, corpus: RetrieverLike) -> IndexStore | None:
        """Return the corpus in Milvus where LVM_MILVUS_URI says so, connected if it is there."""
        known = self._settings
        if not known.milvus_uri:
            return None
        build = MilvusCollection(
            known.milvus_uri, known.milvus_token.get_secret_value(), corpus.sha256, len(corpus.corpus)
        )
        indexes = {name: MilvusIndex(build, name, index) for name, index in corpus.indexes.items()}
        with suppress(IndexUnavailable):
            build.set_timeout(known.timeout_ms / 1000)
            build.open()
        return IndexStore(corpus.with_indexes(indexes), build, known)

    def encoder(self) -> EncoderLike:
        """Find, and load where that was asked for, what turns text into vectors; raises `EncoderError`."""
        spared = max(1, self._settings.threads - 1)  # a core stays with those who bring vectors
        return open_encoder(self._settings.encoder, spared)
