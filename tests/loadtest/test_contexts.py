"""The shipped contexts are real, normalised and reproducible; other files are checked."""

from pathlib import Path

import numpy as np
import pytest

from loadtest import contexts
from loadtest.plan import PlanError


def test_shipped_contexts_are_unit_vectors_of_the_service_shape() -> None:
    shipped = contexts.load()
    assert shipped.shape == (64, 5, 384)
    assert shipped.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(shipped, axis=-1), 1.0, atol=1e-6)


def test_sends_float32_files_unchanged(tmp_path: Path) -> None:
    mine = np.full((2, 3, 4), 7.0, dtype=np.float32)
    np.save(tmp_path / "mine.npy", mine)
    np.testing.assert_array_equal(contexts.load(tmp_path / "mine.npy"), mine)


@pytest.mark.parametrize("array", [np.zeros((5, 4)), np.zeros((2, 3, 4), dtype=int), np.zeros((0, 5, 4))])
def test_rejects_contexts_of_another_shape_or_type(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(PlanError, match=r"shape \(N, T, D\)"):
        contexts.load(tmp_path / "bad.npy")


def test_rejects_missing_contexts(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.npy"):
        contexts.load(tmp_path / "none.npy")


def test_samples_neighbouring_chunks_of_different_articles(tmp_path: Path) -> None:
    lengths = [8, 3, 9, 7]
    index = [(article, place) for article, length in enumerate(lengths) for place in range(length)]
    np.save(tmp_path / "index.npy", np.array(index, dtype=np.int32))
    np.save(tmp_path / "vectors.f16.npy", np.array(index, dtype=np.float16))
    windows = contexts.sample(tmp_path, count=3, length=5)
    np.testing.assert_array_equal(windows[:, :, 0], np.array([[0], [2], [3]]).repeat(5, axis=1))
    assert (np.diff(windows[:, :, 1], axis=1) == 1).all()
    np.testing.assert_array_equal(windows, contexts.sample(tmp_path, count=3, length=5))
    with pytest.raises(PlanError, match="long enough"):
        contexts.sample(tmp_path, count=4, length=5)
