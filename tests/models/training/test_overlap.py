"""What two data sets share is counted: titles, and chunks that are nearly equal, over all training sets."""

from pathlib import Path

import numpy as np
import pytest

from models.retrieval.corpus import BadCorpus, Corpus, write_corpus
from models.training.overlap import find_overlap
from models.vectors import Floats, normalise


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture
def held_out(tmp_path: Path, corpus: Corpus) -> Path:
    """Three articles: a copy of a training chunk, a near one, and one of 0.94; only the last has a title of its own."""
    noise = np.random.default_rng(5).standard_normal((3, 16))
    copied = corpus.vectors[[3, 40, 77]]
    aside = normalise(noise - np.sum(noise * copied, axis=1, keepdims=True) * copied)
    cosine = np.array([[1.0], [0.96], [0.94]])
    return _write(
        tmp_path / "held", cosine * copied + np.sqrt(1 - cosine**2) * aside, ["Article 3", "Article 4", "New"]
    )


def _write(directory: Path, vectors: Floats, titles: list[str]) -> Path:
    lines = [{"article_id": n, "title": title, "chunks": ["text"]} for n, title in enumerate(titles)]
    write_corpus(directory, normalise(vectors), lines)
    return directory


def test_counts_near_chunks_and_their_articles(held_out: Path, corpus_dir: Path, other_dir: Path) -> None:
    found = find_overlap(held_out, [other_dir, corpus_dir], quiet)
    assert (found.chunks, found.near, found.articles, found.near_articles) == (3, 2, 3, 2)
    assert found.near_share == pytest.approx(2 / 3, abs=1e-6)
    assert found.train_chunks == 12 * 20 + 6 * 20


def test_names_the_titles_that_are_on_both_sides(held_out: Path, corpus_dir: Path, other_dir: Path) -> None:
    assert find_overlap(held_out, [other_dir, corpus_dir], quiet).shared_titles == ["Article 3", "Article 4"]


def test_articles_without_a_title_share_none(tmp_path: Path) -> None:
    vectors = np.eye(4)
    one, other = (_write(tmp_path / name, vectors[at], [""]) for name, at in (("one", [0]), ("other", [1])))
    found = find_overlap(one, [other], quiet)
    assert (found.shared_titles, found.near) == ([], 0)


def test_progress_ends_at_the_last_training_chunk(held_out: Path, corpus_dir: Path, other_dir: Path) -> None:
    seen: list[tuple[int, int]] = []
    find_overlap(held_out, [corpus_dir, other_dir], lambda done, total: seen.append((done, total)))
    assert seen == [(240, 360), (360, 360)]


def test_rejects_damaged_articles(held_out: Path, corpus_dir: Path) -> None:
    (held_out / "articles.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(BadCorpus, match="unreadable articles"):
        find_overlap(held_out, [corpus_dir], quiet)
