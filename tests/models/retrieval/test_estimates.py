"""Estimates never order two rows wrongly if they differ by more than the slack that is stated with them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.retrieval.estimates import Estimator
from models.vectors import Floats, normalise


def vectors_of(count: int, dim: int, seed: int, largest: float) -> Floats:
    """Unit vectors, some with one number that is much larger than the others, and one of zeros."""
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    rows[::3, 0] *= largest
    rows[count // 2] = 0
    return normalise(rows)


@pytest.mark.parametrize("levels", [None, 63, 2])
@given(st.integers(2, 60), st.integers(1, 50), st.integers(0, 99), st.sampled_from([1, 9, 1e4]))
def test_what_differs_by_more_than_the_slack_is_in_order(
    levels: int | None, count: int, dim: int, seed: int, largest: float
) -> None:
    vectors, units = vectors_of(count, dim, seed, largest), vectors_of(7, dim, seed + 1, largest)
    estimated = Estimator(vectors, levels).run(units)
    for sums, slack, scores in zip(estimated.sums, estimated.slack, units @ vectors.T, strict=True):
        above = sums[:, None] - sums.astype(np.float64) > slack
        assert (scores[:, None] >= scores)[above].all()


def test_the_slack_leaves_few_rows() -> None:
    vectors = vectors_of(5000, 384, 0, 1)
    estimated = Estimator(vectors).run(vectors[:9])
    likely = (estimated.sums >= np.sort(estimated.sums)[:, -10:-9] - np.array(estimated.slack)[:, None]).sum(axis=1)
    assert likely.max() < 250


def test_vectors_of_no_length_are_all_alike() -> None:
    assert not Estimator(np.zeros((9, 4), np.float32)).run(vectors_of(2, 4, 0, 1)).sums.any()
