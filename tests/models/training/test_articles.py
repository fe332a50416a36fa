"""Articles become a corpus whole or not at all, and no word of theirs is lost, moved or made up."""

import contextlib
import gzip
import json
import os
import shutil
import signal
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.retrieval.corpus import CORPUS_FILES, read_corpus
from models.retrieval.fields import FIELDS_FILE
from models.text.encoder import EncoderError, Progress
from models.training.articles import BLOCK, BadArticles, Summary, build, read, warnings
from models.training.work_cache import cache_next_to
from models.vectors import Floats
from models.windows import windows
from tests.fakes import HashEncoder, prose


class BrokenEncoder(HashEncoder):
    """Returns one array, whatever it is asked."""

    def __init__(self, vectors: Floats) -> None:
        self.vectors = vectors

    def encode(self, texts: Sequence[str], progress: Progress = lambda done, total: None) -> Floats:
        return self.vectors


def write_lines(path: Path, *articles: Any) -> Path:
    text = "".join(json.dumps(article) + "\n" for article in articles)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def make(source: Path, out: Path) -> Summary:
    return build(source, out, HashEncoder(), lambda done, total: None, cache_next_to(out))


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
    line = read_corpus(tmp_path / "out").articles[7]
    assert line == {**article, "ntok": [2, 500]}


def test_text_is_cut_and_leaves_the_line(tmp_path: Path) -> None:
    make(write_lines(tmp_path / "in.jsonl", {"title": "A", "text": prose([60, 60])}), tmp_path / "out")
    line = read_corpus(tmp_path / "out").articles[0]
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
        (b'{"title": "A", "chunks": [{"id": 1}]}', r"`chunks\[0\]`"),
        (b'{"title": "A", "chunks": [{"text": "a", "id": []}]}', r"`chunks\[0\].id`"),
        (b'{"title": "A", "title": "B", "chunks": ["a"]}', "duplicate key 'title'"),
        (b'{"title": "A", "chunks": ["a"], "more": {"b": 1, "b": 1}}', "duplicate key 'b'"),
        (b'{"title": "A", "chunks": ["a"], "more": NaN}', "not JSON"),
        (b'{"title": "A", "chunks": ["a"], "more": 1e999}', "not JSON"),
        (b'{"title": "A", "chunks": ["a"], "license": 3}', "`license` must be"),
        (b'{"title": "A", "chunks": ["a"], "article_id": "1"}', "`article_id` must be"),
        (b'{"title": "A", "chunks": ["a"], "article_id": true}', "`article_id` must be"),
        (b'{"title": "A", "chunks": ["a"], "article_id": 2147483648}', "`article_id` must be"),
        (b'{"title": "A", "chunks": ["a"], "article_id": 0}', "already used by an earlier"),
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
def test_rejects_a_source_of_unknown_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / "data.csv").touch()
    with pytest.raises(BadArticles, match=name):
        list(read(tmp_path / name))


def test_ignores_byte_order_mark_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.strip() + b"\r\n\r\n  \n" + GOOD.strip())
    assert [article["article_id"] for article in read(path)] == [0, 1]


@pytest.mark.parametrize("name", ["A.JSONL", "A.JSONL.GZ", "A.Jsonl.Gz"])
def test_an_extension_in_capitals_is_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(GOOD) if path.suffix.lower() == ".gz" else GOOD)
    assert [article["source"] for article in read(path)] == [name]


def test_text_files_in_capitals_are_found_in_a_directory(tmp_path: Path) -> None:
    for name in ("B.TXT", "a.txt"):
        (tmp_path / name).write_text(prose([40]))
    assert [article["source"] for article in read(tmp_path)] == ["B.TXT", "a.txt"]
    assert [article["title"] for article in read(tmp_path / "B.TXT")] == ["B"]


def fed(path: Path, data: bytes) -> Path:
    """Make a pipe, and write `data` into it once."""
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=(data,), daemon=True).start()
    return path


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("name", ["pipe", "in.jsonl", "in.jsonl.gz"])
def test_a_pipe_is_read_once_packed_or_not(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    summary = make(fed(tmp_path / name, pack(GOOD * 3)), tmp_path / "out")
    assert summary.articles == 3
    sources = {line["source"] for line in read_corpus(tmp_path / "out").articles.values()}
    assert sources == {"stdin" if name == "pipe" else name}


def test_a_text_comes_through_a_pipe_too(tmp_path: Path) -> None:
    pipe = fed(tmp_path / "in.txt", f"A Title\n\n{prose([40])}".encode())
    assert [article["title"] for article in read(pipe)] == ["A Title"]


def test_a_descriptor_of_the_process_is_a_source_of_lines(tmp_path: Path) -> None:
    with write_lines(tmp_path / "in.jsonl.gz", json.loads(GOOD)).open("rb") as file:
        assert [article["source"] for article in read(Path(f"/dev/fd/{file.fileno()}"))] == ["stdin"]


def test_rejects_a_pipe_among_text_files_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(BadArticles, match=r"a\.txt: not a file"):
        list(read(tmp_path))


def test_rejects_a_directory_without_text_files(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(BadArticles, match=r"holds no \.txt file"):
        list(read(tmp_path))


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.txt"])
def test_rejects_an_endless_line_before_it_fills_the_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b" " * 10_000_000))
    with pytest.raises(BadArticles, match=f"{name}.*: more than 5000 bytes"):
        list(read(path, largest=5000))


@pytest.mark.parametrize(
    ("name", "title"),
    [
        (b"f\xfcchse.txt", "f\N{REPLACEMENT CHARACTER}chse"),
        ("füchse.txt".encode(), "füchse"),
        (b"a\nb\x1b[31m.txt", "a\\nb\\x1b[31m"),
    ],
)
def test_a_file_name_of_any_bytes_becomes_a_title_that_can_be_written(tmp_path: Path, name: bytes, title: str) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.write_text(prose([40]))
    make(tmp_path, out := tmp_path / "out")
    line = read_corpus(out).articles[0]
    assert (line["title"], line["source"]) == (title, f"{title}.txt")


def test_a_message_escapes_a_file_name(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[2J\n.jsonl").write_text("{")
    with pytest.raises(BadArticles, match=r"a\\x1b\[2J\\n\.jsonl:1: not JSON"):
        list(read(tmp_path / "a\x1b[2J\n.jsonl"))


# --- building ---


def test_a_corpus_reads_back_with_the_vectors_of_its_chunks(tmp_path: Path) -> None:
    long = {"title": "Long", "text": prose([60] * 9)}
    source = write_lines(tmp_path / "in.jsonl", long, {"title": "Few", "chunks": ["a", "b"]})
    summary = make(source, tmp_path / "new" / "out")
    made = read_corpus(tmp_path / "new" / "out")
    assert summary == Summary(
        "fake", 8, articles=2, chunks=11, windows=4, dropped=0, truncated=0, unread=0, unreadable=0
    )
    assert summary.windows == len(windows(made, 5))
    texts = [str(made.chunk(row).text) for row in range(len(made))]
    np.testing.assert_allclose(made.vectors, [HashEncoder().vector(text) for text in texts], atol=1e-3)
    assert made.chunk(9).title == "Few"
    assert made.position[9:].tolist() == [0, 1]
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == set(CORPUS_FILES)


def test_an_article_too_short_for_a_chunk_is_left_out_and_counted(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"title": "Stub", "text": "Few words."}, json.loads(GOOD))
    summary = make(source, tmp_path / "out")
    assert (summary.articles, summary.dropped) == (1, 1)
    assert list(read_corpus(tmp_path / "out").articles) == [1]


def test_unreadable_chunks_are_left_out_and_counted(tmp_path: Path) -> None:
    texts = ["fine", "? ??", "word " * 300, "one ? word"]
    source = write_lines(tmp_path / "in.jsonl", {"title": "A", "chunks": texts}, {"title": "B", "chunks": ["?"]})
    summary = make(source, tmp_path / "out")
    assert (summary.chunks, summary.dropped) == (3, 1)
    assert (summary.truncated, summary.unread, summary.unreadable) == (1, 1, 2)
    line = read_corpus(tmp_path / "out").articles[0]
    assert (line["chunks"], line["ntok"]) == ([texts[0], *texts[2:]], [1, 300, 3])
    assert [warning.split(" ", 1)[0] for warning in warnings(summary)] == ["1", "2"]


def test_no_warnings_if_everything_was_read(tmp_path: Path) -> None:
    assert warnings(make(write_lines(tmp_path / "in.jsonl", json.loads(GOOD)), tmp_path / "out")) == []


def test_rejects_articles_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    with pytest.raises(BadArticles, match="no article yields a chunk that fake can read"):
        make(write_lines(tmp_path / "in.jsonl", {"title": "A", "chunks": ["?"]}), tmp_path / "out")


def test_progress_counts_the_characters_of_articles(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    texts = [f"chunk {number:04d}" for number in range(BLOCK + 1)]
    stub = {"title": "Stub", "text": "Too few words."}
    source = write_lines(tmp_path / "in.jsonl", stub, {"title": "A", "chunks": ["?", *texts]})
    build(source, tmp_path / "out", HashEncoder(), lambda *at: seen.append(at), cache_next_to(tmp_path / "o"))
    total = len("Too few words.?") + 10 * len(texts)
    assert {all_of_them for _, all_of_them in seen} == {total}
    assert seen == sorted(seen)
    assert total - 10 in [done for done, _ in seen]
    assert seen[-1] == (total, total)


def test_rejects_nothing_to_encode(tmp_path: Path) -> None:
    with pytest.raises(BadArticles, match="no article yields a chunk"):
        make(write_lines(tmp_path / "in.jsonl"), tmp_path / "out")


@pytest.mark.parametrize("occupy", [Path.mkdir, Path.touch, lambda path: path.symlink_to("gone")])
def test_an_existing_destination_is_unchanged(tmp_path: Path, occupy: Callable[[Path], None]) -> None:
    source = write_lines(tmp_path / "in.jsonl", json.loads(GOOD))
    out = tmp_path / "out"
    occupy(out)
    with pytest.raises(FileExistsError, match="out"):
        make(source, out)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out"}


@pytest.mark.parametrize("vectors", [np.ones((2, 8)), np.ones((1, 9)), np.full((1, 8), np.nan)])
def test_unusable_vectors_leave_nothing_behind(tmp_path: Path, vectors: Floats) -> None:
    source = write_lines(tmp_path / "in.jsonl", json.loads(GOOD))
    with pytest.raises(EncoderError, match="fake"):
        build(
            source, tmp_path / "out", BrokenEncoder(vectors), lambda done, total: None, cache_next_to(tmp_path / "out")
        )
    assert list(tmp_path.iterdir()) == [source]


class StoppingEncoder(HashEncoder):
    """Counts the texts that it is given, one call after the other, and is stopped at some call; the probe is one."""

    def __init__(self, stops_at: int = 99) -> None:
        self.stops_at, self.asked = stops_at, list[int]()

    def encode(self, texts: Sequence[str], progress: Progress = lambda done, total: None) -> Floats:
        self.asked.append(len(texts))
        if len(self.asked) == self.stops_at:
            raise KeyboardInterrupt
        return super().encode(texts)


class OtherEncoder(StoppingEncoder):
    """Bears the same name, and makes other vectors."""

    def vector(self, text: str) -> Floats:
        return -super().vector(text)


def test_stopped_work_continues_after_the_encoded_chunks(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"title": "A", "chunks": [f"chunk {n}" for n in range(2 * BLOCK + 44)]})
    out, parts = tmp_path / "out", cache_next_to(tmp_path / "out")
    for encoder in (StoppingEncoder(stops_at=4), StoppingEncoder()):
        with contextlib.suppress(KeyboardInterrupt):
            build(source, out, encoder, lambda done, total: None, parts)
    assert encoder.asked == [1, 44]
    make(source, tmp_path / "whole")
    for file in CORPUS_FILES:
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out", "whole"}


class CountingEncoder(HashEncoder):
    """Writes a byte to a file for each text that it counts, and for each block that it is given."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def count_tokens(self, text: str) -> int:
        self._write(b"c")
        return super().count_tokens(text)

    def encode(self, texts: Sequence[str], progress: Progress = lambda done, total: None) -> Floats:
        self._write(b"e" * (len(texts) > 1))
        return super().encode(texts)

    def _write(self, mark: bytes) -> None:
        with self.file.open("ab") as file:
            file.write(mark)


def killed(source: Path, out: Path, log: Path, at: int) -> bool:
    """Make a corpus in a process that is killed as soon as `log` has `at` marks more; return whether it was."""
    at += log.stat().st_size if log.exists() else 0

    class Mortal(CountingEncoder):
        def _write(self, mark: bytes) -> None:
            super()._write(mark)
            if self.file.stat().st_size >= at:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            build(source, out, Mortal(log), lambda *_: None, cache_next_to(out), ["lang"])
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_process_killed_again_and_again_makes_the_same_files_and_repeats_only_what_it_was_at(tmp_path: Path) -> None:
    cut = [{"title": f"T{n}", "lang": f"l{n % 3}", "text": prose([95] * 400, n)} for n in range(8)]
    chunked = {"title": "C", "chunks": [{"text": f"chunk {n}", "id": n} for n in range(2 * BLOCK)]}
    source = write_lines(tmp_path / "in.jsonl.gz", *cut[:2], chunked, *cut[2:])
    whole, log, once = tmp_path / "whole", tmp_path / "log", tmp_path / "once"
    build(source, whole, CountingEncoder(once), lambda *_: None, cache_next_to(whole), ["lang"])
    kills = next(kills for kills in range(20) if not killed(source, tmp_path / "out", log, 1500))
    assert kills >= 2
    assert log.read_bytes().count(b"e") <= once.read_bytes().count(b"e") + kills
    for file in (*CORPUS_FILES, FIELDS_FILE):
        assert (tmp_path / "out" / file).read_bytes() == (whole / file).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl.gz", "whole", "out", "log", "once"}


def test_leftovers_of_a_killed_run_go_with_the_next_success(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", json.loads(GOOD))
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            build(
                source,
                tmp_path / "out",
                HashEncoder(),
                lambda *_: os.kill(os.getpid(), signal.SIGKILL),
                cache_next_to(tmp_path / "out"),
            )
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    make(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out"}


@pytest.mark.parametrize(
    ("kind", "first", "asked"),
    [
        (StoppingEncoder, "chunk", [1, 44]),
        (StoppingEncoder, "new", [1, BLOCK, 44]),
        (OtherEncoder, "chunk", [1, BLOCK, BLOCK, 44]),
    ],
)
def test_chunks_of_another_text_or_model_are_encoded_again(
    tmp_path: Path, kind: type[StoppingEncoder], first: str, asked: list[int]
) -> None:
    texts = [f"chunk {n}" for n in range(2 * BLOCK + 44)]
    out, parts = tmp_path / "out", cache_next_to(tmp_path / "out")
    source = write_lines(tmp_path / "in.jsonl", {"title": "A", "chunks": ["chunk", *texts[1:]]})
    with pytest.raises(KeyboardInterrupt):
        build(source, out, StoppingEncoder(4), lambda done, total: None, parts)
    write_lines(source, {"title": "A", "chunks": [first, *texts[1:]]})
    build(source, out, encoder := kind(), lambda done, total: None, parts)
    assert encoder.asked == asked


# --- ids and metadata ---


def make_with(source: Path, out: Path, *metadata: str) -> Summary:
    return build(source, out, HashEncoder(), lambda done, total: None, cache_next_to(out), metadata)


def test_chunks_may_have_ids_and_fields_and_share_those_of_their_article(tmp_path: Path) -> None:
    chunks = ["plain", {"text": "one", "id": 7}, {"text": "two", "id": "b", "lang": "fr", "other": []}]
    made = {"title": "A", "lang": "en", "year": 1999, "chunks": chunks}
    lines = write_lines(tmp_path / "in.jsonl", made, {"title": "B", "text": prose([40])})
    make_with(lines, tmp_path / "out", "lang", "year")
    corpus = read_corpus(tmp_path / "out")
    assert [corpus.chunk(row)[3:] for row in range(3)] == [
        ("plain", None, {"lang": "en", "year": 1999}),
        ("one", "7", {"lang": "en", "year": 1999}),
        ("two", "b", {"lang": "fr", "year": 1999}),
    ]
    assert corpus.chunk(3).metadata == {}
    assert corpus.articles[0]["chunks"] == ["plain", "one", "two"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("nowhere", "no chunk and no article has a field 'nowhere'"), ("tags", "field 'tags': list is no value")],
)
def test_a_field_that_cannot_be_kept_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    lines = write_lines(tmp_path / "in.jsonl", {"title": "A", "chunks": ["fine"], "tags": ["a"]})
    with pytest.raises(BadArticles, match=reason):
        make_with(lines, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_a_field_without_a_value_is_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    source, encoder = write_lines(tmp_path / "in.jsonl", json.loads(GOOD)), StoppingEncoder()
    with pytest.raises(BadArticles, match="has a field 'lang'"):
        build(source, tmp_path / "out", encoder, lambda *_: None, cache_next_to(tmp_path / "out"), ["lang"])
    assert encoder.asked == []


class SameVectors(HashEncoder):
    """Makes the same vector of every text."""

    def encode(self, texts: Sequence[str], progress: Progress = lambda done, total: None) -> Floats:
        return np.ones((len(texts), self.dim), np.float32)


def test_memory_does_not_grow_with_the_articles(tmp_path: Path) -> None:
    peaks = []
    for count in (5, 25):
        source = tmp_path / f"{count}.jsonl"
        article = {"title": "A", "chunks": [f"{n} " + "w" * 1000 for n in range(500)]}
        write_lines(source, *[article] * count)
        tracemalloc.start()
        build(source, tmp_path / "out", SameVectors(), lambda *_: None, cache_next_to(tmp_path / f"{count}"))
        shutil.rmtree(tmp_path / "out")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
