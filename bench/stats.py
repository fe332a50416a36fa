"""The arithmetic of the reports: percentiles, medians over rounds, ratios within rounds, differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from loadtest import samples
from models.vectors import Floats

Spread = dict[str, float]

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
