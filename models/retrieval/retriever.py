"""The retriever: one version of a corpus with its index as a function on arrays.

A bundle also has towers, which make queries of contexts and search what the payload tower made of the corpus, and may
have a reranker. A query that is given is of the encoder's space, and is searched among the encoder's vectors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.drift import ReferenceStats
from models.registry import manifest
from models.registry.card import CARD_FILE, BadCard, Card
from models.registry.checkpoint import BadCheckpoint
from models.retrieval.article_index import ArticleIndex
from models.retrieval.corpus import (
    BadCorpus,
    Chunk,
    Passages,
    map_corpus,
    parse_corpus,
)
from models.retrieval.index import IVF_FILE, BadIndex, FlatIndex, InvertedLists, IvfIndex, Rows, ScoredRows, VectorIndex
from models.retrieval.reranker import RERANK_DEPTH, RERANKER_FILE, BadReranker, Reranker, candidate_features
from models.retrieval.towers import TOWER_INDEX_FILE, Towers, open_towers
from models.runtimes.quick import is_quick
from models.vectors import Floats, normalise

_FAULTS = manifest.Corrupt, BadCard, BadCorpus, BadIndex, BadReranker
Lap = Callable[[str], None]
SAMPLED_CONTEXTS = 64  # stretches of the corpus that tell of its space
ENCODED_INDEX, PAYLOAD_INDEX = "encoded", "payload"  # names of indexes: whose vectors they search
SAME_COSINE = 0.999  # cosine from which a candidate counts as one of the caller's own context chunks


@dataclass(frozen=True)
class Search:
    """One query `(D,)`, how many results, and which rows or vectors must not come back.

    Where there is no query, the towers make one of `context` `(T, D)`; only then may hits be reranked.
    """

    query: Floats | None
    k: int
    exclude: Collection[int] = ()
    exclude_vectors: Floats | None = None  # (T, D)
    context: Floats | None = None
    rerank: bool = True


class Hit(NamedTuple):
    """One result: the row in the corpus, its inner product with the query, the passage."""

    row: int
    score: float
    chunk: Chunk


class Retriever:
    """Finds the top-k passages of one corpus."""

    def __init__(
        self,
        version: str,
        sha256: str,
        card: Card,
        corpus: Passages,
        index: VectorIndex,
        towers: Towers | None = None,
        reranker: Reranker | None = None,
    ) -> None:
        self.version, self.sha256, self.card = version, sha256, card
        self.corpus, self.index = corpus, index
        self.towers, self.reranker = towers, reranker
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
    def query_maker(self) -> tuple[str, str] | None:
        """Name and version of the towers that make queries of contexts, where it has them."""
        return (self.towers.name, self.towers.version) if self.towers else None

    @property
    def reranks(self) -> bool:
        """Whether it has a reranker."""
        return self.reranker is not None

    @property
    def is_exact(self) -> bool:
        """Whether hits are the true top-k."""
        return self.index.is_exact

    @property
    def indexes(self) -> dict[str, VectorIndex]:
        """What it searches: the encoder's vectors, of a bundle the payload tower's too."""
        return {ENCODED_INDEX: self.index} | ({PAYLOAD_INDEX: self.towers.index} if self.towers else {})

    def with_indexes(self, indexes: Mapping[str, VectorIndex]) -> Retriever:
        """Return a retriever of the same passages that searches `indexes` instead of its own of these names."""
        towers = self.towers and replace(self.towers, index=indexes[PAYLOAD_INDEX])
        return Retriever(
            self.version, self.sha256, self.card, self.corpus, indexes[ENCODED_INDEX], towers, self.reranker
        )

    @cached_property
    def article_index(self) -> ArticleIndex:
        """The articles of its corpus."""
        return ArticleIndex(self.corpus)

    @cached_property
    def reference_stats(self) -> ReferenceStats | None:
        """The space of its passages, None where no article is as long as a context."""
        length = self.card.context_length
        starts = np.unique(np.linspace(0, max(len(self.corpus) - length, 0), SAMPLED_CONTEXTS).astype(np.int64))
        runs = [start + np.arange(length) for start in starts if self._is_consecutive(start, start + length - 1)]
        return (
            ReferenceStats.from_contexts(np.stack([self.corpus.vectors_at(rows) for rows in runs]))
            if len(runs) > 1
            else None
        )

    def _is_consecutive(self, first: int, last: int) -> bool:
        if last >= len(self.corpus):
            return False
        one, other = self.corpus.chunk(first), self.corpus.chunk(last)
        return one.article == other.article and other.position - one.position == last - first

    def warm_up(self) -> None:
        """Search once in every way, so that no caller pays for first-time work."""
        some = self.corpus.vectors_at(np.zeros(self.card.context_length, np.int64))
        dearest = Search(None, 10, context=some) if self.towers else Search(some[0], 10)
        self.search_batch([Search(some[0], 1), dearest])
        self.is_quick = is_quick(lambda: self.search_batch([dearest]))

    def search_batch(self, searches: list[Search], lap: Lap = lambda stage: None) -> list[list[Hit]]:
        """Return the hits of each search, best first; fewer than k only where the corpus ends.

        `lap` is called with the name of each stage as it ends: infer and rerank where there is any, search.
        """
        found = self.find_candidates(searches, lap)
        if any(map(self._is_reranked, searches)):
            pairs = zip(searches, found, strict=True)
            found = [self._rerank(search, *best) if self._is_reranked(search) else best for search, best in pairs]
            lap("rerank")
        return [self._hits(search.k, *best) for search, best in zip(searches, found, strict=True)]

    def find_candidates(self, searches: list[Search], lap: Lap = lambda stage: None) -> list[ScoredRows]:
        """Return the scores and rows that each search finds, before any reranking; `lap` as in `search_batch`."""
        found = self._find_each(searches, self._queries(searches, lap))
        lap("search")
        return found

    def figures(self, context: Floats, scores: Floats, rows: Rows) -> Floats:
        """Return what the reranker goes by `(C, F)`, for candidates `(C,)` found for `context` `(T, D)`."""
        assert self.towers
        seen = self.corpus.vectors_at(rows), self.towers.neighbours[rows]
        return candidate_features(normalise(context), scores, *seen)

    def _queries(self, searches: list[Search], lap: Lap) -> list[Floats]:
        contexts = [search.context for search in searches if search.query is None and search.context is not None]
        if not contexts:
            return [search.query for search in searches if search.query is not None]
        assert self.towers
        made = iter(self.towers.query.run(normalise(np.array(contexts))))  # unit, so that no net overflows
        lap("infer")
        return [next(made) if search.query is None else search.query for search in searches]

    def _find_each(self, searches: list[Search], queries: list[Floats]) -> list[ScoredRows]:
        """Search given queries among the encoder's vectors, and queries of the towers among the payload tower's."""
        found: dict[int, ScoredRows] = {}
        for index, is_given in ((self.index, True), (self.towers.index if self.towers else None, False)):
            places = [place for place, search in enumerate(searches) if (search.query is not None) is is_given]
            if index and places:
                found.update(self._find_without(index, searches, queries, places))
        return [found[place] for place in range(len(searches))]

    def _find_without(
        self, index: VectorIndex, searches: list[Search], queries: list[Floats], places: list[int]
    ) -> Iterator[tuple[int, ScoredRows]]:
        """Yield what the searches at `places` find, by place; together where they exclude the same."""
        if index.without is None:
            best = self._find(index, [searches[place] for place in places], [queries[place] for place in places])
            yield from zip(places, best, strict=True)
            return
        alike: defaultdict[frozenset[int], list[int]] = defaultdict(list)
        for place in places:
            alike[frozenset(searches[place].exclude)].append(place)
        for rows, some in alike.items():
            left = [replace(searches[place], exclude=()) for place in some]
            yield from zip(some, self._find(index.without(rows), left, [queries[place] for place in some]), strict=True)

    def _find(self, index: VectorIndex, searches: list[Search], queries: list[Floats]) -> list[ScoredRows]:
        wanted = list(map(self._depth, searches))
        reach = max(count + self._excluded_count(search) for count, search in zip(wanted, searches, strict=True))
        while True:
            scores, rows = index.search(np.array(queries), min(reach, len(index)))
            found = [self._drop_excluded(*item) for item in zip(searches, wanted, scores, rows, strict=True)]
            short = any(len(rows) < count for (_, rows), count in zip(found, wanted, strict=True))
            if not short or reach >= len(index):
                return found
            reach *= 4  # the corpus repeats the caller's own chunks more often than was spared for

    def _depth(self, search: Search) -> int:
        return max(search.k, RERANK_DEPTH) if self._is_reranked(search) else search.k

    def _is_reranked(self, search: Search) -> bool:
        return search.rerank and search.query is None and self.reranks

    def _excluded_count(self, search: Search) -> int:
        own = 0 if search.exclude_vectors is None else len(search.exclude_vectors)
        return len(search.exclude) + own

    def _drop_excluded(self, search: Search, count: int, scores: Floats, rows: Rows) -> ScoredRows:
        if search.exclude_vectors is not None:
            other = ~self._matches_context(rows, search.exclude_vectors)
            scores, rows = scores[other], rows[other]
        if search.exclude:
            other = ~np.isin(rows, list(search.exclude))
            scores, rows = scores[other], rows[other]
        return scores[:count], rows[:count]

    def _rerank(self, search: Search, scores: Floats, rows: Rows) -> ScoredRows:
        """Order the best anew, what the caller has already behind them, and behind that what the search found later."""
        assert self.reranker
        assert search.context is not None
        best, later = np.split(np.arange(len(rows)), [RERANK_DEPTH])
        is_own = self._matches_context(rows[best], search.context)
        new, own = best[~is_own], best[is_own]
        figures = self.figures(search.context, scores[new], rows[new])
        new = new[np.argsort(-self.reranker.score(figures), kind="stable")]
        order = np.concatenate([new, own, later])
        return scores[order], rows[order]

    def _hits(self, k: int, scores: Floats, rows: Rows) -> list[Hit]:
        best = rows[:k].tolist()
        return list(map(Hit, best, scores[:k].tolist(), map(self.corpus.chunk, best)))

    def _matches_context(self, rows: Rows, context: Floats) -> NDArray[np.bool_]:
        """Say which of `rows` are vectors of `context` `(T, D)`, of whatever length these are."""
        closeness = self.corpus.vectors_at(rows) @ context.T  # (R, T)
        lengths = np.sqrt(np.vecdot(context, context))
        same: NDArray[np.bool_] = ((closeness >= SAME_COSINE * lengths) & (lengths > 0)).any(axis=1)
        return same


def load_retriever(directory: Path, threads: int = 1) -> Retriever:
    """Load the corpus version in `directory` with its index, or an exact one where it has none.

    With an index of its own the vectors and the text stay on disk (`sealed.mapped` says what guards them). A batch
    of searches in such an index uses `threads` cores; one search uses one.

    Raises:
        BadCheckpoint: a file is missing, altered or unreadable, or contradicts the card.
    """
    try:
        return (
            _mapped(directory, threads)
            if IVF_FILE in manifest.file_names(directory)
            else _in_memory(directory, threads)
        )
    except (
        manifest.Corrupt,
        BadCard,
        BadCorpus,
        BadIndex,
        BadReranker,
        KeyError,
        UnicodeDecodeError,
    ) as error:
        raise BadCheckpoint(f"{directory}: {error}") from error


def _in_memory(directory: Path, threads: int) -> Retriever:
    files = manifest.read_files(directory)
    return build_retriever(directory.name, manifest.read_digest(directory), files, threads)


def build_retriever(version: str, sha256: str, files: Mapping[str, bytes], threads: int = 1) -> Retriever:
    """Return the retriever that the bytes of a version's files make, all of it in memory.

    Raises:
        BadCorpus, BadCard, BadIndex, BadReranker, BadCheckpoint: what is wrong with them.
    """
    corpus = parse_corpus(files)
    card = _card(files, corpus)
    towers = reranker = None
    if TOWER_INDEX_FILE in files:
        towers = open_towers(version, files, len(corpus), card.config["towers"], threads)
    if RERANKER_FILE in files:
        reranker = Reranker.from_bytes(files[RERANKER_FILE], card.context_length)
    return Retriever(version, sha256, card, corpus, FlatIndex(corpus.vectors), towers, reranker)


def _mapped(directory: Path, threads: int) -> Retriever:
    files = manifest.map_files(directory)
    corpus = map_corpus(files)
    card = _card(files, corpus)
    lists = InvertedLists.from_bytes(files[IVF_FILE][:])
    if lists.centroids.shape[1] != corpus.dim or len(lists.rows) != len(corpus):
        raise BadIndex(f"an index of {len(lists.rows)} rows, D = {lists.centroids.shape[1]}")
    index = IvfIndex(lists, corpus.vectors_at, card.config["nprobe"], card.config["pool"], threads)
    return Retriever(directory.name, manifest.read_digest(directory), card, corpus, index)


def _card(files: Mapping[str, manifest.Buffer], corpus: Passages) -> Card:
    card = Card.from_markdown(files[CARD_FILE][:].decode())
    if card.kind != "corpus" or corpus.dim != card.dim:
        raise BadCard(f"a {card.kind} of D = {corpus.dim}, its card says D = {card.dim}")
    return card
