"""The retriever: one version of a corpus with its index as a function on arrays."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models import card as cards
from models import corpus as corpora
from models import sealed
from models.card import Card
from models.checkpoint import BadCheckpoint
from models.corpus import Chunk, Floats, Passages
from models.index import IVF, BadIndex, FlatIndex, IvfIndex, Lists, Rows, VectorIndex
from models.quick import is_quick

SAME = 0.999  # cosine from which a candidate counts as one of the caller's own context chunks


@dataclass(frozen=True)
class Search:
    """One query `(D,)`, how many results, and which rows or vectors must not come back."""

    query: Floats
    k: int
    exclude: Collection[int] = ()
    exclude_vectors: Floats | None = None  # (T, D)


class Hit(NamedTuple):
    """One result: the row in the corpus, its inner product with the query, the passage."""

    row: int
    score: float
    chunk: Chunk


class Retriever:
    """Finds the top-k passages of one corpus."""

    def __init__(self, version: str, sha256: str, card: Card, corpus: Passages, index: VectorIndex) -> None:
        self.version, self.sha256, self.card = version, sha256, card
        self.corpus, self.index = corpus, index
        self.is_quick = False  # whether one search takes less than a hand-over to a thread; warm-up finds out

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
        """Search, so that no caller pays for first-time work."""
        search = Search(self.corpus.vectors_at(np.zeros(1, np.int64))[0], 10)
        self.search_batch([search])
        self.is_quick = is_quick(lambda: self.search_batch([search]))

    def search_batch(self, searches: list[Search]) -> list[list[Hit]]:
        """Return the hits of each search, best first; fewer than k only where the corpus ends."""
        reach = max(search.k + self._spare(search) for search in searches)
        queries = np.array([search.query for search in searches])
        while True:
            scores, rows = self.index.search(queries, min(reach, len(self.index)))
            found = [self._hits(*item) for item in zip(searches, scores, rows, strict=True)]
            short = any(len(hits) < search.k for hits, search in zip(found, searches, strict=True))
            if not short or reach >= len(self.index):
                return found
            reach *= 4  # the corpus repeats the caller's own chunks more often than was spared for

    def _spare(self, search: Search) -> int:
        own = 0 if search.exclude_vectors is None else len(search.exclude_vectors)
        return len(search.exclude) + own

    def _hits(self, search: Search, scores: Floats, rows: Rows) -> list[Hit]:
        if search.exclude_vectors is not None:
            other = ~self._is_own(rows, search.exclude_vectors)
            scores, rows = scores[other], rows[other]
        if search.exclude:
            other = ~np.isin(rows, list(search.exclude))
            scores, rows = scores[other], rows[other]
        best = rows[: search.k].tolist()
        return list(map(Hit, best, scores.tolist(), map(self.corpus.chunk, best)))

    def _is_own(self, rows: Rows, context: Floats) -> NDArray[np.bool_]:
        """Say which of `rows` are vectors of `context` `(T, D)`, of whatever length these are."""
        closeness = self.corpus.vectors_at(rows) @ context.T  # (R, T)
        lengths = np.sqrt(np.vecdot(context, context))
        same: NDArray[np.bool_] = ((closeness >= SAME * lengths) & (lengths > 0)).any(axis=1)
        return same


def load(directory: Path, threads: int = 1) -> Retriever:
    """Load the corpus version in `directory` with its index, or an exact one where it has none.

    With an index of its own the vectors and the text stay on disk (`sealed.mapped` says what guards them). A batch
    of searches in such an index uses `threads` cores; one search uses one.

    Raises:
        BadCheckpoint: a file is missing, altered or unreadable, or contradicts the card.
    """
    try:
        return _mapped(directory, threads) if IVF in sealed.names(directory) else _in_memory(directory)
    except (sealed.Corrupt, cards.BadCard, corpora.BadCorpus, BadIndex, KeyError, UnicodeDecodeError) as error:
        raise BadCheckpoint(f"{directory}: {error}") from error


def _in_memory(directory: Path) -> Retriever:
    files = sealed.read(directory)
    corpus = corpora.parse(files)
    card = _card(files, corpus)
    return Retriever(directory.name, sealed.seal_of(directory), card, corpus, FlatIndex(corpus.vectors))


def _mapped(directory: Path, threads: int) -> Retriever:
    files = sealed.mapped(directory)
    corpus = corpora.mapped(files)
    card = _card(files, corpus)
    lists = Lists.from_bytes(files[IVF][:])
    if lists.centroids.shape[1] != corpus.dim or len(lists.rows) != len(corpus):
        raise BadIndex(f"an index of {len(lists.rows)} rows, D = {lists.centroids.shape[1]}")
    index = IvfIndex(lists, corpus.vectors_at, card.config["nprobe"], card.config["pool"], threads)
    return Retriever(directory.name, sealed.seal_of(directory), card, corpus, index)


def _card(files: Mapping[str, sealed.Buffer], corpus: Passages) -> Card:
    card = Card.from_markdown(files[cards.FILE][:].decode())
    if card.kind != "corpus" or corpus.dim != card.dim:
        raise cards.BadCard(f"a {card.kind} of D = {corpus.dim}, its card says D = {card.dim}")
    return card
