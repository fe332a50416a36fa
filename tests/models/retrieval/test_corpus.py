"""A corpus survives a round trip, and invalid or contradictory files are rejected."""

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.retrieval.corpus import (
    ARTICLES_FILE,
    CORPUS_FILES,
    INDEX_FILE,
    PASSAGES_FILE,
    SPANS_FILE,
    VECTORS_FILE,
    BadCorpus,
    Chunk,
    Corpus,
    MappedCorpus,
    count_chunks,
    map_unverified_corpus,
    parse_corpus,
    read_articles,
    read_corpus,
    write_corpus,
    write_passages,
)
from models.vectors import normalise


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array), allow_pickle=True)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files(corpus_dir: Path) -> dict[str, bytes]:
    return {name: (corpus_dir / name).read_bytes() for name in CORPUS_FILES}


def test_reads_what_was_written(tmp_path: Path) -> None:
    vectors = normalise(np.random.default_rng(0).standard_normal((5, 8)))
    articles: list[dict[str, Any]] = [
        {"article_id": 7, "title": "Ä", "chunks": ["one", "two 🙂"]},
        {"article_id": 3, "title": "B", "chunks": ["three", "four\n", "five"], "url": "https://example.org"},
    ]
    write_corpus(tmp_path / "deep" / "c", vectors, articles)
    corpus = read_corpus(tmp_path / "deep" / "c")
    assert (len(corpus), corpus.dim) == (5, 8)
    assert np.abs(corpus.vectors - vectors).max() < 1e-3  # float16 on disk
    assert np.allclose(np.linalg.norm(corpus.vectors, axis=1), 1, atol=1e-6)
    assert corpus.article.tolist() == [7, 7, 3, 3, 3]
    assert corpus.position.tolist() == [0, 1, 0, 1, 2]
    assert corpus.articles == {7: articles[0], 3: articles[1]}
    assert corpus.chunk(1) == Chunk(7, "Ä", 1, "two 🙂")
    assert corpus.chunk(4) == Chunk(3, "B", 2, "five")


def test_equal_corpora_are_equal_bytes(tmp_path: Path, corpus: Corpus, files: dict[str, bytes]) -> None:
    write_corpus(tmp_path, corpus.vectors, [dict(line) for line in corpus.articles.values()])
    again = {name: (tmp_path / name).read_bytes() for name in CORPUS_FILES}
    assert again[INDEX_FILE] == files[INDEX_FILE]
    assert again[ARTICLES_FILE] == files[ARTICLES_FILE]


def test_a_chunk_may_lack_text_and_article(make_corpus: Callable[..., Corpus]) -> None:
    bare = make_corpus(np.eye(2))
    assert bare.chunk(1) == Chunk(0, "", 1, None)
    titled = Corpus(bare.vectors, bare.article, bare.position, {0: {"title": "T", "chunks": ["only one"]}})
    assert titled.chunk(0) == Chunk(0, "T", 0, "only one")
    assert titled.chunk(1) == Chunk(0, "T", 1, None)


@given(hnp.arrays(np.float16, (4, 6), elements=st.floats(-1e3, 1e3, width=16)))
def test_normalise_gives_unit_rows_and_leaves_zeros(rows: Any) -> None:
    unit = normalise(rows)
    length = np.linalg.norm(unit, axis=1)
    zero = (rows == 0).all(axis=1)
    assert unit.dtype == np.float32
    assert np.allclose(length[~zero], 1, atol=1e-6)
    assert (unit[zero] == 0).all()


@pytest.mark.parametrize("name", CORPUS_FILES)
def test_a_missing_file_is_named(tmp_path: Path, files: dict[str, bytes], name: str) -> None:
    for file in CORPUS_FILES:
        (tmp_path / file).write_bytes(files[file])
    (tmp_path / name).unlink()
    with pytest.raises(BadCorpus, match=f"No such file or directory: .*{name}"):
        read_corpus(tmp_path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (VECTORS_FILE, npy(np.ones((239, 16), np.float16))),
        (VECTORS_FILE, npy(np.ones((240,), np.float16))),
        (VECTORS_FILE, npy(np.ones((240, 4, 4), np.float16))),
        (INDEX_FILE, npy(np.zeros((241, 2), np.int32))),
        (INDEX_FILE, npy(np.zeros((240, 3), np.int32))),
        (INDEX_FILE, npy(np.zeros((240,), np.int32))),
    ],
)
def test_rejects_contradictory_files(files: dict[str, bytes], name: str, data: bytes) -> None:
    with pytest.raises(BadCorpus, match="do not match"):
        parse_corpus({**files, name: data})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named(files: dict[str, bytes], value: float) -> None:
    vectors = np.load(io.BytesIO(files[VECTORS_FILE]))
    vectors[17, 3] = value
    with pytest.raises(BadCorpus, match="vector 17 is not finite"):
        parse_corpus({**files, VECTORS_FILE: npy(vectors)})


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("bomb-went-off"),))


def test_rejects_a_pickle_without_running_it(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (VECTORS_FILE, INDEX_FILE):
        with pytest.raises(BadCorpus, match="allow_pickle=False"):
            parse_corpus({**files, name: npy(np.array([Bomb()], dtype=object))})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "7", "null", '{"title": "no id"}', '{"article_id": null}', '{"article_id": "x"}', '{"article_id": []}'],
)
def test_rejects_invalid_articles(files: dict[str, bytes], text: str) -> None:
    with pytest.raises(BadCorpus, match="unreadable corpus"):
        parse_corpus({**files, ARTICLES_FILE: gzip.compress(text.encode())})


@pytest.mark.parametrize("name", CORPUS_FILES)
@pytest.mark.parametrize("data", [b"\n", b"garbage" * 20, b"\x93NUMPY\x01\x00", b"\x1f\x8b\x08\x00"])
def test_rejects_garbage(files: dict[str, bytes], name: str, data: bytes) -> None:
    with pytest.raises(BadCorpus):
        parse_corpus({**files, name: data})


@settings(max_examples=150)
@given(
    name=st.sampled_from(CORPUS_FILES),
    share=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    cut=st.booleans(),
)
def test_damage_raises_only_bad_corpus(files: dict[str, bytes], name: str, share: float, bit: int, cut: bool) -> None:
    data = bytearray(files[name])
    place = int(share * len(data))
    data[place] ^= 1 << bit
    try:
        parse_corpus({**files, name: bytes(data[:place] if cut else data)})
    except BadCorpus:
        return


def test_rejects_a_damaged_header(files: dict[str, bytes]) -> None:
    """For such headers numpy raises errors of its tokenizer, or allocates the memory that they claim."""
    for old, new in ((b"}", b" "), (b"(240, 16)", b"(240, 9**9)"), (b"(240, 16)", b"(99999999999999, 16)")):
        with pytest.raises(BadCorpus, match="unreadable corpus"):
            parse_corpus({**files, VECTORS_FILE: files[VECTORS_FILE].replace(old, new, 1)})


def test_articles_are_read_line_by_line() -> None:
    lines = [{"article_id": i} for i in range(3)]
    data = gzip.compress("\n".join(map(json.dumps, lines)).encode())
    assert list(read_articles(data)) == lines


# On disk


@pytest.fixture
def paths(corpus_dir: Path, tmp_path: Path) -> dict[str, Path]:
    """The files of the tiny corpus, with its text."""
    write_passages(corpus_dir, tmp_path)
    return {name: corpus_dir / name for name in CORPUS_FILES} | {
        name: tmp_path / name for name in (PASSAGES_FILE, SPANS_FILE)
    }


@pytest.fixture
def mapped(paths: dict[str, Path]) -> MappedCorpus:
    return map_unverified_corpus(paths)


def test_a_corpus_on_disk_is_the_one_in_memory(mapped: MappedCorpus, corpus: Corpus) -> None:
    rows = np.array([239, 0, 17, 17])
    assert (len(mapped), mapped.dim) == (240, 16)
    assert [mapped.chunk(row) for row in range(240)] == [corpus.chunk(row) for row in range(240)]
    assert np.array_equal(mapped.vectors_at(rows), corpus.vectors_at(rows))
    assert np.array_equal(np.vstack([vectors for _, vectors in mapped.blocks()]), corpus.vectors)


def test_text_is_found_whatever_the_order_of_articles(tmp_path: Path) -> None:
    articles: list[dict[str, Any]] = [
        {"article_id": 7, "title": "Ä", "chunks": ["one", "two 🙂"]},
        {"article_id": 3, "chunks": ["three", "four"]},
    ]
    write_corpus(tmp_path, normalise(np.eye(4)), articles)
    np.save(tmp_path / INDEX_FILE, np.array([[3, 1], [7, 1], [3, 0], [7, 5]], np.int32))
    assert write_passages(tmp_path, tmp_path) == 2
    mapped = map_unverified_corpus({name: tmp_path / name for name in (*CORPUS_FILES, PASSAGES_FILE, SPANS_FILE)})
    assert [mapped.chunk(row) for row in range(4)] == [
        Chunk(3, "", 1, "four"),
        Chunk(7, "Ä", 1, "two 🙂"),
        Chunk(3, "", 0, "three"),
        Chunk(7, "Ä", 5, None),
    ]


@pytest.mark.parametrize("name", CORPUS_FILES[1:])
@pytest.mark.parametrize(
    "data", [None, b"", b"garbage" * 20, gzip.compress(b"[]", mtime=0), gzip.compress(b"{}", mtime=0)]
)
def test_rejects_unreadable_text(corpus_dir: Path, tmp_path: Path, name: str, data: bytes | None) -> None:
    for file in CORPUS_FILES:
        (tmp_path / file).write_bytes((corpus_dir / file).read_bytes())
    (tmp_path / name).write_bytes(data) if data is not None else (tmp_path / name).unlink()
    with pytest.raises(BadCorpus):
        write_passages(tmp_path, tmp_path)


def test_rejects_a_row_of_an_unknown_article(corpus_dir: Path, tmp_path: Path) -> None:
    for file in CORPUS_FILES:
        (tmp_path / file).write_bytes((corpus_dir / file).read_bytes())
    np.save(tmp_path / INDEX_FILE, np.full((240, 2), 999, np.int32))
    with pytest.raises(BadCorpus, match="unknown article"):
        write_passages(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        (VECTORS_FILE, npy(np.ones((239, 16), np.float16)), "do not match"),
        (VECTORS_FILE, npy(np.ones((240, 16), np.float32)), "float32, int32, int64"),
        (VECTORS_FILE, npy(np.full((240, 16), np.nan, np.float16)), "vector 0 is not finite"),
        (VECTORS_FILE, npy(np.ones((240, 16), np.float16))[:-1], "unreadable corpus"),
        (VECTORS_FILE, npy(np.array([{}], dtype=object)), "unreadable corpus"),
        (VECTORS_FILE, b"", "unreadable corpus"),
        (INDEX_FILE, npy(np.zeros((240, 3), np.int32)), "do not match"),
        (SPANS_FILE, npy(np.zeros((240, 2), np.int64)), "do not match"),
        (SPANS_FILE, npy(np.full((240, 4), -1)), "exceeds the text"),
        (SPANS_FILE, npy(np.full((240, 4), 2**40)), "exceeds the text"),
        (PASSAGES_FILE, b"short", "exceeds the text"),
        (PASSAGES_FILE, None, "No such file"),
    ],
)
def test_rejects_contradictory_files_on_disk(
    paths: dict[str, Path], tmp_path: Path, name: str, data: bytes | None, said: str
) -> None:
    broken = tmp_path / "broken"
    if data is not None:
        broken.write_bytes(data)
    with pytest.raises(BadCorpus, match=said):
        map_unverified_corpus({**paths, name: broken})


def test_rows_are_counted_without_reading_the_corpus(corpus_dir: Path, tmp_path: Path) -> None:
    assert count_chunks(corpus_dir) == 240
    with pytest.raises(BadCorpus, match="No such file"):
        count_chunks(tmp_path)


@pytest.mark.parametrize("name", CORPUS_FILES)
def test_rejects_a_pipe_without_blocking(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    for ask in (read_corpus, count_chunks):
        with pytest.raises(BadCorpus, match="expected a regular file"):
            ask(tmp_path)
