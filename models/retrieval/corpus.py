"""A corpus: the vectors of passages in reading order, the article of each, and the text.

Format of its directory: `vectors.f16.npy` float16 `(N, D)`, of unit length up to rounding; `index.npy` int32 `(N, 2)`,
article id and position; `articles.jsonl.gz`, one article per line.

A version with an approximate index also has the text in a form that needs no decompression: `passages.txt` (UTF-8), and
`spans.npy` int64 `(N, 4)`, the byte offsets in it at which the title and the text of each row begin and end.

Either form may have `fields.safetensors`, the ids and metadata of the chunks (`models.retrieval.fields`).
"""

from __future__ import annotations

import gzip
import io
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from models.registry import disk, manifest
from models.registry.manifest import Buffer
from models.retrieval.fields import FIELDS_FILE, BadFields, Fields, Filter, Mask, Value, matching
from models.vectors import Floats, normalise, widen

VECTORS_FILE = "vectors.f16.npy"
INDEX_FILE = "index.npy"
ARTICLES_FILE = "articles.jsonl.gz"
CORPUS_FILES = (VECTORS_FILE, INDEX_FILE, ARTICLES_FILE)
PASSAGES_FILE = "passages.txt"
SPANS_FILE = "spans.npy"
# rows of a large corpus that are processed at a time
BLOCK_ROWS = 16_384
# The header of a .npy file is shorter than this.
_HEADER_BYTES = 4096
_UNKNOWN_ARTICLE = "a row belongs to an unknown article"


class BadCorpus(ValueError):
    """The files of a corpus contradict each other or cannot be read."""


class Chunk(NamedTuple):
    """One passage of a corpus, as `/retrieve` returns it; what the corpus does not have is None."""

    article: int
    title: str
    position: int
    text: str | None
    # The chunk's id in the data set that the customer provided.
    source_id: str | None = None
    metadata: Mapping[str, Value] | None = None

    def with_fields(self, fields: Fields, row: int) -> Chunk:
        """Return the passage with the id and the metadata that `fields` has for its row."""
        if fields.is_empty:
            return self
        return self._replace(source_id=fields.source_id(row), metadata=fields.metadata_of(row))

    def fields(self) -> dict[str, Any]:
        """Return `source_id` and `metadata` for an answer in JSON, without what the corpus does not have."""
        found = {"source_id": self.source_id, "metadata": self.metadata}
        return {name: value for name, value in found.items() if value is not None}


class Passages(Protocol):
    """A corpus as a search reads it."""

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        ...

    @property
    def article(self) -> NDArray[np.int32]:
        """The article `(N,)` that each row belongs to."""
        ...

    @property
    def fields(self) -> Fields:
        """Ids and metadata of the rows."""
        ...

    def __len__(self) -> int: ...

    def vectors_at(self, rows: NDArray[np.int64]) -> Floats:
        """Return the unit vectors `(R, D)` of `rows` `(R,)`."""
        ...

    def chunk(self, row: int) -> Chunk:
        """Return the passage of a row."""
        ...

    def matching(self, wanted: Filter) -> Mask:
        """Return which rows `(N,)` a filter keeps, by `article` or a metadata field; raises `UnknownField`."""
        ...


@dataclass(frozen=True)
class Corpus:
    """A corpus in memory: unit vectors `(N, D)` float32, `article` and `position` `(N,)` int32, articles by id."""

    vectors: Floats
    article: NDArray[np.int32]
    position: NDArray[np.int32]
    articles: Mapping[int, Mapping[str, Any]]
    fields: Fields = field(default_factory=Fields)

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        return int(self.vectors.shape[1])

    def __len__(self) -> int:
        return len(self.vectors)

    def vectors_at(self, rows: NDArray[np.int64]) -> Floats:
        """Return the unit vectors `(R, D)` of `rows` `(R,)`."""
        return self.vectors[rows]

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        """Yield the unit vectors in blocks of `BLOCK_ROWS`, each with the number of its first row."""
        for row in range(0, len(self), BLOCK_ROWS):
            yield row, self.vectors[row : row + BLOCK_ROWS]

    def chunk(self, row: int) -> Chunk:
        """Return the passage of a row."""
        return self._chunks[row].with_fields(self.fields, row)

    def matching(self, wanted: Filter) -> Mask:
        """Return which rows `(N,)` a filter keeps; raises `UnknownField`."""
        return matching(self.article, self.fields, wanted)

    @cached_property
    def _chunks(self) -> list[Chunk]:
        return list(map(self._chunk, self.article.tolist(), self.position.tolist()))

    def _chunk(self, article: int, position: int) -> Chunk:
        line = self.articles.get(article, {})
        chunks = line.get("chunks") or []
        text = chunks[position] if position < len(chunks) else None
        return Chunk(article, str(line.get("title", "")), position, text)


@dataclass(frozen=True)
class HalfVectors:
    """Unit vectors `(N, D)`, kept in float16; if they are on disk, the operating system caches what is read."""

    halves: NDArray[np.float16]

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        return int(self.halves.shape[1])

    def __len__(self) -> int:
        return len(self.halves)

    def vectors_at(self, rows: NDArray[np.int64]) -> Floats:
        """Return the unit vectors `(R, D)` of `rows` `(R,)`."""
        return normalise(widen(self.halves[rows]))

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        """Yield the unit vectors in blocks of `BLOCK_ROWS`, each with the number of its first row."""
        for row in range(0, len(self), BLOCK_ROWS):
            yield row, normalise(widen(self.halves[row : row + BLOCK_ROWS]))


@dataclass(frozen=True)
class MappedVectors(HalfVectors):
    """The vectors of a corpus on disk `(N, D)`, and its index `(N, 2)`: the article and the position of each row."""

    index: NDArray[np.int32]

    @property
    def article(self) -> NDArray[np.int32]:
        """The article `(N,)` that each row belongs to."""
        return self.index[:, 0]

    @property
    def position(self) -> NDArray[np.int32]:
        """The position `(N,)` of each row in its article."""
        return self.index[:, 1]


@dataclass(frozen=True)
class MappedCorpus(MappedVectors):
    """A corpus on disk: float16 vectors `(N, D)`, index `(N, 2)`, spans `(N, 4)` and the text."""

    spans: NDArray[np.int64]
    passages: Buffer
    fields: Fields = field(default_factory=Fields)

    def matching(self, wanted: Filter) -> Mask:
        """Return which rows `(N,)` a filter keeps; raises `UnknownField`."""
        return matching(self.article, self.fields, wanted)

    def chunk(self, row: int) -> Chunk:
        """Return the passage of a row."""
        article, position = self.index[row].tolist()
        begin, end, text_begin, text_end = self.spans[row].tolist()
        text = self.passages[text_begin:text_end].decode()
        chunk = Chunk(article, self.passages[begin:end].decode(), position, text or None)
        return chunk.with_fields(self.fields, row)


def read_corpus(directory: Path) -> Corpus:
    """Read the corpus in `directory` into memory.

    Raises:
        BadCorpus: a file is missing or unreadable, the numbers of rows differ, or a vector is not finite.
    """
    _require_files(directory)
    try:
        return parse_corpus({name: disk.read(directory / name) for name in file_names(directory)})
    except OSError as error:
        raise BadCorpus(f"{directory}: {error.strerror}: {error.filename}") from error


def file_names(directory: Path) -> tuple[str, ...]:
    """Return the names of the files of the corpus in `directory`: the three, and the fourth if it exists."""
    return (*CORPUS_FILES, FIELDS_FILE) if (directory / FIELDS_FILE).exists() else CORPUS_FILES


def _require_files(directory: Path) -> None:
    """Raise `BadCorpus` if the directory is a file, or a file is a pipe or a device, which may never end."""
    if directory.is_file():
        raise BadCorpus(f"{directory}: is a file, expected a directory: `lvm data` makes one of articles or vectors")
    for path in (directory / name for name in file_names(directory)):
        if path.exists() and not path.is_file():
            raise BadCorpus(f"{path}: expected a regular file")


def count_chunks(directory: Path) -> int:
    """Return the number of chunks of the corpus in `directory`; raises as `read_corpus`."""
    _require_files(directory)
    try:
        with open(disk.open_regular(directory / INDEX_FILE), "rb") as file:
            return len(np.load(file, allow_pickle=False))
    except Exception as error:
        # a damaged header raises anything from EOFError to TokenError
        raise BadCorpus(f"unreadable corpus: {error}") from error


def stated_encoder(directory: Path) -> str | None:
    """Return the encoder that the first article of the corpus in `directory` names, None if it names none.

    Raises:
        BadCorpus: the articles are missing or unreadable.
    """
    _require_files(directory)
    try:
        with open(disk.open_regular(directory / ARTICLES_FILE), "rb") as file:
            encoder = next(_articles(file), {}).get("encoder")
    except Exception as error:
        # a damaged file raises anything from EOFError to TokenError
        raise BadCorpus(f"unreadable corpus: {error}") from error
    return encoder if isinstance(encoder, str) else None


def parse_corpus(files: Mapping[str, Buffer]) -> Corpus:
    """Make a corpus of the bytes of its files; raises as `read_corpus`."""
    try:
        raw = np.load(io.BytesIO(files[VECTORS_FILE]), allow_pickle=False)
        index = np.load(io.BytesIO(files[INDEX_FILE]), allow_pickle=False)
        articles = {int(line["article_id"]): line for line in read_articles(files[ARTICLES_FILE])}
    except Exception as error:
        # a damaged file raises anything from EOFError to TokenError
        raise BadCorpus(f"unreadable corpus: {error}") from error
    if raw.ndim != 2 or not len(raw) or index.shape != (len(raw), 2):
        raise BadCorpus(f"vectors {raw.shape} and index {index.shape} do not match")
    if not np.isfinite(raw).all():
        raise BadCorpus(f"vector {int(np.argmin(np.isfinite(raw).all(1)))} is not finite")
    if not set(np.unique(index[:, 0]).tolist()) <= articles.keys():
        raise BadCorpus(_UNKNOWN_ARTICLE)
    if index[:, 1].min() < 0:
        raise BadCorpus("a row has a position below 0")
    return Corpus(normalise(raw), index[:, 0].copy(), index[:, 1].copy(), articles, _fields(files, len(raw)))


def _fields(files: Mapping[str, Buffer], count: int) -> Fields:
    if FIELDS_FILE not in files:
        return Fields()
    try:
        return Fields.from_bytes(files[FIELDS_FILE], count)
    except BadFields as error:
        raise BadCorpus(str(error)) from error


def read_articles(data: Buffer) -> Iterator[dict[str, Any]]:
    """Yield the articles in the bytes of a gzipped JSON-lines file."""
    return _articles(io.BytesIO(data))


def _articles(file: BinaryIO) -> Iterator[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def map_corpus(files: Mapping[str, Buffer]) -> MappedCorpus:
    """Make a corpus of the mapped files of a version, without copying them into memory.

    Raises:
        BadCorpus: a file is unreadable, files contradict each other, a span exceeds the text, or a vector is not
        finite.
    """
    halves, index, spans = (_array(files[name]) for name in (VECTORS_FILE, INDEX_FILE, SPANS_FILE))
    if halves.ndim != 2 or not len(halves) or index.shape != (len(halves), 2) or spans.shape != (len(halves), 4):
        raise BadCorpus(f"vectors {halves.shape}, index {index.shape} and spans {spans.shape} do not match")
    types = [array.dtype.name for array in (halves, index, spans)]
    if types != ["float16", "int32", "int64"]:
        raise BadCorpus(f"vectors, index and spans are {', '.join(types)}; expected float16, int32, int64")
    if spans.min() < 0 or spans.max() > len(files[PASSAGES_FILE]):
        raise BadCorpus("a span exceeds the text")
    check_finite(halves)
    fields = _fields(files, len(halves))
    release_memory(files)
    return MappedCorpus(halves, index, spans, files[PASSAGES_FILE], fields)


def map_unverified_corpus(paths: Mapping[str, Path]) -> MappedCorpus:
    """Make a corpus of files that have no checksums yet; raises as `map_corpus`."""
    try:
        return map_corpus({name: manifest.map_file(path) for name, path in paths.items()})
    except OSError as error:
        raise BadCorpus(f"{error.strerror}: {error.filename}") from error


def map_vectors(directory: Path) -> MappedVectors:
    """Map vectors and index of the corpus in `directory`, without its text. Raises as `read_corpus`."""
    _require_files(directory)
    try:
        files = {name: manifest.map_file(directory / name) for name in (VECTORS_FILE, INDEX_FILE)}
    except OSError as error:
        raise BadCorpus(f"{directory}: {error.strerror}: {error.filename}") from error
    vectors, index = (_array(data) for data in files.values())
    if vectors.ndim != 2 or not len(vectors) or index.shape != (len(vectors), 2):
        raise BadCorpus(f"vectors {vectors.shape} and index {index.shape} do not match")
    if (vectors.dtype.kind, index.dtype.kind) != ("f", "i"):
        raise BadCorpus(f"vectors and index are {vectors.dtype}, {index.dtype}; expected float16, int32")
    check_finite(vectors)
    release_memory(files)
    return MappedVectors(vectors, index)


def _array(data: Buffer) -> NDArray[Any]:
    """Return the array of a .npy file as a view of `data`."""
    try:
        head = io.BytesIO(data[:_HEADER_BYTES])
        np.lib.format.read_magic(head)
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(head)
        array = np.frombuffer(data, dtype, math.prod(shape), head.tell())
    except Exception as error:
        # a damaged header raises anything from EOFError to TokenError
        raise BadCorpus(f"unreadable corpus: {error}") from error
    return array.reshape(shape, order="F" if by_column else "C")


def check_finite(halves: NDArray[np.float16]) -> None:
    """Raise `BadCorpus` if a vector is not finite."""
    for row in range(0, len(halves), BLOCK_ROWS):
        finite = np.isfinite(halves[row : row + BLOCK_ROWS]).all(axis=1)
        if not finite.all():
            raise BadCorpus(f"vector {row + int(np.argmin(finite))} is not finite")


def release_memory(files: Mapping[str, Buffer]) -> None:
    """Release the pages of mapped files that checks read, and announce random access."""
    for file in files.values():
        if isinstance(file, mmap.mmap):
            file.madvise(mmap.MADV_DONTNEED)
            file.madvise(mmap.MADV_RANDOM)


def write_passages(source: Path, target: Path) -> int:
    """Write passages and spans of the corpus in `source` into `target`; return the number of articles.

    Raises:
        BadCorpus: a file is missing or unreadable, or a row belongs to an unknown article.
    """
    try:
        index = np.load(io.BytesIO(disk.read(source / INDEX_FILE)), allow_pickle=False)
        spans = np.full((len(index), 4), -1, np.int64)
        count = _write_articles(source / ARTICLES_FILE, target / PASSAGES_FILE, index, spans)
    except Exception as error:
        # a damaged file raises anything from EOFError to TokenError
        raise BadCorpus(f"unreadable corpus: {error}") from error
    if spans.min(initial=0) < 0:
        raise BadCorpus(_UNKNOWN_ARTICLE)
    np.save(target / SPANS_FILE, spans)
    return count


def _write_articles(source: Path, target: Path, index: NDArray[np.int32], spans: NDArray[np.int64]) -> int:
    order = np.argsort(index[:, 0], kind="stable")
    # of the type of the numbers that are looked up, or numpy converts all of them each time
    ids, count = index[order, 0].astype(np.int64), 0
    with open(disk.open_regular(source), "rb") as packed, open(target, "wb") as text:
        for article in _articles(packed):
            rows = order[slice(*np.searchsorted(ids, [article["article_id"], article["article_id"] + 1]))]
            title = _append(text, str(article.get("title", "")))
            chunks = [_append(text, chunk) for chunk in article.get("chunks") or []]
            for row, position in zip(rows.tolist(), index[rows, 1].tolist(), strict=True):
                spans[row] = *title, *(chunks[position] if position < len(chunks) else (0, 0))
            count += 1
    return count


def _append(file: BinaryIO, text: str) -> tuple[int, int]:
    begin = file.tell()
    return begin, begin + file.write(text.encode())


class CorpusWriter:
    """Writes a corpus part by part; articles and vectors come in the same order, each at any time."""

    def __init__(self, vectors: BinaryIO, articles: BinaryIO, dim: int) -> None:
        self._vectors = vectors
        self._articles = articles
        self._dim = dim
        self._rows = 0
        self._index: list[NDArray[np.int32]] = [np.empty((0, 2), np.int32)]
        self._write_header()

    @property
    def index(self) -> NDArray[np.int32]:
        """The article and the position `(N, 2)` of each row."""
        return np.concatenate(self._index)

    def add_article(self, article: Mapping[str, Any]) -> None:
        """Write an article with its `chunks`."""
        self._articles.write((json.dumps(article, ensure_ascii=False) + "\n").encode())
        positions = np.arange(len(article["chunks"]), dtype=np.int32)
        self._index.append(np.stack([np.full_like(positions, article["article_id"]), positions], axis=1))

    def add_vectors(self, vectors: NDArray[Any]) -> None:
        """Write the vectors `(N, D)` of the next N chunks."""
        self._vectors.write(np.ascontiguousarray(vectors, np.float16).data)
        self._rows += len(vectors)

    def finish(self) -> None:
        """Write the number of vectors, for which numpy left room in the header."""
        self._vectors.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        header = {"descr": "<f2", "fortran_order": False, "shape": (self._rows, self._dim)}
        np.lib.format.write_array_header_1_0(self._vectors, header)


@contextmanager
def corpus_writer(directory: Path, dim: int) -> Iterator[CorpusWriter]:
    """Yield what writes a corpus of vectors of `dim` numbers into `directory`; only its index stays in memory."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / VECTORS_FILE, "wb") as vectors, open(directory / ARTICLES_FILE, "wb") as packed:
        with gzip.GzipFile("", "wb", fileobj=packed, mtime=0) as articles:
            writer = CorpusWriter(vectors, articles, dim)  # type: ignore[arg-type]  # as good as a file
            yield writer
        writer.finish()
    np.save(directory / INDEX_FILE, writer.index)


def write_corpus(
    directory: Path, vectors: Floats, articles: list[dict[str, Any]], fields: Fields | None = None
) -> None:
    """Write a corpus: `vectors` `(N, D)`, the articles with their `chunks`, and the fields, all in the same order."""
    with corpus_writer(directory, vectors.shape[1]) as writer:
        writer.add_vectors(vectors)
        for article in articles:
            writer.add_article(article)
    if fields is not None:
        (directory / FIELDS_FILE).write_bytes(fields.to_bytes())
