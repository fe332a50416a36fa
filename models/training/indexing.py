"""Builds an approximate index of a corpus: tunes it on some of its contexts, and measures its recall on others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import faiss
import numpy as np

from models.registry.card import Card
from models.retrieval.corpus import BLOCK_ROWS, MappedCorpus
from models.retrieval.index import (
    BadIndex,
    InvertedLists,
    IvfIndex,
    Rows,
    empty_ivf_index,
    encode_rows,
)
from models.retrieval.retriever import Hit, Retriever, Search
from models.training.work_cache import Arrays, Input, WorkCache, digest, source_digest
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

    def __init__(self, corpus: MappedCorpus, steps: CachedSteps) -> None:
        self._corpus = corpus
        self._steps = steps
        self.vectors_at = corpus.vectors_at

    def __len__(self) -> int:
        return len(self._corpus)

    def search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        """Return scores and rows `(Q, k)`."""
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.zeros((len(queries), k), np.int64)
        for first, vectors in self._corpus.blocks():
            best = self._steps.run(partial(_best, queries, vectors, first, k), f"best {k} of {first}", queries)
            scores, rows = _merge(np.hstack([scores, best["scores"]]), np.hstack([rows, best["rows"]]), k)
        order = np.lexsort((rows, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def _best(queries: Floats, vectors: Floats, first: int, k: int) -> Arrays:
    """Return the `scores` and `rows` `(Q, k)` of the best of a block; of all its rows, if it has fewer than k."""
    found = queries @ vectors.T
    there = np.broadcast_to(np.arange(first, first + len(vectors)), found.shape)
    scores, rows = _merge(found, there, min(k, len(vectors)))
    return {"scores": scores, "rows": rows}


def _merge(scores: Floats, rows: Rows, k: int) -> tuple[Floats, Rows]:
    best = np.argpartition(scores, -k, axis=1)[:, -k:]
    return np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)


@dataclass
class CachedSteps:
    """Steps of about equal length, each cached and reported when it is done."""

    cache: WorkCache
    inputs: str
    total: int
    progress: Progress
    done: int = 0

    def run(self, step: Callable[[], Arrays], *inputs: Input) -> Arrays:
        """Return the result of a step, from the cache if it was done before with the same inputs."""
        result = self.cache.get_arrays(step, self.inputs, *inputs)
        self.done = min(self.done + 1, self.total)
        self.progress(self.done, self.total)
        return result


def build(corpus: MappedCorpus, card: Card, progress: Progress, cache: WorkCache) -> tuple[InvertedLists, Card]:
    """Return the lists of an index of `corpus`, and `card` with its parameters and recall.

    A query is what an untrained net predicts: the mean of `card.context_length` consecutive chunks. The chunks
    themselves are excluded, as in `/retrieve`. `nprobe` and `pool` are the smallest that reach the target recall on one
    half of the queries; the card has the recall on the other half. Centroids, codes and exact results go to `cache`.

    Raises:
        BadIndex: the recall is too low, or the corpus has fewer than `MIN_ROWS` chunks.
    """
    if len(corpus) < MIN_ROWS:
        raise BadIndex(f"{len(corpus)} chunks are too few for an index of lists; store them with a flat index")
    blocks = -(-len(corpus) // BLOCK_ROWS)
    inputs = digest(corpus.halves, source_digest())
    steps = CachedSteps(cache, inputs, ITERATIONS + 2 * blocks, progress)
    lists = _lists(corpus, steps, np.random.default_rng(0))
    searches = _searches(corpus, card.context_length, np.random.default_rng(1))
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
    queries = len(searches[held_out])
    config = {
        "index": "ivf",
        "lists": len(lists.sizes),
        "nprobe": nprobe,
        "pool": pool,
        f"recall@{K}": round(found, 4),
        "queries": queries,
    }
    limit = f"Search is approximate: recall@{K} {found:.4f} on {queries} contexts that it was not tuned on."
    return lists, replace(card, config=config, limits=(*card.limits, limit))


def _lists(corpus: MappedCorpus, steps: CachedSteps, random: np.random.Generator) -> InvertedLists:
    count = min(2 ** round(math.log2(2 * math.sqrt(len(corpus)))), len(corpus))
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


def _searches(corpus: MappedCorpus, length: int, random: np.random.Generator) -> list[Search]:
    starts = random.choice(len(corpus) - length, min(2 * QUERIES, len(corpus) - length), replace=False)
    contexts = (corpus.vectors_at(np.arange(start, start + length)) for start in starts)
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
