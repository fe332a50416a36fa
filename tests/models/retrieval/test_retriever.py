"""A search returns the k best passages outside the context, fewer only if the corpus is smaller."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.registry.card import CARD_FILE, Card
from models.registry.checkpoint import BadCheckpoint
from models.registry.registry import Version
from models.retrieval.corpus import (
    ARTICLES_FILE,
    CORPUS_FILES,
    INDEX_FILE,
    PASSAGES_FILE,
    SPANS_FILE,
    VECTORS_FILE,
    Chunk,
    Corpus,
    read_corpus,
)
from models.retrieval.filters import RowSet
from models.retrieval.index import IVF_FILE, FlatIndex
from models.retrieval.retriever import MMR_POOL, Retriever, Search, load_retriever
from models.vectors import normalise

MakeCorpus = Callable[..., Corpus]


@pytest.fixture(scope="module")
def retriever(corpus_version: Version) -> Retriever:
    return load_retriever(corpus_version.path)


@pytest.fixture
def retriever_of(make_corpus: MakeCorpus, card: Callable[..., Card]) -> Callable[[Any], Retriever]:
    """Return a function that makes a retriever over the vectors given."""

    def make(vectors: Any) -> Retriever:
        corpus = make_corpus(vectors)
        return Retriever("v", "0" * 64, card(kind="corpus", dim=corpus.dim), corpus, FlatIndex(corpus.vectors))

    return make


def rows_of(retriever: Retriever, search: Search) -> list[int]:
    return [hit.row for hit in retriever.search_batch([search])[0]]


def best(corpus: Corpus, query: Any, without: Any = ()) -> list[int]:
    order = np.argsort(-(corpus.vectors @ query), kind="stable").tolist()
    return [row for row in order if row not in set(without)]


def test_describes_its_version(retriever: Retriever, corpus_version: Version, corpus: Corpus) -> None:
    assert (retriever.name, retriever.version) == ("passages", corpus_version.version)
    assert (retriever.dim, retriever.runtime, retriever.is_exact) == (16, "FlatIndex", True)
    assert len(retriever.sha256) == 64
    assert (retriever.card.data["chunks"], retriever.card.data["articles"]) == (240, 12)
    assert np.array_equal(retriever.corpus.vectors, corpus.vectors)
    retriever.warm_up()


def test_hits_have_row_score_and_passage(retriever: Retriever, corpus: Corpus) -> None:
    query = corpus.vectors[45]
    hits = retriever.search_batch([Search(query, 5)])[0]
    assert [hit.row for hit in hits] == best(corpus, query)[:5]
    assert hits[0].row == 45
    assert hits[0].score == pytest.approx(1, abs=1e-6)
    assert [hit.score for hit in hits] == pytest.approx((corpus.vectors @ query)[[hit.row for hit in hits]], abs=1e-6)
    assert hits[0].chunk == Chunk(102, "Article 2", 5, "chunk 5 of 2")


def test_excludes_rows_and_still_returns_k(retriever: Retriever, corpus: Corpus) -> None:
    query = corpus.vectors[45]
    order = best(corpus, query)
    assert rows_of(retriever, Search(query, 4, exclude=order[:7])) == order[7:11]
    assert rows_of(retriever, Search(query, 4, exclude={order[1], -5, 10**9})) == [order[0], *order[2:5]]


def test_excludes_the_context(retriever: Retriever, corpus: Corpus) -> None:
    own = [60, 61, 62, 63, 64]
    context = corpus.vectors[own]
    query = normalise(context.mean(axis=0))
    assert set(best(corpus, query)[:5]) & set(own)  # which would otherwise lead
    assert rows_of(retriever, Search(query, 10, exclude_vectors=context)) == best(corpus, query, own)[:10]
    assert rows_of(retriever, Search(query, 10, exclude_vectors=7 * context)) == best(corpus, query, own)[:10]


def test_excludes_a_rounded_context(retriever: Retriever, corpus: Corpus) -> None:
    rounded = np.round(corpus.vectors[60:65], 3)
    query = corpus.vectors[62]
    assert rows_of(retriever, Search(query, 5, exclude_vectors=rounded)) == best(corpus, query, range(60, 65))[:5]


def test_combines_both_exclusions(retriever: Retriever, corpus: Corpus) -> None:
    query = corpus.vectors[62]
    own, others = range(60, 65), best(corpus, query, range(60, 65))
    search = Search(query, 3, exclude=others[:6], exclude_vectors=corpus.vectors[60:65])
    assert rows_of(retriever, search) == best(corpus, query, [*own, *others[:6]])[:3]


def test_returns_fewer_than_k_only_if_the_corpus_is_smaller(retriever: Retriever, corpus: Corpus) -> None:
    query = corpus.vectors[0]
    assert rows_of(retriever, Search(query, 1000)) == best(corpus, query)
    assert rows_of(retriever, Search(query, 10, exclude=range(235))) == best(corpus, query, range(235))
    assert rows_of(retriever, Search(query, 3, exclude=range(235))) == best(corpus, query, range(235))[:3]
    assert rows_of(retriever, Search(query, 10, exclude=range(240))) == []


def test_excludes_every_copy_of_a_passage(retriever_of: Callable[[Any], Retriever]) -> None:
    """Boilerplate recurs: after the exclusion of fifty copies there must still be results."""
    vectors = np.random.default_rng(0).standard_normal((120, 16))
    vectors[20:70] = vectors[0]
    retriever = retriever_of(vectors)
    query = retriever.corpus.vectors[0]
    expected = best(retriever.corpus, query, [0, *range(20, 70)])
    assert rows_of(retriever, Search(query, 4, exclude_vectors=query[None])) == expected[:4]
    assert rows_of(retriever, Search(query, 1000, exclude_vectors=query[None])) == expected


def test_orders_equal_scores_by_row(retriever_of: Callable[[Any], Retriever]) -> None:
    retriever = retriever_of(np.tile(np.eye(4)[:1], (30, 1)))
    assert rows_of(retriever, Search(retriever.corpus.vectors[0], 5, exclude=[0, 2])) == [1, 3, 4, 5, 6]


# With a filter; the corpus has the articles 100 to 111, of 20 passages each


ARTICLES = [[], [103], [100, 111], [100, 101, 102, 103, 104, 105], range(101, 112), range(100, 112), [99]]


def rows_in(corpus: Corpus, articles: Any) -> list[int]:
    return np.flatnonzero(np.isin(corpus.article, list(articles))).tolist()


@pytest.mark.parametrize("articles", ARTICLES)
@pytest.mark.parametrize("k", [1, 3, 30, 1000])
def test_a_filter_leaves_exactly_the_best_of_the_rows_that_match(
    retriever: Retriever, corpus: Corpus, articles: Any, k: int
) -> None:
    kept = rows_in(corpus, articles)
    for query in corpus.vectors[::50]:
        order = [row for row in best(corpus, query) if row in kept]
        search = Search(query, k, filter={"article": list(articles)})
        hits = retriever.search_batch([search])[0]
        assert [hit.row for hit in hits] == order[:k]
        assert [hit.score for hit in hits] == pytest.approx((corpus.vectors @ query)[order[:k]], abs=1e-6)


@pytest.mark.parametrize("articles", ARTICLES)
def test_exclusions_hold_among_the_rows_that_match(retriever: Retriever, corpus: Corpus, articles: Any) -> None:
    kept = rows_in(corpus, articles)
    context = corpus.vectors[60:65]
    query = corpus.vectors[62]
    order = [row for row in best(corpus, query, range(60, 65)) if row in kept]
    search = Search(query, 5, order[:3], context, filter={"article": list(articles)})
    assert rows_of(retriever, search) == order[3:8]
    assert rows_of(retriever, Search(query, 5, kept, filter={"article": list(articles)})) == []


def test_searches_with_different_filters_run_in_one_batch(retriever: Retriever, corpus: Corpus) -> None:
    query = corpus.vectors[45]
    filters = [None, {"article": [103]}, {"article": [100]}, {"article": [103]}, {"article": [1]}]
    batch = [Search(query, 4, filter=wanted) for wanted in filters]
    assert retriever.search_batch(batch) == [retriever.search_batch([search])[0] for search in batch]


def test_mmr_reorders_a_pool_and_keeps_the_scores(retriever: Retriever, corpus: Corpus) -> None:
    query = corpus.vectors[45]
    plain = retriever.search_batch([Search(query, 10)])[0]
    hits = retriever.search_batch([Search(query, 10, mmr=0.3)])[0]
    assert hits[0] == plain[0]
    assert {hit.row for hit in hits} != {hit.row for hit in plain}
    assert {hit.row for hit in hits} <= set(best(corpus, query)[:MMR_POOL])
    assert [hit.score for hit in hits] == pytest.approx([corpus.vectors[hit.row] @ query for hit in hits], abs=1e-6)
    cosines = [corpus.vectors[[hit.row for hit in each]] for each in (plain, hits)]
    alike = [float((vectors @ vectors.T).mean()) for vectors in cosines]
    assert alike[1] < alike[0]


@pytest.mark.parametrize("k", [1, 7, 240, 1000])
def test_mmr_of_weight_1_is_the_order_without_it(retriever: Retriever, corpus: Corpus, k: int) -> None:
    query = corpus.vectors[45]
    assert rows_of(retriever, Search(query, k, mmr=1.0)) == best(corpus, query)[:k]


def test_mmr_orders_the_best_candidates_and_the_others_follow_by_score(retriever: Retriever, corpus: Corpus) -> None:
    query = corpus.vectors[45]
    found, by_score = rows_of(retriever, Search(query, 1000, mmr=0.3)), best(corpus, query)
    assert found[:MMR_POOL] != by_score[:MMR_POOL]
    assert set(found[:MMR_POOL]) == set(by_score[:MMR_POOL])
    assert found[MMR_POOL:] == by_score[MMR_POOL:]


@pytest.mark.parametrize("length", [0.0, 1e-20, 1.0, 1e9])
def test_mmr_does_not_depend_on_the_length_of_a_query(retriever: Retriever, corpus: Corpus, length: float) -> None:
    query = normalise(corpus.vectors[45] + corpus.vectors[100])
    found = rows_of(retriever, Search((length * query).astype(np.float32), 10, mmr=0.5))
    expected = rows_of(retriever, Search(query, 10, mmr=0.5)) if length else found
    assert found == expected
    assert len(found) == 10


def test_mmr_chooses_among_the_rows_that_match(retriever: Retriever, corpus: Corpus) -> None:
    search = Search(corpus.vectors[45], 10, range(60, 65), filter={"article": [103]}, mmr=0.5)
    found = rows_of(retriever, search)
    assert len(set(found)) == 10
    assert set(found) <= set(range(65, 80))


searches = st.builds(
    lambda row, k, exclude, own: (row, k, exclude, own),
    st.integers(0, 239),
    st.integers(1, 60),
    st.lists(st.integers(0, 239), max_size=30),
    st.none() | st.integers(0, 235),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(searches, min_size=1, max_size=40))
def test_a_batch_equals_single_searches(
    retriever: Retriever, corpus: Corpus, asked: list[tuple[int, int, list[int], int | None]]
) -> None:
    batch = [
        Search(corpus.vectors[row], k, exclude, None if own is None else corpus.vectors[own : own + 5])
        for row, k, exclude, own in asked
    ]
    together = retriever.search_batch(batch)
    for search, hits in zip(batch, together, strict=True):
        alone = retriever.search_batch([search])[0]
        assert [hit.row for hit in hits] == [hit.row for hit in alone]
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in alone], abs=1e-6)


def test_rejects_a_net_as_a_corpus(gru_version: Version) -> None:
    with pytest.raises(BadCheckpoint, match="kind net, expected corpus"):
        load_retriever(gru_version.path)


@pytest.mark.parametrize("name", [*CORPUS_FILES, CARD_FILE])
def test_rejects_an_altered_file_by_name(
    corpus_version: Version, copy_of: Callable[[Version], Path], name: str
) -> None:
    path = copy_of(corpus_version) / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadCheckpoint, match=f"{name} was altered"):
        load_retriever(path.parent)


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        (CARD_FILE, b"\xff\xfe", "decode"),
        (CARD_FILE, b"# no card", "unreadable model card"),
        (VECTORS_FILE, _npy(np.full((240, 16), np.nan, np.float16)), "vector 0 is not finite"),
        (VECTORS_FILE, _npy(np.ones((240, 8), np.float16)), "corpus has D = 8; its card says D = 16"),
        (INDEX_FILE, _npy(np.ones((3, 2), np.int32)), "do not match"),
        (ARTICLES_FILE, b"\x1f\x8b\x08\x00garbage", "unreadable corpus"),
    ],
)
def test_rejects_contradictions_with_valid_checksums(
    corpus_version: Version,
    copy_of: Callable[[Version], Path],
    rewrite_checksums: Callable[[Path], None],
    name: str,
    data: bytes,
    said: str,
) -> None:
    directory = copy_of(corpus_version)
    (directory / name).write_bytes(data)
    rewrite_checksums(directory)
    with pytest.raises(BadCheckpoint, match=said):
        load_retriever(directory)


def test_rejects_a_corpus_with_the_card_of_a_net(
    corpus_version: Version,
    copy_of: Callable[[Version], Path],
    rewrite_checksums: Callable[[Path], None],
    card: Callable[..., Card],
) -> None:
    directory = copy_of(corpus_version)
    (directory / CARD_FILE).write_text(card(kind="net").to_markdown())
    rewrite_checksums(directory)
    with pytest.raises(BadCheckpoint, match="kind net, expected corpus"):
        load_retriever(directory)


# With an index of its own


@pytest.fixture(scope="module")
def indexed(indexed_version: Version) -> Retriever:
    return load_retriever(indexed_version.path)


@pytest.fixture(scope="module")
def larger(larger_dir: Path) -> Corpus:
    return read_corpus(larger_dir)


def found(retriever: Retriever, larger: Corpus, excluding: int = 0) -> float:
    """Return the recall of the ten best, without own chunks and the `excluding` best."""
    hits = 0
    for start in range(0, 1180, 20):
        context = larger.vectors[start : start + 5]
        query = normalise(context.mean(axis=0))
        order = best(larger, query, range(start, start + 5))
        search = Search(query, 10, exclude=order[:excluding], exclude_vectors=context)
        hits += len(set(rows_of(retriever, search)) & set(order[excluding : excluding + 10]))
    return hits / 590


def test_serves_the_index_of_the_version(indexed: Retriever, indexed_version: Version) -> None:
    indexed.warm_up()
    assert (indexed.runtime, indexed.is_exact, indexed.dim) == ("IvfIndex", False, 16)
    assert (indexed.name, indexed.version) == ("larger", indexed_version.version)


@pytest.mark.parametrize(("excluding", "least"), [(0, 0.99), (5, 0.99), (100, 0.97), (600, 0.99)])
def test_recall_holds_with_exclusions(indexed: Retriever, larger: Corpus, excluding: int, least: float) -> None:
    assert found(indexed, larger, excluding) >= least


def test_hits_of_an_index_have_row_score_and_passage(indexed: Retriever, larger: Corpus) -> None:
    query = larger.vectors[45]
    hits = indexed.search_batch([Search(query, 5)])[0]
    assert hits[0].row == 45
    assert [hit.score for hit in hits] == pytest.approx((larger.vectors @ query)[[hit.row for hit in hits]], abs=1e-6)
    assert [hit.chunk for hit in hits] == [larger.chunk(hit.row) for hit in hits]


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("is_scattered", [True, False])
def test_recall_holds_with_a_filter_of_any_selectivity(
    indexed: Retriever, larger: Corpus, share: float, is_scattered: bool
) -> None:
    """The index is searched as it serves, with sets of rows in every list or in few."""
    order = np.random.default_rng(0).permutation(1200) if is_scattered else np.arange(1200)
    mask = np.isin(np.arange(1200), order[: max(int(share * 1200), 1)])
    kept, right, total = RowSet(mask), 0, 0
    for query in larger.vectors[::40]:
        k = min(10, len(kept))
        scores, rows = indexed.index.search(query[None], k, kept)
        expected = [row for row in best(larger, query) if mask[row]][:k]
        assert mask[rows].all()
        assert scores[0].tolist() == pytest.approx((larger.vectors @ query)[rows[0]], abs=1e-6)
        right += len(set(rows[0].tolist()) & set(expected))
        total += k
    assert right / total >= 0.94


def test_an_index_finds_all_rows_that_match(indexed: Retriever, larger: Corpus) -> None:
    article = larger.article[700]
    kept = np.flatnonzero(larger.article == article).tolist()
    search = Search(larger.vectors[3], 1000, filter={"article": [int(article)]})
    assert rows_of(indexed, search) == [row for row in best(larger, larger.vectors[3]) if row in kept]
    assert rows_of(indexed, Search(larger.vectors[3], 1000, kept, filter={"article": [int(article)]})) == []
    assert rows_of(indexed, Search(larger.vectors[3], 5, filter={"article": [10**6]})) == []


def test_an_index_returns_fewer_than_k_only_if_the_corpus_is_smaller(indexed: Retriever, larger: Corpus) -> None:
    query = larger.vectors[0]
    assert rows_of(indexed, Search(query, 5000)) == best(larger, query)
    assert rows_of(indexed, Search(query, 10, exclude=range(1195))) == best(larger, query, range(1195))


def test_threads_change_no_answer(indexed: Retriever, indexed_version: Version, larger: Corpus) -> None:
    two = load_retriever(indexed_version.path, threads=2)
    searches = [Search(vector, 7) for vector in larger.vectors[::50]]
    assert two.search_batch(searches) == indexed.search_batch(searches)


@pytest.mark.parametrize("name", [*CORPUS_FILES, CARD_FILE, IVF_FILE, PASSAGES_FILE, SPANS_FILE])
def test_rejects_an_altered_file_of_an_indexed_version(
    indexed_version: Version, copy_of: Callable[[Version], Path], name: str
) -> None:
    path = copy_of(indexed_version) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=f"{name} was altered"):
        load_retriever(path.parent)


def test_rejects_the_index_of_another_corpus(
    indexed_version: Version,
    copy_of: Callable[[Version], Path],
    rewrite_checksums: Callable[[Path], None],
) -> None:
    directory = copy_of(indexed_version)
    vectors = np.load(directory / VECTORS_FILE)
    (directory / VECTORS_FILE).write_bytes(_npy(vectors[::-1].copy()))
    rewrite_checksums(directory)
    with pytest.raises(BadCheckpoint, match="from other vectors"):
        load_retriever(directory)


def test_rejects_the_index_of_a_smaller_corpus(
    indexed_version: Version,
    larger_dir: Path,
    copy_of: Callable[[Version], Path],
    rewrite_checksums: Callable[[Path], None],
) -> None:
    directory = copy_of(indexed_version)
    for name in (VECTORS_FILE, INDEX_FILE, SPANS_FILE):
        (directory / name).write_bytes(_npy(np.load(directory / name)[:-1]))
    rewrite_checksums(directory)
    with pytest.raises(BadCheckpoint, match=r"index has rows and D \(1200"):
        load_retriever(directory)


@pytest.mark.parametrize(("old", "new"), [("nprobe:", "probes:"), ("pool: ", "pool: x"), ("pool: ", "pool: -")])
def test_rejects_a_card_without_search_parameters(
    indexed_version: Version,
    copy_of: Callable[[Version], Path],
    rewrite_checksums: Callable[[Path], None],
    old: str,
    new: str,
) -> None:
    directory = copy_of(indexed_version)
    text = (directory / CARD_FILE).read_text()
    (directory / CARD_FILE).write_text(text.replace(old, new, 1))
    rewrite_checksums(directory)
    with pytest.raises(BadCheckpoint, match=r"nprobe|must be positive integers"):
        load_retriever(directory)


def test_ignores_an_index_outside_the_manifest(corpus_version: Version, copy_of: Callable[[Version], Path]) -> None:
    directory = copy_of(corpus_version)
    (directory / IVF_FILE).write_bytes(b"stray")
    assert load_retriever(directory).is_exact
