"""Milvus: the vectors of a corpus version in a collection, pushed once and searched over the network.

A collection is named by the digest of its version and never changes once complete, so its rows are the rows of that
version. The alias `lvm_<corpus>` names the last collection pushed. It is for people; searches name the version.
Requires `pymilvus`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal

import numpy as np

from models.retrieval.filters import MASKED_SHARE, RowSet
from models.retrieval.index import Rows, VectorIndex, normalise_queries, rescore, stack_results
from models.vectors import Floats

IndexKind = Literal["flat", "hnsw"]
Progress = Callable[[int, int], None]
# the limit of Milvus for one query
MAX_RESULTS = 16_384
# results beyond k, so that among equal scores at the end the first rows win
EXTRA_FOR_TIES = 16
# For a filter, this many times the results are asked for that would do if its rows were spread evenly.
OVERFETCH = 2
# rows of an insert: a message of a few megabytes
INSERT_ROWS = 1024
HNSW_PARAMS = {"M": 32, "efConstruction": 360}
# for each message of a push
PUSH_TIMEOUT_S = 60.0
_SHA256 = "lvm.sha256"
_ROWS = "lvm.rows"
_KIND = "lvm.index"
_IS_COMPLETE = "lvm.complete"


class IndexUnavailable(Exception):
    """Milvus failed, answered wrongly, or did not answer in time."""

    reason = "index_away"


class NotPushed(IndexUnavailable):
    """Milvus has no complete collection of this version."""

    reason = "index_stale"


class BadCollection(Exception):
    """A collection of this name that does not belong to the version, or cannot be completed."""


def collection_of(sha256: str) -> str:
    """Return the name of the collection of the version with this digest."""
    return f"lvm_{sha256[:12]}"


def alias_of(corpus: str) -> str:
    """Return the alias of the last collection pushed of a corpus; Milvus allows letters, digits and `_`."""
    return "lvm_" + "".join(letter if letter.isalnum() else "_" for letter in corpus)


def connect(uri: str, token: str, timeout_s: float) -> Any:
    """Return a `pymilvus.MilvusClient` with a channel of its own.

    Raises:
        IndexUnavailable: no server answers in time.
    """
    from pymilvus import MilvusClient

    # it logs a traceback of each error that it raises
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    with _wrap_errors():
        return MilvusClient(uri, token=token, timeout=timeout_s, dedicated=True)


@contextmanager
def _wrap_errors() -> Iterator[None]:
    try:
        yield
    except (IndexUnavailable, BadCollection):
        raise
    except Exception as error:
        # the client, gRPC and invalid answers raise exceptions of many kinds
        raise IndexUnavailable(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error; those of gRPC and pymilvus have many."""
    details = getattr(error, "details", None)
    text = details() if callable(details) else getattr(error, "message", str(error))
    return f"{type(error).__name__}: {text}".splitlines()[0]


class MilvusCollection:
    """The collection of one version in the Milvus at `uri`; connects at first use, and again after a failure.

    Use it from one thread at a time.
    """

    def __init__(self, uri: str, token: str, sha256: str, rows: int) -> None:
        self._uri = uri
        self._token = token
        self._sha256 = sha256
        self._rows = rows
        self._name = collection_of(sha256)
        self._until = 0.0
        self._client: Any = None
        self._close: Callable[[], object] = lambda: None
        self.kind: IndexKind = "flat"
        # Number of searches that it answered.
        self.answers = 0

    def set_timeout(self, seconds: float) -> None:
        """Set the time limit of all calls together until the next call of this method."""
        self._until = monotonic() + seconds

    def find(self, field: str, queries: Floats, k: int, exclude: Sequence[int] = ()) -> list[list[int]]:
        """Return the k rows of `field` nearest to each of `queries` `(Q, D)`, without the rows in `exclude`.

        Raises:
            IndexUnavailable: Milvus fails, is slow, returns fewer rows than k, or returns invalid rows.
            NotPushed: Milvus has no complete collection of the version.
        """
        with self._connection():
            found = self._search(field, queries, k, exclude)
            self._check_rows(found, k, set(exclude))
            self.answers += 1
            return found

    def open(self) -> None:
        """Connect unless connected; raises as `find`."""
        with self._connection():
            self._open()

    @contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            with _wrap_errors():
                yield
        except IndexUnavailable:
            self._client = None
            self._close()
            raise

    def _open(self) -> None:
        if self._client:
            return
        client = connect(self._uri, self._token, self._left_s())
        self._close = weakref.finalize(self, client.close)
        self.kind = self._check(client)
        client.load_collection(self._name, timeout=self._left_s())
        self._client = client

    def _left_s(self) -> float:
        left = self._until - monotonic()
        if left <= 0:
            raise IndexUnavailable("timeout")
        return left

    def _check(self, client: Any) -> IndexKind:
        if not client.has_collection(self._name, timeout=self._left_s()):
            raise NotPushed(f"no collection {self._name}")
        marks = client.describe_collection(self._name, timeout=self._left_s())["properties"]
        if (marks.get(_SHA256), marks.get(_ROWS), marks.get(_IS_COMPLETE)) != (self._sha256, str(self._rows), "true"):
            raise NotPushed(f"collection {self._name} is incomplete, or belongs to another version")
        kind: IndexKind = marks[_KIND]
        return kind

    def _search(self, field: str, queries: Floats, k: int, exclude: Sequence[int]) -> list[list[int]]:
        self._open()
        found = self._client.search(
            self._name,
            list(queries),
            anns_field=field,
            limit=k,
            # only numbers, never text of a caller
            filter=f"row not in {[int(row) for row in exclude]}" if exclude else "",
            output_fields=["row"],
            search_params={"params": {"ef": max(64, 2 * k)}} if self.kind == "hnsw" else {},
            # a complete collection is never written to
            consistency_level="Eventually",
            timeout=self._left_s(),
        )
        return [hits.ids for hits in found]

    def _check_rows(self, found: list[list[int]], k: int, excluded: Set[int]) -> None:
        for rows in found:
            if len(set(rows) - excluded) < k or min(rows) < 0 or max(rows) >= self._rows:
                raise IndexUnavailable(f"Milvus returned {len(rows)} rows, or invalid ones; expected {k}")


class MilvusIndex:
    """Searches a field of a collection and rescores the hits by the vectors of `local`, so scores are equal to its."""

    def __init__(self, build: MilvusCollection, field: str, local: VectorIndex, exclude: Sequence[int] = ()) -> None:
        self._build = build
        self._field = field
        self._local = local
        self._exclude = exclude

    @property
    def is_exact(self) -> bool:
        """Whether a search returns the true top-k."""
        return self._build.kind == "flat"

    def __len__(self) -> int:
        return min(len(self._local) - len(self._exclude), MAX_RESULTS)

    def without(self, rows: Collection[int]) -> MilvusIndex:
        """Return this index without `rows`; Milvus filters them."""
        known = sorted({row for row in rows if 0 <= row < len(self._local)})
        return MilvusIndex(self._build, self._field, self._local, known)

    def vectors_at(self, rows: Rows, /) -> Floats:
        """Return the unit vectors `(R, D)` of `rows` `(R,)`."""
        return self._local.vectors_at(rows)

    def search(self, queries: Floats, k: int, among: RowSet | None = None) -> tuple[Floats, Rows]:
        """Return scores and rows `(Q, k)`, equal scores by row; raises as `find`, or `ValueError` for NaN."""
        if not np.isfinite(queries).all():
            raise ValueError("queries must be finite")
        # every row is excluded
        if k == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        return self._search(queries, k) if among is None else self._search_among(queries, k, among)

    def _search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        found = self._build.find(self._field, queries, min(k + EXTRA_FOR_TIES, len(self)), self._exclude)
        units, lengths = normalise_queries(queries)
        each = (rescore(self._local, unit, np.array(rows), k) for unit, rows in zip(units, found, strict=True))
        scores, best = stack_results(each, len(queries), k)
        return scores * lengths, best

    def _search_among(self, queries: Floats, k: int, among: RowSet) -> tuple[Floats, Rows]:
        """Over-fetch and drop what is not in the set; search the local index if the set is small, or if too few remain.

        Milvus knows only the rows, and a filter that lists many is slow to send and to read.
        """
        wide = OVERFETCH * k * len(self._local) // len(among) + EXTRA_FOR_TIES
        if among.share < MASKED_SHARE or wide > len(self):
            return self._local.search(queries, k, among)
        scores, rows = self._search(queries, wide)
        is_kept = among.mask[rows]
        if is_kept.sum(axis=1).min() < k:
            return self._local.search(queries, k, among)
        first = np.argsort(~is_kept, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, first, 1), np.take_along_axis(rows, first, 1)


@dataclass(frozen=True)
class PushResult:
    """The result of a push: `inserted` of `rows` are new; `was` is the collection that the alias named before."""

    uri: str
    collection: str
    alias: str
    was: str | None
    index: IndexKind
    rows: int
    inserted: int


class MilvusPush:
    """Puts the vectors of a version into Milvus. A repeated push continues where the last one stopped."""

    def __init__(self, uri: str, token: str, sha256: str, indexes: Mapping[str, VectorIndex], kind: IndexKind) -> None:
        self._uri = uri
        self._client = connect(uri, token, PUSH_TIMEOUT_S)
        self._name = collection_of(sha256)
        self._indexes = indexes
        self._kind = kind
        self._rows = len(next(iter(indexes.values())))
        self._marks = {_SHA256: sha256, _ROWS: str(self._rows), _KIND: kind}

    def run(self, alias: str, progress: Progress) -> PushResult:
        """Fill the collection, mark it complete once it has every row, and point `alias` at it.

        Raises:
            IndexUnavailable: Milvus fails, is slow, or rejects a request.
            BadCollection: the collection belongs to another version or index, or has a wrong number of rows.
        """
        with _wrap_errors():
            is_complete = self._open_collection()
            # rows are inserted in order
            begin = self._rows if is_complete else self._count() // INSERT_ROWS * INSERT_ROWS
            self._fill(begin, progress)
            self._finish(is_complete)
            was = self._move_alias(alias)
        return PushResult(self._uri, self._name, alias, was, self._kind, self._rows, self._rows - begin)

    def drop(self) -> None:
        """Drop the collection, if it exists; raises as `run`."""
        with _wrap_errors():
            if self._client.has_collection(self._name, timeout=PUSH_TIMEOUT_S):
                for alias in self._client.list_aliases(self._name, timeout=PUSH_TIMEOUT_S)["aliases"]:
                    # a collection with an alias cannot be dropped
                    self._client.drop_alias(alias, timeout=PUSH_TIMEOUT_S)
                self._client.drop_collection(self._name, timeout=PUSH_TIMEOUT_S)

    def _open_collection(self) -> bool:
        """Create the collection, unless it exists; return whether it is complete."""
        if not self._client.has_collection(self._name, timeout=PUSH_TIMEOUT_S):
            self._create()
        self._client.load_collection(self._name, timeout=PUSH_TIMEOUT_S)
        marks = self._client.describe_collection(self._name, timeout=PUSH_TIMEOUT_S)["properties"]
        if differing := [mark for mark, value in self._marks.items() if marks.get(mark) != value]:
            raise BadCollection(f"collection {self._name} exists with another {', '.join(differing)}")
        return bool(marks.get(_IS_COMPLETE) == "true")

    def _create(self) -> None:
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("row", DataType.INT64, is_primary=True)
        params = self._client.prepare_index_params()
        for field, index in self._indexes.items():
            dim = index.vectors_at(np.zeros(1, np.int64)).shape[1]
            schema.add_field(field, DataType.FLOAT_VECTOR, dim=dim)
            built = HNSW_PARAMS if self._kind == "hnsw" else {}
            params.add_index(field, index_type=self._kind.upper(), metric_type="IP", index_name=field, params=built)
        self._client.create_collection(
            self._name, schema=schema, index_params=params, properties=self._marks, timeout=PUSH_TIMEOUT_S
        )

    def _count(self) -> int:
        answer = self._client.query(
            self._name, filter="", output_fields=["count(*)"], consistency_level="Strong", timeout=PUSH_TIMEOUT_S
        )
        return int(answer[0]["count(*)"])

    def _fill(self, begin: int, progress: Progress) -> None:
        for first in range(begin, self._rows, INSERT_ROWS):
            rows = np.arange(first, min(first + INSERT_ROWS, self._rows))
            columns = {field: index.vectors_at(rows) for field, index in self._indexes.items()}
            entities = [
                {"row": int(row), **{field: vectors[at] for field, vectors in columns.items()}}
                for at, row in enumerate(rows)
            ]
            self._client.upsert(self._name, entities, timeout=PUSH_TIMEOUT_S)
            progress(int(rows[-1]) + 1, self._rows)

    def _finish(self, is_complete: bool) -> None:
        if is_complete:
            return
        self._client.flush(self._name, timeout=PUSH_TIMEOUT_S)
        if (count := self._count()) != self._rows:
            raise BadCollection(f"collection {self._name} has {count} rows; expected {self._rows}")
        self._client.alter_collection_properties(self._name, {_IS_COMPLETE: "true"}, timeout=PUSH_TIMEOUT_S)

    def _move_alias(self, alias: str) -> str | None:
        """Point `alias` at the collection, atomically; return the collection that it named before."""
        if alias not in self._client.list_aliases(timeout=PUSH_TIMEOUT_S)["aliases"]:
            self._client.create_alias(self._name, alias, timeout=PUSH_TIMEOUT_S)
            return None
        was = str(self._client.describe_alias(alias, timeout=PUSH_TIMEOUT_S)["collection_name"])
        self._client.alter_alias(self._name, alias, timeout=PUSH_TIMEOUT_S)
        return was
