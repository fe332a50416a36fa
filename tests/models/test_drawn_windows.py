"""A bundle of a large corpus is scored on windows that are drawn from it, the same ones each time."""

import numpy as np

from models.retrieval.corpus import Corpus, MappedCorpus
from models.windows import DRAWN, MAX_SCORED, DrawnWindows, scored_windows, windows


def long_corpus(rows: int) -> Corpus:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((rows, 4)).astype(np.float32)
    numbers = np.arange(rows, dtype=np.int32)
    return Corpus(vectors, numbers // 20, numbers % 20, {})


def test_all_windows_of_a_corpus_in_memory_count_if_there_are_few(corpus: Corpus) -> None:
    data = scored_windows(corpus, 5)
    assert not isinstance(data, DrawnWindows)
    assert np.array_equal(data.start, windows(corpus, 5).start)


def test_drawn_windows_are_windows_of_the_corpus() -> None:
    corpus = long_corpus(2 * MAX_SCORED)
    data = scored_windows(corpus, 5)
    assert isinstance(data, DrawnWindows)
    assert len(data) == DRAWN
    target = data.target_in_corpus
    assert np.array_equal(corpus.vectors[target], data.targets())
    assert np.array_equal(corpus.vectors[target[:, None] + np.arange(-5, 0)], data.contexts())
    assert np.isin(target - 5, windows(corpus, 5).start).all()
    assert np.array_equal(scored_windows(corpus, 5).start, data.start)


def test_windows_of_a_corpus_on_disk_are_those_of_the_same_corpus_in_memory() -> None:
    corpus = long_corpus(2 * MAX_SCORED)
    index = np.column_stack([corpus.article, corpus.position])
    mapped = MappedCorpus(corpus.vectors.astype(np.float16), index, np.zeros((len(corpus), 4), np.int64), b"")
    one, other = scored_windows(corpus, 5), scored_windows(mapped, 5)
    assert np.array_equal(one.target_in_corpus, other.target_in_corpus)
