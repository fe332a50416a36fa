"""The card of an index says how much it finds, and an index that finds too little is not made."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.registry.card import Card
from models.registry.registry import Version
from models.retrieval.corpus import Corpus, MappedCorpus
from models.retrieval.index import BadIndex, FlatIndex
from models.retrieval.retriever import load_retriever
from models.training import indexing
from models.training.work_cache import WorkCache, digest

Build = Callable[[Corpus, indexing.Progress, Path], indexing.MeasuredLists]


@pytest.fixture
def mapped_corpus() -> Callable[[Corpus], MappedCorpus]:
    """Return a function that makes a corpus on disk of one in memory, its text left out."""

    def make(corpus: Corpus) -> MappedCorpus:
        index = np.column_stack([corpus.article, corpus.position])
        return MappedCorpus(corpus.vectors.astype(np.float16), index, np.zeros((len(corpus), 4), np.int64), b"")

    return make


@pytest.fixture
def build(mapped_corpus: Callable[[Corpus], MappedCorpus], card: Callable[..., Card]) -> Build:
    """Return a function that indexes a corpus in memory, keeping parts in a directory."""

    def make(corpus: Corpus, progress: indexing.Progress, parts: Path) -> indexing.MeasuredLists:
        mapped = mapped_corpus(corpus)
        counter = indexing.Counter(indexing.count_steps(len(corpus)), progress)
        steps = indexing.CachedSteps(WorkCache(parts), digest(mapped.halves), counter)
        return indexing.build(mapped, card(kind="corpus"), indexing.mean_searches(mapped, 5), steps)

    return make


def quiet(done: int, total: int) -> None:
    pass


def test_the_card_has_index_parameters_and_recall(indexed_version: Version, larger_dir: Path) -> None:
    card = load_retriever(indexed_version.path).card
    assert set(card.config) == {"index", "lists", "nprobe", "pool", "recall@10", "queries"}
    assert (card.config["index"], card.config["lists"], card.config["queries"]) == ("ivf", 64, 400)
    assert 1 <= card.config["nprobe"] <= 64
    assert 0.99 <= card.config["recall@10"] <= 1
    assert card.limits == (
        f"Search is approximate: recall@10 {card.config['recall@10']:.4f} on 400 contexts that it was not tuned on.",
    )
    assert card.data == {"chunks": 1200, "articles": 60}


def test_the_reference_scan_is_exact(
    corpus: Corpus, mapped_corpus: Callable[[Corpus], MappedCorpus], tmp_path: Path
) -> None:
    ticks: list[int] = []
    mapped = mapped_corpus(corpus)
    steps = indexing.CachedSteps(WorkCache(tmp_path), "", indexing.Counter(1, lambda done, total: ticks.append(done)))
    scan = indexing.Scan(mapped, steps)
    queries = corpus.vectors[::40]
    flat = FlatIndex(mapped.vectors_at(np.arange(240))).search(queries, 30)
    scores, rows = scan.search(queries, 30)
    assert np.array_equal(rows, flat[1])
    assert np.allclose(scores, flat[0], atol=1e-6)
    assert (len(scan), len(ticks), scan.is_exact) == (240, 1, True)


def test_stopped_work_continues_to_the_same_index(corpus: Corpus, build: Build, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 9:  # centroids, and one of two blocks
            raise KeyboardInterrupt

    whole = build(corpus, quiet, tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        build(corpus, stop, tmp_path / "other")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "other").iterdir()}
    again = build(corpus, quiet, tmp_path / "other")
    assert len(kept) == 9
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert (again.lists.to_bytes(), again.config) == (whole.lists.to_bytes(), whole.config)


def test_parts_of_another_corpus_are_not_used(
    corpus: Corpus, make_corpus: Callable[..., Corpus], build: Build, tmp_path: Path
) -> None:
    other = make_corpus(corpus.vectors[::-1])
    build(corpus, quiet, tmp_path / "one")
    again, alone = build(other, quiet, tmp_path / "one"), build(other, quiet, tmp_path)
    assert again.lists.to_bytes() == alone.lists.to_bytes()


def test_progress_is_reported_to_the_end(corpus: Corpus, build: Build, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    build(corpus, lambda done, total: told.append((done, total)), tmp_path)
    assert told == [(step, 10) for step in range(1, 11)]


def test_a_corpus_that_repeats_itself_can_be_indexed(
    make_corpus: Callable[..., Corpus], build: Build, tmp_path: Path
) -> None:
    vectors = np.tile(np.random.default_rng(0).standard_normal((10, 16)), (30, 1))
    assert build(make_corpus(vectors), quiet, tmp_path).config["recall@10"] >= 0.99


def test_tuning_takes_the_smallest_parameters_that_reach_the_recall() -> None:
    def recall(nprobe: int, pool: int) -> float:
        return 1.0 if nprobe >= 7 and pool >= 4 else 0.9

    assert indexing.tune(recall, 64) == (8, 5)
    assert indexing.tune(recall, 7) == (7, 5)


def test_rejects_lists_with_too_low_recall() -> None:
    asked: list[int] = []
    with pytest.raises(BadIndex, match="store it with a flat index"):
        indexing.tune(lambda nprobe, pool: asked.append(nprobe) or 0.98, 64)  # type: ignore[func-returns-value]
    assert asked[-1] == 64


def test_rejects_too_few_chunks_for_an_index(make_corpus: Callable[..., Corpus], build: Build, tmp_path: Path) -> None:
    with pytest.raises(BadIndex, match="99 chunks are too few"):
        build(make_corpus(np.eye(99)), quiet, tmp_path)
