"""The retriever: one version of a corpus and its index, as a function on arrays.

A bundle also has towers. They make a query of a context and search the vectors that the payload tower made of the
corpus; a reranker may reorder the results. A caller's own query is searched among the encoder's vectors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.drift import ReferenceStats
from models.registry import manifest
from models.registry.card import CARD_FILE, BadCard, Card
from models.registry.checkpoint import BadCheckpoint
from models.retrieval.article_index import ArticleIndex
from models.retrieval.corpus import BadCorpus, Chunk, Corpus, MappedCorpus, Passages, map_corpus, parse_corpus
from models.retrieval.diversity import marginal_order
from models.retrieval.fields import Filter
from models.retrieval.filters import FilterCache, RowSet, check_filter
from models.retrieval.index import IVF_FILE, BadIndex, FlatIndex, Rows, ScoredRows, VectorIndex, open_lists
from models.retrieval.reranker import RERANK_DEPTH, RERANKER_FILE, BadReranker, Reranker, candidate_features
from models.retrieval.towers import TOWER_INDEX_FILE, Towers, open_towers
from models.runtimes.inline import can_run_inline
from models.vectors import Floats, normalise

_FAULTS = (manifest.Corrupt, BadCard, BadCorpus, BadIndex, BadReranker, KeyError, UnicodeDecodeError)
# called with the name of each stage at its end
StageCallback = Callable[[str], None]
# contexts of the corpus from which the reference statistics are computed
SAMPLED_CONTEXTS = 64
# names of indexes: of the encoder's vectors, and of the payload tower's
ENCODED_INDEX = "encoded"
PAYLOAD_INDEX = "payload"
# of a query that has a direction
_SHORTEST = 1e-30
# candidates that maximal marginal relevance orders; its time grows with their square
MMR_POOL = 100
# From this cosine on, a candidate counts as one of the chunks of the caller's context.
SAME_COSINE = 0.999


def _ignore(stage: str) -> None:
    """Do nothing at the end of a stage."""


@dataclass(frozen=True)
class Search:
    """One query `(D,)`, the number of results, and the rows and vectors `(T, D)` to exclude from them.

    Without a query the towers make one of `context` `(T, D)`. Only then the hits may be reranked. Only rows that match
    `filter` are found. `mmr` from 0 to 1 orders the hits by maximal marginal relevance: 1 is the order without it.
    """

    query: Floats | None
    k: int
    exclude: Collection[int] = ()
    exclude_vectors: Floats | None = None
    context: Floats | None = None
    rerank: bool = True
    filter: Filter | None = None
    mmr: float | None = None


class Hit(NamedTuple):
    """One result: its row in the corpus, its inner product with the query, its passage, and the reranker's score.

    The last is None if the reranker did not judge it. Higher is better; it has no unit, and orders the results of one
    search only.
    """

    row: int
    score: float
    chunk: Chunk
    rerank_score: float | None = None


class Ranked(NamedTuple):
    """Results in order: scores and rows `(C,)`; and the reranker's scores, NaN if it did not judge a row.

    `cosines` `(T, C)` are those of the passages and the context, if they are known, as of a context that is excluded.
    """

    scores: Floats
    rows: Rows
    rerank_scores: Floats | None = None
    cosines: Floats | None = None

    def take(self, order: Any) -> Ranked:
        """Return the results at these places."""
        judged = None if self.rerank_scores is None else self.rerank_scores[order]
        cosines = None if self.cosines is None else self.cosines[:, order]
        return Ranked(self.scores[order], self.rows[order], judged, cosines)


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
        self.version = version
        self.sha256 = sha256
        self.card = card
        self.corpus = corpus
        self.index = index
        self.towers = towers
        self.reranker = reranker
        self._filters = FilterCache(corpus.matching)
        # Whether one search takes less time than a hand-over to a thread; measured by `warm_up`.
        self.runs_inline = False

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
        """Name and version of the towers that make queries of contexts, if it has towers."""
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
        """The indexes by name: of the encoder's vectors and, in a bundle, of the payload tower's."""
        return {ENCODED_INDEX: self.index} | ({PAYLOAD_INDEX: self.towers.index} if self.towers else {})

    def with_indexes(self, indexes: Mapping[str, VectorIndex]) -> Retriever:
        """Return a retriever of the same passages with other indexes, by the same names."""
        towers = self.towers and replace(self.towers, index=indexes[PAYLOAD_INDEX])
        return Retriever(
            self.version, self.sha256, self.card, self.corpus, indexes[ENCODED_INDEX], towers, self.reranker
        )

    def without_reranker(self) -> Retriever:
        """Return a retriever with the same towers and indexes that does not rerank."""
        return Retriever(self.version, self.sha256, self.card, self.corpus, self.index, self.towers)

    @cached_property
    def article_index(self) -> ArticleIndex:
        """The articles of its corpus."""
        return ArticleIndex(self.corpus)

    @cached_property
    def reference_stats(self) -> ReferenceStats | None:
        """Statistics of its passages in reading order, None if too few articles are as long as a context."""
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
        """Search once in each way, so that the first request is not slow."""
        context = self.corpus.vectors_at(np.zeros(self.card.context_length, np.int64))
        slowest = Search(None, 10, context=context) if self.towers else Search(context[0], 10)
        self.search_batch([Search(context[0], 1), slowest])
        self.runs_inline = can_run_inline(lambda: self.search_batch([slowest]))

    def check_filter(self, wanted: Filter) -> None:
        """Raise `BadFilter` if the corpus lacks a field of a filter, or has values of another kind in it."""
        check_filter(wanted, self.corpus.fields)

    def search_batch(self, searches: list[Search], on_stage: StageCallback = _ignore) -> list[list[Hit]]:
        """Return the hits of each search, best first; fewer than k only if no more rows match.

        `on_stage` is called with the name of each stage at its end: infer (if towers ran), search, rerank (if the
        order was changed).
        """
        queries = self._queries(searches, on_stage)
        found = self._find_each(searches, queries)
        on_stage("search")
        if any(self.is_reranked(search) or search.mmr is not None for search in searches):
            found = list(map(self._reorder, searches, queries, found))
            on_stage("rerank")
        return [self._hits(search.k, best) for search, best in zip(searches, found, strict=True)]

    def find_candidates(self, searches: list[Search]) -> list[ScoredRows]:
        """Return the scores and rows of each search before reranking."""
        return [(found.scores, found.rows) for found in self._find_each(searches, self._queries(searches, _ignore))]

    def candidate_features(self, context: Floats, scores: Floats, rows: Rows) -> Floats:
        """Return the reranker's features `(C, F)` of the candidates `(C,)` of `context` `(T, D)`."""
        assert self.towers
        return candidate_features(self._cosines(context, rows), scores, self.towers.neighbours[rows])

    def _queries(self, searches: list[Search], on_stage: StageCallback) -> list[Floats]:
        contexts = [search.context for search in searches if search.query is None and search.context is not None]
        if not contexts:
            return [search.query for search in searches if search.query is not None]
        assert self.towers
        # Unit length keeps the net from overflow.
        made = iter(self.towers.query.run(normalise(np.array(contexts))))
        on_stage("infer")
        return [next(made) if search.query is None else search.query for search in searches]

    def _find_each(self, searches: list[Search], queries: list[Floats]) -> list[Ranked]:
        """Search the caller's queries among the encoder's vectors, and the towers' queries among the payload's."""
        found: dict[int, Ranked] = {}
        for index, is_given in ((self.index, True), (self.towers.index if self.towers else None, False)):
            positions = [at for at, search in enumerate(searches) if (search.query is not None) is is_given]
            if index and positions:
                found.update(self._find_in(index, searches, queries, positions))
        return [found[at] for at in range(len(searches))]

    def _find_in(
        self, index: VectorIndex, searches: list[Search], queries: list[Floats], positions: list[int]
    ) -> Iterator[tuple[int, Ranked]]:
        """Yield position and result of the searches at `positions`; those that search the same rows run together."""
        groups: defaultdict[tuple[RowSet | None, frozenset[int]], list[int]] = defaultdict(list)
        for at in positions:
            groups[self._rows_of(index, searches[at])].append(at)
        for (among, excluded), group in groups.items():
            asked = [searches[at] for at in group]
            part = index
            if index.without and among is None:
                asked, part = [replace(search, exclude=()) for search in asked], index.without(excluded)
            yield from zip(group, self._find(part, asked, [queries[at] for at in group], among), strict=True)

    def _rows_of(self, index: VectorIndex, search: Search) -> tuple[RowSet | None, frozenset[int]]:
        """Return the set of rows that a search is restricted to, and the rows that the index itself leaves out."""
        if search.filter is not None:
            return self._filters.rows(search.filter), frozenset()
        return None, frozenset(search.exclude) if index.without else frozenset()

    def _find(
        self, index: VectorIndex, searches: list[Search], queries: list[Floats], among: RowSet | None
    ) -> list[Ranked]:
        """Over-fetch by the number of exclusions, then drop what is excluded; fetch more until enough remains."""
        depths = list(map(self._depth, searches))
        most = len(index) if among is None else len(among)
        k = max(depth + self._excluded_count(search) for depth, search in zip(depths, searches, strict=True))
        while most:
            scores, rows = index.search(np.array(queries), min(k, most), among)
            found = [self._drop_excluded(*item) for item in zip(searches, depths, scores, rows, strict=True)]
            is_short = any(len(each.rows) < depth for each, depth in zip(found, depths, strict=True))
            if not is_short or k >= most:
                return found
            # the corpus has more copies of the context's chunks than expected
            k *= 4
        return [Ranked(np.empty(0, np.float32), np.empty(0, np.int64)) for _ in searches]

    def _depth(self, search: Search) -> int:
        pool = 0 if search.mmr is None else MMR_POOL
        return max(search.k, pool, RERANK_DEPTH if self.is_reranked(search) else 0)

    def is_reranked(self, search: Search) -> bool:
        """Return whether the reranker orders the hits of a search."""
        return search.rerank and search.query is None and self.reranks

    def _excluded_count(self, search: Search) -> int:
        vectors = 0 if search.exclude_vectors is None else len(search.exclude_vectors)
        return len(search.exclude) + vectors

    def _drop_excluded(self, search: Search, depth: int, scores: Floats, rows: Rows) -> Ranked:
        found = Ranked(scores, rows)
        if search.exclude_vectors is not None:
            cosines = self._cosines(search.exclude_vectors, rows)
            found = found._replace(cosines=cosines).take(~_is_same(cosines))
        if search.exclude:
            found = found.take(~np.isin(found.rows, list(search.exclude)))
        return found.take(slice(depth))

    def _reorder(self, search: Search, query: Floats, found: Ranked) -> Ranked:
        if self.is_reranked(search):
            found = self._rerank(search, found)
        return found if search.mmr is None else self._diversify(search, search.mmr, query, found)

    def _diversify(self, search: Search, weight: float, query: Floats, found: Ranked) -> Ranked:
        """Order the first `MMR_POOL` candidates by maximal marginal relevance; the others follow as they are.

        Relevance is the cosine of the query. If the candidates were reranked, the first has the greatest cosine among
        them, the second the next, and so on: the reranker decides the order, and its scale does not matter.
        """
        index = self.towers.index if self.towers and search.query is None else self.index
        length = float(np.linalg.norm(query.astype(np.float64)))
        scores, rows = found.scores, found.rows
        relevance = np.sort(scores)[::-1] / max(length, _SHORTEST)
        pool, later = np.split(np.arange(len(rows)), [MMR_POOL])
        count = min(search.k, len(pool))
        order = marginal_order(relevance[pool], index.vectors_at(rows[pool]), count, weight)
        return found.take(np.concatenate([order, later]))

    def _rerank(self, search: Search, found: Ranked) -> Ranked:
        """Reorder the first `RERANK_DEPTH` candidates; the context's own chunks follow, then the other rows."""
        assert self.reranker
        assert self.towers
        assert search.context is not None
        cosines = found.cosines
        if cosines is None or search.exclude_vectors is not search.context:
            cosines = self._cosines(search.context, found.rows)
        best, later = np.split(np.arange(len(found.rows)), [RERANK_DEPTH])
        is_own = _is_same(cosines[:, best])
        new, own = best[~is_own], best[is_own]
        neighbours = self.towers.neighbours[found.rows[new]]
        judged = np.full(len(found.rows), np.nan, np.float32)
        judged[new] = self.reranker.score(candidate_features(cosines[:, new], found.scores[new], neighbours))
        new = new[np.argsort(-judged[new], kind="stable")]
        return found._replace(rerank_scores=judged).take(np.concatenate([new, own, later]))

    def _hits(self, k: int, found: Ranked) -> list[Hit]:
        best = found.rows[:k].tolist()
        judged: Iterable[float | None] = repeat(None)
        if found.rerank_scores is not None:
            judged = (None if isnan(score) else score for score in found.rerank_scores[:k].tolist())
        return list(map(Hit, best, found.scores[:k].tolist(), map(self.corpus.chunk, best), judged))

    def _cosines(self, context: Floats, rows: Rows) -> Floats:
        """Return the cosines `(T, R)` of `context` `(T, D)`, vectors of any length, and of `rows` `(R,)`."""
        cosines: Floats = normalise(context) @ self.corpus.vectors_at(rows).T
        return cosines


def _is_same(cosines: Floats) -> NDArray[np.bool_]:
    """Return which passages `(R,)` are chunks of the context, by their cosines `(T, R)`."""
    is_same: NDArray[np.bool_] = np.logical_or.reduce(cosines >= SAME_COSINE, axis=0)
    return is_same


def load_retriever(directory: Path, threads: int = 1) -> Retriever:
    """Load the corpus version in `directory` with its index, or with an exact one if it has none.

    If it has an index, the vectors and the text stay on disk (`manifest.map_files` says how they are protected).
    A batch of searches in such an index uses `threads` cores; a single search uses one.

    Raises:
        BadCheckpoint: a file is missing, altered or unreadable, or contradicts the card.
    """
    try:
        has_index = IVF_FILE in manifest.file_names(directory)
        files = manifest.map_files(directory) if has_index else manifest.read_files(directory)
        return build_retriever(directory.name, manifest.read_digest(directory), files, threads)
    except _FAULTS as error:
        raise BadCheckpoint(f"{directory}: {error}") from error


def build_retriever(version: str, sha256: str, files: Mapping[str, manifest.Buffer], threads: int = 1) -> Retriever:
    """Make a retriever of the files of a version.

    Raises:
        BadCorpus, BadCard, BadIndex, BadReranker, BadCheckpoint: a file is invalid.
    """
    card = _read_card(files)
    corpus = map_corpus(files) if IVF_FILE in files else parse_corpus(files)
    if corpus.dim != card.dim:
        raise BadCard(f"corpus has D = {corpus.dim}; its card says D = {card.dim}")
    index = _open_index(files, card, corpus, threads)
    towers = reranker = None
    if TOWER_INDEX_FILE in files:
        towers = open_towers(version, files, len(corpus), card.config, threads)
    if RERANKER_FILE in files:
        reranker = Reranker.from_bytes(files[RERANKER_FILE][:], card.context_length)
    return Retriever(version, sha256, card, corpus, index, towers, reranker)


def _open_index(
    files: Mapping[str, manifest.Buffer], card: Card, corpus: Corpus | MappedCorpus, threads: int
) -> VectorIndex:
    if isinstance(corpus, Corpus):
        return FlatIndex(corpus.vectors)
    return open_lists(files[IVF_FILE], corpus, card.config, threads)


def _read_card(files: Mapping[str, manifest.Buffer]) -> Card:
    card = Card.from_markdown(files[CARD_FILE][:].decode())
    if card.kind != "corpus":
        raise BadCard(f"kind {card.kind}, expected corpus")
    return card
