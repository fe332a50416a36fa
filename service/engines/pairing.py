"""Pairing: finds the true next vectors of earlier answers in the contexts that callers send later.

A caller who reads an article sends overlapping contexts. The first T - 1 vectors of a context are then the last T - 1
of an earlier one, byte for byte, and its last vector is the true next vector of that earlier context. So answers
can be scored without labels.
"""

from __future__ import annotations

import asyncio
import mmap
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh3_128_digest

from models.vectors import Floats
from service.engines.authors import Author
from service.engines.pair_store import Bytes, Digests, Pairs, PairStore

# Rows that are handled together, and the longest that they wait for it in seconds.
BLOCK = 256
PAUSE_S = 0.25
# Contexts wait longer than answers, because another process may still be about to keep the answer.
DELAY_S = 2 * PAUSE_S
MAX_WAITING = 8
# Whether the caller of the current request declines that its vectors are kept.
is_declined: ContextVar[bool] = ContextVar("is_declined", default=False)


class Answered(NamedTuple):
    """An answer, the first vector `(D,)` of its context, and the digest of the other vectors."""

    digest: bytes
    answer: Any
    first: Floats
    author: Author


class Arrivals(NamedTuple):
    """Contexts `(T, D)`, the digests of their first T - 1 vectors, and when they may be looked up."""

    due: float
    digests: Digests
    contexts: Sequence[Floats]


class Board(ABC):
    """Says how answers are kept, and scores them when their true next vectors have arrived."""

    @abstractmethod
    def identify(self, author: Author) -> int:
        """Return the number of an author, from 0 to 2^64 - 1; the same in processes that share memory."""

    @abstractmethod
    def count_kept(self, author: Author, count: int) -> None:
        """Count answers that wait for their true next vectors from now on."""

    @abstractmethod
    def width(self, dim: int) -> int:
        """Return the number of bytes of an answer, if vectors have `dim` numbers."""

    @abstractmethod
    def pack(self, answered: Sequence[Answered]) -> Bytes:
        """Return the bytes `(n, width)` of answers."""

    @abstractmethod
    def count(self, pairs: Pairs, contexts: Sequence[Floats]) -> None:
        """Score answers; `pairs.rows` are those of the `contexts` `(T, D)`, which end with the true next vectors."""


class Pairing:
    """Keeps a share of the answers until their true next vectors arrive; then the board scores them.

    Args:
        memory: where answers are kept. Processes that share it score each other's answers.
        share: of the answers. The digest decides, so that both parts of a pair are chosen, or neither.
        seconds: how long an answer is kept at most.
        board: scores the answers.
    """

    def __init__(
        self,
        memory: mmap.mmap | memoryview,
        share: float,
        seconds: float,
        board: Board,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._open = partial(PairStore, memory, seconds=seconds, clock=clock)
        self._below = digest_below(share)
        self._board = board
        self._clock = clock
        self._store: PairStore | None = None
        self._shape: tuple[int, ...] = ()
        self._answered: list[Answered] = []
        self._arrived: list[tuple[bytes, Floats]] = []
        self._waiting: deque[Arrivals] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, contexts: Floats, answers: Sequence[Any] | Floats, author: Author) -> None:
        """Take the `n` answers to contexts `(n, T, D)`, and the true next vectors that these contexts hold.

        Contexts of another shape than the first ones are left alone.
        """
        if is_declined.get() or not self._takes(contexts.shape[1:]):
            return
        below = self._below
        # of a vector, and of a context, in bytes
        vector = 4 * contexts.shape[2]
        size = vector * contexts.shape[1]
        # now, since the vectors are in the cache of the processor
        data = np.ascontiguousarray(contexts).data.cast("B")
        for row in range(len(contexts)):
            start = row * size
            later = xxh3_128_digest(data[start + vector : start + size])
            earlier = xxh3_128_digest(data[start : start + size - vector])
            # a context of one repeated vector would be its own successor
            if later != earlier:
                if later < below:
                    self._answered.append(Answered(later, answers[row], contexts[row, 0], author))
                if earlier < below:
                    self._arrived.append((earlier, contexts[row]))
        self._schedule()

    def keep(self, context: Floats, answer: Any, author: Author) -> None:
        """Take only the answer to a context `(T, D)`."""
        if not is_declined.get() and self._takes(context.shape):
            later = _digest(context[1:])
            if later < self._below and later != _digest(context[:-1]):
                self._answered.append(Answered(later, answer, context[0], author))
                self._schedule()

    def arrive(self, contexts: Floats) -> None:
        """Take only the true next vectors that contexts `(n, T, D)` hold."""
        if contexts.shape[1:] == self._shape and not is_declined.get():
            for context in contexts:
                earlier = _digest(context[:-1])
                if earlier < self._below:
                    self._arrived.append((earlier, context))
            self._schedule()

    def flush(self) -> None:
        """Keep the answers so far, and score those whose true next vectors have waited for `DELAY_S` seconds."""
        if self._timer:
            self._timer.cancel()
        self._timer = None
        assert self._store
        answered, self._answered = self._answered, []
        for author in {each.author for each in answered}:
            self._keep(self._store, author, [each for each in answered if each.author == author])
        arrived, self._arrived = self._arrived, []
        now = self._clock()
        if arrived:
            digests, contexts = zip(*arrived, strict=True)
            self._waiting.append(Arrivals(now + DELAY_S, _as_words(digests), contexts))
        while self._waiting and (self._waiting[0].due <= now or len(self._waiting) > MAX_WAITING):
            arrivals = self._waiting.popleft()
            pairs = self._store.take(arrivals.digests)
            if len(pairs.rows):
                self._board.count(pairs, arrivals.contexts)
        self._schedule()

    def _takes(self, shape: tuple[int, ...]) -> bool:
        """Return whether contexts of this shape `(T, D)` are paired: the shape of the first ones."""
        if not self._shape and shape[0] > 1:
            self._shape = shape
            self._store = self._open(self._board.width(shape[1]))
        return shape == self._shape

    def _schedule(self) -> None:
        if len(self._answered) >= BLOCK or len(self._arrived) >= BLOCK:
            self.flush()
        elif self._timer is None and (self._answered or self._arrived or self._waiting):
            self._timer = asyncio.get_running_loop().call_later(PAUSE_S, self.flush)

    def _keep(self, store: PairStore, author: Author, answered: Sequence[Answered]) -> None:
        counts = Counter([each.digest for each in answered])
        # one of those that are alike, in the order of `counts`
        distinct = [*{each.digest: each for each in answered}.values()]
        waiting = np.fromiter(counts.values(), np.uint64, len(counts))
        store.put(_as_words([*counts]), self._board.identify(author), waiting, self._board.pack(distinct))
        self._board.count_kept(author, len(answered))


def digest_below(share: float) -> bytes:
    """Return what the digests of a share of all vectors are below."""
    return b"\xff" * 17 if share >= 1 else int(share * 2**128).to_bytes(16, "big")


def _digest(vectors: Floats) -> bytes:
    return xxh3_128_digest(np.ascontiguousarray(vectors).data)


def _as_words(digests: Sequence[bytes]) -> Digests:
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
