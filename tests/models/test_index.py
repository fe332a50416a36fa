"""The flat index is exact: what numpy finds by sorting everything, in an order that never changes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.corpus import Floats, normalise
from models.index import FlatIndex


def unit(count: int, dim: int = 16, seed: int = 0) -> Floats:
    return normalise(np.random.default_rng(seed).standard_normal((count, dim)))


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 30), st.integers(0, 99))
def test_the_top_k_is_numpys(count: int, k: int, queries: int, seed: int) -> None:
    k = min(k, count)
    vectors, asked = unit(count, seed=seed), unit(queries, seed=seed + 1000)
    scores, rows = FlatIndex(vectors).search(asked, k)
    similarity = asked @ vectors.T
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    assert np.allclose(scores, np.take_along_axis(similarity, expected, 1), atol=1e-6)
    assert np.allclose(np.take_along_axis(similarity, rows, 1), scores, atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert all(len(set(found)) == k for found in rows.tolist())


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.parametrize("k", [1, 7, 120])
def test_equal_scores_come_by_row(queries: int, k: int) -> None:
    vectors = np.tile(unit(1), (150, 1))
    _, rows = FlatIndex(vectors).search(np.tile(unit(1), (queries, 1)), k)
    assert (rows == np.arange(k)).all()


def test_equal_scores_come_by_row_among_others() -> None:
    vectors = unit(60)
    vectors[[5, 31, 47]] = vectors[20]
    _, rows = FlatIndex(vectors).search(vectors[20:21], 6)
    assert rows[0, :4].tolist() == [5, 20, 31, 47]


def test_the_whole_index_is_found() -> None:
    _, rows = FlatIndex(unit(9)).search(unit(2, seed=5), 9)
    assert [sorted(found) for found in rows.tolist()] == [list(range(9))] * 2


def test_it_counts_and_says_that_it_is_exact() -> None:
    index = FlatIndex(unit(9))
    assert len(index) == 9
    assert index.is_exact


def test_queries_in_any_memory_order_are_understood() -> None:
    index, queries = FlatIndex(unit(40)), unit(6)
    assert (index.search(np.asfortranarray(queries), 5)[1] == index.search(queries, 5)[1]).all()
    assert (index.search(unit(12)[::2], 5)[1] == index.search(unit(12)[::2].copy(), 5)[1]).all()
