"""Windows over a corpus: T consecutive chunk vectors of one article and the one that follows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.retrieval.corpus import (
    Corpus,
)
from models.vectors import Floats


class NoWindows(ValueError):
    """A corpus without any window."""


Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """Stride-1 windows of a corpus, stored as row numbers: window i covers the rows start[i] to start[i] + T."""

    vectors: Floats
    start: Rows
    article: NDArray[np.int32]
    length: int

    def __len__(self) -> int:
        return len(self.start)

    @property
    def target(self) -> Rows:
        """Rows of the true next vectors, `(W,)`."""
        return self.start + self.length

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


def windows(corpus: Corpus, length: int) -> Windows:
    """Return every window of `length` context chunks that stays inside one article, in order."""
    start = np.arange(max(len(corpus) - length, 0))
    end = start + length
    same_article = corpus.article[start] == corpus.article[end]
    consecutive = corpus.position[end] - corpus.position[start] == length
    start = start[same_article & consecutive]
    return Windows(corpus.vectors, start, corpus.article[start], length)


def require_windows(corpus: Corpus, length: int) -> Windows:
    """Return `windows`, at least one.

    Raises:
        NoWindows: no article has more than `length` chunks.
    """
    data = windows(corpus, length)
    if not len(data):
        raise NoWindows(f"no article has more than {length} chunks")
    return data


def hold_out(data: Windows, share: float, seed: int) -> tuple[Windows, Windows]:
    """Split windows by article into the rest and a held-out share; no article is in both."""
    articles = np.unique(data.article)
    np.random.default_rng(seed).shuffle(articles)
    held = np.isin(data.article, articles[: max(1, round(share * len(articles)))])
    return data.take(~held), data.take(held)


def compact_windows(data: Windows) -> Windows:
    """Return the same windows over the vectors of their own chunks only."""
    span = np.arange(data.length + 1)
    own = np.unique(data.start[:, None] + span)
    return Windows(data.vectors[own], np.searchsorted(own, data.start), data.article, data.length)
