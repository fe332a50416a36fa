"""Maximal marginal relevance, held to its definition."""

from __future__ import annotations

import numpy as np
import pytest

from models.retrieval.diversity import marginal_order
from models.vectors import Floats, normalise


def by_definition(relevance: Floats, vectors: Floats, count: int, weight: float) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < count:
        left = [place for place in range(len(relevance)) if place not in chosen]
        nearest = [max((float(vectors[place] @ vectors[other]) for other in chosen), default=0.0) for place in left]
        gains = [weight * relevance[place] - (1 - weight) * near for place, near in zip(left, nearest, strict=True)]
        chosen.append(left[int(np.argmax(gains))])
    return chosen


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("count", [1, 7, 120])
def test_chooses_by_the_definition(weight: float, count: int) -> None:
    random = np.random.default_rng(count)
    vectors = normalise(random.standard_normal((120, 8)))
    relevance = np.sort(random.uniform(-1, 1, 120).astype(np.float32))[::-1]
    assert marginal_order(relevance, vectors, count, weight).tolist() == by_definition(
        relevance, vectors, count, weight
    )


def test_weight_1_keeps_the_order_and_equal_candidates_keep_theirs() -> None:
    vectors = np.ones((5, 4), np.float32) / 2
    assert marginal_order(np.array([3, 3, 2, 2, 1], np.float32), vectors, 5, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_a_copy_comes_after_something_else() -> None:
    vectors = np.eye(3, dtype=np.float32)[[0, 0, 1]]
    assert marginal_order(np.array([0.9, 0.9, 0.5], np.float32), vectors, 3, 0.5).tolist() == [0, 2, 1]


def test_no_candidate_is_no_choice() -> None:
    assert len(marginal_order(np.empty(0, np.float32), np.empty((0, 4), np.float32), 0, 0.5)) == 0
