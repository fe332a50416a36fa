"""Windows stay inside one article, miss none, and no article is on both sides of a split."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.retrieval.corpus import Corpus
from models.windows import hold_out, windows

MakeCorpus = Callable[..., Corpus]


def test_windows_of_the_tiny_corpus_are_all_there(corpus: Corpus) -> None:
    data = windows(corpus, 5)
    assert len(data) == 12 * 15
    assert data.start.tolist() == [20 * a + s for a in range(12) for s in range(15)]
    assert data.article.tolist() == [100 + a for a in range(12) for _ in range(15)]


def test_a_window_is_its_context_and_the_next(corpus: Corpus) -> None:
    data = windows(corpus, 3)
    assert data.rows()[18].tolist() == [21, 22, 23]
    assert data.target[18] == 24
    assert np.array_equal(data.contexts()[18], corpus.vectors[21:24])
    assert np.array_equal(data.targets()[18], corpus.vectors[24])
    assert data.contexts().shape == (12 * 17, 3, 16)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    articles=st.lists(st.lists(st.integers(0, 15), unique=True, max_size=12).map(sorted), max_size=5),
    length=st.integers(1, 6),
)
def test_every_run_of_positions_gives_its_windows_and_nothing_else(
    make_corpus: MakeCorpus, articles: list[list[int]], length: int
) -> None:
    article = [a for a, positions in enumerate(articles) for _ in positions]
    position = [p for positions in articles for p in positions]
    corpus = make_corpus(np.ones((len(position), 2)), article, position)
    expected = [
        row
        for row in range(len(position))
        if all(
            row + step < len(position)
            and article[row + step] == article[row]
            and position[row + step] == position[row] + step
            for step in range(length + 1)
        )
    ]
    data = windows(corpus, length)
    assert data.start.tolist() == expected
    assert data.article.tolist() == [article[row] for row in expected]


def test_a_gap_breaks_windows(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus(np.ones((9, 2)), None, [0, 1, 2, 3, 5, 6, 7, 8, 9])
    assert windows(corpus, 3).start.tolist() == [0, 4, 5]


@pytest.mark.parametrize("chunks", [0, 1, 5])
def test_too_short_an_article_gives_none(make_corpus: MakeCorpus, chunks: int) -> None:
    data = windows(make_corpus(np.ones((chunks, 2))), 5)
    assert len(data) == 0
    assert data.contexts().shape == (0, 5, 2)


@pytest.mark.parametrize(("share", "held"), [(0.25, 3), (0.5, 6), (0.0, 1), (0.01, 1)])
def test_a_split_is_by_article_and_loses_nothing(corpus: Corpus, share: float, held: int) -> None:
    data = windows(corpus, 5)
    rest, held_out = hold_out(data, share, seed=3)
    assert not set(rest.article) & set(held_out.article)
    assert len(set(held_out.article)) == held
    assert sorted([*rest.start, *held_out.start]) == data.start.tolist()
    assert rest.length == held_out.length == 5
    assert rest.vectors is data.vectors


def test_a_smaller_share_of_the_articles_is_a_part_of_a_greater_one(corpus: Corpus) -> None:
    data = windows(corpus, 5)
    drawn = [set[int]().union(*(part.article for part in hold_out(data, 0.25, 3, used))) for used in (0.3, 0.6, 1)]
    assert [len(articles) for articles in drawn] == [4, 7, 12]
    assert drawn[0] < drawn[1] < drawn[2]


def test_of_few_articles_a_split_uses_at_least_two(corpus: Corpus) -> None:
    rest, held_out = hold_out(windows(corpus, 5), 0.25, seed=3, used=0.001)
    assert (len(set(rest.article)), len(set(held_out.article))) == (1, 1)


def test_a_split_depends_on_its_seed_alone(corpus: Corpus) -> None:
    data = windows(corpus, 5)
    assert hold_out(data, 0.3, 1)[1].start.tolist() == hold_out(data, 0.3, 1)[1].start.tolist()
    assert len({tuple(hold_out(data, 0.3, seed)[1].start.tolist()) for seed in range(5)}) > 1
