"""Ids and metadata of chunks survive a round trip, filters find them, and damaged files are rejected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from models.retrieval.corpus import (
    CORPUS_FILES,
    PASSAGES_FILE,
    SPANS_FILE,
    BadCorpus,
    Corpus,
    MappedCorpus,
    map_unverified_corpus,
    read_corpus,
    write_corpus,
    write_passages,
)
from models.retrieval.fields import FIELDS_FILE, BadFields, Column, Fields, Texts, UnknownField, Value
from models.vectors import normalise

FIELDS = Fields(
    Texts.of(["a-1", "ä🙂", "", "a-4"]),
    {"lang": Column.of(["en", "de", None, "en"]), "year": Column.of([1999, 2.5, True, 1999.0])},
)
ARTICLES: list[dict[str, Any]] = [
    {"article_id": 7, "title": "A", "chunks": ["one", "two"]},
    {"article_id": 3, "title": "B", "chunks": ["three", "four"]},
]
values = (
    st.none()
    | st.booleans()
    | st.text()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_corpus(tmp_path, normalise(np.eye(4)), ARTICLES, FIELDS)
    return tmp_path


def mapped(directory: Path) -> MappedCorpus:
    write_passages(directory, directory)
    names = (*CORPUS_FILES, PASSAGES_FILE, SPANS_FILE, FIELDS_FILE)
    return map_unverified_corpus({name: directory / name for name in names})


@pytest.mark.parametrize("read", [read_corpus, mapped])
def test_chunks_have_their_ids_and_metadata(directory: Path, read: Callable[[Path], Corpus | MappedCorpus]) -> None:
    chunks = [read(directory).chunk(row) for row in range(4)]
    assert [chunk.source_id for chunk in chunks] == ["a-1", "ä🙂", None, "a-4"]
    assert [chunk.metadata for chunk in chunks] == [
        {"lang": "en", "year": 1999},
        {"lang": "de", "year": 2.5},
        {"year": True},
        {"lang": "en", "year": 1999},
    ]
    assert chunks[2].fields() == {"metadata": {"year": True}}


@pytest.mark.parametrize("read", [read_corpus, mapped])
@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        ({}, [0, 1, 2, 3]),
        ({"article": [3, 99]}, [2, 3]),
        ({"article": ["3", True, 2**40, 3.5]}, []),
        ({"lang": ["en"]}, [0, 3]),
        ({"lang": ["en", "de", "fr"]}, [0, 1, 3]),
        ({"lang": []}, []),
        ({"year": [1999.0]}, [0, 3]),
        ({"year": [1]}, []),
        ({"year": [True, 2.5]}, [1, 2]),
        ({"lang": ["en"], "article": [7]}, [0]),
    ],
)
def test_a_filter_keeps_rows_that_match_every_name(
    directory: Path,
    read: Callable[[Path], Corpus | MappedCorpus],
    wanted: dict[str, list[Value]],
    rows: list[int],
) -> None:
    assert np.flatnonzero(read(directory).matching(wanted)).tolist() == rows


def test_an_unknown_field_is_rejected_with_those_that_exist(directory: Path) -> None:
    with pytest.raises(UnknownField, match="no field 'source'; it has article, lang, year"):
        read_corpus(directory).matching({"source": ["x"]})


def test_a_corpus_without_fields_has_no_ids(make_corpus: Callable[..., Corpus]) -> None:
    bare = make_corpus(np.eye(2), article=[0, 1])
    assert bare.chunk(1).fields() == {}
    assert bare.matching({"article": [1]}).tolist() == [False, True]


@given(st.lists(values, min_size=1, max_size=8))
def test_any_value_is_read_back_and_found(column: list[Any]) -> None:
    found = Fields.from_bytes(Fields(None, {"x": Column.of(column)}).to_bytes(), len(column)).metadata["x"]
    for row, value in enumerate(column):
        assert found[row] == value
        assert value is None or found.matching([value])[row]


@given(st.lists(st.text(), min_size=1, max_size=8))
def test_any_id_is_read_back(ids: list[str]) -> None:
    found = Fields.from_bytes(Fields(Texts.of(ids)).to_bytes(), len(ids))
    assert [found.source_id(row) or "" for row in range(len(ids))] == ids


def test_rejects_text_that_utf8_does_not_have() -> None:
    for make in (Texts.of, Column.of):
        with pytest.raises(BadFields, match="not valid Unicode"):
            make(["\ud800"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [], {}, b"x", 2**64])
def test_rejects_values_that_json_or_a_filter_cannot_have(value: Any) -> None:
    with pytest.raises(BadFields, match="no value of a field"):
        Column.of(["x", value])


def column(codes: Any, texts: list[str]) -> dict[str, Any]:
    found = Texts.of(texts)
    return {"metadata.x.codes": codes, "metadata.x.text": found.text, "metadata.x.offsets": found.offsets}


def ids(text: bytes, offsets: list[int]) -> dict[str, Any]:
    return {"source_id.text": np.frombuffer(text, np.uint8), "source_id.offsets": np.array(offsets, np.int64)}


I32 = np.zeros(2, np.int32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (ids(b"ab", [0, 1]), "offsets must ascend"),
        (ids(b"ab", [0, 1, 2, 2]), "ids of 3 chunks; the corpus has 2"),
        (ids(b"ab", [0, 3, 2]), "offsets must ascend"),
        (ids("ä".encode(), [0, 1, 2]), "inside a character"),
        (ids(b"\xff\xff", [0, 1, 2]), "not UTF-8"),
        (ids(b"ab", []), "offsets int64"),
        ({"source_id.offsets": np.zeros(3, np.int64)}, "lacks 'source_id.text'"),
        (column(np.zeros(3, np.int32), ['"a"']), r"codes int32 \(3,\); expected int32 \(2,\)"),
        (column(np.zeros(2, np.int64), ['"a"']), "codes int64"),
        (column(I32 + 1, ['"a"']), "code outside of its 1 values"),
        (column(I32 - 2, ['"a"']), "code outside"),
        (column(I32, ["{"]), "'{' is not JSON"),
        (column(I32, ["[]"]), "list is no value"),
        (column(I32, ["NaN"]), "finite"),
        (column(I32, ['"b"', '"a"']), "ascending"),
        (column(I32, ['"a"', '"a"']), "ascending"),
        (column(I32, ["1.0"]), "ascending"),
    ],
)
def test_rejects_contradictory_fields(directory: Path, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(BadFields, match=f"{FIELDS_FILE}: .*{message}"):
        Fields.from_bytes(save(tensors), 2)
    (directory / FIELDS_FILE).write_bytes(save(tensors))
    for read in (read_corpus, mapped):
        with pytest.raises(BadCorpus, match=FIELDS_FILE):
            read(directory)


@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_damage_raises_only_bad_fields(share: float, bit: int, cut: bool) -> None:
    data = bytearray(FIELDS.to_bytes())
    place = int(share * len(data))
    data[place] ^= 1 << bit
    try:
        found = Fields.from_bytes(bytes(data[:place] if cut else data), 4)
    except BadFields:
        return
    assert all(found.source_id(row) != "" and json.dumps(found.metadata_of(row)) for row in range(4))
