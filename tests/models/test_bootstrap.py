"""Intervals count articles, not windows."""

import numpy as np
import pytest

from models.bootstrap import interval, intervals


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


def test_interval_of_a_column_is_the_one_that_it_has_alone() -> None:
    random = np.random.default_rng(2)
    scores, article = random.normal(0.5, 0.1, (60, 3)), np.repeat(np.arange(12), 5)
    alone = np.array([interval(column, article) for column in scores.T])
    assert np.array(intervals(scores, article)) == pytest.approx(alone)
