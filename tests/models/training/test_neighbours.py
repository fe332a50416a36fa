"""Neighbours found in lists are those of an exact comparison, up to the recall that is reported."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.retrieval.corpus import HalfVectors
from models.retrieval.index import InvertedLists
from models.retrieval.reranker import NEIGHBOUR_COUNT
from models.training import neighbours
from models.training.indexing import CachedSteps, Counter
from models.training.neighbours import exact_neighbours, listed_neighbours
from models.training.work_cache import WorkCache
from models.vectors import normalise

Listed = Callable[[HalfVectors, int], tuple[np.ndarray, float, list[int]]]


@pytest.fixture
def listed(tmp_path: Path) -> Listed:
    """Return a function that finds neighbours in lists around rows of the corpus, and the steps that it reports."""

    def find(corpus: HalfVectors, count: int) -> tuple[np.ndarray, float, list[int]]:
        centroids = corpus.vectors_at(np.linspace(0, len(corpus) - 1, count).astype(np.int64))
        home = np.argmax(corpus.vectors_at(np.arange(len(corpus))) @ centroids.T, axis=1)
        rows = np.argsort(home, kind="stable").astype(np.int32)
        lists = InvertedLists(centroids, np.bincount(home, minlength=count), rows, np.zeros((len(rows), 1), np.uint8))
        ticks: list[int] = []
        counter = Counter(neighbours.count_steps(len(corpus), count), lambda done, total: ticks.append(total - done))
        found, recall = listed_neighbours(corpus, lists, CachedSteps(WorkCache(tmp_path), "", counter))
        return found, recall, ticks

    return find


def clusters(count: int, size: int, dim: int = 16) -> HalfVectors:
    random = np.random.default_rng(0)
    centres = random.standard_normal((count, 1, dim))
    return HalfVectors(
        normalise(centres + 0.3 * random.standard_normal((count, size, dim))).reshape(-1, dim).astype("f2")
    )


def test_neighbours_in_lists_are_the_exact_ones_up_to_the_recall(listed: Listed) -> None:
    corpus = clusters(40, 50)
    found, recall, ticks = listed(corpus, 80)
    exact = exact_neighbours(corpus.vectors_at(np.arange(len(corpus))))
    assert found.shape == (2000, NEIGHBOUR_COUNT)
    assert recall >= neighbours.TARGET_RECALL
    assert np.mean(np.abs(found - exact) < 1e-5) >= recall - 0.1
    assert (found <= exact + 1e-5).all()
    assert ticks[-1] == 0


def test_few_rows_have_as_many_neighbours_as_there_are(listed: Listed) -> None:
    found, _, _ = listed(clusters(1, 4), 2)
    assert (found[:, 3:] == -1).all()
    assert (found[:, :3] > -1).sum() >= 6


def test_copies_are_neighbours_of_each_other_but_no_row_is_its_own(listed: Listed) -> None:
    halves = np.tile(normalise(np.eye(8)), (4, 1)).astype(np.float16)
    found, _, _ = listed(HalfVectors(halves), 8)
    assert np.allclose(found[:, :3], 1, atol=1e-3)
    assert (found[:, 3] < 0.5).all()
