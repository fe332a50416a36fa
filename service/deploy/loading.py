"""Loading: how a version of the registry becomes something that runs."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

from models.predictor import Predictor, load_predictor
from models.registry.registry import Version
from models.retrieval.milvus import IndexUnavailable, MilvusCollection, MilvusIndex
from models.retrieval.retriever import Retriever, load_retriever
from models.text.encoder import Encoder, open_encoder
from service.engines.external_index import ExternalSearchModel
from service.engines.search import SearchModel
from service.settings import Settings


class Loaders(Protocol):
    """How a version becomes something that runs; tests hand in fakes."""

    def predictor(self, version: Version) -> Predictor:
        """Load and warm a net; raises `BadCheckpoint`."""
        ...

    def retriever(self, version: Version) -> Retriever:
        """Load and warm a corpus; raises `BadCheckpoint`."""
        ...

    def search_model(self, retriever: Retriever) -> SearchModel:
        """Return what searches the corpus: its own index, or an external one first."""
        ...

    def encoder(self) -> Encoder:
        """Find, and load where that was asked for, what turns text into vectors; raises `EncoderError`."""
        ...


class RealLoaders:
    """Loads versions with the runtimes of this machine."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def predictor(self, version: Version) -> Predictor:
        """Load and warm a net; raises `BadCheckpoint`."""
        known = self._settings
        loaded = load_predictor(version.path, known.device, known.threads, known.precision)
        loaded.warm_up(known.max_batch)
        return loaded

    def retriever(self, version: Version) -> Retriever:
        """Load and warm a corpus; raises `BadCheckpoint`."""
        loaded = load_retriever(version.path, self._settings.threads)
        loaded.warm_up()
        return loaded

    def search_model(self, retriever: Retriever) -> SearchModel:
        """Return what searches the corpus: Milvus first if LVM_MILVUS_URI is set, connected if it answers."""
        known = self._settings
        if not known.milvus_uri:
            return SearchModel(retriever)
        token = known.milvus_token.get_secret_value()
        build = MilvusCollection(known.milvus_uri, token, retriever.sha256, len(retriever.corpus))
        indexes = {name: MilvusIndex(build, name, index) for name, index in retriever.indexes.items()}
        with suppress(IndexUnavailable):
            build.set_timeout(known.timeout_ms / 1000)
            build.open()
        return ExternalSearchModel(retriever, retriever.with_indexes(indexes), build, known)

    def encoder(self) -> Encoder:
        """Find, and load where that was asked for, what turns text into vectors; raises `EncoderError`."""
        spared = max(1, self._settings.threads - 1)  # a core stays with those who bring vectors
        return open_encoder(self._settings.encoder, spared)
