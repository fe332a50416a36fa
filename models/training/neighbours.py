"""The largest cosines of each chunk to other chunks, which a reranker reads: exact, or found in the lists of an index.

Exact is quadratic in the number of chunks. In lists, a chunk is compared with the chunks of the lists that are nearest
to its own; how many lists is chosen by the recall on drawn chunks, whose true neighbours are found by a scan.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from models.retrieval.corpus import HalfVectors
from models.retrieval.index import InvertedLists, Rows
from models.retrieval.reranker import NEIGHBOUR_COUNT
from models.training.indexing import CachedSteps, Scan, count_blocks
from models.training.work_cache import Arrays
from models.vectors import Floats

# drawn chunks on which the recall is measured, the recall to reach, and most lists that are read for a chunk
DRAWN, TARGET_RECALL, MAX_PROBES = 512, 0.95, 64
# rows that a chunk is compared with at most, if lists are much longer than usual
CANDIDATES = 65_536
# lists that are searched in one step
GROUP = 64
# rows that are compared with others at a time
_BLOCK = 1024


def exact_neighbours(vectors: Floats) -> Floats:
    """Return each row's largest cosines to other rows, descending, `(N, NEIGHBOUR_COUNT)`; -1 if there are no more."""
    rows = np.arange(len(vectors))
    parts = [_largest(vectors[part], vectors, part) for part in np.array_split(rows, len(rows) // _BLOCK + 1)]
    return np.concatenate(parts)


def _largest(some: Floats, others: Floats, own: Rows) -> Floats:
    """Return the largest cosines of `some` `(R, D)` to `others` `(C, D)`, but for the places `own` `(R,)` in them."""
    cosines = some @ others.T
    cosines[np.arange(len(some)), own] = -1
    count = min(NEIGHBOUR_COUNT, len(others) - 1)
    found = np.full((len(some), NEIGHBOUR_COUNT), -1, np.float32)
    if count:
        best = np.partition(cosines, -count, axis=1)[:, -count:]
        found[:, :count] = np.sort(best, axis=1)[:, ::-1]
    return found


def count_steps(rows: int, lists: int) -> int:
    """Return the number of steps of `listed_neighbours` for a corpus of `rows` chunks."""
    return count_blocks(rows) + -(-lists // GROUP)


def listed_neighbours(corpus: HalfVectors, lists: InvertedLists, steps: CachedSteps) -> tuple[Floats, float]:
    """Return each row's largest cosines to other rows, as `exact_neighbours`, and the recall on drawn chunks."""
    places = ListPlaces(lists)
    nearness = _nearness(lists.centroids)
    ranks = _ranks_of_true_neighbours(corpus, places, nearness, steps)
    shares = np.array([(ranks < probes).mean() for probes in range(1, min(MAX_PROBES, len(nearness)) + 1)])
    enough = np.flatnonzero(shares >= TARGET_RECALL)
    probes = int(enough[0]) + 1 if len(enough) else len(shares)
    found = np.full((len(corpus), NEIGHBOUR_COUNT), -1, np.float32)
    for first in range(0, len(nearness), GROUP):
        group = nearness[first : first + GROUP]
        step = partial(_neighbours_in_group, corpus, places, group[:, :probes])
        part = steps.run(step, f"neighbours in {probes} lists from {first}")
        found[part["rows"]] = part["cosines"]
    return found, float(shares[probes - 1])


class ListPlaces:
    """Which rows are in each list of an index, and in which list each row is."""

    def __init__(self, lists: InvertedLists) -> None:
        self._rows = np.split(lists.rows.astype(np.int64), np.cumsum(lists.sizes)[:-1])
        self.list_of = np.empty(len(lists.rows), np.int64)
        self.list_of[lists.rows] = np.repeat(np.arange(len(lists.sizes)), lists.sizes)

    def rows_in(self, numbers: Rows) -> Rows:
        """Return the rows of the lists `numbers`, list after list."""
        return np.concatenate([self._rows[number] for number in numbers])


def _nearness(centroids: Floats) -> Rows:
    """Return the lists in the order of their nearness to each list `(L, L)`; each is nearest to itself."""
    products = centroids @ centroids.T
    np.fill_diagonal(products, np.inf)
    return np.argsort(-products, axis=1, kind="stable")


def _ranks_of_true_neighbours(corpus: HalfVectors, places: ListPlaces, nearness: Rows, steps: CachedSteps) -> Rows:
    """Return where, in the order of nearness to the list of a drawn row, the lists of its neighbours come."""
    drawn = np.sort(np.random.default_rng(2).choice(len(corpus), min(DRAWN, len(corpus)), replace=False))
    count = min(NEIGHBOUR_COUNT + 1, len(corpus))
    _, rows = Scan(corpus, steps).search(corpus.vectors_at(drawn), count)
    is_other = rows != drawn[:, None]
    order = np.argsort(nearness, axis=1)  # by list, the place of each list
    ranks = order[places.list_of[drawn][:, None], places.list_of[rows]]
    return np.asarray(ranks[is_other])


def _neighbours_in_group(corpus: HalfVectors, places: ListPlaces, nearest: Rows) -> Arrays:
    """Return `rows` `(R,)` of some lists, and their `cosines` to rows of the lists `nearest` `(L, P)` to each."""
    parts = [part for numbers in nearest for part in _in_list(corpus, places, numbers)]
    none = [(np.empty(0, np.int64), np.empty((0, NEIGHBOUR_COUNT), np.float32))]
    rows, cosines = (np.concatenate(part) for part in zip(*none, *parts, strict=True))
    return {"rows": rows, "cosines": cosines}


def _in_list(corpus: HalfVectors, places: ListPlaces, nearest: Rows) -> list[tuple[Rows, Floats]]:
    """Return rows of a list, and their largest cosines to rows of the lists `nearest`, of which it is the first."""
    candidates = places.rows_in(nearest)
    count = len(places.rows_in(nearest[:1]))
    return [_in_part(corpus, candidates, begin, min(begin + _BLOCK, count)) for begin in range(0, count, _BLOCK)]


def _in_part(corpus: HalfVectors, candidates: Rows, begin: int, end: int) -> tuple[Rows, Floats]:
    """Return the candidates from `begin` to `end`, and their largest cosines to at most `CANDIDATES` candidates."""
    own = candidates[begin:end]
    others = np.concatenate([own, candidates[:begin], candidates[end:]])[:CANDIDATES]
    vectors = corpus.vectors_at(others)
    return own, _largest(vectors[: len(own)], vectors, np.arange(len(own)))
