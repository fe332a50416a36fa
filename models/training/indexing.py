"""Builds an approximate index of a corpus: tunes it on some of its contexts, and measures its recall on others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import faiss
import numpy as np

from models.registry.card import Card
from models.retrieval.corpus import BLOCK_ROWS, HalfVectors, MappedCorpus
from models.retrieval.filters import RowSet
from models.retrieval.index import (
    BadIndex,
    InvertedLists,
    IvfIndex,
    Rows,
    empty_ivf_index,
    encode_rows,
)
from models.retrieval.retriever import Hit, Retriever, Search
from models.training.work_cache import Arrays, Input, WorkCache
from models.vectors import Floats, normalise

Progress = Callable[[int, int], None]

ITERATIONS = 8  # of k-means
SAMPLE = 64  # vectors that k-means sees for each centroid
MIN_ROWS = 100  # a corpus with fewer gets no index of lists
K, QUERIES = 10, 400  # recall is that of the ten best; as many queries for tuning as for the final recall
TARGET_RECALL, MIN_RECALL = 0.995, 0.99  # on the queries for tuning; on the others, or the index is rejected
POOLS = (2, 3, 5, 8, 12, 20, 32)


class Scan:
    """Exact search of a corpus on disk, block by block: slow, and the reference for recall."""

    is_exact, without = True, None

    def __init__(self, corpus: HalfVectors, steps: CachedSteps) -> None:
        self._corpus = corpus
        self._steps = steps
        self.vectors_at = corpus.vectors_at

    def __len__(self) -> int:
        return len(self._corpus)

    def search(self, queries: Floats, k: int, among: RowSet | None = None) -> tuple[Floats, Rows]:
        """Return scores and rows `(Q, k)`; it searches all rows only."""
        assert among is None
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.zeros((len(queries), k), np.int64)
        for first, vectors in self._corpus.blocks():
            best = self._steps.run(partial(_best, queries, vectors, first, k), f"best {k} of {first}", queries)
            scores, rows = _merge(np.hstack([scores, best["scores"]]), np.hstack([rows, best["rows"]]), k)
        order = np.lexsort((rows, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def _best(queries: Floats, vectors: Floats, first: int, k: int) -> Arrays:
    """Return the `scores` and `rows` `(Q, k)` of the best of a block; of all its rows, if it has fewer than k."""
    scores, rows = faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
    return {"scores": scores, "rows": first + rows}


def _merge(scores: Floats, rows: Rows, k: int) -> tuple[Floats, Rows]:
    best = np.argpartition(scores, -k, axis=1)[:, -k:]
    return np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)


@dataclass
class Counter:
    """Counts steps of about equal length, and reports each."""

    total: int
    progress: Progress
    done: int = 0

    def count(self) -> None:
        """Count one step."""
        self.done = min(self.done + 1, self.total)
        self.progress(self.done, self.total)

    def finish(self) -> None:
        """Report that all steps are done, if some were not needed."""
        if self.done < self.total:
            self.done = self.total
            self.progress(self.done, self.total)


@dataclass(frozen=True)
class CachedSteps:
    """Steps that are each cached and counted when they are done; `inputs` is a digest of what all of them read."""

    cache: WorkCache
    inputs: str
    counter: Counter

    def run(self, step: Callable[[], Arrays], *inputs: Input) -> Arrays:
        """Return the result of a step, from the cache if it was done before with the same inputs."""
        result = self.cache.get_arrays(step, self.inputs, *inputs)
        self.counter.count()
        return result

    def reading(self, inputs: str) -> CachedSteps:
        """Return steps of the same work that read something else."""
        return replace(self, inputs=inputs)


@dataclass(frozen=True)
class MeasuredLists:
    """The lists of an index, with its parameters and its recall as a card has them."""

    lists: InvertedLists
    config: Mapping[str, Any]

    def limit(self, searched: str) -> str:
        """Return the sentence of a card on the search among `searched`."""
        found, queries = self.config[f"recall@{K}"], self.config["queries"]
        return f"{searched} is approximate: recall@{K} {found:.4f} on {queries} contexts that it was not tuned on."


def count_steps(rows: int) -> int:
    """Return the number of steps of `build` for a corpus of `rows` chunks."""
    return ITERATIONS + 2 * count_blocks(rows)


def count_blocks(rows: int) -> int:
    """Return the number of blocks of a corpus of `rows` chunks."""
    return -(-rows // BLOCK_ROWS)


def count_lists(rows: int) -> int:
    """Return the number of lists of a corpus of `rows` chunks."""
    return min(1 << round(math.log2(2 * math.sqrt(rows))), rows)


def build(corpus: MappedCorpus, card: Card, searches: list[Search], steps: CachedSteps) -> MeasuredLists:
    """Return the lists of an index of `corpus`, with its parameters and recall.

    The chunks of a context are excluded, as in `/retrieve`. `nprobe` and `pool` are the smallest that reach the target
    recall on one half of the searches; the recall is that of the other half. Centroids, codes and exact results are
    cached steps.

    Raises:
        BadIndex: the recall is too low, or the corpus has fewer than `MIN_ROWS` chunks.
    """
    if len(corpus) < MIN_ROWS:
        raise BadIndex(f"{len(corpus)} chunks are too few for an index of lists; store them with a flat index")
    lists = _lists(corpus, steps, np.random.default_rng(0))
    truth = Retriever("", "", card, corpus, Scan(corpus, steps)).search_batch(searches)
    tuning, held_out = slice(0, None, 2), slice(1, None, 2)

    def recall(nprobe: int, pool: int, half: slice) -> float:
        retriever = Retriever("", "", card, corpus, IvfIndex(lists, corpus.vectors_at, nprobe, pool))
        # one by one: a batch searches as many lists as its most demanding query
        return _overlap([retriever.search_batch([search])[0] for search in searches[half]], truth[half])

    nprobe, pool = tune(lambda nprobe, pool: recall(nprobe, pool, tuning), len(lists.sizes))
    found = recall(nprobe, pool, held_out)
    if found < MIN_RECALL:
        raise BadIndex(
            f"recall@{K} is {found:.4f} with {nprobe} of {len(lists.sizes)} lists: store it with a flat index"
        )
    figures = {"lists": len(lists.sizes), "nprobe": nprobe, "pool": pool, f"recall@{K}": round(found, 4)}
    return MeasuredLists(lists, {"index": "ivf", **figures, "queries": len(searches[held_out])})


def _lists(corpus: MappedCorpus, steps: CachedSteps, random: np.random.Generator) -> InvertedLists:
    count = count_lists(len(corpus))
    some = np.sort(random.choice(len(corpus), min(SAMPLE * count, len(corpus)), replace=False))
    centroids = _centroids(corpus.vectors_at(some), count, steps)
    index = empty_ivf_index(centroids)
    blocks = [steps.run(partial(_coded, index, vectors), f"block {row}") for row, vectors in corpus.blocks()]
    home, codes = (np.concatenate([block[part] for block in blocks]) for part in ("home", "codes"))
    rows = np.argsort(home, kind="stable")
    return InvertedLists(centroids, np.bincount(home, minlength=count), rows.astype(np.int32), codes[rows])


def _coded(index: Any, vectors: Floats) -> Arrays:
    """Return the lists, `home` `(R,)`, and `codes` `(R, C)` of a block of vectors."""
    home = index.quantizer.search(vectors, 1)[1][:, 0]
    return {"home": home, "codes": encode_rows(index, vectors, home)}


def _centroids(vectors: Floats, count: int, steps: CachedSteps) -> Floats:
    means = None
    for step in range(ITERATIONS):
        means = steps.run(partial(_moved, vectors, count, means), f"centroids {step}")["means"]
    assert means is not None
    return means


def _moved(vectors: Floats, count: int, means: Floats | None) -> Arrays:
    """Return the `means` after one more iteration of k-means."""
    moved = faiss.Kmeans(
        vectors.shape[1],
        count,
        niter=1,
        spherical=True,
        seed=0,
        min_points_per_centroid=1,
        max_points_per_centroid=SAMPLE,
    )
    moved.train(vectors, init_centroids=means)
    assert moved.centroids is not None
    return {"means": moved.centroids}


def draw_contexts(corpus: MappedCorpus, length: int) -> Rows:
    """Return the rows `(Q, T)` of contexts by which an index is tuned and measured: consecutive chunks."""
    starts = np.arange(max(len(corpus) - length, 1))
    drawn = np.random.default_rng(1).choice(starts, min(2 * QUERIES, len(starts)), replace=False)
    return np.asarray(drawn[:, None] + np.arange(length))


def mean_searches(corpus: MappedCorpus, length: int) -> list[Search]:
    """Return searches for what an untrained net predicts: the mean of a context of `length` chunks."""
    contexts = corpus.vectors_at(draw_contexts(corpus, length))
    return [Search(normalise(context.mean(axis=0)), K, exclude_vectors=context) for context in contexts]


def _overlap(found: list[list[Hit]], truth: list[list[Hit]]) -> float:
    """Return the share of the exact results that was found; passages of equal score count as the same."""
    pairs = zip(found, truth, strict=True)
    shares = [sum(hit.score >= best[-1].score - 1e-6 for hit in hits) / len(best) for hits, best in pairs if best]
    return float(np.mean(shares))


def tune(recall: Callable[[int, int], float], lists: int) -> tuple[int, int]:
    """Return the smallest `nprobe`, then the smallest `pool`, that reach the target recall; raises `BadIndex`."""
    nprobe = 1
    while recall(nprobe, POOLS[-1]) < TARGET_RECALL:
        if nprobe >= lists:
            raise BadIndex(f"recall@{K} stays below {TARGET_RECALL} in all {lists} lists: store it with a flat index")
        nprobe = min(nprobe + -(-nprobe // 2), lists)
    return nprobe, next(pool for pool in POOLS if recall(nprobe, pool) >= TARGET_RECALL)
