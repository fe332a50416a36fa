"""Every score matches its definition, computed by hand: cosine, margin, ranks in both protocols, baselines."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.evaluate import RANKS, baseline_scores, compare_with_card, evaluate, ridge
from models.registry.card import Card
from models.retrieval.corpus import (
    Corpus,
)
from models.vectors import Floats, normalise
from models.windows import windows

MakeCorpus = Callable[..., Corpus]


class Says:
    """A predictor that calls the given function."""

    def __init__(self, answer: Callable[[Floats], Any]) -> None:
        self.answer = answer

    def predict_batch(self, contexts: Floats) -> Floats:
        return np.asarray(self.answer(contexts), np.float32)


class Tells:
    """A predictor with given answers, row by row."""

    def __init__(self, vectors: Floats) -> None:
        self.vectors, self.told = vectors, 0

    def predict_batch(self, contexts: Floats) -> Floats:
        self.told += len(contexts)
        return self.vectors[self.told - len(contexts) : self.told]


def circle(*degrees: float) -> Floats:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def cos(degrees: float) -> float:
    return math.cos(math.radians(degrees))


@pytest.mark.parametrize(("carded", "is_worse"), [(0.5, False), (0.5009, False), (0.5011, True), (0.4, False)])
def test_compares_a_score_with_the_card(card: Callable[..., Card], carded: float, is_worse: bool) -> None:
    counts = {"windows": 3, "articles": 1, "chunks": 5}
    known = card(scores={"other": {**counts, "chunks": 6, "cosine": 0.9}, "ours": {**counts, "cosine": carded}})
    found = compare_with_card({**counts, "cosine": 0.5}, known)
    assert found
    assert (found["data"], found["cosine"], found["is_worse"]) == ("ours", carded, is_worse)
    assert found["difference"] == pytest.approx(0.5 - carded)
    assert compare_with_card({**counts, "windows": 4, "cosine": 0.5}, known) is None


def test_a_small_example_by_hand(make_corpus: MakeCorpus) -> None:
    """One article at 0, 10, 25, 45, 100 degrees, T = 2: three windows; the predictor says the last vector."""
    corpus = make_corpus(circle(0, 10, 25, 45, 100))
    scores = evaluate(Says(lambda contexts: contexts[:, -1]), corpus, 2)
    # (0, 10) -> 25: by distance from 10 come 10, 0, 25: third, first without the context
    # (10, 25) -> 45: from 25 come 25, 10, 45: third, first without
    # (25, 45) -> 100: from 45 come 45, 25, 10, 0, 100: fifth, third without
    cosine = (cos(15) + cos(20) + cos(55)) / 3
    assert scores["cosine"] == pytest.approx(cosine, abs=1e-6)
    assert scores["margin"] == pytest.approx(cosine - 1, abs=1e-6)
    assert scores["retrieval"]["with_context"]["MRR"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 5) / 3)
    assert scores["retrieval"]["without_context"]["MRR"] == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert (scores["windows"], scores["articles"], scores["chunks"]) == (3, 1, 5)


def test_ranks_by_hand_in_both_protocols(make_corpus: MakeCorpus) -> None:
    """Two articles, T = 1; the bank is 0, 30, 70 | 100, 145 degrees, and the query is given."""
    corpus = make_corpus(circle(0, 30, 70, 100, 145), [1, 1, 1, 2, 2], [0, 1, 2, 0, 1])
    # windows: 0 -> 30, 30 -> 70, 100 -> 145
    # query 10: 0, 30, 70, 100, 145 -> true 30 is 2nd, 1st without 0
    # query 99: 100, 70, 145, 30, 0 -> true 70 is 2nd, 2nd without 30
    # query 60: 70, 30, 100, 0, 145 -> true 145 is 5th, 4th without 100
    found = evaluate(Tells(circle(10, 99, 60)), corpus, 1)["retrieval"]
    assert found["with_context"] == {
        "R@1": 0.0,
        "R@3": pytest.approx(2 / 3),
        "R@5": 1.0,
        "R@10": 1.0,
        "R@20": 1.0,
        "R@50": 1.0,
        "Contain@50": 1.0,
        "MRR": pytest.approx((1 / 2 + 1 / 2 + 1 / 5) / 3),
    }
    assert found["without_context"] == {
        "R@1": pytest.approx(1 / 3),
        "R@3": pytest.approx(2 / 3),
        "R@5": 1.0,
        "R@10": 1.0,
        "R@20": 1.0,
        "R@50": 1.0,
        "Contain@50": 1.0,
        "MRR": pytest.approx((1 + 1 / 2 + 1 / 4) / 3),
    }


def test_recall_is_a_share_at_each_rank_and_contain_is_its_last(make_corpus: MakeCorpus) -> None:
    """The true next is the r-th of the bank for window r: R@k = k / windows."""
    assert RANKS == (1, 3, 5, 10, 20, 50)
    count = 61
    degrees = np.arange(count) * 2.5
    corpus = make_corpus(circle(*degrees))
    # T = 1, window i: i -> i + 1; a query at 0 degrees ranks row r at r + 1, so the target i + 1 at i + 2
    found = evaluate(Says(lambda contexts: np.repeat(circle(0), len(contexts), 0)), corpus, 1)["retrieval"]
    for k in RANKS:
        assert found["with_context"][f"R@{k}"] == pytest.approx((k - 1) / (count - 1))  # ranks 2 .. count
        assert found["without_context"][f"R@{k}"] == pytest.approx(k / (count - 1))  # each less its context
    assert found["with_context"]["Contain@50"] == found["with_context"]["R@50"]


def test_a_tie_goes_to_the_earlier_row(make_corpus: MakeCorpus) -> None:
    bank = circle(0, 50, 50, 50, 0, 50)
    article, position = [1, 1, 2, 2, 3, 3], [0, 1, 0, 1, 0, 1]
    corpus = make_corpus(bank, article, position)
    # windows 0 -> 1, 2 -> 3, 4 -> 5; the query is 50 degrees: rows 1, 2, 3, 5 tie
    found = evaluate(Says(lambda contexts: np.repeat(circle(50), len(contexts), 0)), corpus, 1)["retrieval"]
    assert found["with_context"]["MRR"] == pytest.approx((1 / 1 + 1 / 3 + 1 / 4) / 3)
    assert found["without_context"]["MRR"] == pytest.approx((1 / 1 + 1 / 2 + 1 / 4) / 3)


def test_a_perfect_predictor_is_always_first(corpus: Corpus) -> None:
    scores = evaluate(Tells(windows(corpus, 5).targets()), corpus, 5)
    assert scores["cosine"] == pytest.approx(1, abs=1e-6)
    assert scores["margin"] > 0
    for protocol in ("with_context", "without_context"):
        assert set(scores["retrieval"][protocol].values()) == {1.0}


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), length=st.integers(1, 6))
def test_ranks_are_those_of_sorting_everything(corpus: Corpus, seed: int, length: int) -> None:
    data = windows(corpus, length)
    answers = normalise(np.random.default_rng(seed).standard_normal((len(data), 16)))
    expected: dict[str, list[int]] = {"with_context": [], "without_context": []}
    for row, target in enumerate(data.target.tolist()):
        order = np.argsort(-(corpus.vectors @ answers[row]), kind="stable").tolist()
        expected["with_context"].append(1 + order.index(target))
        left = [r for r in order if r not in set(data.rows()[row].tolist())]
        expected["without_context"].append(1 + left.index(target))
    found = evaluate(Tells(answers), corpus, length)["retrieval"]
    for protocol, ranks in expected.items():
        assert found[protocol]["MRR"] == pytest.approx(np.mean([1 / rank for rank in ranks]), abs=2e-3)
        assert found[protocol]["R@10"] == pytest.approx(np.mean([rank <= 10 for rank in ranks]), abs=0.011)


def test_many_windows_are_scored_in_blocks_as_at_once(make_corpus: MakeCorpus) -> None:
    vectors = np.random.default_rng(0).standard_normal((1100, 8))
    corpus = make_corpus(vectors)
    batches: list[int] = []

    def answer(contexts: Floats) -> Floats:
        batches.append(len(contexts))
        return contexts[:, -1]

    scores = evaluate(Says(answer), corpus, 5)
    assert sum(batches) == 1095
    assert len(batches) > 1
    data = windows(corpus, 5)
    assert scores["cosine"] == pytest.approx(float((data.contexts()[:, -1] * data.targets()).sum(1).mean()), abs=1e-6)


# Baselines


def test_the_baselines_are_their_formulae(corpus: Corpus, other: Corpus) -> None:
    data = windows(other, 5)
    contexts, truth = data.contexts().astype(np.float64), data.targets().astype(np.float64)
    train = windows(corpus, 5)
    x = train.contexts().reshape(-1, 80).astype(np.float64)
    weights = np.linalg.inv(x.T @ x + 30 * np.eye(80)) @ x.T @ train.targets()
    answers = {
        "persistence": contexts[:, 4],
        "mean": contexts.sum(axis=1) / 5,
        "weighted_mean": sum(0.7 ** (4 - t) * contexts[:, t] for t in range(5)),
        "ridge": contexts.reshape(-1, 80) @ weights,
    }
    scores = evaluate(Says(lambda given: given[:, 0]), other, 5, corpus)["baselines"]
    assert scores.keys() == answers.keys()
    for name, answer in answers.items():
        unit = answer / np.linalg.norm(answer, axis=1, keepdims=True)
        cosine = (unit * truth).sum(axis=1)
        assert scores[name]["cosine"] == pytest.approx(cosine.mean(), abs=1e-5)
        assert scores[name]["cosine_std"] == pytest.approx(cosine.std(), abs=1e-5)
        assert scores[name]["margin"] == pytest.approx((cosine - (unit * contexts[:, 4]).sum(1)).mean(), abs=1e-5)
        similarity = unit @ other.vectors.T
        ranks = 1 + (similarity > np.take_along_axis(similarity, data.target[:, None], 1)).sum(axis=1)
        mrr = np.mean(1 / ranks)
        assert scores[name]["retrieval"]["with_context"]["MRR"] == pytest.approx(mrr, abs=5e-3)
    assert len({round(score["cosine"], 5) for score in scores.values()}) == 4


def test_persistence_has_no_margin(corpus: Corpus) -> None:
    scores = evaluate(Says(lambda contexts: contexts[:, -1]), corpus, 5)
    assert scores["baselines"]["persistence"] == {
        key: scores[key] for key in ("cosine", "cosine_std", "margin", "retrieval")
    }
    assert scores["margin"] == pytest.approx(scores["cosine"] - 1, abs=1e-6)


def test_ridge_requires_a_training_corpus(corpus: Corpus) -> None:
    scores = evaluate(Says(lambda contexts: contexts[:, -1]), corpus, 5)
    assert set(scores["baselines"]) == {"persistence", "mean", "weighted_mean"}


def test_ridge_solves_its_normal_equations(corpus: Corpus) -> None:
    train = windows(corpus, 2)
    x, y = train.contexts().reshape(-1, 32).astype(np.float64), train.targets().astype(np.float64)
    weights = np.linalg.solve(x.T @ x + 30.0 * np.eye(32), x.T @ y)
    answer = x @ weights
    expected = answer / np.linalg.norm(answer, axis=1, keepdims=True)
    assert np.allclose(ridge(train)(train.contexts()), expected, atol=1e-4)


def test_baseline_scores_equal_the_evaluation(corpus: Corpus) -> None:
    early = baseline_scores(windows(corpus, 5))
    late = evaluate(Says(lambda contexts: contexts[:, -1]), corpus, 5)["baselines"]
    assert early == {name: pytest.approx(score["cosine"], abs=1e-6) for name, score in late.items()}


def test_rejects_articles_too_short_for_a_window(make_corpus: MakeCorpus) -> None:
    with pytest.raises(ValueError, match="no article has more than 5 chunks"):
        evaluate(Says(lambda contexts: contexts[:, -1]), make_corpus(circle(0, 1, 2, 3, 4)), 5)
