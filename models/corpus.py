"""A corpus on disk: article vectors in reading order, which article each belongs to, and the text.

The format (one directory): `vectors.f16.npy` float16 `(N, D)`, L2-normalised up to rounding;
`index.npy` int32 `(N, 2)` = (article id, position); `articles.jsonl.gz`, one article a line.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VECTORS, INDEX, ARTICLES = "vectors.f16.npy", "index.npy", "articles.jsonl.gz"
FILES = (VECTORS, INDEX, ARTICLES)
Floats = NDArray[np.float32]


class BadCorpus(ValueError):
    """The files of a corpus contradict each other or cannot be read."""


@dataclass(frozen=True)
class Chunk:
    """One passage of a corpus, as `/retrieve` shows it."""

    article: int
    title: str
    position: int
    text: str | None


def normalise(vectors: NDArray[Any]) -> Floats:
    """Return float32 rows of unit length from `(..., D)` of any float type; zero rows stay zero."""
    rows = np.asarray(vectors, dtype=np.float32)
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit: Floats = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    return unit


@dataclass(frozen=True)
class Corpus:
    """Unit vectors `(N, D)` float32, `article` and `position` `(N,)` int32, and the articles' lines."""

    vectors: Floats
    article: NDArray[np.int32]
    position: NDArray[np.int32]
    articles: Mapping[int, Mapping[str, Any]]

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        return int(self.vectors.shape[1])

    def __len__(self) -> int:
        return len(self.vectors)

    def chunk(self, row: int) -> Chunk:
        """Return the passage behind row `row`; its text is None where the corpus carries none."""
        article, position = int(self.article[row]), int(self.position[row])
        line = self.articles.get(article, {})
        chunks = line.get("chunks") or []
        text = chunks[position] if position < len(chunks) else None
        return Chunk(article, str(line.get("title", "")), position, text)


def read(directory: Path) -> Corpus:
    """Read the corpus in `directory`.

    Raises:
        BadCorpus: a file is missing or unreadable, the row counts differ, or a vector is not finite.
    """
    try:
        return parse({name: (directory / name).read_bytes() for name in FILES})
    except OSError as error:
        raise BadCorpus(f"{directory}: {error.strerror}: {error.filename}") from error


def parse(files: Mapping[str, bytes]) -> Corpus:
    """Make a corpus of the bytes of its three files; raises `BadCorpus` as `read` does."""
    try:
        raw = np.load(io.BytesIO(files[VECTORS]), allow_pickle=False)
        index = np.load(io.BytesIO(files[INDEX]), allow_pickle=False)
        articles = {int(line["article_id"]): line for line in read_articles(files[ARTICLES])}
    except Exception as error:  # a damaged file raises anything from EOFError to TokenError
        raise BadCorpus(f"unreadable corpus: {error}") from error
    if raw.ndim != 2 or not len(raw) or index.shape != (len(raw), 2):
        raise BadCorpus(f"vectors {raw.shape} and index {index.shape} do not match")
    if not np.isfinite(raw).all():
        raise BadCorpus(f"vector {int(np.argmin(np.isfinite(raw).all(1)))} is not finite")
    if not set(np.unique(index[:, 0]).tolist()) <= articles.keys():
        raise BadCorpus("a row belongs to an article that is not among the articles")
    return Corpus(normalise(raw), index[:, 0].copy(), index[:, 1].copy(), articles)


def read_articles(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the articles of a gzipped JSON-lines file's bytes."""
    with gzip.open(io.BytesIO(data), "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write(directory: Path, vectors: Floats, articles: list[dict[str, Any]]) -> None:
    """Write `vectors` `(N, D)` and the articles whose `chunks` they are, in the same order."""
    directory.mkdir(parents=True, exist_ok=True)
    index = [(a["article_id"], p) for a in articles for p in range(len(a["chunks"]))]
    np.save(directory / VECTORS, vectors.astype(np.float16))
    np.save(directory / INDEX, np.asarray(index, dtype=np.int32).reshape(-1, 2))
    text = "".join(json.dumps(article, ensure_ascii=False) + "\n" for article in articles)
    (directory / ARTICLES).write_bytes(gzip.compress(text.encode(), mtime=0))
