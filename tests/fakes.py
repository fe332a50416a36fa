"""Tiny stand-ins that are handed to the app: nets that answer, raise, hang or lie; corpora of a few rows."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from models.drift import ReferenceStats
from models.registry.card import Card
from models.registry.checkpoint import BadCheckpoint
from models.registry.registry import Registry, Version
from models.retrieval.corpus import (
    Corpus,
)
from models.retrieval.index import FlatIndex
from models.retrieval.milvus import MilvusIndex
from models.retrieval.reranker import NEIGHBOUR_COUNT, Reranker, feature_count
from models.retrieval.retriever import Retriever
from models.retrieval.towers import Towers
from models.text.encoder import (
    MAX_WORD_PIECES,
    Encoder,
    EncoderError,
    Progress,
    TextInfo,
)
from models.vectors import Floats, normalise
from service.engines.external_index import ExternalSearchAdapter
from service.engines.search import SearchAdapter
from service.settings import Settings

D, T = 8, 5


def contexts(count: int = 1, seed: int = 0) -> Floats:
    """Return unit contexts `(count, T, D)`."""
    return normalise(np.random.default_rng(seed).standard_normal((count, T, D)))


def octets_of(rows: Floats) -> dict[str, str]:
    """Return the headers of octets that tell their shape."""
    shape = "x".join(map(str, rows.shape))
    return {"content-type": f"application/octet-stream; dtype={rows.dtype.name}; shape={shape}"}


def mean_of(batch: Floats) -> Floats:
    """Predict the mean: the right answer of every fake net that works."""
    return normalise(batch.mean(axis=1))


def raises(batch: Floats) -> Floats:
    """Fail as a broken net does."""
    raise RuntimeError("a kernel failed")


def answers_nan(batch: Floats) -> Floats:
    """Answer what is not finite."""
    return np.full((len(batch), D), np.nan, np.float32)


def answers_wrong_shape(batch: Floats) -> Floats:
    """Answer one row too few."""
    return mean_of(batch)[:-1]


def card(name: str = "amn", **changes: object) -> Card:
    """Return a card of the fakes' sizes."""
    fields: dict[str, object] = {
        "name": name,
        "kind": "net",
        "dim": D,
        "context_length": T,
        "encoder": "fake",
        "license": "other",
        "attribution": "",
    }
    return Card(**{**fields, **changes})  # type: ignore[arg-type]


@dataclass
class FakePredictor:
    """A net whose answer is a function, and which remembers the batches it saw."""

    name: str = "amn"
    version: str = "20260101-000000000000"
    answer: Callable[[Floats], Floats] = mean_of
    sha256: str = "0" * 64
    runtime: str = "fake"
    runs_inline: bool = False
    reference_stats: ReferenceStats | None = None
    card: Card = field(default_factory=card)
    batches: list[int] = field(default_factory=list)

    def predict_batch(self, batch: Floats) -> Floats:
        """Map contexts `(B, T, D)` to whatever `answer` makes of them."""
        self.batches.append(len(batch))
        return self.answer(batch)


class Shaped(NamedTuple):
    """A target whose items have a shape."""

    shape: tuple[int, ...]


class Gate:
    """An answer that waits until it is opened: a hang that a test can end."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = threading.Event()

    def __call__(self, batch: Floats) -> Floats:
        """Wait, then predict the mean."""
        self.entered.set()
        self.opened.wait(30)
        return mean_of(batch)


def corpus(rows: int = 20) -> Corpus:
    """Return two articles of `rows / 2` chunks each."""
    vectors = normalise(np.random.default_rng(1).standard_normal((rows, D)))
    article = np.repeat([0, 1], rows // 2).astype(np.int32)
    position = np.tile(np.arange(rows // 2), 2).astype(np.int32)
    lines = {
        a: {"article_id": a, "title": f"Article {a}", "chunks": [f"chunk {a}/{p}" for p in range(rows // 2)]}
        for a in (0, 1)
    }
    return Corpus(vectors, article, position, lines)


def retriever(version: str = "20260101-000000000000", **changes: object) -> Retriever:
    """Return a real retriever over the fake corpus."""
    known = corpus()
    return Retriever(version, "1" * 64, card("corpus", kind="corpus", **changes), known, FlatIndex(known.vectors))


class MeanQuery:
    """A query tower that answers the mean."""

    name, on_cpu = "fake", True

    def run(self, batch: Floats) -> Floats:
        """Map contexts `(B, T, D)` to their means."""
        return mean_of(batch)


def bundle(version: str = "20260101-000000000000") -> Retriever:
    """Return the fake corpus with towers, and a reranker that puts the nearest to the last vector first."""
    known = corpus()
    neighbours = np.zeros((len(known), NEIGHBOUR_COUNT), np.float32)
    towers = Towers("towers", "20260202-000000000000", MeanQuery(), FlatIndex(known.vectors), neighbours)
    hidden = np.zeros((1, feature_count(T)), np.float32)
    hidden[0, T - 1] = 1
    last = Reranker(hidden, np.ones(1, np.float32), np.ones(1, np.float32))
    return Retriever(version, "1" * 64, card("corpus", kind="corpus"), known, FlatIndex(known.vectors), towers, last)


class FakeBuild:
    """The fake corpus in a store that gives equal scores in any order, and fails while `fault` is set."""

    kind = "flat"

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.asked: list[list[int]] = []  # what was to be left out
        self.seconds: list[float] = []
        self.answers = 0

    def set_timeout(self, seconds: float) -> None:
        """Note how long it may take."""
        self.seconds.append(seconds)

    def find(self, field: str, queries: Floats, k: int, exclude: Sequence[int] = ()) -> list[list[int]]:
        """Return the k nearest rows, the later of equal ones first."""
        self.asked.append(list(exclude))
        if self.fault:
            raise self.fault
        self.answers += 1
        scores = queries @ corpus().vectors[::-1].T
        order = len(corpus()) - 1 - np.argsort(-scores, axis=1, kind="stable")
        return [[int(row) for row in rows if row not in exclude][:k] for rows in order]

    def search_model(self, corpus: Retriever, settings: Settings, **more: Any) -> ExternalSearchAdapter:
        """Return what searches `corpus` in this store first."""
        indexes = {name: MilvusIndex(self, name, index) for name, index in corpus.indexes.items()}
        return ExternalSearchAdapter(corpus, corpus.with_indexes(indexes), self, settings, **more)


class HashEncoder:
    """An encoder: a unit vector drawn from the text's hash; a word is a token; encodes two texts at a time."""

    name, dim = "fake", D

    def count_tokens(self, text: str) -> int:
        """Return the number of words."""
        return words(text)

    def text_info(self, text: str) -> TextInfo:
        """Say that words are read up to the longest, but for those that begin with `?`."""
        read = text.split()[: MAX_WORD_PIECES - 2]
        return TextInfo(words(text), len(read), sum(word.startswith("?") for word in read) / max(1, len(read)))

    def encode(self, texts: Sequence[str], progress: Progress = lambda done, total: None) -> Floats:
        """Return the vectors of some texts."""
        vectors = np.array([self.vector(text) for text in texts], np.float32).reshape(-1, self.dim)
        for done in range(2, len(texts) + 2, 2):
            progress(min(done, len(texts)), len(texts))
        return vectors

    def vector(self, text: str) -> Floats:
        """Return the vector of one text."""
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
        return normalise(np.random.default_rng(seed).standard_normal(self.dim))


def words(text: str) -> int:
    """Return the number of words."""
    return len(text.split())


def prose(sizes: Sequence[int], first: int = 0) -> str:
    """Return sentences of the given numbers of words, every word different."""
    made = []
    for size in sizes:
        made.append(" ".join(f"W{first + i}" for i in range(size)) + ".")
        first += size
    return " ".join(made)


class FakeLoader:
    """Loads fake nets by their names; a version of another name is a bad checkpoint."""

    def __init__(
        self,
        corpus: Callable[[str], Retriever] = retriever,
        text: Encoder | None = None,
        search_model: Callable[[Retriever], SearchAdapter] = SearchAdapter,
        **answers: Callable[[Floats], Floats],
    ) -> None:
        self.answers, self._corpus, self._text, self.search_model = answers, corpus, text, search_model
        self.loaded: list[FakePredictor] = []

    def load_predictor(self, version: Version) -> FakePredictor:
        """Return a fake net of the version's name."""
        if self.answers.get(version.name) is None:
            raise BadCheckpoint(f"{version.id} was altered")
        made = FakePredictor(version.name, version.version, self.answers[version.name], card=card(version.name))
        self.loaded.append(made)
        return made

    def load_retriever(self, version: Version) -> Retriever:
        """Return the fake corpus."""
        return self._corpus(version.version)

    def load_encoder(self) -> Encoder:
        """Return the fake encoder; raises `EncoderError` if there is none."""
        if self._text is None:
            raise EncoderError("install what encodes text")
        return self._text


def add_version(registry: Registry, name: str, text: str = "first") -> Version:
    """Store a version that holds nothing but a card's place and `text`."""
    return registry.add(name, {"README.md": card(name).to_markdown().encode(), "note.txt": text.encode()})


def registry_of(root, **aliases: str) -> Registry:  # type: ignore[no-untyped-def]
    """Return a registry where each alias points at a version of the model named."""
    registry = Registry(root)
    for alias, name in aliases.items():
        registry.point(alias, add_version(registry, name))
    return registry
