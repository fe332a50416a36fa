"""The Milvus index answers like the local one. tests/e2e/test_milvus.py tests the network."""

from __future__ import annotations

import numpy as np
import pytest

from models.retrieval.filters import RowSet
from models.retrieval.index import FlatIndex
from models.retrieval.milvus import MilvusIndex, alias_of, collection_of
from models.retrieval.retriever import Retriever, Search
from tests.fakes import D, FakeBuild, T, bundle, contexts, corpus

LOCAL = FlatIndex(corpus().vectors)


def through(build: FakeBuild, known: Retriever) -> Retriever:
    return known.with_indexes({name: MilvusIndex(build, name, index) for name, index in known.indexes.items()})


def test_scores_and_order_equal_the_exact_index() -> None:
    """For any arithmetic of the store, and any length of the queries."""
    queries = np.random.default_rng(0).standard_normal((16, D)).astype(np.float32) * 3
    for ours, theirs in zip(
        MilvusIndex(FakeBuild(), "encoded", LOCAL).search(queries, 7), LOCAL.search(queries, 7), strict=True
    ):
        assert np.array_equal(ours, theirs)


def test_orders_equal_scores_by_row() -> None:
    """Also at the end of the list, where a store would choose among them."""
    nothing = np.zeros((1, D), np.float32)
    assert MilvusIndex(FakeBuild(), "encoded", LOCAL).search(nothing, 4)[1].tolist() == [[0, 1, 2, 3]]


def test_milvus_filters_excluded_rows() -> None:
    """Unknown rows are not sent, and the index is shorter by the known ones."""
    build = FakeBuild()
    index = MilvusIndex(build, "encoded", LOCAL).without([3, 1, 3, -1, 999])
    assert len(index) == len(LOCAL) - 2
    assert not {1, 3} & set(index.search(contexts(1)[0][:1], len(index))[1][0].tolist())
    assert build.asked == [[1, 3]]


def test_rejects_non_finite_queries_before_sending() -> None:
    """It is rejected before anything is sent."""
    build = FakeBuild()
    with pytest.raises(ValueError, match="finite"):
        MilvusIndex(build, "encoded", LOCAL).search(np.full((1, D), np.nan, np.float32), 3)
    assert build.asked == []


def test_a_mixed_batch_equals_the_local_index() -> None:
    """Queries and contexts, with and without exclusions; searches with equal exclusions run together."""
    known, build, context = bundle(), FakeBuild(), contexts(1)[0]
    own = corpus().vectors[2 : 2 + T]
    searches = [
        Search(context[0], 5),
        Search(context[1], 3, exclude=[4, 7]),
        Search(None, 4, context=own, exclude_vectors=own),
        Search(context[2], 6, exclude=(7, 4)),
        Search(None, 20, exclude=[0], context=context),
        Search(context[3], 5, exclude=range(100)),
    ]
    found = through(build, known).search_batch(searches)
    assert found == known.search_batch(searches)
    assert found[-1] == []
    assert sorted(build.asked) == [[], [], [0], [4, 7]]


@pytest.mark.parametrize("articles", [[0], [1], [0, 1], [7], []])
@pytest.mark.parametrize("k", [1, 4, 30])
def test_a_filter_gives_the_results_of_the_local_index(articles: list[int], k: int) -> None:
    known, build = bundle(), FakeBuild()
    own = corpus().vectors[2 : 2 + T]
    searches = [
        Search(contexts(1)[0][0], k, filter={"article": articles}),
        Search(None, k, [3, 12], own, own, filter={"article": articles}, mmr=0.5),
        Search(contexts(1)[0][1], k, [3, 12], filter={"article": articles}),
    ]
    assert through(build, known).search_batch(searches) == known.search_batch(searches)


@pytest.mark.parametrize(("share", "asked"), [(0.1, 0), (0.9, 1)])
def test_milvus_is_asked_only_for_large_sets(share: float, asked: int) -> None:
    build = FakeBuild()
    kept = RowSet(np.arange(20) < share * 20)
    queries = contexts(1)[0][:3]
    found = MilvusIndex(build, "encoded", LOCAL).search(queries, 1, kept)
    assert [part.tolist() for part in found] == [part.tolist() for part in LOCAL.search(queries, 1, kept)]
    assert build.answers == asked


def test_names_are_valid_in_milvus() -> None:
    """A collection is named by the digest, an alias by the corpus."""
    assert (collection_of("ef8f512233ff" + "0" * 52), alias_of("wiki-val.2")) == ("lvm_ef8f512233ff", "lvm_wiki_val_2")
