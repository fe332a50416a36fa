"""The retriever: one version of a corpus with its index as a function on arrays."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models import card as cards
from models import corpus as corpora
from models import sealed
from models.card import Card
from models.checkpoint import BadCheckpoint
from models.corpus import Chunk, Corpus, Floats
from models.index import FlatIndex, VectorIndex

SAME = 0.999  # cosine from which a candidate counts as one of the caller's own context chunks


@dataclass(frozen=True)
class Search:
    """One query `(D,)`, how many results, and which rows or vectors must not come back."""

    query: Floats
    k: int
    exclude: Collection[int] = ()
    exclude_vectors: Floats | None = None  # (T, D)


@dataclass(frozen=True)
class Hit:
    """One result: the row in the corpus, its inner product with the query, the passage."""

    row: int
    score: float
    chunk: Chunk


class Retriever:
    """Finds the top-k passages of one corpus."""

    def __init__(self, version: str, sha256: str, card: Card, corpus: Corpus, index: VectorIndex) -> None:
        self.version, self.sha256, self.card = version, sha256, card
        self.corpus, self.index = corpus, index

    @property
    def name(self) -> str:
        """The corpus's name."""
        return self.card.name

    @property
    def dim(self) -> int:
        """Dimensions of a query."""
        return self.corpus.dim

    @property
    def runtime(self) -> str:
        """The index's name."""
        return type(self.index).__name__

    @property
    def is_exact(self) -> bool:
        """Whether hits are the true top-k."""
        return self.index.is_exact

    def warm_up(self) -> None:
        """Search once, so that no caller pays for first-time work."""
        self.search_batch([Search(self.corpus.vectors[0], 1)])

    def search_batch(self, searches: list[Search]) -> list[list[Hit]]:
        """Return the hits of each search, best first; fewer than k only where the corpus ends."""
        reach = max(search.k + self._spare(search) for search in searches)
        queries = np.stack([search.query for search in searches])
        while True:
            scores, rows = self.index.search(queries, min(reach, len(self.index)))
            found = [self._hits(*item) for item in zip(searches, scores, rows, strict=True)]
            short = any(len(hits) < search.k for hits, search in zip(found, searches, strict=True))
            if not short or reach >= len(self.index):
                return found
            reach *= 4  # the corpus repeats the caller's own chunks more often than was spared for

    def _spare(self, search: Search) -> int:
        own = 0 if search.exclude_vectors is None else len(search.exclude_vectors)
        return len(search.exclude) + 2 * own

    def _hits(self, search: Search, scores: Floats, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[Hit]:
        keep = ~np.isin(rows, list(search.exclude))
        if search.exclude_vectors is not None:
            closeness = self.corpus.vectors[rows] @ corpora.normalise(search.exclude_vectors).T  # (R, T)
            keep &= closeness.max(axis=1) < SAME
        pairs = list(zip(rows[keep].tolist(), scores[keep].tolist(), strict=True))[: search.k]
        return [Hit(row, score, self.corpus.chunk(row)) for row, score in pairs]


def load(directory: Path) -> Retriever:
    """Load the corpus version in `directory` and build its exact index.

    Raises:
        BadCheckpoint: a file is missing, altered or unreadable, or contradicts the card.
    """
    try:
        files = sealed.read(directory)
        card = Card.from_markdown(files[cards.FILE].decode())
        corpus = corpora.parse(files)
    except (sealed.Corrupt, cards.BadCard, corpora.BadCorpus, KeyError, UnicodeDecodeError) as error:
        raise BadCheckpoint(f"{directory}: {error}") from error
    if card.kind != "corpus" or corpus.dim != card.dim:
        raise BadCheckpoint(f"{directory}: a {card.kind} of D = {corpus.dim}, its card says D = {card.dim}")
    return Retriever(directory.name, sealed.seal_of(directory), card, corpus, FlatIndex(corpus.vectors))
