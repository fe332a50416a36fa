"""Articles to a corpus: read them, cut them into chunks, encode the chunks, write `models.corpus` files."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from models import corpus
from models.chunks import Count, chunk
from models.corpus import Floats
from models.encoder import Encoder, EncoderError, Progress
from models.training.parts import Arrays, Parts

Article = dict[str, Any]  # one line of `articles.jsonl.gz`; before chunking it may hold `text` for `chunks`

CONTEXT = 5  # T at which the summary counts windows
BLOCK = 128  # chunks that are encoded, and kept, together
PROBE = "The same model makes the same vector of this."
TITLE = 80  # longest first line of a text file, in characters, that is taken as its title


class BadArticles(ValueError):
    """Articles that cannot be read or used; the message opens with the file and, where known, the line."""


@dataclass(frozen=True)
class Summary:
    """What a build made; `windows` is at T = 5, `dropped` counts articles too short for one chunk."""

    encoder: str
    dim: int
    articles: int
    chunks: int
    windows: int
    dropped: int


def build(source: Path, out: Path, encoder: Encoder, progress: Progress, parts: Parts) -> Summary:
    """Write the articles of `source` as the new corpus directory `out`, whole or not at all.

    Chunks that an article brings are taken as they are, however long; text is cut by `chunk`. Vectors are kept in
    `parts` until all is written: what was stopped goes on after them.

    Args:
        source: `.jsonl`, `.jsonl.gz` or `.txt` file, or a directory of `.txt` files.
        out: a directory that does not exist yet.
        encoder: counts word-pieces and makes the vectors.
        progress: called with (chunks encoded, chunks in all).
        parts: what an earlier run kept.

    Raises:
        BadArticles: an article is malformed, or no article yields a chunk.
        EncoderError: the vectors have the wrong shape or are not finite.
        FileExistsError: `out` exists.
        OSError: `out` cannot be written.
    """
    with parts, _appearing(out) as directory:
        found = [_chunked(article, encoder.count_tokens) for article in read(source)]
        kept = [article for article in found if article["chunks"]]
        if not kept:
            raise BadArticles(f"{source}: no article yields a chunk")
        corpus.write(directory, _vectors(encoder, kept, progress, parts), kept)
    lengths = [len(article["chunks"]) for article in kept]
    windows = sum(max(0, length - CONTEXT) for length in lengths)
    return Summary(encoder.name, encoder.dim, len(kept), sum(lengths), windows, len(found) - len(kept))


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Yield a new directory beside `out` that becomes `out` on success and vanishes on failure."""
    _refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    staging.mkdir()
    try:
        yield staging
        _refuse_existing(out)  # a rename would silently replace an empty directory
        os.rename(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise FileExistsError(f"{out}: exists")


def _chunked(article: Article, count: Count) -> Article:
    """Return `article` with `chunks` and `ntok`, and without `text`."""
    chunks = article.get("chunks") or chunk(article["text"], count)
    rest = {key: value for key, value in article.items() if key not in ("text", "chunks", "ntok")}
    return {**rest, "chunks": chunks, "ntok": [count(text) for text in chunks]}


def _vectors(encoder: Encoder, articles: Sequence[Article], progress: Progress, parts: Parts) -> Floats:
    texts = [text for article in articles for text in article["chunks"]]
    vectors = np.empty((len(texts), encoder.dim), np.float32)
    model = encoder.encode([PROBE]).tobytes()  # by its name, a directory whose files changed would be the same one
    for first in range(0, len(texts), BLOCK):
        block = texts[first : first + BLOCK]
        kept = parts.arrays(partial(_encoded, encoder, block), model, *block)
        vectors[first : first + len(block)] = kept["vectors"]
        progress(first + len(block), len(texts))
    return vectors


def _encoded(encoder: Encoder, texts: Sequence[str]) -> Arrays:
    vectors = encoder.encode(texts)
    if vectors.shape != (len(texts), encoder.dim):
        raise EncoderError(f"{encoder.name}: {vectors.shape} for {len(texts)} chunks of {encoder.dim}")
    if not np.isfinite(vectors).all():
        raise EncoderError(f"{encoder.name}: a vector is not finite")
    return {"vectors": vectors}


# --- reading ---


def read(source: Path) -> Iterator[Article]:
    """Yield the articles of `source`, each with `article_id`, `title`, `source` and `chunks` or `text`.

    An article without an id gets its place in the order, from 0. Further fields are carried through.
    In a text file a first line of up to 80 characters is the title, and leaves the text where a blank
    line follows; otherwise the title is the file's name.

    Raises:
        BadArticles: `source` is missing, holds nothing of a known kind, or an article is malformed.
    """
    seen: set[int] = set()
    for place, (where, article) in enumerate(_located(source)):
        article = {"article_id": place, **article}
        _check_id(where, article["article_id"], seen)
        yield article


def _located(source: Path) -> Iterator[tuple[str, Article]]:
    """Yield where each article stands, as a message would say it, and the article."""
    if source.is_dir():
        return chain.from_iterable(map(_from_text, sorted(source.glob("*.txt"))))
    if not source.is_file():
        raise BadArticles(f"{source}: no such file or directory")
    if source.name.endswith((".jsonl", ".jsonl.gz")):
        return _from_lines(source)
    if source.suffix == ".txt":
        return _from_text(source)
    raise BadArticles(f"{source}: expected .jsonl, .jsonl.gz, .txt or a directory of .txt files")


def _from_lines(path: Path) -> Iterator[tuple[str, Article]]:
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}:{number}"
            yield where, {"source": path.name, **_parse(where, line)}


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise BadArticles(f"{path}:{number + 1}: unreadable: {error}") from error


def _parse(where: str, line: bytes) -> Article:
    try:
        article = json.loads(line.decode("utf-8-sig"))
        json.dumps(article, ensure_ascii=False).encode()  # a lone surrogate parses but cannot be written
    except (ValueError, RecursionError) as error:
        raise BadArticles(f"{where}: not JSON in UTF-8: {error}") from error
    fault = _fault(article)
    if fault:
        raise BadArticles(f"{where}: {fault}")
    return dict(article)


def _fault(article: Any) -> str | None:
    """Say what is wrong with one line's value, or None."""
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
    for place, text in enumerate(chunks):
        if not isinstance(text, str) or not text.strip():
            return f"`chunks[{place}]` must be a string that is not blank"
    return None


def _check_id(where: str, value: Any, seen: set[int]) -> None:
    """Refuse an id that is no int32 from 0 up, or not new; add it to `seen`."""
    if type(value) is not int or not 0 <= value < 2**31:
        raise BadArticles(f"{where}: `article_id` must be an integer from 0 to 2^31 - 1")
    if value in seen:
        raise BadArticles(f"{where}: `article_id` {value} stands for an earlier article")
    seen.add(value)


def _from_text(path: Path) -> Iterator[tuple[str, Article]]:
    text = _text(path).strip()
    first, _, rest = text.partition("\n")
    first = first.strip()
    titled = 0 < len(first) <= TITLE
    if titled and _starts_blank(rest):
        text = rest
    yield str(path), {"title": first if titled else path.stem, "source": path.name, "text": text}


def _starts_blank(rest: str) -> bool:
    """Say whether a blank line comes next (a wrapped first sentence has none: it must not lose a line)."""
    return not rest.partition("\n")[0].strip()


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise BadArticles(f"{path}:{number}: not UTF-8") from error
    except OSError as error:
        raise BadArticles(f"{path}: unreadable: {error.strerror}") from error
