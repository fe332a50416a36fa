"""Ranks in a bank are those of the definition, whatever copies the bank holds and however it is cut into blocks."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from models.bank import Ranked, draw, metrics, rank_in_bank, scores_in_bank
from models.evaluate import baselines, evaluate_windows
from models.retrieval.corpus import Corpus
from models.vectors import Floats, normalise
from models.windows import require_windows

MEAN = Ranked(baselines(5, None)["weighted_mean"])


def in_blocks(vectors: Floats, size: int) -> Callable[[], Iterator[Floats]]:
    return lambda: (vectors[first : first + size] for first in range(0, len(vectors), size))


def rounded(vectors: Floats) -> Floats:
    return normalise(vectors.astype(np.float16))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_ranks_in_its_own_corpus_are_those_of_evaluate(corpus: Corpus, size: int) -> None:
    data = require_windows(corpus, 5)
    right = evaluate_windows(MEAN.predict, data)
    found, held = rank_in_bank({"mean": MEAN}, data, in_blocks(corpus.vectors, size), len(corpus))
    assert held == len(data)
    for name in ("ranks", "ranks_without"):
        assert np.array_equal(getattr(found["mean"], name), getattr(right, name))
    for name in ("cosine", "margin"):
        assert np.allclose(getattr(found["mean"], name), getattr(right, name), atol=1e-6)


def test_copies_of_the_true_chunk_and_rounding_do_not_cost_ranks(corpus: Corpus) -> None:
    data = require_windows(corpus, 5)
    right = evaluate_windows(MEAN.predict, data)
    bank = np.concatenate([rounded(corpus.vectors), corpus.vectors])
    found, _ = rank_in_bank({"mean": MEAN}, data, in_blocks(bank, 50), len(bank))
    # Every chunk stands there twice, so twice as many are better; the true one and its copy count as one.
    assert np.mean(found["mean"].ranks == 2 * right.ranks - 1) > 0.99
    assert np.mean(found["mean"].ranks_without == 2 * right.ranks_without - 1) > 0.99


def test_a_bank_without_the_true_chunks_is_searched_as_if_they_were_added(corpus: Corpus, other: Corpus) -> None:
    data = require_windows(corpus, 5)
    found, held = rank_in_bank({"mean": MEAN}, data, in_blocks(other.vectors, 64), len(other))
    queries = MEAN.predict(data.contexts())
    better = (queries @ other.vectors.T > np.vecdot(queries, data.targets())[:, None]).sum(axis=1)
    assert held == 0
    assert np.array_equal(found["mean"].ranks, 1 + better)
    assert np.array_equal(found["mean"].ranks_without, 1 + better)


def test_towers_search_what_they_make_of_the_bank(corpus: Corpus) -> None:
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 16)))[0].astype(np.float32)
    data = require_windows(corpus, 5)
    turned = Ranked(lambda contexts: MEAN.predict(contexts) @ turn, lambda vectors: vectors @ turn)
    found, _ = rank_in_bank({"mean": MEAN, "turned": turned}, data, in_blocks(corpus.vectors, 100), len(corpus))
    assert np.mean(found["mean"].ranks == found["turned"].ranks) > 0.99


def test_a_sample_is_drawn_without_repetition_and_seeded(corpus: Corpus) -> None:
    data = require_windows(corpus, 5)
    some = draw(data, 30)
    assert len(set(some.start.tolist())) == 30
    assert some.start.tolist() == draw(data, 30).start.tolist() != draw(data, 30, seed=1).start.tolist()
    assert draw(data, None) is draw(data, 10**6) is data


def test_a_bank_of_another_size_and_an_infinite_answer_are_rejected(corpus: Corpus) -> None:
    data = require_windows(corpus, 5)
    with pytest.raises(ValueError, match="the bank has 240 vectors, not 9"):
        rank_in_bank({"mean": MEAN}, data, in_blocks(corpus.vectors, 100), 9)
    broken = Ranked(lambda contexts: contexts[:, 0] * np.float32(np.inf))
    with pytest.raises(ValueError, match="not finite"):
        rank_in_bank({"broken": broken}, data, in_blocks(corpus.vectors, 100), 240)


def test_metrics_have_the_names_of_their_file(corpus: Corpus) -> None:
    data = require_windows(corpus, 5)
    known = evaluate_windows(MEAN.predict, data)
    scores = scores_in_bank({"net": MEAN, "mean": MEAN}, data, in_blocks(corpus.vectors, 100), len(corpus))
    assert scores["baselines"]["mean"]["cosine"] == scores["cosine"]
    assert scores["bank"] == {"chunks": 240, "true_chunks": len(data)}
    found = metrics(scores, "with_context")
    assert {"Nq_effective", "R_at_k", "MRR", "mode", "topK"} <= found.keys()
    assert (found["Nq_effective"], found["mode"], found["topK"]) == (len(data), "with_context", 50)
    assert found["R_at_k"]["5"] == np.mean(known.ranks <= 5)
    assert found["cosine_std"] == pytest.approx(known.cosine.std())
