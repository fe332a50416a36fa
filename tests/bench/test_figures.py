"""Percentiles happened, medians are over rounds, and a ratio pairs what one round measured."""

import math

import pytest

from bench.figures import ratios, spread, times_ms, typical


def test_percentiles_are_by_nearest_rank_and_in_milliseconds() -> None:
    figures = times_ms([n / 1000 for n in range(1, 101)])
    assert figures == pytest.approx({"mean_ms": 50.5, "p50_ms": 50, "p95_ms": 95, "p99_ms": 99})


def test_nothing_timed_is_not_a_number() -> None:
    assert all(math.isnan(value) for value in times_ms([]).values())


def test_a_ratio_is_the_median_of_the_rounds_not_the_ratio_of_the_medians() -> None:
    ours, theirs = [10.0, 90.0, 30.0], [1.0, 30.0, 10.0]
    assert ratios(ours, theirs) == {"median": 3.0, "min": 3.0, "max": 10.0}
    assert spread(ours) == {"median": 30.0, "min": 10.0, "max": 90.0}


def test_rounds_must_pair() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_a_typical_round_has_the_median_of_every_figure() -> None:
    assert typical([{"a": 1.0, "b": 9.0}, {"a": 2.0, "b": 8.0}, {"a": 7.0, "b": 1.0}]) == {"a": 2.0, "b": 8.0}
