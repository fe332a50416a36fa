"""Intervals of means over windows, by bootstrap over their articles.

The windows of an article share its topic and overlap, so articles are drawn, not windows (the cluster bootstrap of
Field and Welsh, 2007).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]

DRAWS = 2000
# Numbers of draws times articles that are in memory at a time.
_DRAWN = 1 << 22


def interval(values: NDArray[Any], article: NDArray[Any], seed: int = 0) -> Interval:
    """Return the 95 % interval of the mean of `values` `(W,)`; `article` `(W,)` has the article of each."""
    return intervals(values[:, None], article, seed)[0]


def intervals(values: NDArray[Any], article: NDArray[Any], seed: int = 0) -> list[Interval]:
    """Return the 95 % interval of the mean of each column of `values` `(W, C)`.

    All columns, and two calls with the same articles, draw the same articles, so that intervals of differences are
    those of paired samples.
    """
    known, place = np.unique(article, return_inverse=True)
    # (A, C + 1): the sums and the count of every article.
    parts = np.stack([*(np.bincount(place, column) for column in values.T), np.bincount(place)], axis=1)
    random, share = np.random.default_rng(seed), np.full(len(known), 1 / len(known))
    size = max(1, _DRAWN // len(known))
    draws = [random.multinomial(len(known), share, min(size, DRAWS - done)) for done in range(0, DRAWS, size)]
    sums = np.concatenate([drawn @ parts for drawn in draws])
    low, high = np.percentile(sums[:, :-1] / sums[:, -1:], [2.5, 97.5], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))
