"""Filters: the rows of a corpus that a search may return, as sets that indexes search."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.retrieval.fields import ARTICLE, Column, Fields, Filter, Mask, Value

# bytes of the sets that are kept
CACHE_BYTES = 64 << 20
# bytes, at most, that a set and what indexes derive from it hold for each of its rows, and for each row of the corpus
_ROW_BYTES = 80
_MASK_BYTES = 2
# A set of so few rows is searched by estimates, of which an index holds so many bytes for each row.
ESTIMATED_ROWS, _ESTIMATE_BYTES = 16_384, 1000
# bytes, at most, that an entry of the cache holds beside its set and values, and for each value beside the value itself
_ENTRY_BYTES = 4000
_VALUE_BYTES = 200
# If a set has less than this share of the rows, its mask is not used.
MASKED_SHARE = 1 / 4


class RowSet:
    """Some rows `(M,)` of the N rows of a corpus, ascending. Two sets are equal only if they are the same object."""

    def __init__(self, mask: Mask) -> None:
        self.rows: NDArray[np.int64] = np.flatnonzero(mask)
        self.share = len(self.rows) / max(len(mask), 1)
        self._total = len(mask)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds with all that is derived from it, at most."""
        row_bytes = _ROW_BYTES + _ESTIMATE_BYTES * (len(self) <= ESTIMATED_ROWS)
        return row_bytes * len(self) + _MASK_BYTES * self._total * (self.share >= MASKED_SHARE)

    @cached_property
    def mask(self) -> Mask:
        """Which of the N rows are in the set, `(N,)`."""
        mask = np.zeros(self._total, np.bool_)
        mask[self.rows] = True
        return mask

    @cached_property
    def bits(self) -> NDArray[np.uint8]:
        """The mask with one bit for each row, lowest bit first."""
        return np.packbits(self.mask, bitorder="little")


class FilterCache:
    """The sets of rows of recent filters of one corpus, which never changes. Safe to call from several threads.

    Args:
        matching: returns which rows `(N,)` a filter keeps; may raise.
        max_bytes: the sets used last are kept up to this size, with the values of their filters, and at least one.
    """

    def __init__(self, matching: Callable[[Filter], Mask], max_bytes: int = CACHE_BYTES) -> None:
        self._matching = matching
        self._max_bytes = max_bytes
        self._known: OrderedDict[Any, RowSet] = OrderedDict()
        self._nbytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, at most."""
        return self._nbytes

    def rows(self, wanted: Filter) -> RowSet:
        """Return the rows that a filter keeps; equal filters have the same set. Raises as `matching`."""
        key = _key(wanted)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
            found = RowSet(self._matching(wanted))
            self._known[key] = found
            self._nbytes += _entry_bytes(key, found)
            while self._nbytes > self._max_bytes and len(self._known) > 1:
                self._nbytes -= _entry_bytes(*self._known.popitem(last=False))
            return found


def _entry_bytes(key: Any, rows: RowSet) -> int:
    values = sum(_VALUE_BYTES + sys.getsizeof(value) for _, typed in key for _, value in typed)
    return _ENTRY_BYTES + rows.nbytes + values


def _key(wanted: Filter) -> Any:
    """Return the same key for the same filter in any order; true is not 1 here."""
    return frozenset((name, frozenset((type(value), value) for value in values)) for name, values in wanted.items())


class BadFilter(ValueError):
    """A filter that no row of the corpus could ever match: an unknown `field`, or values of a wrong kind."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(detail)
        self.field = field


def check_filter(wanted: Filter, fields: Fields) -> None:
    """Raise `BadFilter` unless the corpus has every field of a filter, with values of the kind of those wanted."""
    known = {ARTICLE: {"integer"}} | {name: _kinds(column) for name, column in fields.metadata.items()}
    for name, values in wanted.items():
        if name not in known:
            raise BadFilter(name, f'unknown field "{name[:100]}"; the corpus has {", ".join(known)}')
        for value in values:
            if not _kinds_of(value) & known[name]:
                kinds = " or ".join(sorted(known[name])) or "no value"
                detail = f'a value of "{name}" is a {sorted(_kinds_of(value))[-1]}; expected {kinds}'
                raise BadFilter(name, f"{detail} (the corpus has the fields {', '.join(known)})")


def _kinds(column: Column) -> set[str]:
    """Return the kinds of the values of a column. They are sorted as JSON, so the values of a kind are in a row."""
    strings_end, numbers_end = (bisect_left(column.values, end) for end in ("#", "A"))
    found = {"string": strings_end, "number": numbers_end - strings_end, "boolean": len(column.values) - numbers_end}
    return {kind for kind, count in found.items() if count}


def _kinds_of(value: Value) -> set[str]:
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, str):
        return {"string"}
    return {"integer", "number"} if isinstance(value, int) else {"number"}
