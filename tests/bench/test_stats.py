"""Percentiles were measured, ratios pair what one round measured, and intervals count articles, not windows."""

import math

import numpy as np
import pytest

from bench.stats import interval, max_difference, ratios, spread, times_ms, typical


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


def test_more_windows_of_the_same_articles_do_not_narrow_the_interval() -> None:
    scores = np.random.default_rng(0).normal(0.5, 0.1, 50)
    once = interval(scores, np.arange(50))
    again = interval(np.repeat(scores, 20), np.repeat(np.arange(50), 20))
    assert again == pytest.approx(once)
    fooled = interval(np.repeat(scores, 20), np.arange(1000))
    assert fooled[1] - fooled[0] < 0.5 * (once[1] - once[0])


def test_interval_of_normal_scores_is_the_textbook_one() -> None:
    scores = np.random.default_rng(1).normal(0.5, 0.1, 400)
    low, high = interval(scores, np.arange(400))
    assert high - low == pytest.approx(2 * 1.96 * scores.std() / 20, rel=0.1)
    assert low < scores.mean() < high


def test_weights_articles_by_their_windows() -> None:
    low, high = interval(np.array([0.0] * 9 + [1.0]), np.array([0] * 9 + [1]))
    assert (low, high) == (0.0, 1.0)
    assert interval(np.array([0.3, 0.3]), np.array([0, 1])) == pytest.approx((0.3, 0.3))


def test_difference_is_of_the_worst_component_and_infinite_if_vectors_cannot_be_compared() -> None:
    expected = np.zeros((2, 3), np.float32)
    assert max_difference(expected, expected) == 0
    assert max_difference(expected + np.float32(0.5), expected) == pytest.approx(0.5)
    assert max_difference(expected[:1], expected) == math.inf
    assert max_difference(np.full((2, 3), np.nan, np.float32), expected) == math.inf
