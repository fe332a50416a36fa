"""Files of pairs are scored as the corpus that they were cut from, and banks are read from any form."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.evaluate import baselines, evaluate_windows
from models.retrieval.corpus import BadCorpus, Corpus, write_corpus
from models.training.array_files import BadArrays
from models.training.pairs import PAIRS, bank_of, read_data
from models.vectors import normalise
from models.windows import NoWindows, OtherDimension, PairCorpus, require_windows, windows

MEAN = baselines(5, None)["mean"]


def saved(directory: Path, **arrays: Any) -> Path:
    np.savez(directory / "pairs.npz", **arrays)
    return directory / "pairs.npz"


def their_arrays(corpus: Corpus) -> dict[str, Any]:
    data = require_windows(corpus, 5)
    return {"context_sequences": data.contexts(), "target_vectors": data.targets()}


def test_pairs_score_as_the_windows_that_they_are(tmp_path: Path, corpus: Corpus) -> None:
    right = require_windows(corpus, 5)
    found = read_data(
        saved(tmp_path, **their_arrays(corpus), truth_keys=np.stack([right.article, right.target], axis=1))
    )
    data = require_windows(found, 5)
    assert np.allclose(data.contexts(), right.contexts(), atol=1e-6)
    assert np.allclose(data.targets(), right.targets(), atol=1e-6)
    assert len(found) == len(corpus), "every chunk is kept once"
    assert len(set(data.article.tolist())) == 12
    ours, theirs = (evaluate_windows(MEAN, each) for each in (data, right))
    assert np.array_equal(ours.ranks, theirs.ranks)
    assert np.array_equal(ours.ranks_without, theirs.ranks_without)
    some = data.take(np.array([3, 170]))
    assert np.allclose(some.contexts(), right.contexts()[[3, 170]], atol=1e-6)
    assert np.allclose(some.targets(), right.targets()[[3, 170]], atol=1e-6)


def test_chunks_are_kept_once_across_blocks(tmp_path: Path) -> None:
    vectors = normalise(np.random.default_rng(0).standard_normal((3 * PAIRS // 2, 4)))
    rows = np.arange(len(vectors) - 2)[:, None] + np.arange(2)
    found = read_data(saved(tmp_path, contexts=vectors[rows], targets=vectors[2:]))
    assert np.allclose(found.vectors, vectors, atol=1e-6)
    assert np.array_equal(require_windows(found, 2).rows(), rows)


def test_articles_are_guessed_from_pairs_that_follow_each_other(tmp_path: Path, corpus: Corpus) -> None:
    arrays = their_arrays(corpus)
    found = read_data(saved(tmp_path, contexts=arrays["context_sequences"], targets=arrays["target_vectors"]))
    assert np.array_equal(np.unique(require_windows(found, 5).article, return_counts=True)[1], [15] * 12)
    assert isinstance(found, PairCorpus)
    assert found.crossing is None


@pytest.mark.parametrize("form", ["text", "arrays", "objects"])
def test_pairs_that_cross_articles_are_counted_if_the_file_says_it(tmp_path: Path, corpus: Corpus, form: str) -> None:
    arrays, count = their_arrays(corpus), 180
    lines = [{"article_index": row // 90, "crosses_article": row % 60 == 0} for row in range(count)]
    known: dict[str, Any] = {
        "text": {"metadata": np.array(list(map(json.dumps, lines)))},
        "arrays": {name: np.array([line[name] for line in lines]) for name in lines[0]},
        # Never loaded.
        "objects": {"metadata": np.array(lines, object)},
    }
    found = read_data(saved(tmp_path, **arrays, **known[form]))
    assert isinstance(found, PairCorpus)
    assert found.crossing == (None if form == "objects" else 3)
    assert len(np.unique(found.pairs.article)) == (12 if form == "objects" else 2)


def test_vectors_are_a_data_set_too(tmp_path: Path, corpus: Corpus) -> None:
    np.savez(tmp_path / "x.npz", vectors=corpus.vectors, doc_id=corpus.article, pos=corpus.position)
    data = require_windows(read_data(tmp_path / "x.npz"), 5)
    assert np.abs(data.contexts() - require_windows(corpus, 5).contexts()).max() < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_vectors": np.ones((3, 16))}, r"`context_sequences` is float32 \(180, 5, 16\), `target_vectors`"),
        ({"context_sequences": np.ones((180, 16))}, r"expected floating-point contexts \(N, T, D\)"),
        ({"target_vectors": np.zeros((180, 16))}, "pair 0 has a vector that is zero or not finite"),
        ({"article_index": np.arange(9)}, "articles of 9 pairs; it has 180"),
        ({"metadata": np.array(["{"])}, "`metadata`: not JSON"),
    ],
)
def test_refuses_what_are_no_pairs(tmp_path: Path, corpus: Corpus, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArrays, match=message):
        read_data(saved(tmp_path, **{**their_arrays(corpus), **change}))


def test_pairs_of_another_length_are_refused(tmp_path: Path, corpus: Corpus) -> None:
    found = read_data(saved(tmp_path, **their_arrays(corpus)))
    with pytest.raises(NoWindows, match="contexts of 5 chunks, not of 3"):
        require_windows(found, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crosses_article": np.arange(2)}, "has crossings of 2 pairs; it has 40"),
        ({"article_ids": np.arange(3)}, "has articles of 3 pairs; it has 40"),
        ({"metadata": np.array(['{"article_index": {"a": 1}}'] * 40)}, "has articles that are neither"),
        ({"metadata": np.array(['{"crosses_article": null}'] * 40)}, "has crossings that are neither"),
        ({"targets": np.zeros((40, 16))}, "pair 0 has a vector that is zero"),
    ],
)
def test_what_does_not_describe_the_pairs_is_refused_with_the_file(
    tmp_path: Path, corpus: Corpus, changes: dict[str, Any], message: str
) -> None:
    data = windows(corpus, 5).take(np.arange(40))
    np.savez(tmp_path / "pairs.npz", **{"contexts": data.contexts(), "targets": data.targets(), **changes})
    with pytest.raises(BadArrays, match=rf"pairs\.npz: {message}"):
        read_data(tmp_path / "pairs.npz")


def test_a_bank_of_another_dimension_is_refused_by_its_name(tmp_path: Path) -> None:
    np.save(tmp_path / "bank.npy", np.ones((2, 4)))
    with pytest.raises(OtherDimension, match=r"bank\.npy has vectors with D = 4; the model reads D = 5"):
        bank_of(tmp_path / "bank.npy", tmp_path, 5)


def test_a_bank_is_a_directory_or_a_file(tmp_path: Path, corpus: Corpus) -> None:
    write_corpus(tmp_path / "dir", corpus.vectors, [dict(line) for line in corpus.articles.values()])
    np.save(tmp_path / "bank.npy", corpus.vectors * 3)
    np.savez(tmp_path / "bank.npz", vectors=corpus.vectors.astype(np.float64))
    for name in ("dir", "bank.npy", "bank.npz"):
        size, blocks = bank_of(tmp_path / name, tmp_path, corpus.dim)
        assert size == 240
        assert np.abs(np.concatenate(list(blocks())) - corpus.vectors).max() < 1e-3
    with pytest.raises(BadCorpus, match="No such file"):
        bank_of(tmp_path / "nowhere", tmp_path, corpus.dim)
    np.save(tmp_path / "bad.npy", np.zeros((2, 4)))
    with pytest.raises(BadArrays, match="row 0 is zero or not finite"):
        list(bank_of(tmp_path / "bad.npy", tmp_path, 4)[1]())
