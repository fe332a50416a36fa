"""Percentiles were measured, and ratios pair what one round measured."""

import math

import numpy as np
import pytest

from bench.stats import max_difference, ratios, spread, times_ms, typical


def test_percentiles_are_by_nearest_rank_and_in_milliseconds() -> None:
    figures = times_ms([n / 1000 for n in range(1, 101)])
    assert figures == pytest.approx({"mean_ms": 50.5, "p50_ms": 50, "p95_ms": 95, "p99_ms": 99})


def test_ratio_is_the_median_over_rounds_not_the_ratio_of_medians() -> None:
    ours, theirs = [10.0, 90.0, 30.0], [1.0, 30.0, 10.0]
    assert ratios(ours, theirs) == {"median": 3.0, "min": 3.0, "max": 10.0}
    assert spread(ours) == {"median": 30.0, "min": 10.0, "max": 90.0}


def test_rounds_must_pair() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_typical_round_has_the_median_of_every_figure() -> None:
    assert typical([{"a": 1.0, "b": 9.0}, {"a": 2.0, "b": 8.0}, {"a": 7.0, "b": 1.0}]) == {"a": 2.0, "b": 8.0}


def test_difference_is_of_the_worst_component_and_infinite_if_vectors_cannot_be_compared() -> None:
    expected = np.zeros((2, 3), np.float32)
    assert max_difference(expected, expected) == 0
    assert max_difference(expected + np.float32(0.5), expected) == pytest.approx(0.5)
    assert max_difference(expected[:1], expected) == math.inf
    assert max_difference(np.full((2, 3), np.nan, np.float32), expected) == math.inf
