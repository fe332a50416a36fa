"""Data to score on, as it is: a directory, or a `.npz` or `.npy` file of vectors or of (context, next vector) pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.retrieval.corpus import VECTORS_FILE, BadCorpus, Corpus, read_corpus
from models.training.array_files import SUFFIXES, Array, ArrayFile, BadArrays
from models.training.vector_files import ROLES, build, unit
from models.training.work_cache import cache_next_to
from models.vectors import Floats
from models.windows import PairCorpus, Pairs, check_dim

CONTEXTS = ("context_sequences", "contexts", "context")
TARGETS = ("target_vectors", "targets", "target")
# Arrays of a pair's article and of whether it crosses articles.
ARTICLES = ("article_index", "article_indices", "article_ids", "metadata.article_index")
CROSSES = ("crosses_article", "metadata.crosses_article")
# Pairs that are read at a time.
PAIRS = 1024
KEYS, METADATA = "truth_keys", "metadata"


def read_data(path: Path) -> Corpus:
    """Read a data set: the directory of one, or a `.npz` or `.npy` file of vectors or of pairs.

    Raises:
        BadCorpus: a directory has no corpus.
        BadArrays: a file is damaged, or holds neither vectors nor pairs.
    """
    if not path.name.lower().endswith(SUFFIXES) or path.is_dir():
        return read_corpus(path)
    with TemporaryDirectory(prefix="lvm-") as scratch:
        names = ArrayFile(path, Path(scratch)).names
        if _first(CONTEXTS, names):
            return read_pairs(path, Path(scratch))
        out = Path(scratch) / "data"
        build(path, out, "", {}, (), False, lambda done, total: None, cache_next_to(out))
        return read_corpus(out)


def read_pairs(path: Path, scratch: Path) -> PairCorpus:
    """Read contexts `(N, T, D)` and next vectors `(N, D)`; equal vectors become one chunk. Raises `BadArrays`."""
    file = ArrayFile(path, scratch)
    contexts, targets = file[_first(CONTEXTS, file.names)], file[_first(TARGETS, file.names) or TARGETS[0]]
    _check_shapes(contexts, targets)
    chunks = _Chunks(path, contexts.shape[2])
    blocks = zip(contexts.blocks(PAIRS), targets.blocks(PAIRS), strict=True)
    rows = np.concatenate([chunks.add(*block) for block in blocks])
    context, following = rows[:, :-1], rows[:, -1]
    article, crossing = _articles(file, context)
    vectors = chunks.vectors()
    pairs = Pairs(vectors, context[:, 0], article, context.shape[1], context, following)
    none = np.zeros(len(vectors), np.int32)
    return PairCorpus(vectors, none, np.arange(len(vectors), dtype=np.int32), {}, pairs=pairs, crossing=crossing)


class _Chunks:
    """Unit vectors, each kept once, in the order in which they are found."""

    def __init__(self, path: Path, dim: int) -> None:
        self._path = path
        self._dim = dim
        self._rows: dict[bytes, int] = {}
        self._parts: list[Floats] = []
        self._pairs = 0

    def add(self, contexts: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.int64]:
        """Return the rows `(B, T + 1)` of the vectors of pairs."""
        every = np.concatenate([contexts, targets[:, None]], axis=1)
        vectors, lengths = unit(every.reshape(-1, self._dim))
        bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(bad):
            pair = self._pairs + int(bad[0]) // every.shape[1]
            raise BadArrays(f"{self._path}: pair {pair} has a vector that is zero or not finite")
        self._pairs += len(every)
        before = len(self._rows)
        rows = np.array([self._row(vector) for vector in vectors])
        _, firsts = np.unique(rows, return_index=True)
        self._parts.append(vectors[firsts[rows[firsts] >= before]])
        return rows.reshape(every.shape[:2])

    def _row(self, vector: Floats) -> int:
        return self._rows.setdefault(hashlib.blake2b(vector.tobytes(), digest_size=16).digest(), len(self._rows))

    def vectors(self) -> Floats:
        """Return all vectors `(N, D)`."""
        return np.concatenate(self._parts)


def _check_shapes(contexts: Array, targets: Array) -> None:
    ok = len(contexts.shape) == 3 and 0 not in contexts.shape and contexts.dtype.kind == targets.dtype.kind == "f"
    if not ok or targets.shape != (contexts.shape[0], contexts.shape[2]):
        raise BadArrays(
            f"{contexts.label} is {contexts.dtype} {contexts.shape}, `{targets.name}` {targets.dtype} {targets.shape}; "
            "expected floating-point contexts (N, T, D) and next vectors (N, D)"
        )


def _articles(file: ArrayFile, context: NDArray[np.int64]) -> tuple[NDArray[np.int32], int | None]:
    """Return the article of each pair `(N,)`, and how many pairs cross articles, if the file says it.

    Without articles in the file, pairs whose contexts follow each other by one chunk count as one article.
    """
    known = _metadata(file, len(context))
    article = known.get("article")
    if article is None:
        follows = (context[1:, :-1] == context[:-1, 1:]).all(axis=1)
        article = np.concatenate([[0], np.cumsum(~follows)]).tolist()
    for what, values in {"articles": article, "crossings": known.get("crosses", article)}.items():
        if len(values) != len(context):
            raise BadArrays(f"{file.path}: has {what} of {len(values)} pairs; it has {len(context)}")
        if not all(isinstance(value, str | int | float) for value in values):
            raise BadArrays(f"{file.path}: has {what} that are neither texts, numbers nor truth values")
    number = {name: place for place, name in enumerate(dict.fromkeys(article))}
    crosses = known.get("crosses")
    return np.array([number[name] for name in article], np.int32), None if crosses is None else sum(map(bool, crosses))


def _metadata(file: ArrayFile, count: int) -> dict[str, list[Any]]:
    """Return what the file says of pairs, in any of its forms: arrays, keys of (article, position), or JSON texts."""
    names = {"article": _first(ARTICLES, file.names), "crosses": _first(CROSSES, file.names)}
    found = {what: file[name].values() for what, name in names.items() if name}
    if "article" not in found and KEYS in file.names and file.shape(KEYS) == (count, 2):
        found["article"] = np.concatenate(list(file[KEYS].blocks()))[:, 0].tolist()
    if METADATA in file.names and file.is_text(METADATA):
        lines = [_object(file[METADATA], line) for line in file[METADATA].values()]
        for what, key in (("article", "article_index"), ("crosses", "crosses_article")):
            if what not in found and all(key in line for line in lines):
                found[what] = [line[key] for line in lines]
    return found


def _object(array: Array, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadArrays(f"{array.label}: not JSON: {text[:100]!r}") from error
    return value if isinstance(value, dict) else {}


def _first(names: Iterable[str], known: Iterable[str]) -> str:
    return next((name for name in names if name in known), "")


def bank_of(path: Path, scratch: Path, dim: int) -> tuple[int, Callable[[], Iterator[Floats]]]:
    """Return the number of vectors of a data set or a file, and a function that yields them in blocks of unit vectors.

    Raises:
        BadCorpus: the directory has no vectors.
        OtherDimension: the vectors have not D = `dim`.
        BadArrays: the file has no vectors; while they are read, one is zero or not finite.
    """
    try:
        file = ArrayFile(path / VECTORS_FILE if path.is_dir() else path, scratch)
    except BadArrays as error:
        raise BadCorpus(str(error)) from error
    vectors = file[_first(("", *ROLES["vectors"]), file.names)]
    if vectors.dtype.kind != "f" or len(vectors.shape) != 2:
        raise BadArrays(f"{vectors.label} is {vectors.dtype} {vectors.shape}; expected floating-point vectors (N, D)")
    check_dim(str(path), vectors.shape[1], dim)
    return len(vectors), lambda: _unit_blocks(vectors)


def _unit_blocks(vectors: Array) -> Iterator[Floats]:
    first = 0
    for block in vectors.blocks():
        found, lengths = unit(block)
        bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(bad):
            raise BadArrays(f"{vectors.label}: row {first + int(bad[0])} is zero or not finite")
        yield found
        first += len(block)
