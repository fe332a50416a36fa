"""Articles to a corpus: read them, cut them into chunks, encode the chunks, write `models.retrieval.corpus` files."""

from __future__ import annotations

import gzip
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, NamedTuple

import numpy as np

from models.retrieval.corpus import CorpusWriter, corpus_writer
from models.retrieval.fields import ARTICLE, FIELDS_FILE, BadFields, Column, Fields, Texts, as_text
from models.text import chunks
from models.text.chunks import chunk
from models.text.encoder import Encoder, EncoderError, Progress, no_progress
from models.training.work_cache import Arrays, WorkCache, source_digest
from models.vectors import Floats

Article = dict[str, Any]  # one line of `articles.jsonl.gz`; before chunking it may hold `text` for `chunks`

CONTEXT = 5  # T for which the summary counts windows
WINDOW = 2**19  # characters of articles that are cut and cached together
BLOCK = 1024  # chunks that are encoded and cached together: the encoder can sort these by length
# Counts of a `Summary`.
COUNTS = ("articles", "chunks", "windows", "dropped", "truncated", "unread", "unreadable")
PROBE = "The same model makes the same vector of this."
MAX_TITLE = 80  # characters of a text file's first line that can be its title
MAX_ARTICLE_BYTES = 2**28  # a file without line ends must not fill the memory
GZIP = b"\x1f\x8b"
STDIN = Path("-")
KINDS = "a .jsonl, .jsonl.gz or .txt file, a directory of .txt files, or - for lines from a pipe"


class BadArticles(ValueError):
    """Articles cannot be read or used; the message starts with the file and, if known, the line."""


@dataclass(frozen=True)
class Summary:
    """Counts of a new data set; `windows` are those at T = 5, `dropped` articles have no chunk that can be read.

    Of the chunks, `truncated` are longer than the encoder reads, and `unread` contain words that it does not know.
    The `unreadable` chunks were left out, and `chunks` does not count them.
    """

    encoder: str
    dim: int
    articles: int
    chunks: int
    windows: int
    dropped: int
    truncated: int
    unread: int
    unreadable: int


def warnings(made: Summary) -> list[str]:
    """Return one sentence for each kind of text that the vectors do not represent."""
    truncated = (
        f"{made.truncated} of {made.chunks} chunks are longer than the encoder reads; their vectors ignore the rest"
    )
    unreadable = f"{made.unreadable} chunks were left out: the encoder knows almost none of their words"
    return [*([truncated] if made.truncated else []), *([unreadable] if made.unreadable else [])]


def build(
    source: Path,
    out: Path,
    encoder: Encoder,
    progress: Progress,
    cache: WorkCache,
    metadata: Sequence[str] = (),
) -> Summary:
    """Write the articles of `source` as the new corpus directory `out`, whole or not at all.

    The chunks of an article are used as they are, however long; a text is cut by `chunk`. Chunks that the encoder
    cannot read are left out. All articles are read and checked before the first is encoded. Then a `WINDOW` of them is
    cut at a time and a `BLOCK` of chunks encoded at a time, so memory grows with ids and metadata alone. Both stay in
    `cache` until all is written, so that stopped work continues after them, to the same bytes.

    Args:
        source: as for `read`.
        out: a directory that does not exist yet.
        encoder: counts word-pieces and makes the vectors.
        progress: called with (characters done, characters in all).
        cache: the work cache, with what an earlier run finished.
        metadata: fields of chunks, or of articles for all their chunks, that the corpus keeps.

    Raises:
        BadArticles: an article is malformed, no article yields a chunk, or a field of `metadata` has no value, or one
            that is neither text nor a number nor a truth value.
        EncoderError: the vectors have the wrong shape or are not finite.
        FileExistsError: `out` exists.
        OSError: `out` cannot be written.
    """
    with cache, appearing(out, cache) as directory, TemporaryDirectory(prefix="spool.", dir=cache.directory) as scratch:
        spool = _Spool(Path(scratch) / "articles", source, metadata)
        with corpus_writer(directory, encoder.dim) as corpus:
            encoding = _Encoding(corpus, encoder, _Meter(progress, spool.characters), cache)
            for window in spool.windows():
                encoding.add(window, metadata)
            encoding.finish()
        if not encoding.counts["articles"]:
            raise BadArticles(f"{shown(source)}: no article yields a chunk that {encoder.name} can read")
        fields = encoding.fields(metadata)
        if not fields.is_empty:
            (directory / FIELDS_FILE).write_bytes(fields.to_bytes())
    return Summary(encoder.name, encoder.dim, **encoding.counts)


@contextmanager
def appearing(out: Path, cache: WorkCache) -> Iterator[Path]:
    """Yield a new directory in the work cache that becomes `out` on success and vanishes on failure.

    If the process is killed, it stays there until the same command succeeds.
    """
    _refuse_existing(out)
    staging = cache.directory / f"whole.{secrets.token_hex(4)}"
    staging.mkdir(parents=True)
    try:
        yield staging
        _refuse_existing(out)  # a rename would silently replace an empty directory
        os.rename(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise FileExistsError(f"{shown(out)}: exists")


class _Spool:
    """The articles of a source, checked and copied to a file, so that a pipe can be read twice as well."""

    def __init__(self, path: Path, source: Path, metadata: Sequence[str]) -> None:
        """Copy all articles; raises `BadArticles` if one is malformed, or a field is missing or cannot be kept."""
        self._path = path
        self.characters = 0
        missing = set(metadata)
        with path.open("w", encoding="utf-8") as file:
            for article in read(source):
                self.characters += _characters(article)
                missing -= _kept_fields(source, article, metadata)
                file.write(json.dumps(article, ensure_ascii=False) + "\n")
        for name in metadata:
            if name == ARTICLE or name in missing:
                raise BadArticles(f"{shown(source)}: no chunk and no article has a field {name!r} that can be kept")

    def windows(self) -> Iterator[list[str]]:
        """Yield the articles as lines of JSON, as many at a time as have `WINDOW` characters, but at least one."""
        window: list[str] = []
        size = 0
        with self._path.open(encoding="utf-8") as file:
            for line in file:
                window.append(line)
                size += len(line)
                if size >= WINDOW:
                    yield window
                    window, size = [], 0
        if window:
            yield window


def _characters(article: Article) -> int:
    texts = (_members(chunk)["text"] for chunk in article["chunks"]) if "chunks" in article else [article["text"]]
    return sum(map(len, texts))


def _members(chunk: Any) -> Mapping[str, Any]:
    """Return a chunk as an object with `text`."""
    return chunk if isinstance(chunk, Mapping) else {"text": chunk}


def _kept_fields(source: Path, article: Article, metadata: Sequence[str]) -> set[str]:
    """Return which fields of `metadata` an article or one of its chunks has; raises `BadArticles` for a bad value."""
    found = {(name, value) for name in metadata for value in _values(source, article, name) if value is not None}
    return {name for name, _ in found}


def _values(source: Path, article: Article, name: str) -> list[str | None]:
    values = [_members(chunk).get(name, article.get(name)) for chunk in article.get("chunks", [""])]
    try:
        return [None if value is None else as_text(value) for value in values]
    except BadFields as error:
        raise BadArticles(f"{shown(source)}: field {name!r}: {error}") from error


class _Cut(NamedTuple):
    """An article with the chunks that can be read, as the corpus keeps it, and what is known of these chunks.

    `ids` and the `values` of each field of metadata have one entry for each chunk. `characters` are those of the
    article; the last three are numbers of chunks.
    """

    article: Article
    characters: int
    ids: list[Any]
    values: list[list[Any]]
    truncated: int
    unread: int
    unreadable: int


def _cut(encoder: Encoder, lines: Sequence[str], metadata: Sequence[str]) -> list[_Cut]:
    return [_cut_article(json.loads(line), encoder, metadata) for line in lines]


def _cut_article(article: Article, encoder: Encoder, metadata: Sequence[str]) -> _Cut:
    given = article.get("chunks") or chunk(article["text"], encoder.count_tokens)
    both = [(members, encoder.text_info(members["text"])) for members in map(_members, given)]
    kept = [(members, info) for members, info in both if not info.fault]
    rest = {key: value for key, value in article.items() if key not in ("text", "chunks", "ntok")}
    texts = {"chunks": [members["text"] for members, _ in kept], "ntok": [info.word_pieces for _, info in kept]}
    return _Cut(
        {**rest, **texts},
        _characters(article),
        ids=[members.get("id") for members, _ in kept],
        values=[[members.get(name, article.get(name)) for members, _ in kept] for name in metadata],
        truncated=sum(info.truncated for _, info in kept),
        unread=sum(info.unread > 0 for _, info in kept),
        unreadable=len(both) - len(kept),
    )


class _Meter:
    """Tells how much is done, in characters: an article costs as much time as it is long."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def skip(self, characters: int) -> None:
        """Count characters that are not encoded."""
        self._done += characters

    @contextmanager
    def block(self, characters: int) -> Iterator[Progress]:
        """Yield what an encoder calls with (texts done, texts in all) of a block, which then counts as done."""
        yield lambda done, total: self._progress(self._done + characters * done // total, self._total)
        self._done += characters
        self._progress(self._done, self._total)


class _Encoding:
    """The corpus while it is written: articles at once, vectors whenever a block of chunks is complete."""

    def __init__(self, corpus: CorpusWriter, encoder: Encoder, meter: _Meter, cache: WorkCache) -> None:
        self.counts = dict.fromkeys(COUNTS, 0)
        self._corpus = corpus
        self._encoder = encoder
        self._meter = meter
        self._cache = cache
        # a name would not tell an encoder from another in the same directory, nor how it computes
        self._made_by = _checked(encoder, [PROBE]).tobytes(), source_digest(Path(chunks.__file__).parent)
        self._texts: list[str] = []
        self._ids: list[Any] = []
        self._values: list[list[Any]] = []

    def add(self, window: Sequence[str], metadata: Sequence[str]) -> None:
        """Cut articles, given as lines of JSON, and encode what makes whole blocks."""
        cut = partial(_cut, self._encoder, window, metadata)
        for each in self._cache.get_json(cut, "cut", *self._made_by, json.dumps(metadata), *window):
            self._add(_Cut(*each))
        self._encode(len(self._texts) // BLOCK * BLOCK)

    def finish(self) -> None:
        """Encode the last chunks."""
        self._encode(len(self._texts))

    def fields(self, metadata: Sequence[str]) -> Fields:
        """Return the ids and the metadata of all chunks."""
        has_ids = any(value is not None for value in self._ids)
        ids = Texts.of("" if value is None else str(value) for value in self._ids) if has_ids else None
        return Fields(ids, dict(zip(metadata, map(Column.of, self._values), strict=True)))

    def _add(self, cut: _Cut) -> None:
        texts = cut.article["chunks"]
        self._count(cut, len(texts))
        self._meter.skip(cut.characters - sum(map(len, texts)))
        if texts:
            self._corpus.add_article(cut.article)
        self._texts += texts
        self._ids += cut.ids
        self._values = self._values or [[] for _ in cut.values]
        for values, more in zip(self._values, cut.values, strict=True):
            values += more

    def _count(self, cut: _Cut, chunks: int) -> None:
        windows, has_chunks = max(0, chunks - CONTEXT), bool(chunks)
        found = (has_chunks, chunks, windows, not has_chunks, cut.truncated, cut.unread, cut.unreadable)
        for name, count in zip(self.counts, found, strict=True):
            self.counts[name] += count

    def _encode(self, count: int) -> None:
        """Write the vectors of the first `count` chunks that wait."""
        for first in range(0, count, BLOCK):
            block = self._texts[first : min(first + BLOCK, count)]
            with self._meter.block(sum(map(len, block))) as progress:
                encoded = partial(_encoded, self._encoder, block, progress)
                self._corpus.add_vectors(self._cache.get_arrays(encoded, *self._made_by, *block)["vectors"])
        del self._texts[:count]


def _encoded(encoder: Encoder, texts: Sequence[str], progress: Progress) -> Arrays:
    return {"vectors": _checked(encoder, texts, progress).astype(np.float16)}


def _checked(encoder: Encoder, texts: Sequence[str], progress: Progress = no_progress) -> Floats:
    vectors = encoder.encode(texts, progress)
    if vectors.shape != (len(texts), encoder.dim):
        raise EncoderError(f"{encoder.name}: {vectors.shape} for {len(texts)} chunks of {encoder.dim}")
    if not np.isfinite(vectors).all():
        raise EncoderError(f"{encoder.name}: a vector is not finite")
    return vectors


# --- reading ---


def read(source: Path, largest: int = MAX_ARTICLE_BYTES) -> Iterator[Article]:
    """Yield the articles of `source`, each with `article_id`, `title`, `source` and `chunks` or `text`.

    `source` is a `.jsonl`, `.jsonl.gz` or `.txt` file (upper case or not), a directory of `.txt` files, or a pipe or
    device of lines, plain or compressed; `-` is the standard input. Each is read once.
    An article without an id gets its index, from 0. Unknown fields are kept. In a text file a first line of up to
    80 characters is the title; if a blank line follows, it is not part of the text. Otherwise the title is the file's
    name. An article has at most `largest` bytes.

    Raises:
        BadArticles: `source` is missing, holds nothing of a known kind, or an article is malformed.
    """
    seen: set[int] = set()
    for place, (location, article) in enumerate(_located(source, largest)):
        article = {"article_id": place, **article}
        _check_id(location, article["article_id"], seen)
        yield article


def shown(path: Path) -> str:
    """Return a path as printable UTF-8, whatever bytes its name has."""
    name = os.fsencode(path).decode(errors="replace")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in name)


def _located(source: Path, largest: int) -> Iterator[tuple[str, Article]]:
    """Yield the location of each article, for messages, and the article."""
    name = source.name.lower()
    try:
        if source.is_dir():
            return chain.from_iterable(_from_text(path, largest) for path in _texts_in(source))
        if source != STDIN and not source.exists():
            raise BadArticles(f"{shown(source)}: no such file or directory")
        if name.endswith(".txt"):
            return _from_text(source, largest)
        if name.endswith((".jsonl", ".jsonl.gz")) or _is_stream(source):
            return _from_lines(source, largest)
    except OSError as error:
        raise BadArticles(f"{shown(source)}: unreadable: {error.strerror}") from error
    raise BadArticles(f"{shown(source)}: expected {KINDS}")


def _is_stream(source: Path) -> bool:
    """Return whether `source` is a pipe or a device, or the name of one: `/dev/stdin` may be a file."""
    return source == STDIN or not source.is_file() or source.parts[:2] in (("/", "dev"), ("/", "proc"))


def _texts_in(directory: Path) -> list[Path]:
    texts = sorted(path for path in directory.iterdir() if path.suffix.lower() == ".txt")
    if not texts:
        raise BadArticles(f"{shown(directory)}: holds no .txt file; expected {KINDS}")
    for path in texts:
        if not path.is_file():  # a pipe without a writer would never end
            raise BadArticles(f"{shown(path)}: not a file")
    return texts


def _called(path: Path) -> str:
    """Return the `source` of an article that has none: the name of its file."""
    return "stdin" if _is_stream(path) and not path.suffix else shown(Path(path.name))


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Yield the bytes of a file or a pipe, decompressed if they are gzip's, whatever its name."""
    given = 0 if path == STDIN else path
    with open(given, "rb", closefd=path != STDIN) as raw:
        yield gzip.GzipFile(fileobj=raw) if raw.peek(2).startswith(GZIP) else raw  # type: ignore[misc]  # as good as


def _from_lines(path: Path, largest: int) -> Iterator[tuple[str, Article]]:
    name = _called(path)
    for number, line in _lines(path, largest):
        if line.strip():
            location = f"{shown(path)}:{number}"
            yield location, {"source": name, **_parse(location, line)}


def _lines(path: Path, largest: int) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(iter(partial(file.readline, largest + 1), b""), 1):
                _check_size(f"{shown(path)}:{number}", line, largest)
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise BadArticles(f"{shown(path)}:{number + 1}: unreadable: {error}") from error


def _check_size(location: str, article: bytes, largest: int) -> None:
    if len(article) > largest:
        raise BadArticles(f"{location}: more than {largest} bytes; expected one article")


def _parse(location: str, line: bytes) -> Article:
    try:
        article = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique)
        json.dumps(article, ensure_ascii=False, allow_nan=False).encode()  # a lone surrogate, or NaN, parses
    except (ValueError, RecursionError) as error:
        raise BadArticles(f"{location}: not JSON in UTF-8: {error}") from error
    fault = _fault(article)
    if fault:
        raise BadArticles(f"{location}: {fault}")
    return dict(article)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the members of an object; raises `ValueError` for a duplicate key, as the service rejects it."""
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise ValueError(f"duplicate key {key[:100]!r}")
        members[key] = value
    return members


def _fault(article: Any) -> str | None:
    """Return what is wrong with the value of a line, or None."""
    if not isinstance(article, Mapping):
        return "expected an object"
    if not isinstance(article.get("title"), str):
        return "`title` must be a string"
    for key in ("source", "license"):
        if not isinstance(article.get(key, ""), str):
            return f"`{key}` must be a string"
    return _fault_of_body(article)


def _fault_of_body(article: Mapping[str, Any]) -> str | None:
    if "chunks" not in article:
        return None if isinstance(article.get("text"), str) else "needs `chunks` or a string `text`"
    chunks = article["chunks"]
    if not isinstance(chunks, list) or not chunks:
        return "`chunks` must be a list of at least one string"
    faults = (_fault_of_chunk(f"chunks[{place}]", chunk) for place, chunk in enumerate(chunks))
    return next((fault for fault in faults if fault), None)


def _fault_of_chunk(place: str, chunk: Any) -> str | None:
    text = chunk.get("text") if isinstance(chunk, Mapping) else chunk
    if not isinstance(text, str) or not text.strip():
        return f"`{place}` must be a string that is not blank, or an object with such a `text`"
    if isinstance(chunk, Mapping) and type(chunk.get("id", "")) not in (str, int):
        return f"`{place}.id` must be a string or an integer"
    return None


def _check_id(location: str, value: Any, seen: set[int]) -> None:
    """Raise `BadArticles` if an id is not a new int32 from 0 up; otherwise add it to `seen`."""
    if type(value) is not int or not 0 <= value < 2**31:
        raise BadArticles(f"{location}: `article_id` must be an integer from 0 to 2^31 - 1")
    if value in seen:
        raise BadArticles(f"{location}: `article_id` {value} is already used by an earlier article")
    seen.add(value)


def _from_text(path: Path, largest: int) -> Iterator[tuple[str, Article]]:
    text = _text(path, largest).strip()
    first, _, rest = text.partition("\n")
    first = first.strip()
    titled = 0 < len(first) <= MAX_TITLE
    if titled and _starts_blank(rest):
        text = rest
    title = first if titled else shown(Path(path.stem))
    yield shown(path), {"title": title, "source": _called(path), "text": text}


def _starts_blank(rest: str) -> bool:
    """Return whether a blank line follows; after the first line of a wrapped sentence, none does."""
    return not rest.partition("\n")[0].strip()


def _text(path: Path, largest: int) -> str:
    try:
        with _opened(path) as file:
            data = file.read(largest + 1)
        _check_size(shown(path), data, largest)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise BadArticles(f"{shown(path)}:{number}: not UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadArticles(f"{shown(path)}: unreadable: {error}") from error
