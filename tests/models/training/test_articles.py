"""Articles become a corpus whole or not at all, and no word of theirs is lost, moved or made up."""

import gzip
import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import corpus
from models.corpus import Floats
from models.training.articles import (
    BadArticles,
    EncoderError,
    Progress,
    Sizes,
    Summary,
    build,
    chunk,
    read,
    sentences,
)
from models.windows import windows


class HashEncoder:
    """A unit vector drawn from the text's hash; a word is a token; encodes two texts at a time."""

    name, dim = "hash", 8

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def encode(self, texts: Sequence[str], progress: Progress) -> Floats:
        vectors = np.stack([self.vector(text) for text in texts])
        for done in range(2, len(texts) + 2, 2):
            progress(min(done, len(texts)), len(texts))
        return vectors

    def vector(self, text: str) -> Floats:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
        return corpus.normalise(np.random.default_rng(seed).standard_normal(self.dim))


class BrokenEncoder(HashEncoder):
    """Returns one array, whatever it is asked."""

    def __init__(self, vectors: Floats) -> None:
        self.vectors = vectors

    def encode(self, texts: Sequence[str], progress: Progress) -> Floats:
        return self.vectors


def words(text: str) -> int:
    return len(text.split())


def prose(sizes: Sequence[int], first: int = 0) -> str:
    """Sentences of the given numbers of words, every word different."""
    made = []
    for size in sizes:
        made.append(" ".join(f"W{first + i}" for i in range(size)) + ".")
        first += size
    return " ".join(made)


def write_lines(path: Path, *articles: Any) -> Path:
    text = "".join(json.dumps(article) + "\n" for article in articles)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def make(source: Path, out: Path) -> Summary:
    return build(source, out, HashEncoder(), lambda done, total: None)


# --- sentences ---


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One thing. Another thing! A third? Yes.", 4),
        ("Dr. Smith met J. R. Jones of the U.S. Navy on Jan. 5 at 3.14 p.m. and left.", 1),
        ("See e.g. the notes, i.e. the end.", 1),
        ('He said "Stop." Then he left.', 2),
        ("Wait... what? Fine.", 2),
        ("No stop at the end", 1),
        ("Ein Satz. Über uns. Éire.", 3),
        ("  \n ", 0),
    ],
)
def test_a_sentence_ends_where_a_reader_would_end_it(text: str, count: int) -> None:
    assert len(sentences(text)) == count
    assert " ".join(sentences(text)).split() == text.split()


def test_a_line_of_dots_costs_no_more_than_its_length() -> None:
    started = time.perf_counter()
    sentences("." * 200_000 + "x")
    assert time.perf_counter() - started < 2


# --- chunks ---


def sizes_of(text: str) -> list[int]:
    return [words(piece) for piece in chunk(text, words)]


@pytest.mark.parametrize(
    ("sentence_sizes", "expected"),
    [
        ([40, 40, 40, 40], [80, 80]),
        ([50, 50, 50], [100, 50]),
        ([20, 110, 40], [130, 40]),  # below the least, it takes one more sentence beyond the full size
        ([120, 60], [120, 60]),
        ([90, 20], [110]),  # a short tail joins the chunk before it
        ([120, 25], [120]),  # and is dropped where there is no room
        ([20, 130], [85, 65]),  # 150 is too much: the sentence is halved
        ([300], [75, 75, 75, 75]),
        ([29], []),
        ([30], [30]),
        ([], []),
    ],
)
def test_sentences_are_packed_up_to_the_full_size(sentence_sizes: list[int], expected: list[int]) -> None:
    assert sizes_of(prose(sentence_sizes)) == expected


@pytest.mark.parametrize(("paragraphs", "expected"), [([50, 40], [50, 40]), ([49, 40], [89]), ([20, 20], [40])])
def test_a_paragraph_ends_a_chunk_of_fifty_or_more(paragraphs: list[int], expected: list[int]) -> None:
    assert sizes_of("\n \n".join(prose([size]) for size in paragraphs)) == expected


def test_a_single_word_beyond_the_most_is_split_between_characters() -> None:
    pieces = chunk("x" * 500, len)
    assert "".join(pieces) == "x" * 500
    assert all(30 <= len(piece) <= 140 for piece in pieces)


@pytest.mark.parametrize("seed", range(40))
def test_chunks_hold_the_words_in_order_within_the_limits(seed: int) -> None:
    draw = random.Random(seed)
    limits = Sizes() if seed % 2 else Sizes(least=5, close=8, full=12, most=20)
    paragraphs = [
        prose([draw.choice([1, 3, 12, 25, 60, 99, 141, 400]) for _ in range(draw.randint(0, 6))], 10_000 * i)
        for i in range(draw.randint(1, 12))
    ]
    text = "\n\n".join(paragraphs)
    pieces = chunk(text, words, limits)
    kept = " ".join(pieces).split()
    assert kept == text.split()[: len(kept)]
    assert words(text) - len(kept) < limits.least
    assert all(limits.least <= words(piece) <= limits.most for piece in pieces)


# --- reading ---


def test_ready_chunks_and_further_fields_are_taken_as_they_are(tmp_path: Path) -> None:
    article = {
        "article_id": 7,
        "title": "Élan",
        "source": "wiki",
        "license": "CC BY-SA 3.0",
        "split": "val",
        "section": ["a", "b"],
        "chunks": [" two  words", "x " * 500],
    }
    make(write_lines(tmp_path / "in.jsonl.gz", article), tmp_path / "out")
    line = corpus.read(tmp_path / "out").articles[7]
    assert line == {**article, "ntok": [2, 500]}


def test_text_is_cut_and_leaves_the_line(tmp_path: Path) -> None:
    make(write_lines(tmp_path / "in.jsonl", {"title": "A", "text": prose([60, 60])}), tmp_path / "out")
    line = corpus.read(tmp_path / "out").articles[0]
    assert line["ntok"] == [60, 60]
    assert list(line) == ["article_id", "source", "title", "chunks", "ntok"]
    assert line["source"] == "in.jsonl"


def test_a_directory_of_text_files_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("A Title\r\n\r\n" + prose([40]))
    (tmp_path / "a.txt").write_text("A first line as long as any in a wrapped text\nand on " + prose([40]))
    (tmp_path / "c.txt").write_text(prose([40]))
    (tmp_path / "notes.md").write_text("not read")
    first, second, third = read(tmp_path)
    assert [a["article_id"] for a in (first, second, third)] == [0, 1, 2]
    assert (second["title"], second["text"].strip()) == ("A Title", prose([40]))
    assert first["text"].startswith("A first line")  # no blank line follows: nothing is lost
    assert third["title"] == "c"


def test_one_text_file_is_one_article(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Title\n\n" + prose([40]))
    assert [article["title"] for article in read(tmp_path / "a.txt")] == ["Title"]


GOOD = b'{"title": "A", "chunks": ["fine"]}\n'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON in UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "expected an object"),
        (b'{"chunks": ["a"]}', "`title` must be"),
        (b'{"title": "A"}', "needs `chunks` or"),
        (b'{"title": "A", "text": 1}', "needs `chunks` or"),
        (b'{"title": "A", "chunks": []}', "at least one"),
        (b'{"title": "A", "chunks": "text"}', "must be a list"),
        (b'{"title": "A", "chunks": ["a", " "]}', r"`chunks\[1\]`"),
        (b'{"title": "A", "chunks": ["a", null]}', r"`chunks\[1\]`"),
        (b'{"title": "A", "chunks": ["\\ud800"]}', "not JSON in UTF-8"),
        (b'{"title": "A", "chunks": ["a"], "license": 3}', "`license` must be"),
        (b'{"title": "A", "chunks": ["a"], "article_id": "1"}', "`article_id` must be"),
        (b'{"title": "A", "chunks": ["a"], "article_id": true}', "`article_id` must be"),
        (b'{"title": "A", "chunks": ["a"], "article_id": 2147483648}', "`article_id` must be"),
        (b'{"title": "A", "chunks": ["a"], "article_id": 0}', "stands for an earlier"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(BadArticles, match=f"in.jsonl:3: .*{reason}"):
        make(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_a_cut_gzip_file_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 2)[:-9])
    with pytest.raises(BadArticles, match=r"in.jsonl.gz:\d: unreadable"):
        list(read(path))


def test_a_text_file_in_another_encoding_is_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("fine\nna\xefve".encode("latin-1"))
    with pytest.raises(BadArticles, match=r"a\.txt:2: not UTF-8"):
        list(read(tmp_path))


@pytest.mark.parametrize("name", ["missing.jsonl", "data.csv"])
def test_a_source_of_no_known_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "data.csv").touch()
    with pytest.raises(BadArticles, match=name):
        list(read(tmp_path / name))


# --- building ---


def test_a_corpus_reads_back_with_the_vectors_of_its_chunks(tmp_path: Path) -> None:
    long = {"title": "Long", "text": prose([60] * 9)}
    source = write_lines(tmp_path / "in.jsonl", long, {"title": "Few", "chunks": ["a", "b"]})
    summary = make(source, tmp_path / "new" / "out")
    made = corpus.read(tmp_path / "new" / "out")
    assert summary == Summary("hash", 8, articles=2, chunks=11, windows=4, dropped=0)
    assert summary.windows == len(windows(made, 5))
    texts = [str(made.chunk(row).text) for row in range(len(made))]
    np.testing.assert_allclose(made.vectors, [HashEncoder().vector(text) for text in texts], atol=1e-3)
    assert made.chunk(9).title == "Few"
    assert made.position[9:].tolist() == [0, 1]
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == set(corpus.FILES)


def test_an_article_too_short_for_a_chunk_is_left_out_and_counted(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"title": "Stub", "text": "Few words."}, json.loads(GOOD))
    summary = make(source, tmp_path / "out")
    assert (summary.articles, summary.dropped) == (1, 1)
    assert list(corpus.read(tmp_path / "out").articles) == [1]


def test_progress_ends_at_the_number_of_chunks(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = write_lines(tmp_path / "in.jsonl", {"title": "A", "chunks": ["a", "b", "c"]})
    build(source, tmp_path / "out", HashEncoder(), lambda done, total: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]


def test_nothing_to_encode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArticles, match="no article yields a chunk"):
        make(write_lines(tmp_path / "in.jsonl"), tmp_path / "out")


@pytest.mark.parametrize("occupy", [Path.mkdir, Path.touch, lambda path: path.symlink_to("gone")])
def test_what_stands_at_the_destination_is_left_alone(tmp_path: Path, occupy: Callable[[Path], None]) -> None:
    source = write_lines(tmp_path / "in.jsonl", json.loads(GOOD))
    out = tmp_path / "out"
    occupy(out)
    with pytest.raises(FileExistsError, match="out"):
        make(source, out)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out"}


@pytest.mark.parametrize("vectors", [np.ones((2, 8)), np.ones((1, 9)), np.full((1, 8), np.nan)])
def test_unusable_vectors_leave_nothing_behind(tmp_path: Path, vectors: Floats) -> None:
    source = write_lines(tmp_path / "in.jsonl", json.loads(GOOD))
    with pytest.raises(EncoderError, match="hash"):
        build(source, tmp_path / "out", BrokenEncoder(vectors), lambda done, total: None)
    assert list(tmp_path.iterdir()) == [source]


WITHOUT_THE_EXTRA = """
import sys
from models.training import articles
assert not {"torch", "sentence_transformers"} & set(sys.modules), "imported with the module"
sys.modules["sentence_transformers"] = None  # as if it were not installed
try:
    articles.SentenceTransformersEncoder("all-MiniLM-L6-v2")
except articles.EncoderError as error:
    print(error)
"""


def test_without_the_extra_the_module_imports_and_the_encoder_says_what_is_missing() -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", WITHOUT_THE_EXTRA]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "`data` extra" in ran.stdout
