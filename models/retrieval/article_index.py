"""The articles of a corpus, and the rows of each in reading order."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.retrieval.corpus import Passages


class ArticleEntry(NamedTuple):
    """One article: its id, its title, and its number of passages."""

    article: int
    title: str
    chunks: int


class ArticleIndex:
    """The articles of `passages`, in the order of their ids."""

    def __init__(self, passages: Passages) -> None:
        self._passages = passages
        self._order = np.argsort(passages.article, kind="stable")
        self._ids, starts = np.unique(passages.article[self._order], return_index=True)
        self._bounds = np.append(starts, len(self._order))

    @cached_property
    def entries(self) -> list[ArticleEntry]:
        """Every article."""
        counts = np.diff(self._bounds).tolist()
        first = map(self._passages.chunk, self._order[self._bounds[:-1]].tolist())
        return [ArticleEntry(chunk.article, chunk.title, count) for chunk, count in zip(first, counts, strict=True)]

    def rows(self, article: int) -> NDArray[np.int64]:
        """Return the rows `(R,)` of one article in reading order; none if the article is unknown."""
        at = int(np.searchsorted(self._ids, article))
        known = at < len(self._ids) and self._ids[at] == article
        return self._order[slice(*self._bounds[at : at + 2]) if known else slice(0)]
