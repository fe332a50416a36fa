"""The reranker reads only vectors, and invalid files are rejected."""

from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import save

from models.retrieval.reranker import NEIGHBOUR_COUNT, BadReranker, Reranker, candidate_features, feature_count
from models.vectors import Floats


@pytest.fixture
def reranker() -> Reranker:
    draw = np.random.default_rng(0).standard_normal
    hidden, bias, output = (draw(shape).astype(np.float32) for shape in ((8, feature_count(5)), (8,), (8,)))
    return Reranker(hidden, bias, output)


def neighbours(count: int, *largest: float) -> Floats:
    rows = np.full((count, NEIGHBOUR_COUNT), -1, np.float32)
    rows[:, : len(largest)] = largest
    return rows


def test_has_the_announced_number_of_features(contexts: Callable[..., Floats]) -> None:
    for length in (1, 5, 9):
        context, candidates = contexts(1, length=length)[0], contexts(1, length=7)[0]
        features = candidate_features(context @ candidates.T, np.linspace(1, 0, 7, dtype=np.float32), neighbours(7))
        assert features.shape == (7, feature_count(length))
        assert features.dtype == np.float32
        assert np.isfinite(features).all()


def test_counts_neighbours_closer_than_the_context() -> None:
    """The third of four neighbours is the context itself: two are closer; the context does not count."""
    context, candidate = np.eye(4, dtype=np.float32)[:1], np.array([[0.6, 0.8, 0, 0]], np.float32)
    features = candidate_features(context @ candidate.T, np.ones(1, np.float32), neighbours(1, 0.9, 0.7, 0.6, 0.5))
    assert features[0, 0] == pytest.approx(0.6)
    assert features[0, 1] == pytest.approx(np.log1p(2))


def test_features_are_invariant_to_rotation(contexts: Callable[..., Floats]) -> None:
    """Features are cosines, so they mean the same in other domains."""
    context, candidates = contexts(1)[0], contexts(1, length=7)[0]
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((16, 16)))[0].astype(np.float32)
    scores, known = np.linspace(1, 0, 7, dtype=np.float32), neighbours(7, 0.5)
    before, after = (
        candidate_features((context @ by) @ (candidates @ by).T, scores, known)
        for by in (np.eye(16, dtype=np.float32), turn)
    )
    assert np.allclose(before, after, atol=1e-5)


def test_a_reranker_survives_a_round_trip(reranker: Reranker) -> None:
    features = np.random.default_rng(1).standard_normal((6, feature_count(5))).astype(np.float32)
    again = Reranker.from_bytes(reranker.to_bytes(), 5)
    assert np.array_equal(again.score(features), reranker.score(features))
    assert again.score(features).shape == (6,)


def test_rejects_invalid_rerankers(reranker: Reranker) -> None:
    with pytest.raises(BadReranker, match="unreadable"):
        Reranker.from_bytes(b"no", 5)
    with pytest.raises(BadReranker, match="unreadable"):
        Reranker.from_bytes(save({"hidden": reranker.hidden}), 5)
    with pytest.raises(BadReranker, match="expected 22 features"):
        Reranker.from_bytes(reranker.to_bytes(), 6)
    broken = Reranker(reranker.hidden, np.full_like(reranker.bias, np.nan), reranker.output)
    with pytest.raises(BadReranker, match="finite"):
        Reranker.from_bytes(broken.to_bytes(), 5)
