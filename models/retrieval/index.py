"""Vector indexes: the nearest rows of a corpus by inner product.

`FlatIndex` is exact and keeps float32 vectors in memory. `IvfIndex` is approximate, for corpora of any size: it keeps
one bit per dimension and row in memory, searches the most likely lists, and rescores the hits by the corpus's vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import repeat
from typing import Any, NamedTuple, Protocol, Self
from weakref import WeakKeyDictionary

import faiss
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from models.registry.manifest import Buffer
from models.retrieval.estimates import Estimator, Sums
from models.retrieval.filters import ESTIMATED_ROWS, RowSet
from models.vectors import Floats

Rows = NDArray[np.int64]
Codes = NDArray[np.uint8]
# scores and rows, best first
ScoredRows = tuple[Floats, Rows]
IVF_FILE = "ivf.safetensors"
# So many rows are scored in full sooner than others are estimated.
_FEW_ROWS = 400
# the lowest int32, which no sum is below
_LOWEST = -(1 << 31)
# The rows of a set of less than this share are copied into lists of their own: to pass over many rows takes long.
_COPIED_SHARE = 0.8
# More candidates of a set are fetched than are rescored, so that this many standard errors of an estimate are allowed.
_DEEPER = 2
_ERRORS = 2
# queries times rows whose estimates are in memory at a time
_BLOCK_ESTIMATES = 1 << 20
# `nprobe` and `pool` are tuned for this k: ten results, and five more for the context's own passages.
_TUNED_K = 15


class BadIndex(ValueError):
    """An index that does not belong to its corpus, or whose recall is too low."""


class VectorIndex(Protocol):
    """Searches an immutable set of vectors; safe to call from several threads."""

    @property
    def is_exact(self) -> bool:
        """Whether a search returns the true top-k."""
        ...

    def __len__(self) -> int: ...

    def search(self, queries: Floats, k: int, among: RowSet | None = None) -> tuple[Floats, Rows]:
        """Return scores and rows, both `(Q, k)`, best first, equal scores ordered by row.

        Only rows of the set `among` are returned, if it is given. k is at most the number of rows.
        """
        ...

    def vectors_at(self, rows: Rows, /) -> Floats:
        """Return the unit vectors `(R, D)` of `rows` `(R,)`."""
        ...

    @property
    def without(self) -> Callable[[Collection[int]], VectorIndex] | None:
        """Returns the index without some rows; None if filtering the results costs no more."""
        ...


class FlatIndex:
    """Exact search of unit vectors `(N, D)` in the caller's thread, which reads few of them.

    Int8 estimates bound each score from both sides. Only rows that may be among the best k are scored in full.
    """

    is_exact = True
    without = None

    def __init__(self, vectors: Floats) -> None:
        self._vectors = np.ascontiguousarray(vectors)
        self._estimator = Estimator(self._vectors) if len(vectors) > _FEW_ROWS else None

    def __len__(self) -> int:
        return len(self._vectors)

    def search(self, queries: Floats, k: int, among: RowSet | None = None) -> tuple[Floats, Rows]:
        """Return scores and rows `(Q, k)`; queries `(Q, D)` must be finite."""
        units, lengths = normalise_queries(queries)
        scores, rows = stack_results(self._search(units, k, among), len(queries), k)
        return scores * lengths, rows

    def _search(self, units: Floats, k: int, among: RowSet | None) -> Iterator[ScoredRows]:
        """Yield the result of each query, by the way that reads least."""
        rows = None if among is None else among.rows
        count = len(self) if rows is None else len(rows)
        if self._estimator is None or count <= max(_FEW_ROWS, 2 * k):
            yield from map(self._search_rows, units, repeat(rows), repeat(k))
            return
        block = max(_BLOCK_ESTIMATES // len(self), 1)
        for at in range(0, len(units), block):
            some = units[at : at + block]
            for unit, sums, slack in zip(some, *self._estimator.run(some), strict=True):
                yield self._search_rows(unit, _likely(sums, slack, rows, k), k)

    def vectors_at(self, rows: Rows, /) -> Floats:
        """Return the unit vectors `(R, D)` of `rows` `(R,)`."""
        return self._vectors[rows]

    def _search_rows(self, unit: Floats, rows: Rows | None, k: int) -> ScoredRows:
        """Return scores and rows of the best k of `rows`, which ascend; of all rows, if it is None."""
        scores: Floats = np.vecdot(self._vectors if rows is None else self._vectors[rows], unit)
        best = _top_k(scores, k)
        return scores[best], best if rows is None else rows[best]


def _likely(sums: Sums, slack: float, rows: Rows | None, k: int) -> Rows:
    """Return those of `rows` `(R,)`, by default of all, that may be among the best k.

    Sums `(N,)` of two rows that differ by more than `slack` are in the order of the scores.
    """
    sums = sums if rows is None else sums[rows]
    least = max(int(_threshold(sums, k) - slack), _LOWEST)
    likely = np.flatnonzero(sums >= least)
    return likely if rows is None else rows[likely]


def _top_k(scores: Floats, k: int) -> Rows:
    """Return the positions of the k best scores, best first, equal scores in their order."""
    some = np.flatnonzero(scores >= _threshold(scores, k))
    return some[np.argsort(-scores[some], kind="stable")[:k]]


def normalise_queries(queries: Floats) -> tuple[Floats, Floats]:
    """Return `queries` `(Q, D)` at unit length, and their original lengths `(Q, 1)`."""
    wide = queries.astype(np.float64)
    lengths = np.sqrt(np.vecdot(wide, wide))[:, None]
    return (wide / np.where(lengths > 0, lengths, 1)).astype(np.float32), lengths.astype(np.float32)


def rescore(index: VectorIndex, query: Floats, rows: Rows, k: int) -> ScoredRows:
    """Score `rows` `(R,)` by the vectors of an index; return scores and rows of the k nearest to `query` `(D,)`."""
    return _best(rows, np.vecdot(index.vectors_at(rows), query), k)


def _best(rows: Rows, scores: Floats, k: int) -> ScoredRows:
    """Return scores and rows of the k best of some `rows` `(R,)`, which are in any order."""
    order = np.argsort(rows)
    best = order[_top_k(scores[order], k)]
    return scores[best], rows[best]


def stack_results(found: Iterable[ScoredRows], count: int, k: int) -> tuple[Floats, Rows]:
    """Return the scores and rows `(k,)` of each of `count` queries as two arrays `(count, k)`."""
    all_scores, all_rows = np.empty((count, k), np.float32), np.empty((count, k), np.int64)
    for place, (scores, rows) in enumerate(found):
        all_scores[place], all_rows[place] = scores, rows
    return all_scores, all_rows


def _threshold(scores: NDArray[Any], k: int) -> Any:
    """Return a score that at least k of `scores` reach: the k-th best, or slightly less."""
    group = min(len(scores) // (4 * k), 16)
    if group > 1:
        # the maxima of groups are distinct rows, and fewer values to partition
        scores = scores[: len(scores) // group * group].reshape(group, -1).max(axis=0)
    place = max(len(scores) - k, 0)
    return np.partition(scores, place)[place]


@dataclass(frozen=True)
class InvertedLists:
    """An inverted file: the rows of the corpus, grouped in lists around centroids.

    `centroids` `(L, D)` float32, `sizes` `(L,)` int64, `rows` `(N,)` int32 list after list, and `codes` `(N, C)` uint8:
    the RaBitQ code (one bit per dimension and two factors) of the difference between a row's vector and its centroid.
    """

    centroids: Floats
    sizes: Rows
    rows: NDArray[np.int32]
    codes: Codes

    def to_bytes(self) -> bytes:
        """Return the lists as a safetensors file."""
        return bytes(save_tensors(asdict(self)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read the lists from a safetensors file.

        Raises:
            BadIndex: the file is unreadable, its parts contradict each other, or a row is missing or duplicate.
        """
        try:
            lists = cls(**load_tensors(data))
        except (SafetensorError, TypeError) as error:
            raise BadIndex(f"unreadable index: {error}") from error
        lists._check()
        return lists

    def _check(self) -> None:
        types = [getattr(self, part.name).dtype.name for part in fields(self)]
        shapes = self.centroids.ndim, self.sizes.shape, self.rows.ndim, len(self.codes)
        expected = 2, self.centroids.shape[:1], 1, len(self.rows)
        if (
            types != ["float32", "int64", "int32", "uint8"]
            or shapes != expected
            or not np.isfinite(self.centroids).all()
        ):
            raise BadIndex("the parts of the index contradict each other")
        count = len(self.rows)
        if ((self.sizes < 0) | (self.sizes > count)).any() or self.sizes.sum() != count:
            raise BadIndex("the sizes of the lists do not add up to the number of rows")
        if not np.array_equal(np.sort(self.rows), np.arange(count)):
            raise BadIndex("the lists do not hold every row exactly once")


class Part(NamedTuple):
    """The rows of a set in an index of lists: `counts` `(L,)` of them are in each list.

    `lists` holds no other rows, or `selector` is their bitmap.
    """

    lists: Any
    counts: Rows
    selector: Any | None


class IvfIndex:
    """Approximate search: scan the codes of the `nprobe` nearest lists, then rescore the best `pool * k` by vector.

    Codes and row numbers are in memory (72 bytes per row at D = 384). `vectors_at` returns the unit vectors `(R, D)` of
    rows. `nprobe` and `pool` grow if k is larger than usual. A search among a set of rows scans as many codes, of rows
    of the set only, in the lists that have some.

    Raises:
        BadIndex: the lists do not belong to the vectors, or `nprobe` or `pool` is invalid.
    """

    is_exact = False
    without = None

    def __init__(
        self, lists: InvertedLists, vectors_at: Callable[[Rows], Floats], nprobe: int, pool: int, threads: int = 1
    ) -> None:
        self.vectors_at: Callable[[Rows], Floats] = vectors_at
        self._nprobe = nprobe
        self._pool = pool
        self._threads = threads
        if not all(isinstance(number, int) and number > 0 for number in (nprobe, pool)):
            raise BadIndex(f"nprobe {nprobe!r} and pool {pool!r} must be positive integers")
        self._lists = empty_ivf_index(lists.centroids)
        if lists.codes.shape[1:] != (self._lists.code_size,):
            raise BadIndex(
                f"codes have {lists.codes.shape[1:]} bytes; this version of faiss makes {self._lists.code_size}"
            )
        self._check_codes(lists)
        self._add_lists(lists)
        self._list_of = np.empty(len(lists.rows), np.int32)
        self._list_of[lists.rows] = np.repeat(np.arange(len(lists.sizes)), lists.sizes)
        self._place_of = np.empty(len(lists.rows), np.int32)
        self._place_of[lists.rows] = np.arange(len(lists.rows)) - np.repeat(
            np.cumsum(lists.sizes) - lists.sizes, lists.sizes
        )
        self._parts: WeakKeyDictionary[RowSet, Part] = WeakKeyDictionary()
        self._estimators: WeakKeyDictionary[RowSet, Estimator] = WeakKeyDictionary()

    def __len__(self) -> int:
        return int(self._lists.ntotal)

    def search(self, queries: Floats, k: int, among: RowSet | None = None) -> tuple[Floats, Rows]:
        """Return scores and rows `(Q, k)`; queries `(Q, D)` must be finite."""
        queries = np.ascontiguousarray(queries)
        # applies to searches of the calling thread
        faiss.omp_set_num_threads(self._threads)
        found = self._search_all(queries, k) if among is None else self._search_among(queries, k, among)
        return stack_results(found, len(queries), k)

    def _search_all(self, queries: Floats, k: int) -> Iterator[ScoredRows]:
        return map(self._rescore, queries, self._candidates(queries, k), repeat(k))

    def _candidates(self, queries: Floats, k: int, share: float = 1) -> Rows:
        """Return the rows to rescore for each query, filled up with -1.

        If the caller keeps only a `share` of all rows, more lists are scanned.
        """
        nprobe, count = self._effort(k, len(self))
        nprobe = math.ceil(nprobe / share)
        while True:
            params = faiss.SearchParametersIVF()
            params.nprobe = min(nprobe, self._lists.nlist)
            rows: Rows = self._lists.search(queries, count, params=params)[1]
            if nprobe >= self._lists.nlist or (rows[:, k - 1] >= 0).all():
                return rows
            nprobe *= 4

    def _effort(self, k: int, rows: int) -> tuple[int, int]:
        """Return how many lists are scanned for k of some `rows`, and how many of these are rescored."""
        depth = -(-k // _TUNED_K)
        return self._nprobe * depth, min(self._pool * min(depth, 4) * k, rows)

    def _search_among(self, queries: Floats, k: int, among: RowSet) -> Iterator[ScoredRows]:
        _, count = self._effort(k, len(among))
        if count == len(among):
            return map(self._rescore, queries, repeat(among.rows), repeat(k))
        if len(among) <= ESTIMATED_ROWS:
            return self._search_few(queries, k, among)
        if among.share >= _COPIED_SHARE:
            return self._search_most(queries, k, among)
        return self._search_part(queries, k, among)

    def _search_most(self, queries: Floats, k: int, among: RowSet) -> Iterator[ScoredRows]:
        """Search all rows and drop those outside the set. If that drops too many, search the set itself."""
        for query, rows in zip(queries, self._candidates(queries, k, among.share), strict=True):
            kept = rows[(rows >= 0) & among.mask[rows]]
            if len(kept) >= max(k, len(rows) // 2):
                yield self._rescore(query, kept, k)
            else:
                yield from self._search_part(query[None], k, among)

    def _search_few(self, queries: Floats, k: int, among: RowSet) -> Iterator[ScoredRows]:
        """Yield the exact results of each query."""
        if among not in self._estimators:
            self._estimators[among] = Estimator(self.vectors_at(among.rows))
        estimated = self._estimators[among].run(normalise_queries(queries)[0])
        for query, sums, slack in zip(queries, *estimated, strict=True):
            yield self._rescore(query, among.rows[_likely(sums, slack, None, k)], k)

    def _search_part(self, queries: Floats, k: int, among: RowSet) -> Iterator[ScoredRows]:
        nprobe, count = self._effort(k, len(among))
        part = self._part(among)
        held = np.count_nonzero(part.counts) / self._lists.nlist
        width = int(2 * nprobe / (among.share * held) ** 0.5)
        lists, products = self._nearest(queries, part, width, nprobe, count)
        estimates, rows = _scan(part, queries, lists, products, min(_DEEPER * count, len(among)))
        return map(self._rescore_unsure, queries, estimates, rows, repeat(count), repeat(k))

    def _nearest(self, queries: Floats, part: Part, width: int, nprobe: int, count: int) -> tuple[Rows, Floats]:
        """Return the lists that are scanned for each query, -1 for none, and the products of their centroids.

        They are as many lists with as many rows of the set as without a filter. If the lists have fewer rows of the
        set, more lists are scanned, and fewer rows. They are looked for among the `width` nearest, then among all.
        """
        products, lists = self._lists.quantizer.search(queries, min(width, self._lists.nlist))
        counts = part.counts[lists]
        is_held = counts > 0
        scanned, place = np.cumsum(counts, axis=1) - counts, np.cumsum(is_held, axis=1) - is_held
        budget = nprobe * max(nprobe * len(self) // self._lists.nlist, count)
        is_open = (scanned * place < budget) | (scanned < count)
        if is_open[:, -1].any() and width < self._lists.nlist:
            return self._nearest(queries, part, self._lists.nlist, nprobe, count)
        is_read = is_held & is_open
        width = int(np.flatnonzero(is_read.any(axis=0))[-1]) + 1
        return np.where(is_read, lists, -1)[:, :width], products[:, :width]

    def _rescore_unsure(self, query: Floats, estimates: Floats, rows: Rows, count: int, k: int) -> ScoredRows:
        """Rescore the first `count` rows, and those of the others that may be among the best k.

        `pool` is right for rows near the query. Rows far from it have scores so alike that their estimates, which
        descend, order them badly: then the errors of the first rows tell how many more may be better than the k-th.
        """
        scores = np.vecdot(self.vectors_at(rows[:count]), query)
        error = np.sqrt(np.mean((scores - estimates[:count]) ** 2))
        unsure = (estimates[count:] >= _threshold(scores, k) - _ERRORS * error) & (rows[count:] >= 0)
        more = rows[count:][unsure]
        if len(more):
            scores = np.concatenate([scores, np.vecdot(self.vectors_at(more), query)])
        return _best(np.concatenate([rows[:count], more]), scores, k)

    def _part(self, among: RowSet) -> Part:
        if among not in self._parts:
            counts = np.bincount(self._list_of[among.rows], minlength=self._lists.nlist)
            if among.share < _COPIED_SHARE:
                self._parts[among] = Part(self._copy_of(among.rows, counts), counts, None)
            else:
                selector = faiss.IDSelectorBitmap(len(among.bits), faiss.swig_ptr(among.bits))
                self._parts[among] = Part(self._lists, counts, selector)
        return self._parts[among]

    def _copy_of(self, rows: Rows, counts: Rows) -> Any:
        """Return lists that hold `rows` alone, `counts` `(L,)` in each list."""
        copy = _ivf_index(self._lists.quantizer, self._lists.d, self._lists.nlist)
        rows = rows[np.argsort(self._list_of[rows], kind="stable")]
        ends = np.cumsum(counts)
        for number in np.flatnonzero(counts).tolist():
            some = rows[ends[number] - counts[number] : ends[number]]
            # a pointer does not keep its array
            codes = self._codes(number, some)
            copy.invlists.add_entries(number, len(some), faiss.swig_ptr(some), faiss.swig_ptr(codes))
        copy.ntotal = len(rows)
        return copy

    def _codes(self, number: int, rows: Rows) -> Codes:
        """Return the codes `(R, C)` of `rows` of one list."""
        lists, size = self._lists.invlists, self._lists.code_size
        codes = faiss.rev_swig_ptr(lists.get_codes(number), lists.list_size(number) * size).reshape(-1, size)
        found: Codes = codes[self._place_of[rows]]
        return found

    def _rescore(self, query: Floats, candidates: Rows, k: int) -> ScoredRows:
        return rescore(self, query, candidates[candidates >= 0], k)

    def _check_codes(self, lists: InvertedLists) -> None:
        """Raise `BadIndex` if this faiss encodes a sample of the vectors differently; rounding may flip single bits."""
        sample = np.linspace(0, len(lists.rows) - 1, 64).astype(np.int64)
        list_of = np.repeat(np.arange(len(lists.sizes)), lists.sizes)[sample]
        expected = encode_rows(self._lists, self.vectors_at(lists.rows[sample].astype(np.int64)), list_of)
        if (expected != lists.codes[sample]).mean() > 0.1:
            raise BadIndex("the index was built from other vectors, or by another version of faiss")

    def _add_lists(self, lists: InvertedLists) -> None:
        ends = np.cumsum(lists.sizes)
        rows = lists.rows.astype(np.int64)
        for number, (begin, end) in enumerate(zip(ends - lists.sizes, ends, strict=True)):
            if begin < end:
                parts = faiss.swig_ptr(rows[begin:end]), faiss.swig_ptr(lists.codes[begin:end])
                self._lists.invlists.add_entries(number, int(end - begin), *parts)
        self._lists.ntotal = len(rows)


class Vectors(Protocol):
    """The unit vectors of a corpus, in memory or on disk."""

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        ...

    def __len__(self) -> int: ...

    def vectors_at(self, rows: Rows, /) -> Floats:
        """Return the unit vectors `(R, D)` of `rows` `(R,)`."""
        ...


def open_lists(data: Buffer, vectors: Vectors, config: Any, threads: int = 1) -> IvfIndex:
    """Return the index in the bytes of a file of lists over `vectors`; `config` is a mapping with `nprobe` and `pool`.

    Raises:
        BadIndex: the lists are unreadable, or were made of other vectors, or `config` is not as it should be.
    """
    if not (isinstance(config, Mapping) and {"nprobe", "pool"} <= config.keys()):
        raise BadIndex(f"the card has {config!r:.80} for an index of lists; expected nprobe and pool")
    lists = InvertedLists.from_bytes(data[:])
    if lists.centroids.shape[1] != vectors.dim or len(lists.rows) != len(vectors):
        shape = len(lists.rows), lists.centroids.shape[1]
        raise BadIndex(f"index has rows and D {shape}; the corpus has {(len(vectors), vectors.dim)}")
    return IvfIndex(lists, vectors.vectors_at, config["nprobe"], config["pool"], threads)


def empty_ivf_index(centroids: Floats) -> Any:
    """Return an empty faiss index with lists around `centroids` `(L, D)`; it encodes vectors and searches codes."""
    quantizer = faiss.IndexFlatIP(centroids.shape[1])
    quantizer.add(np.ascontiguousarray(centroids))
    return _ivf_index(quantizer, *reversed(centroids.shape))


def _ivf_index(quantizer: Any, dim: int, lists: int) -> Any:
    index = faiss.IndexIVFRaBitQ(quantizer, dim, lists, faiss.METRIC_INNER_PRODUCT)
    # its centroids are all that it learns
    index.is_trained = True
    return index


def _scan(part: Part, queries: Floats, lists: Rows, products: Floats, count: int) -> tuple[Floats, Rows]:
    """Return estimated scores and rows of the `count` likeliest for each of `queries` `(Q, D)` in its own `lists`.

    A row of -1 is none. `lists` is `(Q, P)`.

    `products` `(Q, P)` are those of a query and the centroid of a list. A list of -1 is passed over.
    """
    params = faiss.SearchParametersIVF()
    params.nprobe = lists.shape[1]
    params.sel = part.selector
    arrays = np.ascontiguousarray(lists), np.ascontiguousarray(products)
    scores, rows = np.empty((len(queries), count), np.float32), np.empty((len(queries), count), np.int64)
    pointers = [faiss.swig_ptr(array) for array in (*arrays, scores, rows)]
    part.lists.search_preassigned_c(len(queries), faiss.swig_ptr(queries), count, *pointers, False, params)
    return scores, rows


def encode_rows(index: Any, vectors: Floats, list_of: Rows) -> Codes:
    """Return the codes `(R, C)` of `vectors` `(R, D)` in the lists `list_of` `(R,)`."""
    codes = np.empty((len(vectors), index.code_size), np.uint8)
    vectors, list_of = np.ascontiguousarray(vectors), np.ascontiguousarray(list_of)
    pointers = [faiss.swig_ptr(array) for array in (vectors, list_of, codes)]
    index.encode_vectors(len(vectors), *pointers, False)
    return codes
