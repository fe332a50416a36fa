"""Reference statistics detect contexts of another encoder, or of another length."""

import numpy as np
import pytest

from models.drift import STATISTICS, ReferenceStats
from models.retrieval.corpus import read_corpus
from models.training.publish import GOLDEN
from models.vectors import Floats, normalise
from models.windows import windows
from service.engines.drift import MIN_ALIGNMENT
from tests.conftest import SHIPPED


@pytest.fixture(scope="module")
def shipped() -> Floats:
    return windows(read_corpus(SHIPPED / "retriever"), 5).contexts()


@pytest.fixture(scope="module")
def space(shipped: Floats) -> ReferenceStats:
    """Statistics of as many contexts as a version has golden ones, from the first half of the articles."""
    return ReferenceStats.from_contexts(shipped[np.linspace(0, len(shipped) // 2, GOLDEN).astype(int)])


@pytest.fixture(scope="module")
def contexts(shipped: Floats) -> Floats:
    return np.random.default_rng(0).permutation(shipped[len(shipped) // 2 + 60 :])[:100]


def drift(space: ReferenceStats, contexts: Floats) -> dict[str, float]:
    return dict(zip(STATISTICS, space.deviations(space.measure(contexts).mean(axis=0)).tolist(), strict=True))


def test_other_articles_of_the_encoder_show_no_drift(space: ReferenceStats, contexts: Floats) -> None:
    assert all(abs(off) < 1 for off in drift(space, contexts).values())


def test_length_shows_and_changes_nothing_else(space: ReferenceStats, contexts: Floats) -> None:
    usual, long = drift(space, contexts), drift(space, 3 * contexts)
    assert long["norm"] > 100
    assert [long[name] for name in STATISTICS[1:]] == pytest.approx([usual[name] for name in STATISTICS[1:]], abs=1e-3)


def test_rotated_vectors_show_drift(space: ReferenceStats, contexts: Floats) -> None:
    """A rotation keeps all inner products, as between two encoders of one family, but not the mean direction."""
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((384, 384)))[0].astype(np.float32)
    off = drift(space, contexts @ turn)
    assert off["alignment"] < MIN_ALIGNMENT < -1 < drift(space, contexts)["alignment"]
    assert off["neighbour_cosine"] == pytest.approx(drift(space, contexts)["neighbour_cosine"], abs=1e-2)


def test_random_vectors_show_drift(space: ReferenceStats) -> None:
    noise = normalise(np.random.default_rng(2).standard_normal((100, 5, 384)).astype(np.float32))
    assert drift(space, noise)["neighbour_cosine"] < -2


def test_a_query_alone_has_no_neighbours_to_judge(space: ReferenceStats, contexts: Floats) -> None:
    assert drift(space, contexts[:, :1])["neighbour_cosine"] == pytest.approx(0, abs=1e-5)
