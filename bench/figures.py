"""The arithmetic of the report: percentiles that happened, medians over rounds, ratios within rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import numpy as np

Spread = dict[str, float]
PERCENTILES = {"p50_ms": 50.0, "p95_ms": 95.0, "p99_ms": 99.0}


def times_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return mean, p50, p95 and p99 in milliseconds, by nearest rank; NaN where nothing was timed."""
    names = ("mean_ms", *PERCENTILES)
    if not len(seconds):
        return dict.fromkeys(names, float("nan"))
    values = np.asarray(seconds) * 1e3
    ranked = np.percentile(values, list(PERCENTILES.values()), method="inverted_cdf")
    return dict(zip(names, [float(values.mean()), *ranked.tolist()], strict=True))


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
