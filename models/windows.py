"""Windows over a corpus: T consecutive chunk vectors of one article and the one that follows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.retrieval.corpus import Corpus, MappedCorpus, MappedVectors
from models.vectors import Floats, StoredVectors, Vectors


class NoWindows(ValueError):
    """A corpus without any window."""


class OtherDimension(ValueError):
    """Vectors of another D than the model, or the data beside them, have."""


def check_dim(name: str, found: int, expected: int) -> None:
    """Raise `OtherDimension`, which names the data, if their vectors have not the D that is expected."""
    if found != expected:
        raise OtherDimension(f"{name} has vectors with D = {found}; the model reads D = {expected}")


Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """Stride-1 windows of a corpus, stored as row numbers: window i covers the rows start[i] to start[i] + T."""

    vectors: Vectors
    start: Rows
    article: NDArray[np.int32]
    length: int

    def __len__(self) -> int:
        return len(self.start)

    @property
    def target(self) -> Rows:
        """Rows of the true next vectors, `(W,)`."""
        return self.start + self.length

    @property
    def target_in_corpus(self) -> Rows:
        """The same rows `(W,)` in the corpus that the windows were taken from."""
        return self.target

    def take(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> Windows:
        """Return the windows that these numbers, or this mask, select."""
        return Windows(self.vectors, self.start[which], self.article[which], self.length)

    def rows(self) -> Rows:
        """Return the rows of the contexts, `(W, T)`."""
        return self.start[:, None] + np.arange(self.length)

    def contexts(self) -> Floats:
        """Return the contexts, `(W, T, D)`."""
        return self.vectors[self.rows()]

    def targets(self) -> Floats:
        """Return the true next vectors, `(W, D)`."""
        return self.vectors[self.target]


@dataclass(frozen=True)
class Pairs(Windows):
    """Windows that are given one by one: the rows `context` `(W, T)` and `following` `(W,)` need not be consecutive."""

    context: Rows
    following: Rows

    @property
    def target(self) -> Rows:
        """Rows of the true next vectors, `(W,)`."""
        return self.following

    def take(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> Pairs:
        """Return the windows that these numbers, or this mask, select."""
        context, following = self.context[which], self.following[which]
        return Pairs(self.vectors, self.start[which], self.article[which], self.length, context, following)

    def rows(self) -> Rows:
        """Return the rows of the contexts, `(W, T)`."""
        return self.context


@dataclass(frozen=True, kw_only=True)
class PairCorpus(Corpus):
    """The chunks of pairs of context and next vector, each once, and the pairs; `crossing` cross articles, if known.

    The article and the position of a chunk are not known; `pairs` have the articles.
    """

    pairs: Pairs
    crossing: int | None = None


@dataclass(frozen=True)
class StoredCorpus:
    """Vectors `(N, D)` that stay on disk, with `article` and `position` `(N,)` of each: what training reads."""

    vectors: StoredVectors
    article: NDArray[np.int32]
    position: NDArray[np.int32]

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        return self.vectors.shape[1]

    def __len__(self) -> int:
        return len(self.vectors)


def windows(corpus: Corpus | StoredCorpus, length: int) -> Windows:
    """Return every window of `length` context chunks that stays inside one article, in order; of pairs, all.

    Raises:
        NoWindows: the corpus is one of pairs with contexts of another length.
    """
    if isinstance(corpus, PairCorpus):
        if corpus.pairs.length != length:
            raise NoWindows(f"the pairs have contexts of {corpus.pairs.length} chunks, not of {length}")
        return corpus.pairs
    start = window_starts(corpus, length)
    return Windows(corpus.vectors, start, corpus.article[start], length)


def window_starts(corpus: Corpus | StoredCorpus | MappedVectors, length: int) -> Rows:
    """Return the rows at which the windows of a corpus start."""
    start = np.arange(max(len(corpus) - length, 0))
    end = start + length
    same_article = corpus.article[start] == corpus.article[end]
    consecutive = corpus.position[end] - corpus.position[start] == length
    found: Rows = start[same_article & consecutive]
    return found


def require_windows(corpus: Corpus | StoredCorpus, length: int) -> Windows:
    """Return `windows`, at least one.

    Raises:
        NoWindows: no article has more than `length` chunks.
    """
    data = windows(corpus, length)
    if not len(data):
        raise NoWindows(f"no article has more than {length} chunks")
    return data


def hold_out(data: Windows, share: float, seed: int, used: float = 1.0) -> tuple[Windows, Windows]:
    """Split windows by article into the rest and a held-out share; no article is in both.

    Of the articles, a share `used` is drawn first; a smaller share is a part of a greater one.
    """
    articles = np.unique(data.article)
    np.random.default_rng(seed).shuffle(articles)
    articles = articles[: max(2, round(used * len(articles)))]
    held, rest = np.split(articles, [max(1, round(share * len(articles)))])
    return data.take(np.isin(data.article, rest)), data.take(np.isin(data.article, held))


def draw_articles(data: Windows, most: int, seed: int) -> Windows:
    """Return the windows of as many articles, drawn at random, as have at most `most` windows; of at least one."""
    articles, counts = np.unique(data.article, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(articles))
    fitting = max(1, int(np.searchsorted(np.cumsum(counts[order]), most, side="right")))
    return data.take(np.isin(data.article, articles[order[:fitting]]))


def compact_windows(data: Windows) -> Windows:
    """Return the same windows over the vectors of their own chunks only; vectors on disk stay there."""
    span = np.arange(data.length + 1)
    own = np.unique(data.start[:, None] + span)
    vectors = data.vectors.view(own) if isinstance(data.vectors, StoredVectors) else data.vectors[own]
    return Windows(vectors, np.searchsorted(own, data.start), data.article, data.length)


# A bundle is scored on all windows of its corpus, if it is in memory and has not more; else on as many drawn ones.
MAX_SCORED, DRAWN = 10_000, 1_000


@dataclass(frozen=True)
class DrawnWindows(Windows):
    """Windows that were drawn from a corpus; `source` are the rows in it of their `vectors`."""

    source: Rows

    @property
    def target_in_corpus(self) -> Rows:
        """Rows of the true next vectors in the corpus, `(W,)`."""
        rows: Rows = self.source[self.target]
        return rows


def scored_windows(corpus: Corpus | MappedCorpus, length: int) -> Windows:
    """Return the windows by which a bundle is scored on its own corpus: all, or drawn ones if there are many.

    Raises:
        NoWindows: no article has more than `length` chunks.
    """
    if isinstance(corpus, PairCorpus):
        return require_windows(corpus, length)
    start = window_starts(corpus, length)
    if not len(start):
        raise NoWindows(f"no article has more than {length} chunks")
    if len(start) <= MAX_SCORED and isinstance(corpus, Corpus):
        return windows(corpus, length)
    chosen = np.sort(np.random.default_rng(0).choice(start, min(DRAWN, len(start)), replace=False))
    source = np.unique(chosen[:, None] + np.arange(length + 1))
    compact = np.searchsorted(source, chosen)
    return DrawnWindows(corpus.vectors_at(source), compact, corpus.article[chosen], length, source)
