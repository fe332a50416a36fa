"""Nets whose nature is known get the verdict that they deserve, and every figure is what it is called."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.diagnose import Predict, diagnose, for_card, stretches
from models.registry.checkpoint import BadCheckpoint
from models.retrieval.corpus import BadCorpus, Corpus, map_vectors, write_corpus
from models.vectors import Floats, normalise
from models.windows import NoWindows, PairCorpus, Pairs

MakeCorpus = Callable[..., Corpus]


def _topics(articles: int = 12, chunks: int = 20, dim: int = 32, noise: float = 0.2) -> Floats:
    """Chunks `(articles * chunks, dim)` that scatter around the topic of their article, without any order."""
    random = np.random.default_rng(0)
    topic = normalise(random.standard_normal((articles, 1, dim)))
    scatter = random.standard_normal((articles, chunks, dim))
    return normalise(topic + noise * scatter).reshape(-1, dim)


def _cycles(articles: int = 12, period: int = 7, rounds: int = 4, dim: int = 32) -> Floats:
    """Chunks of articles that repeat the same `period` chunks."""
    cycle = np.random.default_rng(1).standard_normal((articles, period, dim))
    return normalise(np.tile(cycle, (1, rounds, 1)).reshape(-1, dim))


def _corpus(make: MakeCorpus, vectors: Floats, articles: int = 12) -> Corpus:
    chunks = len(vectors) // articles
    return make(vectors, np.repeat(np.arange(articles), chunks), np.tile(np.arange(chunks), articles))


def _follows(corpus: Corpus) -> Predict:
    """Return a net that knows which chunk follows the last one that it reads."""
    return lambda contexts: corpus.vectors[(contexts[:, -1] @ corpus.vectors.T).argmax(axis=1) + 1]


def _last(contexts: Floats) -> Floats:
    return contexts[:, -1]


def _mean(contexts: Floats) -> Floats:
    return normalise(contexts.mean(axis=1))


def _run(predict: Predict, corpus: Corpus, length: int = 5, **options: Any) -> dict[str, Any]:
    return diagnose(predict, corpus, stretches(corpus, length, **options))


def test_net_that_copies_the_last_chunk_copies(make_corpus: MakeCorpus) -> None:
    found = _run(_last, _corpus(make_corpus, _topics()))
    assert found["verdict"]["kind"] == "copies"
    assert found["verdict"]["text"].startswith("Answers copy the last chunk read (cosine 1.00)")
    assert found["cosine"]["net"] == found["cosine"]["persistence"]
    assert found["cosine"]["net"][found["offsets"].index(0)] == pytest.approx(1)
    assert found["order"]["last_only"]["loss"]["mean"] == 0


def test_net_that_copies_the_first_chunk_copies_that_one(make_corpus: MakeCorpus) -> None:
    found = _run(lambda contexts: contexts[:, 0], _corpus(make_corpus, _topics()))
    assert found["verdict"]["text"].startswith("Answers copy the chunk read at offset -4")
    assert found["order"]["first_only"]["loss"]["mean"] == 0


@pytest.mark.parametrize("period", [3, 7])
def test_net_that_knows_the_next_chunk_of_a_cycle_predicts(make_corpus: MakeCorpus, period: int) -> None:
    corpus = _corpus(make_corpus, _cycles(period=period))
    found = _run(_follows(corpus), corpus, steps=5)
    assert found["verdict"]["kind"] == "predicts"
    assert found["cosine"]["net"][found["offsets"].index(1)] == pytest.approx(1)
    assert found["rollout"]["net"] == pytest.approx([1] * 5)
    assert found["order"]["reversed"]["loss"]["mean"] > 0.5
    assert found["order"]["last_only"]["loss"]["mean"] == pytest.approx(0, abs=1e-6)
    assert all(gain["interval"][0] > 0 for gain in found["rollout_gain"])


def test_net_whose_answers_are_vague_but_nearest_to_the_next_chunk_predicts(make_corpus: MakeCorpus) -> None:
    corpus = _corpus(make_corpus, _cycles())
    known = _follows(corpus)

    def vague(contexts: Floats) -> Floats:
        return normalise(known(contexts) + contexts.mean(axis=1))

    found = _run(vague, corpus)
    assert found["verdict"]["kind"] == "predicts"
    assert found["verdict"]["text"].startswith("Answers are near the next chunk")


def test_net_that_ignores_order_knows_the_topic(make_corpus: MakeCorpus) -> None:
    found = _run(_mean, _corpus(make_corpus, _topics()))
    assert found["verdict"]["kind"] == "topic"
    assert "most of the score is topic" in found["verdict"]["text"]
    assert found["verdict"]["text"].endswith(
        "They are as near to the next chunk as the best baseline, mean; order does not matter."
    )
    for altered in ("shuffled", "reversed"):
        assert found["order"][altered]["loss"]["mean"] == pytest.approx(0, abs=1e-6)
    assert found["order"]["last_only"]["loss"]["interval"][0] > 0


def test_net_that_reads_another_space_has_nothing_to_do_with_the_articles(make_corpus: MakeCorpus) -> None:
    turn = np.random.default_rng(3).standard_normal((32, 32)).astype(np.float32)
    found = _run(lambda contexts: normalise(contexts.mean(axis=1) @ turn), _corpus(make_corpus, _topics()))
    assert found["verdict"]["kind"] == "unrelated"
    assert "another encoder" in found["verdict"]["text"]


def test_offsets_count_from_the_last_chunk_read(make_corpus: MakeCorpus) -> None:
    corpus = _corpus(make_corpus, _topics())
    found = _run(_mean, corpus, steps=2)
    start = np.concatenate([np.arange(20 * article, 20 * article + 14) for article in range(12)])
    answers = _mean(corpus.vectors[start[:, None] + np.arange(5)])
    assert found["offsets"] == [-4, -3, -2, -1, 0, 1, 2]
    expected = [np.vecdot(answers, corpus.vectors[start + at]).mean() for at in range(7)]
    assert found["cosine"]["net"] == pytest.approx(expected, abs=1e-6)
    assert found["windows"] == len(start)
    to_next = [np.vecdot(corpus.vectors[start + 5], corpus.vectors[start + at]).mean() for at in range(7)]
    assert found["cosine"]["true_next"] == pytest.approx(to_next, abs=1e-6)
    assert abs(found["other_articles"]["true_next"]) < 0.2


def test_answers_are_fed_back(make_corpus: MakeCorpus) -> None:
    corpus = _corpus(make_corpus, _topics())
    found = _run(_last, corpus)
    start = np.concatenate([np.arange(20 * article, 20 * article + 13) for article in range(12)])
    expected = [np.vecdot(corpus.vectors[start + 4], corpus.vectors[start + 5 + step]).mean() for step in range(3)]
    assert found["rollout"]["net"] == pytest.approx(expected, abs=1e-6)
    assert len(found["rollout_gain"]) == 3


def test_articles_are_divided_by_the_cosine_of_adjacent_chunks(make_corpus: MakeCorpus) -> None:
    parts = [_topics(articles=4, noise=noise) for noise in (0.4, 0.2, 0.1)]
    found = _run(_mean, _corpus(make_corpus, np.concatenate(parts)))["coherence"]
    assert [part["coherence"] for part in found] == ["low", "middle", "high"]
    assert [part["articles"] for part in found] == [4, 4, 4]
    for part, vectors in zip(found, parts, strict=True):
        by_article = vectors.reshape(4, 20, -1)
        adjacent = np.vecdot(by_article[:, 1:], by_article[:, :-1]).mean()
        assert part["adjacent_cosine"] == pytest.approx(adjacent, abs=1e-5)
        assert part["verdict"]["kind"] == "topic"


def test_same_seed_gives_the_same_figures_and_another_one_does_not(make_corpus: MakeCorpus) -> None:
    corpus = _corpus(make_corpus, _topics())
    weights = np.arange(1, 6, dtype=np.float32)

    def weighted(contexts: Floats) -> Floats:
        return normalise(np.tensordot(contexts, weights, axes=(1, 0)))

    def figures(seed: int) -> dict[str, Any]:
        return diagnose(weighted, corpus, stretches(corpus, 5, sample=40, seed=seed), seed)

    assert figures(1) == figures(1)
    assert figures(1) != figures(2)
    assert (figures(1)["windows"], figures(1)["drawn_from"]) == (40, 12 * 13)
    drawn = [stretches(corpus, 5, sample=40, seed=seed).rows for seed in (1, 2)]
    assert not np.array_equal(*drawn)


def test_no_shuffled_context_keeps_its_order(make_corpus: MakeCorpus) -> None:
    corpus = _corpus(make_corpus, _topics())
    found = _run(lambda contexts: contexts[:, -1], corpus, length=2)
    assert found["order"]["shuffled"]["loss"] == found["order"]["reversed"]["loss"]


def test_context_of_one_chunk_has_no_order(make_corpus: MakeCorpus) -> None:
    found = _run(_last, _corpus(make_corpus, _topics()), length=1)
    assert found["order"] == {}
    assert found["offsets"] == [0, 1, 2, 3]


def test_long_context_shows_its_last_five_chunks(make_corpus: MakeCorpus) -> None:
    found = _run(_last, _corpus(make_corpus, _topics()), length=9)
    assert found["offsets"] == [-4, -3, -2, -1, 0, 1, 2, 3]
    assert found["cosine"]["net"][4] == pytest.approx(1)


def test_one_article_has_no_interval_and_no_terciles(make_corpus: MakeCorpus) -> None:
    found = _run(_last, make_corpus(_topics(articles=1)))
    assert found["margin"]["interval"] is None
    assert found["coherence"] == []
    assert found["verdict"]["kind"] == "copies"


def test_article_with_most_windows_is_compared_with_others(make_corpus: MakeCorpus) -> None:
    topics = np.eye(2, 8)[[0] * 9 + [1]].repeat(20, axis=0)
    corpus = make_corpus(topics, np.repeat([0] * 9 + [1], 20), np.arange(200))
    assert _run(_mean, corpus)["other_articles"]["net"] == pytest.approx(0)


def test_chunks_on_either_side_of_a_gap_are_not_adjacent(make_corpus: MakeCorpus) -> None:
    halves = np.eye(2, 8)[[0, 1] * 3].repeat(10, axis=0)
    positions = np.tile([*range(10), *range(50, 60)], 3)
    found = _run(_mean, make_corpus(halves, np.repeat([0, 1, 2], 20), positions))
    assert [part["adjacent_cosine"] for part in found["coherence"]] == [1, 1, 1]


def test_difference_too_small_to_matter_is_not_put_into_words(make_corpus: MakeCorpus) -> None:
    corpus = _corpus(make_corpus, _cycles(period=7))
    known = _follows(corpus)

    def nearly_mean(contexts: Floats) -> Floats:
        return normalise(contexts.mean(axis=1) + 0.0003 * known(contexts))

    found = _run(nearly_mean, corpus)
    assert found["order"]["shuffled"]["loss"]["interval"][0] > 0
    assert found["verdict"]["text"].endswith("order does not matter.")


def test_articles_that_are_too_short_are_refused(make_corpus: MakeCorpus) -> None:
    corpus = _corpus(make_corpus, _topics(chunks=7))
    with pytest.raises(NoWindows, match="8 consecutive chunks: T = 5, and 3 that follow"):
        stretches(corpus, 5)
    assert len(stretches(corpus, 5, steps=2)) == 12


def test_gap_in_the_positions_ends_a_stretch(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus(_topics(articles=1), None, [*range(10), *range(11, 21)])
    assert stretches(corpus, 5).rows[:, 0].tolist() == [0, 1, 2, 10, 11, 12]


def test_pairs_are_followed_by_one_chunk(make_corpus: MakeCorpus) -> None:
    vectors = _topics()
    rows = np.concatenate([np.arange(6) + 20 * article for article in range(12)]).reshape(12, 6)
    pairs = Pairs(vectors, rows[:, 0], np.arange(12, dtype=np.int32), 5, rows[:, :5], rows[:, 5])
    none = np.zeros(len(vectors), np.int32)
    found = _run(_last, PairCorpus(vectors, none, np.arange(len(vectors), dtype=np.int32), {}, pairs=pairs))
    assert (found["steps"], found["windows"], found["offsets"][-1]) == (1, 12, 1)
    assert [part["articles"] for part in found["coherence"]] == [4, 4, 4]


def test_answer_that_is_not_finite_is_refused(make_corpus: MakeCorpus) -> None:
    with pytest.raises(BadCheckpoint, match="not finite"):
        _run(lambda contexts: np.full_like(contexts[:, 0], np.nan), _corpus(make_corpus, _topics()))


def test_progress_ends_at_its_total(make_corpus: MakeCorpus) -> None:
    corpus = _corpus(make_corpus, _topics(chunks=100))
    seen: list[tuple[int, int]] = []
    diagnose(_last, corpus, stretches(corpus, 5), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_card_has_the_verdict_and_a_few_figures(make_corpus: MakeCorpus) -> None:
    found = _run(_last, _corpus(make_corpus, _topics()))
    block = for_card(found)
    assert block["verdict"] == "copies"
    assert block["cosine"]["+0"] == 1
    assert list(block["cosine"]) == ["-4", "-3", "-2", "-1", "+0", "+1", "+2", "+3"]
    assert block["order_loss"]["last_only"] == 0
    assert len(block["rollout"]) == 3


def test_mapped_vectors_give_the_figures_of_those_in_memory(tmp_path: Path) -> None:
    vectors = _topics(dim=24).astype(np.float16).astype(np.float32)
    lines = [{"article_id": a, "title": "", "chunks": [""] * 20} for a in range(12)]
    write_corpus(tmp_path, vectors, lines)
    mapped = map_vectors(tmp_path)
    rows = np.arange(12 * 20)
    whole = Corpus(normalise(vectors), mapped.article, mapped.position, {})
    found = diagnose(_mean, mapped, stretches(mapped, 3))
    assert found["cosine"]["net"] == pytest.approx(_run(_mean, whole, length=3)["cosine"]["net"], abs=1e-6)
    assert np.allclose(mapped.vectors_at(rows), whole.vectors, atol=1e-6)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vectors.f16.npy", np.zeros((240, 2, 2), np.float16), "do not match"),
        ("vectors.f16.npy", np.zeros((239, 24), np.float16), "do not match"),
        ("vectors.f16.npy", np.zeros((240, 24), np.int32), "expected float16, int32"),
        ("vectors.f16.npy", np.full((240, 24), np.nan, np.float16), "vector 0 is not finite"),
        ("index.npy", np.zeros((240, 2), np.float32), "expected float16, int32"),
    ],
)
def test_damaged_data_are_refused(tmp_path: Path, file: str, content: Any, message: str) -> None:
    lines = [{"article_id": a, "title": "", "chunks": [""] * 20} for a in range(12)]
    write_corpus(tmp_path, _topics(dim=24), lines)
    np.save(tmp_path / file, content)
    with pytest.raises(BadCorpus, match=message):
        map_vectors(tmp_path)


def test_data_without_vectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCorpus, match="No such file"):
        map_vectors(tmp_path)
