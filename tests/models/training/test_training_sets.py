"""Several data sets are trained on as one: articles stay apart, vectors stay on disk, and every window is there."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from models.retrieval.corpus import BadCorpus, Corpus, read_corpus, write_corpus
from models.training.training_sets import map_training_sets
from models.vectors import StoredVectors, normalise
from models.windows import OtherDimension, compact_windows, draw_articles, hold_out, windows


def test_the_windows_are_those_of_every_set(corpus_dir: Path, other_dir: Path, corpus: Corpus, other: Corpus) -> None:
    data = windows(map_training_sets([corpus_dir, other_dir]), 5)
    apart = windows(corpus, 5), windows(other, 5)
    assert len(data) == sum(map(len, apart))
    assert np.array_equal(data.contexts(), np.concatenate([each.contexts() for each in apart]))
    assert np.array_equal(data.targets(), np.concatenate([each.targets() for each in apart]))


def test_articles_with_the_same_id_in_two_sets_are_two(corpus_dir: Path, other_dir: Path, corpus: Corpus) -> None:
    """Both number their articles from 100 on; no article is on both sides of the split, counted by its chunks."""
    both = map_training_sets([corpus_dir, other_dir])
    assert np.array_equal(np.unique(both.article), np.arange(12 + 6))
    rest, held = hold_out(windows(both, 5), 0.3, seed=1)
    used = [{int(row) for rows in (part.rows(), part.target) for row in rows.ravel()} for part in (rest, held)]
    assert not used[0] & used[1]
    assert not set(both.article[list(used[0])]) & set(both.article[list(used[1])])
    assert {int(number) < 12 for number in np.unique(held.article)} == {True, False}  # of both sets


def test_one_set_is_split_as_it_is_in_memory(corpus_dir: Path, corpus: Corpus) -> None:
    stored = hold_out(windows(map_training_sets([corpus_dir]), 5), 0.25, seed=3)
    in_memory = hold_out(windows(corpus, 5), 0.25, seed=3)
    assert [part.start.tolist() for part in stored] == [part.start.tolist() for part in in_memory]


def test_vectors_stay_on_disk_also_those_of_some_windows_only(corpus_dir: Path, other_dir: Path) -> None:
    held = hold_out(windows(map_training_sets([corpus_dir, other_dir]), 5), 0.3, seed=1)[1]
    own = compact_windows(held)
    assert isinstance(own.vectors, StoredVectors)
    assert all(not array.flags.owndata for array in own.vectors.arrays[:-1])  # views of mapped files
    assert len(own.vectors) < len(held.vectors)
    assert np.array_equal(own.contexts(), held.contexts())


def test_as_an_array_they_are_all_vectors(corpus_dir: Path, other_dir: Path, corpus: Corpus, other: Corpus) -> None:
    found = map_training_sets([corpus_dir, other_dir])
    assert np.array_equal(np.asarray(found.vectors), np.concatenate([corpus.vectors, other.vectors]))
    assert len(found) == len(corpus) + len(other)
    assert found.dim == 16


def test_rejects_a_set_that_is_given_twice(corpus_dir: Path) -> None:
    with pytest.raises(BadCorpus, match="given twice"):
        map_training_sets([corpus_dir, corpus_dir / "." / ".." / corpus_dir.name])


def test_rejects_sets_of_different_dimensions(corpus_dir: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path, normalise(np.ones((3, 8))), [{"article_id": 1, "title": "", "chunks": ["a", "b", "c"]}])
    with pytest.raises(OtherDimension, match="D = 8"):
        map_training_sets([corpus_dir, tmp_path])


def test_rejects_what_is_no_set(corpus_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus_dir, tmp_path / "damaged")
    (tmp_path / "damaged" / "vectors.f16.npy").write_bytes(b"no array")
    for wrong in (tmp_path / "nowhere", tmp_path / "damaged"):
        with pytest.raises(BadCorpus):
            map_training_sets([corpus_dir, wrong])


@pytest.mark.parametrize(("most", "articles"), [(15, 1), (44, 2), (45, 3), (1000, 12), (3, 1)])
def test_articles_are_drawn_whole_up_to_a_number_of_windows(corpus: Corpus, most: int, articles: int) -> None:
    drawn = draw_articles(windows(corpus, 5), most, seed=2)
    assert len(np.unique(drawn.article)) == articles
    assert len(drawn) == 15 * articles


def test_the_text_is_not_read(corpus_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus_dir, tmp_path / "data")
    (tmp_path / "data" / "articles.jsonl.gz").write_bytes(b"not gzip")
    assert len(map_training_sets([tmp_path / "data"])) == len(read_corpus(corpus_dir))
