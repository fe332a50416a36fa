"""A filter becomes a set of rows, once; it names what the corpus does not have."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from models.retrieval.fields import Column, Fields, Filter, Mask
from models.retrieval.filters import BadFilter, FilterCache, RowSet, check_filter

ROWS = 1000
FIELDS = Fields(
    metadata={
        "lang": Column.of(["en", "de", None]),
        "year": Column.of([1999, 2001.5, -3]),
        "draft": Column.of([True, False, True]),
        "mixed": Column.of(["1", 1, True]),
        "empty": Column.of([None, None, None]),
    }
)


def every(step: int) -> Mask:
    return np.arange(ROWS) % step == 0


@pytest.mark.parametrize("step", [1, 3, 999])
def test_a_set_of_rows_is_also_a_mask_and_bits(step: int) -> None:
    mask = every(step)
    rows = RowSet(mask)
    assert rows.rows.tolist() == np.flatnonzero(mask).tolist()
    assert np.array_equal(rows.mask, mask)
    assert np.array_equal(np.unpackbits(rows.bits, bitorder="little")[:ROWS].astype(bool), mask)


def test_equal_filters_are_evaluated_once() -> None:
    asked: list[Filter] = []

    def matching(wanted: Filter) -> Mask:
        asked.append(wanted)
        return every(2)

    cache = FilterCache(matching)
    first = cache.rows({"a": [1, 2], "b": ["x"]})
    assert cache.rows({"b": ["x", "x"], "a": [2, 1]}) is first
    assert len(asked) == 1


@pytest.mark.parametrize("values", [[True], ["1"], [1, 2], []])
def test_filters_that_differ_are_told_apart(values: Sequence[Any]) -> None:
    cache = FilterCache(lambda wanted: every(2))
    assert cache.rows({"a": [1]}) is not cache.rows({"a": values})


def test_keeps_the_sets_used_last() -> None:
    one = FilterCache(lambda wanted: every(2))
    one.rows({"a": [0]})
    cache = FilterCache(lambda wanted: every(2), max_bytes=3 * one.nbytes + 1000)
    sets = [cache.rows({"a": [value]}) for value in (0, 1, 2)]
    assert cache.rows({"a": [0]}) is sets[0]
    cache.rows({"a": [3]})
    assert len(cache) == 3
    assert cache.rows({"a": [0]}) is sets[0]
    assert cache.rows({"a": [1]}) is not sets[1]


def test_keeps_one_set_however_large() -> None:
    cache = FilterCache(lambda wanted: every(2), max_bytes=1)
    assert cache.rows({"a": [0]}) is cache.rows({"a": [0]})


def test_filters_that_match_nothing_are_not_kept_without_bound() -> None:
    cache = FilterCache(lambda wanted: np.zeros(ROWS, np.bool_), max_bytes=1_000_000)
    tracemalloc.start()
    try:
        for start in range(0, 300_000, 1000):
            cache.rows({"article": range(start, start + 1000)})
            cache.rows({"language": [f"{start}" + "é" * 10_000]})
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1_100_000


def test_a_filter_that_raises_is_not_kept() -> None:
    def fails(wanted: Filter) -> Mask:
        raise RuntimeError

    cache = FilterCache(fails)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            cache.rows({"a": [0]})


@pytest.mark.parametrize(
    "wanted",
    [
        {"article": [3, 2**40, -1]},
        {"lang": ["fr"], "year": [1, 2.5], "draft": [False]},
        {"mixed": ["1", 1, True, 2.5]},
        {"lang": []},
        {},
    ],
)
def test_accepts_values_of_the_kinds_that_a_field_has(wanted: Filter) -> None:
    check_filter(wanted, FIELDS)


@pytest.mark.parametrize(
    ("wanted", "field", "said"),
    [
        ({"language": ["en"]}, "language", "unknown field .* article, lang, year, draft, mixed, empty"),
        ({"lang": ["en", 1]}, "lang", '"lang" is a number; expected string'),
        ({"lang": [True]}, "lang", '"lang" is a boolean; expected string'),
        ({"year": ["1999"]}, "year", '"year" is a string; expected number'),
        ({"year": [True]}, "year", '"year" is a boolean; expected number'),
        ({"draft": [1]}, "draft", '"draft" is a number; expected boolean'),
        ({"article": ["3"]}, "article", '"article" is a string; expected integer'),
        ({"article": [1.5]}, "article", '"article" is a number; expected integer'),
        ({"article": [True]}, "article", '"article" is a boolean; expected integer'),
        ({"empty": ["x"]}, "empty", "expected no value"),
    ],
)
def test_rejects_what_no_row_could_match(wanted: Filter, field: str, said: str) -> None:
    with pytest.raises(BadFilter, match=said) as refusal:
        check_filter(wanted, FIELDS)
    assert refusal.value.field == field
    assert "article" in str(refusal.value)
