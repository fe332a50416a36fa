"""Ranks of the true next chunk in a bank of any size, block by block. No torch.

The bank may hold the true next chunk and the chunks of the context, or copies of them. Copies of the true chunk count
as the true chunk. A bank that lacks it is searched as if it were added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.evaluate import WindowScores, window_counts
from models.retrieval.retriever import SAME_COSINE
from models.vectors import Floats
from models.windows import Windows

Blocks = Callable[[], Iterable[Floats]]
Predict = Callable[[Floats], Floats]
Progress = Callable[[int, int], None]
Rows = NDArray[np.int64]
# Queries that are compared with a block of the bank at a time.
QUERIES = 2048
# Directions on which vectors are projected to find copies, and how far copies may lie apart there. A copy that was
# rounded to float16 lies 2e-5 apart, two different vectors about 0.05.
_DIRECTIONS, _APART = 4, 2e-4


@dataclass(frozen=True)
class Ranked:
    """One way to answer: `predict` makes queries `(W, D)` of contexts; they search what `payload` makes of vectors."""

    predict: Predict
    payload: Predict = lambda vectors: vectors


def draw(data: Windows, count: int | None, seed: int = 0) -> Windows:
    """Return `count` windows drawn at random, in order; all of them if there are not more."""
    if count is None or count >= len(data):
        return data
    return data.take(np.sort(np.random.default_rng(seed).choice(len(data), count, replace=False)))


def rank_in_bank(
    systems: Mapping[str, Ranked], data: Windows, bank: Blocks, size: int, progress: Progress = lambda done, total: None
) -> tuple[dict[str, WindowScores], int]:
    """Return the scores of every system by window, and how many of the true next chunks the bank holds.

    Args:
        systems: what is ranked, by name.
        data: the windows.
        bank: yields the unit vectors `(N, D)` of the bank in blocks, the same each time.
        size: N.
        progress: called with (vectors compared, N).
    """
    targets = data.targets()
    queries = {name: _queries(system.predict, data) for name, system in systems.items()}
    chunks, place = np.unique(np.concatenate([data.target, data.rows().ravel()]), return_inverse=True)
    copies = _copies(data.vectors[chunks], bank, size)
    true = copies.of(place[: len(data)])
    own = copies.of(place[len(data) :].reshape(len(data), -1))
    counts = {name: _Counts(queries[name], targets, systems[name].payload) for name in systems}
    first = 0
    for block in bank():
        last = first + len(block)
        for count in counts.values():
            count.add(block, true.between(first, last), own.between(first, last))
        first = last
        progress(first, size)
    return {name: _scores(queries[name], data, count) for name, count in counts.items()}, true.count


def _queries(predict: Predict, data: Windows) -> Floats:
    rows = data.rows()
    found = np.concatenate(
        [predict(data.vectors[rows[first : first + QUERIES]]) for first in range(0, len(data), QUERIES)]
    )
    if not np.isfinite(found).all():
        raise ValueError("an answer is not finite")
    return found


def _scores(queries: Floats, data: Windows, count: _Counts) -> WindowScores:
    cosine: Floats = np.vecdot(queries, data.targets())
    margin = cosine - np.vecdot(queries, data.vectors[data.rows()[:, -1]])
    return WindowScores(data.article, cosine, margin, 1 + count.better, 1 + count.better - count.own)


class _Counts:
    """How many vectors of the bank score better than the true next chunk: all `(W,)`, and the context's own `(W,)`."""

    def __init__(self, queries: Floats, targets: Floats, payload: Predict) -> None:
        self._queries = queries
        self._payload = payload
        self._true = np.vecdot(queries, payload(targets))[:, None]
        self.better, self.own = np.zeros(len(queries), np.int64), np.zeros(len(queries), np.int64)

    def add(self, block: Floats, true: Rows, own: Rows) -> None:
        """Count a block; `true` and `own` `(P, 2)` are pairs of window and row of the block: copies of its chunks."""
        vectors = self._payload(block)
        for first in range(0, len(self._queries), QUERIES):
            part = slice(first, first + QUERIES)
            scores = self._queries[part] @ vectors.T
            scores[_inside(true, part)] = -np.inf
            self.better[part] += np.count_nonzero(scores > self._true[part], axis=1)
            window, row = _inside(own, part)
            is_better = scores[window, row] > self._true[part][window, 0]
            np.add.at(self.own, first + window[is_better], 1)


def _inside(pairs: Rows, part: slice) -> tuple[Rows, Rows]:
    """Return those pairs of window and row whose window is in a part, counted from its first window."""
    window = pairs[:, 0] - part.start
    kept = (window >= 0) & (window < part.stop - part.start)
    return window[kept], pairs[kept, 1]


@dataclass(frozen=True)
class _Pairs:
    """Pairs `(P, 2)` of window and row of the bank, in the order of rows, each once; `count` windows have any."""

    pairs: Rows
    count: int

    def between(self, first: int, last: int) -> Rows:
        """Return the pairs whose rows are in a block, counted from its first row."""
        begin, end = np.searchsorted(self.pairs[:, 1], [first, last])
        found: Rows = self.pairs[begin:end] - np.array([0, first])
        return found


@dataclass(frozen=True)
class _Copies:
    """Pairs `(P, 2)` of a chunk and a row of the bank that is a copy of it, in the order of chunks."""

    pairs: Rows

    def of(self, chunks: Rows) -> _Pairs:
        """Return the copies of the chunks `(W,)` or `(W, T)` of windows."""
        flat = chunks.ravel()
        window = np.repeat(np.arange(len(chunks)), flat.size // max(len(chunks), 1))
        begin, end = (np.searchsorted(self.pairs[:, 0], flat, side) for side in ("left", "right"))
        sizes = end - begin
        at = np.repeat(begin - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        found = np.unique(np.stack([self.pairs[at, 1], np.repeat(window, sizes)], axis=1), axis=0)[:, ::-1]
        return _Pairs(found, len(np.unique(found[:, 0])))


def _copies(vectors: Floats, bank: Blocks, size: int) -> _Copies:
    """Return the copies of unit vectors `(U, D)` in the bank."""
    axes = np.random.default_rng(0).standard_normal((vectors.shape[1], _DIRECTIONS)).astype(np.float32)
    axes /= np.linalg.norm(axes, axis=0)
    places = vectors @ axes
    order = np.argsort(places[:, 0])
    found = [np.zeros((0, 2), np.int64)]
    first = 0
    for block in bank():
        found += _copies_in(vectors, places, order, block, block @ axes, first)
        first += len(block)
    if first != size:
        raise ValueError(f"the bank has {first} vectors, not {size}")
    pairs = np.concatenate(found)
    return _Copies(pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))])


def _copies_in(
    vectors: Floats, places: Floats, order: Rows, block: Floats, block_places: Floats, first: int
) -> Iterator[Rows]:
    """Yield the pairs of a vector and a row of one block, found among the rows that lie near on every direction."""
    by_first = np.argsort(block_places[:, 0])
    line = block_places[by_first, 0]
    begin = np.searchsorted(line, places[order, 0] - _APART)
    end = np.searchsorted(line, places[order, 0] + _APART)
    sizes = end - begin
    for part in np.array_split(np.arange(len(order)), max(1, int(sizes.sum()) >> 22)):
        at = np.repeat(begin[part] - np.cumsum(sizes[part]) + sizes[part], sizes[part]) + np.arange(sizes[part].sum())
        vector, row = np.repeat(order[part], sizes[part]), by_first[at]
        near = (np.abs(places[vector, 1:] - block_places[row, 1:]) <= _APART).all(axis=1)
        vector, row = vector[near], row[near]
        same = np.vecdot(vectors[vector], block[row]) >= SAME_COSINE
        yield np.stack([vector[same], first + row[same]], axis=1)


def scores_in_bank(
    systems: Mapping[str, Ranked], data: Windows, bank: Blocks, size: int, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Return the scores of the first system, those of the others as `baselines`, and the `bank`, for JSON.

    The arguments are those of `rank_in_bank`.
    """
    found, held = rank_in_bank(systems, data, bank, size, progress)
    scores = {name: each.summary() for name, each in found.items()}
    own = scores.pop(next(iter(systems)))
    return {**own, "baselines": scores, **window_counts(data), "bank": {"chunks": size, "true_chunks": held}}


def metrics(scores: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """Return the figures of one protocol, `with_context` or `without_context`, by the names of LNSP's metrics.json."""
    ranks = scores["retrieval"][protocol]
    recall = {name[2:]: value for name, value in ranks.items() if name.startswith("R@")}
    return {
        "Nq_effective": scores["windows"],
        "R_at_k": recall,
        "MRR": ranks["MRR"],
        "mode": protocol,
        "topK": max(map(int, recall)),
        "cosine": scores["cosine"],
        "cosine_std": scores["cosine_std"],
    }
