"""Vectors that are already computed to a corpus: `.npz` and `.npy` files as they are. Nothing is encoded."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.retrieval.corpus import ARTICLES_FILE, INDEX_FILE, VECTORS_FILE
from models.retrieval.fields import ARTICLE, FIELDS_FILE, BadFields, Column, Fields, Texts
from models.training.array_files import BLOCK, Array, ArrayFile, BadArrays
from models.training.articles import CONTEXT, appearing, shown
from models.training.work_cache import WorkCache
from models.vectors import Floats

Progress = Callable[[int, int], None]
Rows = NDArray[np.int64]

# The arrays that a file may have, by what they are, with the names by which they are recognised.
ROLES: Mapping[str, tuple[str, ...]] = {
    "vectors": ("vectors", "embeddings", "concept_vectors"),
    "texts": ("concept_texts", "texts", "chunks"),
    "ids": ("cpe_ids", "ids", "chunk_ids"),
    "articles": ("article_indices", "article_index", "article_ids", "doc_ids", "doc_id"),
    "positions": ("chunk_indices", "chunk_index", "positions", "position", "pos"),
    "titles": ("article_titles", "titles"),
}
# A vector whose length differs from 1 by more than this is reported as normalised.
UNIT = 1e-3
# The most places without a chunk that the positions of a corpus may leave: so many for each chunk, and so many more.
_GAPS, _MORE_GAPS = 10, 1_000_000
_LISTED = 5
_INT32 = 2**31


@dataclass(frozen=True)
class VectorSummary:
    """Counts of a new data set; `windows` are those at T = 5.

    Of the vectors, `normalised` did not have unit length, and `left_out` were zero or not finite; `chunks` does not
    count these. `fields` are the arrays that were used, by what they are.
    """

    encoder: str
    dim: int
    articles: int
    chunks: int
    windows: int
    normalised: int
    left_out: int
    moved: int
    fields: Mapping[str, str]
    metadata: Sequence[str]
    unused: Sequence[str]


def warnings(made: VectorSummary) -> list[str]:
    """Return one sentence for each thing that the data set has otherwise than its file."""
    found = {
        f"{made.normalised} of {made.chunks} vectors did not have unit length; they were normalised": made.normalised,
        f"{made.left_out} vectors were left out: they are zero or not finite": made.left_out,
        f"{made.moved} of {made.chunks} chunks were moved, so that articles are in reading order": made.moved,
        "the file names no articles: all chunks are one article, and windows may cross the real ones": "articles"
        not in made.fields,
        "no article has six chunks at positions in a row: no net can be trained or scored on them": not made.windows,
        f"not used: {', '.join(made.unused)}; --metadata NAME keeps one": made.unused,
    }
    return [sentence for sentence, is_true in found.items() if is_true]


def build(
    source: Path,
    out: Path,
    encoder: str,
    fields: Mapping[str, str],
    metadata: Sequence[str],
    skip_bad: bool,
    progress: Progress,
    cache: WorkCache,
) -> VectorSummary:
    """Write the vectors of `source` as the new corpus directory `out`, whole or not at all.

    Vectors are read, normalised and written a block at a time. Articles come in the order in which the file names them
    first, their chunks in the order of their positions.

    Args:
        source: a `.npz` or `.npy` file of vectors `(N, D)` and arrays `(N,)`.
        out: a directory that does not exist yet.
        encoder: the name of the model that made the vectors; it is kept with the articles.
        fields: what is what, if the names are not those of `ROLES`: by role the name of an array, the path of a `.npy`
            file, or "" for none.
        metadata: arrays that are kept as metadata fields.
        skip_bad: leave out vectors that are zero or not finite.
        progress: called with (chunks written, chunks in all).
        cache: the work cache, which holds what is not finished.

    Raises:
        BadArrays: an array is missing, malformed, or has another number of rows; a vector is zero or not finite; two
            rows have the same article and position.
        FileExistsError: `out` exists.
        OSError: `out` cannot be written.
    """
    with cache, appearing(out, cache) as directory, TemporaryDirectory(dir=cache.directory) as scratch:
        table = _Table(source, fields, metadata, Path(scratch))
        lengths = _lengths(table.vectors, progress)
        bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(bad) and not skip_bad:
            rows = _listed(bad.tolist())
            raise BadArrays(
                f"{table.vectors.label}: {len(bad)} vectors are zero or not finite (rows {rows}); --skip-bad leaves "
                "them out"
            )
        if len(bad) == len(lengths):
            raise BadArrays(f"{table.vectors.label}: no vector is other than zero and finite")
        places = _Places.of(table, np.setdiff1d(np.arange(len(lengths)), bad), len(lengths))
        _write_vectors(directory / VECTORS_FILE, table.vectors, places.order, progress)
        np.save(directory / INDEX_FILE, np.stack([places.article, places.position], axis=1).astype(np.int32))
        _write_articles(directory / ARTICLES_FILE, table, places, encoder)
        found = table.fields(places.order)
        if not found.is_empty:
            (directory / FIELDS_FILE).write_bytes(found.to_bytes())
    return VectorSummary(
        encoder,
        table.vectors.shape[1],
        articles=len(places.starts) - 1,
        chunks=len(places.order),
        windows=places.windows(CONTEXT),
        normalised=int((np.abs(lengths[places.order] - 1) > UNIT).sum()),
        left_out=len(bad),
        moved=int((np.diff(places.order, prepend=-1) < 0).sum()),
        fields=table.names,
        metadata=list(metadata),
        unused=table.unused,
    )


class _Table:
    """The arrays of a file by what they are, each with one entry per vector."""

    def __init__(self, source: Path, fields: Mapping[str, str], metadata: Sequence[str], scratch: Path) -> None:
        self.source = source
        self._scratch = scratch
        self._file = ArrayFile(source, scratch)
        self.names = {role: name for role in ROLES if (name := self._name(role, fields))}
        if "vectors" not in self.names:
            known = ", ".join(name or "one array" for name in self._file.names)
            raise BadArrays(f"{shown(source)}: no array is called `vectors`; it has {known}: --field vectors=NAME")
        self.vectors = self._checked_vectors(self._open(self.names["vectors"]))
        self.arrays = {role: self._open(name) for role, name in self.names.items()}
        self._metadata = {name: self._open(name) for name in metadata}
        for role, array in {**self.arrays, **self._metadata}.items():
            if len(array) != len(self.vectors):
                without = f"; --field {role}= does without" if role in ROLES else ""
                raise BadArrays(
                    f"{array.label} has {len(array)} {role}; there are {len(self.vectors)} vectors{without}"
                )
        used = {"", *self.names.values(), *metadata}
        self.unused = [name for name in self._file.names if name not in used]

    def values(self, role: str) -> list[Any] | None:
        """Return one value for each vector of the file, None if there is no such array."""
        return self.arrays[role].values() if role in self.arrays else None

    def texts(self) -> Texts | None:
        """Return the texts, mapped from disk, None if there are none."""
        return self.arrays["texts"].texts(self._scratch / "texts") if "texts" in self.arrays else None

    def fields(self, order: Rows) -> Fields:
        """Return the ids and the metadata of the rows `order`."""
        ids = self.values("ids")
        try:
            kept = Texts.of("" if ids[row] is None else str(ids[row]) for row in order.tolist()) if ids else None
            columns = {name: _column(array, order) for name, array in self._metadata.items()}
        except BadFields as error:
            raise BadArrays(f"{shown(self.source)}: {error}") from error
        return Fields(kept, columns)

    def _name(self, role: str, fields: Mapping[str, str]) -> str:
        """Return the name of the array of a role; the array of a `.npy` file is the vectors."""
        if role in fields:
            return fields[role]
        if self._file.names == ("",):
            return str(self.source) if role == "vectors" else ""
        return next((name for name in ROLES[role] if name in self._file.names), "")

    def _open(self, name: str) -> Array:
        if name in self._file.names or not name.lower().endswith(".npy"):
            return self._file[name]
        other = ArrayFile(Path(name), self._scratch)
        return other[""]

    def _checked_vectors(self, vectors: Array) -> Array:
        if vectors.dtype.kind != "f" or len(vectors.shape) != 2 or 0 in vectors.shape:
            pairs = "; pairs of context and target are data for `lvm evaluate`" if len(vectors.shape) == 3 else ""
            raise BadArrays(
                f"{vectors.label} is {vectors.dtype} {vectors.shape}; expected floating-point vectors (N, D){pairs}"
            )
        return vectors


def _column(array: Array, order: Rows) -> Column:
    if array.name == ARTICLE:
        raise BadArrays(f"{array.label}: a filter calls the number of an article so; give the array another name")
    values = array.values()
    try:
        return Column.of([values[row] for row in order.tolist()])
    except BadFields as error:
        raise BadArrays(f"{array.label}: {error}") from error


@dataclass(frozen=True)
class _Places:
    """Where chunks go: row `order[i]` of the file becomes row i, with `article[i]` and `position[i]`.

    `starts` `(A + 1,)` are the first rows of the articles; `names` are what the file calls these, if it does.
    """

    order: Rows
    article: Rows
    position: Rows
    starts: Rows
    names: Sequence[Any] | None

    @classmethod
    def of(cls, table: _Table, rows: Rows, count: int) -> _Places:
        """Return the places of the rows `(R,)` of a table of `count`; raises `BadArrays`."""
        names = table.values("articles")
        names = names and [int(name) if isinstance(name, float) and name.is_integer() else name for name in names]
        appearance = _appearance(table, names, count)
        position = _positions(table, appearance, count)
        order = rows[np.lexsort((position[rows], appearance[rows]))]
        _check_unique(table, order, appearance, position)
        starts = np.flatnonzero(np.diff(appearance[order], prepend=-1))
        firsts = order[starts].tolist()
        is_number = names is not None and all(type(names[row]) is int and 0 <= names[row] < _INT32 for row in firsts)
        numbers = [names[row] for row in firsts] if names and is_number else range(len(starts))
        sizes = np.diff(starts, append=len(order))
        article = np.repeat(np.array(numbers, np.int64), sizes)
        known = None if names is None else [names[row] for row in firsts]
        return cls(order, article, position[order], np.append(starts, len(order)), known)

    def windows(self, length: int) -> int:
        """Return the number of windows of `length` chunks and the next."""
        if len(self.order) <= length:
            return 0
        same = self.article[length:] == self.article[:-length]
        return int((same & (self.position[length:] - self.position[:-length] == length)).sum())

    def articles(self) -> Iterator[tuple[int, slice, Any]]:
        """Yield the number of each article, its rows, and what the file calls it."""
        for place, (begin, end) in enumerate(zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)):
            yield int(self.article[begin]), slice(begin, end), self.names[place] if self.names else None


def _appearance(table: _Table, names: list[Any] | None, count: int) -> Rows:
    """Return for each row of the file the place `(N,)` of its article, in the order of their first rows."""
    if names is None:
        return np.zeros(count, np.int64)
    if None in names:
        raise BadArrays(f"{table.arrays['articles'].label}: row {names.index(None)} is not a number")
    number = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return np.fromiter((number[name] for name in names), np.int64, count)


def _positions(table: _Table, appearance: Rows, count: int) -> Rows:
    """Return the position of each row in its article, by its order in the file if no array has it."""
    if "positions" not in table.arrays:
        order = np.argsort(appearance, kind="stable")
        starts = np.flatnonzero(np.diff(appearance[order], prepend=-1))
        found = np.empty(count, np.int64)
        found[order] = np.arange(count) - np.repeat(starts, np.diff(starts, append=count))
        return found
    array = table.arrays["positions"]
    values = array.values()
    wrong = next((row for row, value in enumerate(values) if not _is_position(value)), None)
    if wrong is not None:
        raise BadArrays(f"{array.label}: row {wrong} is {values[wrong]!r}; expected a whole number from 0 to 2^31 - 1")
    position = np.array(values, np.int64)
    last = np.zeros(appearance.max() + 1, np.int64)
    np.maximum.at(last, appearance, position)
    if last.sum() > _GAPS * count + _MORE_GAPS:
        raise BadArrays(
            f"{array.label}: reaches {position.max()}, with {count} rows in all; expected places in articles"
        )
    return position


def _is_position(value: Any) -> bool:
    return type(value) in (int, float) and float(value).is_integer() and 0 <= value < _INT32


def _check_unique(table: _Table, order: Rows, appearance: Rows, position: Rows) -> None:
    same = (np.diff(appearance[order]) == 0) & (np.diff(position[order]) == 0)
    twice = [f"{order[at]} and {order[at + 1]}" for at in np.flatnonzero(same)[:_LISTED]]
    if twice:
        raise BadArrays(
            f"{shown(table.source)}: {int(same.sum())} rows have the article and the position of another: rows "
            f"{', '.join(twice)}{', ...' if same.sum() > _LISTED else ''}"
        )


def _listed(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:_LISTED])) + (", ..." if len(rows) > _LISTED else "")


def unit(vectors: NDArray[Any]) -> tuple[Floats, NDArray[np.float64]]:
    """Return unit vectors, and the lengths `(B,)` that they had; of any floating-point type, whatever their size."""
    vectors = vectors.astype(np.promote_types(vectors.dtype, np.float32), copy=False)
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        scaled = (vectors / largest).astype(np.float32)
        lengths = np.sqrt(np.vecdot(scaled, scaled))
        found: Floats = scaled / lengths[:, None]
        return found, lengths.astype(np.float64) * largest[:, 0]


def _lengths(vectors: Array, progress: Progress) -> NDArray[np.float64]:
    """Return the length of each vector `(N,)`, NaN or 0 for those that have no direction."""
    found = []
    for number, block in enumerate(vectors.blocks()):
        found.append(unit(block)[1])
        progress(min((number + 1) * BLOCK, len(vectors)), 2 * len(vectors))
    return np.concatenate(found)


def _write_vectors(path: Path, vectors: Array, order: Rows, progress: Progress) -> None:
    """Write the unit vectors of the rows `order` in float16, a block at a time."""
    header = {"descr": "<f2", "fortran_order": False, "shape": (len(order), vectors.shape[1])}
    rows = vectors.rows()
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, len(order), BLOCK):
            block, _ = unit(rows.take(order[first : first + BLOCK]))
            file.write(block.astype(np.float16).tobytes())
            progress(len(order) + min(first + BLOCK, len(order)), 2 * len(order))


def _write_articles(path: Path, table: _Table, places: _Places, encoder: str) -> None:
    texts, titles = table.texts(), table.values("titles")
    with open(path, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=6, mtime=0) as file:
        for article, rows, name in places.articles():
            first = int(places.order[rows.start])
            title = titles[first] if titles else name if isinstance(name, str) else None
            line: dict[str, Any] = {
                "article_id": article,
                "title": "" if title is None else str(title),
                "source": shown(Path(table.source.name)),
            }
            if encoder:
                line["encoder"] = encoder
            if texts is not None:
                line["chunks"] = _chunks(texts, places, rows)
            _write_line(file, table, line)


def _chunks(texts: Texts, places: _Places, rows: slice) -> list[str]:
    """Return the texts of an article by position; a position without a chunk has an empty text."""
    found = [""] * (int(places.position[rows].max()) + 1)
    for position, row in zip(places.position[rows].tolist(), places.order[rows].tolist(), strict=True):
        found[position] = texts[row]
    return found


def _write_line(file: gzip.GzipFile, table: _Table, line: Mapping[str, Any]) -> None:
    try:
        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    except UnicodeEncodeError as error:
        raise BadArrays(f"{table.arrays['titles'].label}: {error.object[:100]!r} is not valid Unicode") from error
