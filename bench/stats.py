"""The arithmetic of the reports: percentiles, medians over rounds, ratios within rounds, intervals, differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest import samples
from models.vectors import Floats

Spread = dict[str, float]
Interval = tuple[float, float]

DRAWS = 2000
# Largest difference of one component to the answer of the float32 torch net.
TOLERANCE = 1e-5


def times_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return mean, p50, p95 and p99 of at least one time, in milliseconds."""
    return named_ms(samples.times_ms(np.asarray(seconds) * 1e3))


def named_ms(times: Mapping[str, Any]) -> dict[str, Any]:
    """Return the times that reports show, under names that carry the unit."""
    return {f"{name}_ms": times[name] for name in ("mean", "p50", "p95", "p99")}


def spread(values: Iterable[float]) -> Spread:
    """Return median, min and max."""
    given = list(values)
    return {"median": median(given), "min": min(given), "max": max(given)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Return the spread of ours / theirs, each pair from one round."""
    return spread(one / other for one, other in zip(ours, theirs, strict=True))


def typical(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median over rounds of every figure."""
    return {name: median(each[name] for each in rounds) for name in rounds[0]}


def max_difference(vectors: Floats, expected: Floats) -> float:
    """Return the largest difference of one component, infinity if shapes differ or a value is not finite."""
    if vectors.shape != expected.shape:
        return math.inf
    worst = float(np.max(np.abs(vectors - expected)))
    return worst if math.isfinite(worst) else math.inf


def interval(values: NDArray[Any], article: NDArray[Any], seed: int = 0) -> Interval:
    """Return the 95 % interval of the mean of `values` `(W,)`, by bootstrap over their articles `(W,)`.

    The windows of an article share its topic and overlap, so articles are drawn, not windows (the cluster bootstrap of
    Field and Welsh, 2007). Two calls draw the same articles, so that intervals of differences are those of paired
    samples.
    """
    known, place = np.unique(article, return_inverse=True)
    # (A, 2): the sum and the count of every article.
    parts = np.stack([np.bincount(place, values), np.bincount(place)], axis=1)
    drawn = np.random.default_rng(seed).multinomial(len(known), np.full(len(known), 1 / len(known)), DRAWS)
    sums, counts = (drawn @ parts).T
    low, high = np.percentile(sums / counts, [2.5, 97.5])
    return float(low), float(high)
