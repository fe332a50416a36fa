"""The paired test calls a version worse if it is, and hardly ever if it is not, whenever it is asked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from service.deploy.paired import ERROR_RATE, MIN_PAIRS, PairedScores, PairedTest
from service.engines.vector_board import Scored

TOLERANCE = 0.005
SPREAD = 0.05
Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
# differences with mean 0 and about the same spread
DRAWS: dict[str, Draw] = {
    "normal": lambda draw, count: draw.normal(0, SPREAD, count),
    "skewed": lambda draw, count: SPREAD * (1 - draw.exponential(1, count)),
    "heavy tails": lambda draw, count: SPREAD / 2 * draw.standard_t(3, count),
}


def is_called_worse(differences: NDArray[np.float64]) -> int | None:
    """Return after how many pairs the test, asked after every tenth, calls the version worse; None if never."""
    test = PairedTest()
    for start in range(0, len(differences), 10):
        test.add(differences[start : start + 10].tolist())
        if test.is_worse_by(TOLERANCE):
            return test.pairs
    return None


@pytest.mark.parametrize("kind", DRAWS)
def test_the_error_rate_is_kept_at_the_tolerance(kind: str) -> None:
    draw = np.random.default_rng(0)
    called = [is_called_worse(DRAWS[kind](draw, 1000) - TOLERANCE) for _ in range(300)]
    # 300 times 0.005 are 1.5 expected; more than 6 happen with a probability below 0.001
    assert sum(each is not None for each in called) <= 6
    assert ERROR_RATE == 0.005


@pytest.mark.parametrize("kind", DRAWS)
def test_an_equal_version_is_never_called_worse(kind: str) -> None:
    draw = np.random.default_rng(1)
    assert not any(is_called_worse(DRAWS[kind](draw, 1000)) for _ in range(200))
    assert is_called_worse(np.zeros(1000)) is None


@pytest.mark.parametrize("kind", DRAWS)
def test_a_version_worse_by_four_tolerances_is_found_within_500_pairs(kind: str) -> None:
    draw = np.random.default_rng(2)
    found = [is_called_worse(DRAWS[kind](draw, 500) - 4 * TOLERANCE) for _ in range(50)]
    assert all(found)
    assert float(np.median([each or 0 for each in found])) <= 250


def test_few_pairs_decide_nothing() -> None:
    test = PairedTest()
    test.add([-1.0] * (MIN_PAIRS - 1))
    assert not test.is_worse_by(0)
    test.add([-1.0])
    assert test.is_worse_by(0)


def test_only_contexts_that_both_versions_predicted_count() -> None:
    test = PairedTest()
    board = PairedScores(lambda differences, contexts: test.add(differences.tolist()))
    new, old = board.identify(PairedScores.NEW), board.identify(PairedScores.OLD)
    cosines = np.array([0.5, 0.7, 0.4, 0.9], np.float32)
    nothing = np.zeros((4, 5, 8), np.float32)
    board.count_scores(Scored([0, 0, 1, 2], [old, new, new, old], cosines, nothing, nothing[:, 0]))
    assert test.pairs == 1
    assert test.mean == pytest.approx(0.2)


def test_a_context_that_callers_repeat_counts_once() -> None:
    test = PairedTest()
    board = PairedScores(lambda differences, contexts: test.add(differences.tolist()))
    authors = [board.identify(PairedScores.OLD), board.identify(PairedScores.NEW)]
    contexts = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    for _ in range(3):
        for context in contexts:
            board.count_scores(Scored([0, 0], authors, np.ones(2, np.float32), np.stack([context] * 2), contexts[:, 0]))
    assert test.pairs == 2
