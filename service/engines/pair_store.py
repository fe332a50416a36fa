"""The pair store: recent predictions, each kept until the context arrives that holds its true next vector.

The memory has a fixed size. It may be shared by several processes without locks: an entry that two of them write at
the same time is lost or overwritten, and never read half.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.vectors import Floats

# Entries that a digest may be in. The oldest of them makes room.
WAYS = 4
# A context of which the last T - 1 vectors are kept as a digest: two words of 64 bits.
Digests = NDArray[np.uint64]
Words = NDArray[np.uint64]
_WORD = 8
# Words of an entry beside its vectors: digest (2), prediction's author, predictions that wait, time.
_HEAD_WORDS = 5
_HALF = 2
_VECTORS = 2


class Pairs(NamedTuple):
    """Kept predictions whose true next vectors have arrived.

    Attributes:
        rows: index `(m,)` of the digest that each belongs to.
        authors: who predicted `(m,)`, as given to `put`.
        predictions, firsts: `(m, D)` each: the prediction, and the first vector of its context.
    """

    rows: NDArray[np.intp]
    authors: Words
    predictions: Floats
    firsts: Floats


class PairStore:
    """Keeps predictions of `dim` numbers for at most `seconds`, in `memory`.

    Processes that share the memory use the same `dim`, and a clock that they share. Vectors are kept as float16.
    """

    def __init__(
        self, memory: mmap.mmap | bytearray, dim: int, seconds: float, clock: Callable[[], float] = monotonic
    ) -> None:
        entry_bytes = _HEAD_WORDS * _WORD + _VECTORS * dim * _HALF
        self._sets = max(1, len(memory) // (WAYS * entry_bytes))
        entries = self._sets * WAYS
        words = np.frombuffer(memory, np.uint64, _HEAD_WORDS * entries)
        self._keys = words[: 2 * entries].reshape(entries, 2)
        self._authors, self._waiting = words[2 * entries : 4 * entries].reshape(2, entries)
        self._times = words[4 * entries :].view(np.float64)
        halves = np.frombuffer(memory, np.float16, _VECTORS * dim * entries, words.nbytes)
        self._vectors = halves.reshape(entries, _VECTORS, dim)
        self._seconds = seconds
        self._clock = clock

    @property
    def capacity(self) -> int:
        """How many predictions it keeps at most."""
        return len(self._keys)

    def put(self, digests: Digests, author: int, counts: Words, predictions: Floats, firsts: Floats) -> None:
        """Keep a prediction `(n, D)` and a first vector `(n, D)` for each of `n` different digests `(n, 2)`.

        Each waits for as many true next vectors as `counts` `(n,)` says, if it is kept already for as many more.
        """
        now = self._clock()
        left = np.arange(len(digests))
        while len(left):
            slots = self._slots_for(digests[left], author, now)
            # of digests that would take the same entry, one is kept in this turn
            _, chosen = np.unique(slots, return_index=True)
            rows = left[chosen]
            self._write(slots[chosen], digests[rows], author, counts[rows], predictions[rows], firsts[rows], now)
            left = np.delete(left, chosen)

    def take(self, digests: Digests) -> Pairs:
        """Return the predictions that wait for the digests `(n, 2)`; each waits for one less from now on."""
        entries = self._entries(digests)
        is_found = self._matches(entries, digests) & (self._waiting[entries] > 0)
        is_found &= self._times[entries] > self._clock() - self._seconds
        rows, ways = np.nonzero(is_found)
        found = entries[rows, ways]
        vectors = self._vectors[found].astype(np.float32)
        authors = self._authors[found]
        # another process may have written to an entry while it was read
        is_same = (self._keys[found] == digests[rows]).all(axis=1)
        found, rows, vectors, authors = found[is_same], rows[is_same], vectors[is_same], authors[is_same]
        rows, vectors, authors = self._settle(found, rows, vectors, authors)
        return Pairs(rows, authors, vectors[:, 0], vectors[:, 1])

    def _settle(
        self, found: NDArray[np.intp], rows: NDArray[np.intp], vectors: Floats, authors: Words
    ) -> tuple[NDArray[np.intp], Floats, Words]:
        """Count down the entries `found`; leave out what is found more often than it waits."""
        order = np.argsort(found, kind="stable")
        ordered = found[order]
        place = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
        kept = np.sort(order[place < self._waiting[ordered].astype(np.int64)])
        np.subtract.at(self._waiting, found[kept], np.uint64(1))
        return rows[kept], vectors[kept], authors[kept]

    def _entries(self, digests: Digests) -> NDArray[np.intp]:
        """Return the entries `(n, WAYS)` that digests may be in."""
        first = (digests[:, 1] % np.uint64(self._sets)).astype(np.intp) * WAYS
        return first[:, None] + np.arange(WAYS)

    def _matches(self, entries: NDArray[np.intp], digests: Digests) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = (self._keys[entries] == digests[:, None]).all(axis=2)
        return found

    def _slots_for(self, digests: Digests, author: int, now: float) -> NDArray[np.intp]:
        """Return the entry of each digest: the one that has it already, else the oldest; empty ones are oldest."""
        entries = self._entries(digests)
        is_kept = self._matches(entries, digests) & (self._authors[entries] == np.uint64(author))
        age = np.where(is_kept, np.inf, now - self._times[entries])
        chosen: NDArray[np.intp] = entries[np.arange(len(entries)), age.argmax(axis=1)]
        return chosen

    def _write(
        self,
        slots: NDArray[np.intp],
        digests: Digests,
        author: int,
        counts: Words,
        predictions: Floats,
        firsts: Floats,
        now: float,
    ) -> None:
        is_kept = (self._keys[slots] == digests).all(axis=1) & (self._authors[slots] == np.uint64(author))
        is_kept &= self._times[slots] > now - self._seconds
        waiting = np.where(is_kept, self._waiting[slots], 0) + counts
        # a reader finds no entry until all of it is written
        self._keys[slots] = 0
        self._authors[slots] = author
        self._vectors[slots, 0] = predictions
        self._vectors[slots, 1] = firsts
        self._times[slots] = now
        self._waiting[slots] = waiting
        self._keys[slots] = digests
