"""How far a mean over windows would be elsewhere: 95 % intervals by bootstrap over articles.

The windows of an article share its topic and overlap, so articles are drawn, not windows (the cluster bootstrap of
Field and Welsh, 2007).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
Interval = tuple[float, float]


def interval(values: NDArray[Any], article: NDArray[Any], seed: int = 0) -> Interval:
    """Return between which two numbers the mean of `values` `(W,)` lies in 95 % of draws of their articles `(W,)`.

    Two calls draw the same articles, so that intervals of differences are those of paired samples.
    """
    known, place = np.unique(article, return_inverse=True)
    parts = np.stack([np.bincount(place, values), np.bincount(place)], axis=1)  # (A, 2): sum and count
    drawn = np.random.default_rng(seed).multinomial(len(known), np.full(len(known), 1 / len(known)), DRAWS)
    sums, counts = (drawn @ parts).T
    low, high = np.percentile(sums / counts, [2.5, 97.5])
    return float(low), float(high)
