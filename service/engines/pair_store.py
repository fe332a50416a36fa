"""The pair store: recent answers, each kept until the context arrives that holds the true next vector.

The memory has a fixed size. It may be shared by several processes without locks: each entry has a checksum, so one
that two of them write at the same time, or that a process wrote in part before it died, counts as lost.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

# Entries that a digest may be in. The oldest of them makes room.
WAYS = 4
# A context of which the last T - 1 vectors are kept as a digest: two words of 64 bits.
Digests = NDArray[np.uint64]
Words = NDArray[np.uint64]
Bytes = NDArray[np.uint8]
_WORD = 8
# Words of an entry beside its bytes: digest (2), the answer's author, answers that wait, checksum, time.
_HEAD_WORDS = 6


class Pairs(NamedTuple):
    """Kept answers whose true next vectors have arrived.

    Attributes:
        rows: index `(m,)` of the digest that each belongs to.
        authors: who answered `(m,)`, as given to `put`.
        answers: `(m, width)`, as given to `put`.
    """

    rows: NDArray[np.intp]
    authors: Words
    answers: Bytes


class PairStore:
    """Keeps answers of `width` bytes, for at most `seconds`, in `memory`.

    Processes that share the memory use a clock that they share. While some use another width, entries are lost.
    Memory that is too small for `WAYS` entries keeps nothing.
    """

    def __init__(
        self, memory: mmap.mmap | memoryview, width: int, seconds: float, clock: Callable[[], float] = monotonic
    ) -> None:
        self._sets = len(memory) // (WAYS * (_HEAD_WORDS * _WORD + width))
        entries = self._sets * WAYS
        words = np.frombuffer(memory, np.uint64, _HEAD_WORDS * entries)
        self._keys = words[: 2 * entries].reshape(entries, 2)
        self._authors, self._waiting, self._checksums = words[2 * entries : 5 * entries].reshape(3, entries)
        self._times = words[5 * entries :].view(np.float64)
        self._answers = np.frombuffer(memory, np.uint8, width * entries, words.nbytes).reshape(entries, width)
        self._seconds = seconds
        self._clock = clock

    @property
    def capacity(self) -> int:
        """How many answers it keeps at most."""
        return len(self._keys)

    def put(self, digests: Digests, author: int, counts: Words, answers: Bytes) -> None:
        """Keep an answer `(n, width)` for each of `n` different digests `(n, 2)`.

        Each waits for as many true next vectors as `counts` `(n,)` says, if it is kept already for as many more.
        """
        now = self._clock()
        left = np.arange(len(digests) if self._sets else 0)
        while len(left):
            slots = self._slots_for(digests[left], author, now)
            # of digests that would take the same entry, one is kept in this turn
            _, chosen = np.unique(slots, return_index=True)
            rows = left[chosen]
            self._write(slots[chosen], digests[rows], author, counts[rows], answers[rows], now)
            left = np.delete(left, chosen)

    def take(self, digests: Digests) -> Pairs:
        """Return the answers that wait for the digests `(n, 2)`; each waits for one less from now on."""
        if not self._sets:
            digests = digests[:0]
        entries = self._entries(digests)
        is_found = self._matches(entries, digests) & (self._waiting[entries] > 0)
        is_found &= self._times[entries] > self._clock() - self._seconds
        rows, ways = np.nonzero(is_found)
        found = entries[rows, ways]
        answers = self._answers[found]
        authors = self._authors[found]
        is_whole = self._checksums[found] == _checksums(digests[rows], authors, answers)
        kept = np.flatnonzero(is_whole)[self._settle(found[is_whole])]
        return Pairs(rows[kept], authors[kept], answers[kept])

    def _settle(self, found: NDArray[np.intp]) -> NDArray[np.intp]:
        """Count down the entries `found`; return which of them wait as often as they are found."""
        order = np.argsort(found, kind="stable")
        ordered = found[order]
        place = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
        kept = np.sort(order[place < self._waiting[ordered].astype(np.int64)])
        np.subtract.at(self._waiting, found[kept], np.uint64(1))
        return kept

    def _entries(self, digests: Digests) -> NDArray[np.intp]:
        """Return the entries `(n, WAYS)` that digests may be in."""
        first = (digests[:, 1] % np.uint64(max(self._sets, 1))).astype(np.intp) * WAYS
        return first[:, None] + np.arange(WAYS)

    def _matches(self, entries: NDArray[np.intp], digests: Digests) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = (self._keys[entries] == digests[:, None]).all(axis=2)
        return found

    def _slots_for(self, digests: Digests, author: int, now: float) -> NDArray[np.intp]:
        """Return the entry of each digest: the one that has it already, else the oldest; empty ones are oldest."""
        entries = self._entries(digests)
        is_kept = self._matches(entries, digests) & (self._authors[entries] == np.uint64(author))
        # what another width has left there has any time, also one in the future, and then counts as old
        age = np.where(is_kept, np.inf, np.abs(now - self._times[entries]))
        chosen: NDArray[np.intp] = entries[np.arange(len(entries)), age.argmax(axis=1)]
        return chosen

    def _write(
        self,
        slots: NDArray[np.intp],
        digests: Digests,
        author: int,
        counts: Words,
        answers: Bytes,
        now: float,
    ) -> None:
        is_kept = (self._keys[slots] == digests).all(axis=1) & (self._authors[slots] == np.uint64(author))
        is_kept &= self._times[slots] > now - self._seconds
        waiting = np.where(is_kept, self._waiting[slots], 0) + counts
        # a reader finds no entry until all of it is written
        self._keys[slots] = 0
        self._checksums[slots] = _checksums(digests, np.uint64(author), answers)
        self._authors[slots] = author
        self._answers[slots] = answers
        self._times[slots] = now
        self._waiting[slots] = waiting
        self._keys[slots] = digests


def _checksums(digests: Digests, authors: Words | np.uint64, answers: Bytes) -> Words:
    """Return a number `(n,)` for each digest, author and answer `(n, width)`, which differs if any of them does."""
    hashes = np.fromiter((xxh3_64_intdigest(answer.data) for answer in answers), np.uint64, len(answers))
    found: Words = hashes + digests[:, 0] + authors
    return found
