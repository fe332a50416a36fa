"""The plane of a map is that of principal component analysis, the same each time, for any corpus."""

from __future__ import annotations

import numpy as np
import pytest

from models.retrieval.corpus import MappedCorpus
from models.retrieval.projection import SAMPLE, Plane, sample_rows
from models.vectors import Floats, normalise
from tests.fakes import corpus


def clouds(count: int, dim: int) -> Floats:
    """Return unit vectors whose variance falls from dimension to dimension."""
    drawn = np.random.default_rng(7).standard_normal((count, dim)) / np.arange(1, dim + 1)
    return normalise(drawn + 1)


@pytest.mark.parametrize("dim", [8, 384, 768])
def test_the_axes_are_the_two_principal_ones(dim: int) -> None:
    vectors = clouds(1500, dim)
    plane = Plane.fit(vectors)
    _, values, rows = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs((plane.axes * rows[:2]).sum(axis=1)), 1, atol=1e-4)
    np.testing.assert_allclose(plane.axes @ plane.axes.T, np.eye(2), atol=1e-5)
    np.testing.assert_allclose(plane.explained, values[:2] ** 2 / (values**2).sum(), atol=1e-4)


def test_coordinates_are_the_same_each_time_and_centred() -> None:
    vectors = clouds(900, 32)
    first, second = Plane.fit(vectors), Plane.fit(vectors)
    np.testing.assert_array_equal(first.project(vectors), second.project(vectors))
    np.testing.assert_allclose(first.project(vectors).mean(axis=0), 0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8), (2, 8), (3, 1), (5, 3)])
def test_a_corpus_of_few_passages_or_dimensions_has_a_map(shape: tuple[int, int]) -> None:
    plane = Plane.fit(clouds(*shape))
    assert plane.axes.shape == (2, shape[1])
    assert np.isfinite(plane.project(clouds(*shape))).all()
    assert 0 <= plane.explained.sum() <= 1.001


def test_equal_vectors_are_one_point() -> None:
    vectors = np.full((50, 16), 0.25, np.float32)
    plane = Plane.fit(vectors)
    np.testing.assert_allclose(plane.project(vectors), 0, atol=1e-5)
    np.testing.assert_allclose(plane.explained, 0, atol=1e-5)


def test_a_sample_spans_the_corpus_and_is_bounded() -> None:
    assert sample_rows(corpus()).tolist() == list(range(len(corpus())))
    halves = np.zeros((1_000_000, 4), np.float16)
    large = MappedCorpus(halves, np.zeros((1, 2), np.int32), np.zeros((1, 4), np.int64), b"")
    rows = sample_rows(large)
    assert (len(rows), len(np.unique(rows)), rows[0], rows[-1]) == (SAMPLE, SAMPLE, 0, 999_999)
