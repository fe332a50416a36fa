"""The flat index is exact: what numpy finds by sorting everything, in an order that never changes.

The inverted file finds the same where it looks everywhere, says that it may not, and refuses parts that are not its.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from models.retrieval.fields import Mask
from models.retrieval.filters import RowSet
from models.retrieval.index import BadIndex, FlatIndex, InvertedLists, IvfIndex, Rows, empty_ivf_index, encode_rows
from models.vectors import Floats, normalise


def unit(count: int, dim: int = 16, seed: int = 0) -> Floats:
    return normalise(np.random.default_rng(seed).standard_normal((count, dim)))


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 30), st.integers(0, 99))
def test_the_top_k_is_numpys(count: int, k: int, queries: int, seed: int) -> None:
    k = min(k, count)
    vectors, asked = unit(count, seed=seed), unit(queries, seed=seed + 1000)
    scores, rows = FlatIndex(vectors).search(asked, k)
    similarity = asked @ vectors.T
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    assert np.allclose(scores, np.take_along_axis(similarity, expected, 1), atol=1e-6)
    assert np.allclose(np.take_along_axis(similarity, rows, 1), scores, atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert all(len(set(found)) == k for found in rows.tolist())


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.parametrize("k", [1, 7, 120])
def test_orders_equal_scores_by_row(queries: int, k: int) -> None:
    vectors = np.tile(unit(1), (150, 1))
    _, rows = FlatIndex(vectors).search(np.tile(unit(1), (queries, 1)), k)
    assert (rows == np.arange(k)).all()


def test_orders_equal_scores_by_row_among_others() -> None:
    vectors = unit(60)
    vectors[[5, 31, 47]] = vectors[20]
    _, rows = FlatIndex(vectors).search(vectors[20:21], 6)
    assert rows[0, :4].tolist() == [5, 20, 31, 47]


def test_k_may_be_the_whole_index() -> None:
    _, rows = FlatIndex(unit(9)).search(unit(2, seed=5), 9)
    assert [sorted(found) for found in rows.tolist()] == [list(range(9))] * 2


def test_has_a_length_and_is_exact() -> None:
    index = FlatIndex(unit(9))
    assert len(index) == 9
    assert index.is_exact


def test_accepts_queries_in_any_memory_order() -> None:
    index, queries = FlatIndex(unit(40)), unit(6)
    assert (index.search(np.asfortranarray(queries), 5)[1] == index.search(queries, 5)[1]).all()
    assert (index.search(unit(12)[::2], 5)[1] == index.search(unit(12)[::2].copy(), 5)[1]).all()


def clustered(count: int, dim: int, seed: int) -> Floats:
    """Rows around few centres, along few axes, some repeated and one zero: both tight and loose bounds."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((5, dim)) * np.geomspace(1, 0.01, dim)
    rows = normalise(centres[random.integers(0, 5, count)] + 0.1 * random.standard_normal((count, dim)))
    rows[count // 2 :: 7] = rows[0]
    rows[count // 3] = 0
    return rows


@given(st.integers(3, 3000), st.integers(1, 40), st.integers(1, 100), st.integers(0, 99), st.floats(1e-3, 1e3))
def test_misses_no_row(count: int, k: int, dim: int, seed: int, length: float) -> None:
    k = min(k, count)
    vectors = clustered(count, dim, seed)
    asked = np.vstack([vectors[:2], unit(1, dim, seed)]) * np.float32(length)
    scores, rows = FlatIndex(vectors).search(asked, k)
    similarity = asked @ vectors.T
    best = -np.sort(-similarity, axis=1)[:, :k]
    assert np.allclose(scores, best, atol=1e-5 * length)
    assert np.allclose(np.take_along_axis(similarity, rows, 1), best, atol=1e-5 * length)
    assert all(len(set(found)) == k for found in rows.tolist())


@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 1])
@pytest.mark.parametrize("k", [1, 15, 105])
def test_finds_the_best_of_a_set_of_rows(share: float, k: int) -> None:
    vectors = clustered(3000, 24, 0)
    kept = RowSet(np.random.default_rng(1).random(3000) < share)
    k = min(k, len(kept))
    scores, rows = FlatIndex(vectors).search(vectors[:3], k, kept)
    similarity = (vectors[:3] @ vectors.T)[:, kept.rows]
    assert np.allclose(scores, -np.sort(-similarity, axis=1)[:, :k], atol=1e-6)
    assert np.isin(rows, kept.rows).all()
    assert all(len(set(found)) == k for found in rows.tolist())


def test_a_query_of_no_length_finds_the_first_rows() -> None:
    scores, rows = FlatIndex(unit(50)).search(np.zeros((1, 16), np.float32), 4)
    assert (scores.tolist(), rows.tolist()) == ([[0, 0, 0, 0]], [[0, 1, 2, 3]])


@pytest.mark.parametrize("length", [1e-30, 1e30])
def test_a_query_of_any_length_finds_the_same(length: float) -> None:
    index, asked = FlatIndex(unit(500)), unit(3, seed=7)
    assert np.array_equal(index.search(asked * np.float32(length), 9)[1], index.search(asked, 9)[1])


# The inverted file


def lists_of(vectors: Floats, count: int) -> InvertedLists:
    """Return lists around the first `count` vectors."""
    index = empty_ivf_index(vectors[:count])
    home = np.argmax(vectors @ vectors[:count].T, axis=1)
    rows = np.argsort(home, kind="stable")
    return InvertedLists(
        vectors[:count],
        np.bincount(home, minlength=count),
        rows.astype(np.int32),
        encode_rows(index, vectors, home)[rows],
    )


def ivf(vectors: Floats, nprobe: int, pool: int = 1, count: int = 8) -> IvfIndex:
    return IvfIndex(lists_of(vectors, count), vectors.__getitem__, nprobe, pool)


@given(st.integers(20, 300), st.integers(1, 40), st.integers(0, 99))
def test_a_full_scan_equals_the_flat_index(count: int, k: int, seed: int) -> None:
    k = min(k, count)
    vectors, asked = clustered(count, 24, seed), unit(5, 24, seed + 1)
    scores, rows = ivf(vectors, nprobe=8, pool=count).search(asked, k)
    exact, flat = FlatIndex(vectors).search(asked, k)
    assert np.allclose(scores, exact, atol=1e-6)
    assert np.array_equal(rows, flat) or np.allclose(np.take_along_axis(asked @ vectors.T, rows, 1), exact, atol=1e-6)


def test_scores_are_those_of_the_vectors_best_first() -> None:
    vectors, asked = unit(400, 32), unit(6, 32, seed=1)
    scores, rows = ivf(vectors, nprobe=2, pool=3).search(asked, 10)
    assert np.allclose(scores, np.take_along_axis(asked @ vectors.T, rows, 1), atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_more_lists_are_scanned_until_k_are_found() -> None:
    vectors = unit(300, 32)
    _, rows = ivf(vectors, nprobe=1).search(unit(3, 32, seed=2), 300)
    assert [sorted(found) for found in rows.tolist()] == [list(range(300))] * 3


def test_a_batch_equals_single_queries() -> None:
    index, asked = ivf(unit(400, 32), nprobe=3, pool=4), unit(20, 32, seed=3)
    scores, rows = index.search(asked, 12)
    single = [index.search(query[None], 12) for query in asked]
    assert np.array_equal(rows, np.vstack([found for _, found in single]))
    assert np.array_equal(scores, np.vstack([found for found, _ in single]))


def test_orders_equal_vectors_by_row() -> None:
    vectors = unit(200, 32)
    vectors[[5, 131, 77]] = vectors[20]
    _, rows = ivf(vectors, nprobe=8, pool=9).search(vectors[20:21], 6)
    assert rows[0, :4].tolist() == [5, 20, 77, 131]


def test_has_a_length_and_is_not_exact() -> None:
    index = ivf(unit(90, 32), nprobe=1)
    assert len(index) == 90
    assert not index.is_exact


def spread(share: float) -> Callable[[Floats], Mask]:
    """A set of rows that are anywhere."""
    return lambda vectors: np.random.default_rng(3).random(len(vectors)) < share


def far(share: float) -> Callable[[Floats], Mask]:
    """A set of the rows that are farthest from the first."""
    return lambda vectors: vectors @ vectors[0] < np.quantile(vectors @ vectors[0], share)


@pytest.fixture(scope="module")
def many() -> IvfIndex:
    """An index of more rows than are searched by estimates; it finds everything that its lists can tell apart."""
    return ivf(unit(30_000), nprobe=24, pool=20, count=64)


@pytest.mark.parametrize(
    ("kept", "recall"),
    [*((spread(share), 0.99) for share in (0.002, 0.3, 0.6, 0.9, 1)), (far(0.6), 0.94), (far(0.9), 0.94)],
)
def test_finds_the_best_of_a_set_in_lists(many: IvfIndex, kept: Callable[[Floats], Mask], recall: float) -> None:
    vectors = many.vectors_at(np.arange(len(many)))
    among = RowSet(kept(vectors))
    scores, rows = many.search(vectors[:20], 10, among)
    exact, _ = FlatIndex(vectors).search(vectors[:20], 10, among)
    assert np.isin(rows, among.rows).all()
    assert (scores >= exact[:, -1:] - 1e-6).mean() >= recall


def test_lists_survive_a_round_trip() -> None:
    lists = lists_of(unit(90, 32), 8)
    again = InvertedLists.from_bytes(lists.to_bytes())
    assert all(np.array_equal(part, asdict(lists)[name]) for name, part in asdict(again).items())


def twice(rows: Rows) -> Rows:
    return np.where(rows == 3, 4, rows).astype(rows.dtype)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("rows", twice, "every row exactly once"),
        ("rows", lambda rows: rows - 1, "every row exactly once"),
        ("rows", lambda rows: rows[:-1], "contradict each other"),
        ("rows", lambda rows: rows.astype(np.int64), "contradict each other"),
        ("codes", lambda codes: codes[:-1], "contradict each other"),
        ("codes", lambda codes: codes.astype(np.float32), "contradict each other"),
        ("sizes", lambda sizes: sizes + 1, "sizes of the lists"),
        ("sizes", lambda sizes: np.where(np.arange(8) < 2, 2**62, sizes), "sizes of the lists"),
        ("sizes", lambda sizes: -sizes, "sizes of the lists"),
        ("sizes", lambda sizes: sizes[:-1], "contradict each other"),
        ("centroids", lambda centroids: centroids[:-1], "contradict each other"),
        ("centroids", lambda centroids: centroids * np.float32(np.nan), "contradict each other"),
    ],
)
def test_rejects_contradictory_lists(part: str, change: Any, said: str) -> None:
    parts = asdict(lists_of(unit(90, 32), 8))
    with pytest.raises(BadIndex, match=said):
        InvertedLists.from_bytes(save({**parts, part: change(parts[part])}))


@pytest.mark.parametrize("data", [b"", b"garbage" * 9, save({"rows": np.zeros(3, np.int32)})])
def test_rejects_a_file_without_lists(data: bytes) -> None:
    with pytest.raises(BadIndex, match="unreadable index"):
        InvertedLists.from_bytes(data)


def test_rejects_lists_of_other_vectors() -> None:
    lists, other = lists_of(unit(90, 32), 8), unit(90, 32, seed=1)
    with pytest.raises(BadIndex, match="from other vectors"):
        IvfIndex(lists, other.__getitem__, 1, 1)
    with pytest.raises(BadIndex, match="codes have"):
        IvfIndex(replace(lists, codes=lists.codes[:, 1:]), other.__getitem__, 1, 1)


@pytest.mark.parametrize("effort", [(0, 1), (1, 0), (-1, 1), ("8", 1), (None, 1), (1.5, 1)])
def test_rejects_invalid_nprobe_and_pool(effort: tuple[Any, Any]) -> None:
    vectors = unit(90, 32)
    with pytest.raises(BadIndex, match="must be positive integers"):
        IvfIndex(lists_of(vectors, 8), vectors.__getitem__, *effort)
