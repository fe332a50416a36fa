"""Pairing: finds the true next vectors of earlier answers in the contexts that callers send later.

A caller who reads an article sends overlapping contexts. The first T - 1 vectors of a context are then the last T - 1
of an earlier one, byte for byte, and its last vector is the true next vector of that earlier context. So answers
can be scored without labels.
"""

from __future__ import annotations

import asyncio
import math
import mmap
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context, ContextVar
from copy import copy
from functools import partial
from time import monotonic, thread_time
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh3_128_digest

from models.registry.alias import Alias
from models.vectors import Floats
from service.engines.affordable_share import AffordableShare
from service.engines.authors import Author
from service.engines.pair_store import Bytes, Digests, Pairs, PairStore
from service.tasks import CatchAndLog

# Contexts that are read, and scored, in one turn of the event loop, which takes less than a millisecond.
STEP = 32
# Whether a vector is sampled depends on its middle number, times this, modulo 1: to hash a vector costs more.
SPREAD = 1e6
# The longest that contexts wait until they are read, in seconds.
PAUSE_S = 0.25
# They are looked up later still, because another process may still be about to keep the answer.
DELAY_S = 2 * PAUSE_S
# Contexts that wait at most to be read, or to be looked up; more are left out. If half of them wait to be looked up,
# they wait no longer.
MAX_WAITING = 4096
# Whether the caller of the current request declines that its vectors are kept.
is_declined: ContextVar[bool] = ContextVar("is_declined", default=False)
Answers = Sequence[Any] | Floats


class Taken(NamedTuple):
    """Contexts `(n, T, D)` that are not read yet; the answers and who gave them, if these count.

    `due` says when they may be looked up; never if it is infinite.
    """

    contexts: Floats
    answers: Answers
    author: tuple[str, str, str] | None
    due: float


class Answered(NamedTuple):
    """An answer, the first vector `(D,)` of its context, and the digest of the other vectors."""

    digest: bytes
    answer: Any
    first: Floats
    author: Author


class Arrival(NamedTuple):
    """A context `(T, D)`, the digest of its first T - 1 vectors, and when it may be looked up."""

    digest: bytes
    context: Floats
    due: float


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

    Callers must not change arrays of many contexts: these are read later, in turns of the event loop of their own.

    Args:
        memory: where answers are kept. Processes that share it score each other's answers.
        share: of the answers. A number of the first vector that both parts of a pair have decides, so that both are
            chosen, or neither. If all this takes too much time, fewer are chosen.
        seconds: how long an answer is kept at most.
        board: scores the answers.
        thread_clock: seconds in which this thread was not idle.
    """

    def __init__(
        self,
        memory: mmap.mmap | memoryview,
        share: float,
        seconds: float,
        board: Board,
        clock: Callable[[], float] = monotonic,
        thread_clock: Callable[[], float] = thread_time,
    ) -> None:
        self._open = partial(PairStore, memory, seconds=seconds, clock=clock)
        self._share = AffordableShare(share, clock, thread_clock)
        self._board = board
        self._clock = clock
        self._catch = CatchAndLog("live scores")
        self._store: PairStore | None = None
        self._alias: str | None = None
        self._shape: tuple[int, ...] = ()
        # the shape of one context, as most requests have it
        self._one: tuple[int, ...] = ()
        # places of the middle numbers of its first two vectors
        self._middles = 0, 0
        self._taken: deque[Taken] = deque()
        self._rows = 0  # of `_taken`
        self._arrived: deque[Arrival] = deque()
        self._timer: asyncio.Handle | None = None
        self._is_soon = False

    def add(self, contexts: Floats, answers: Answers, author: tuple[str, str, str]) -> None:
        """Take the `n` answers to contexts `(n, T, D)`, and the true next vectors that these contexts hold.

        The author is an `Author`, or its members.

        Contexts of another shape than those of the primary, or of the first alias until the primary answers, are left
        alone. If that shape changes, what waits is forgotten.
        """
        is_one = contexts.shape == self._one
        if is_one and not self._is_sampled(contexts):
            return
        if not is_declined.get() and self._takes(contexts.shape[1:], author[0]):
            if is_one:
                # the memory of a request is in the processor's cache: the next request should get it
                contexts, answers = contexts.copy(), copy(answers)
            self._take(Taken(contexts, answers, author, self._clock() + DELAY_S))

    def keep(self, context: Floats, answer: Floats, author: Author) -> None:
        """Take only the answer `(D,)` to a context `(T, D)`."""
        if not is_declined.get() and self._takes(context.shape, author.alias):
            self._take(Taken(context[None], answer[None], author, math.inf))

    def arrive(self, contexts: Floats) -> None:
        """Take only the true next vectors that contexts `(n, T, D)` hold."""
        if not is_declined.get() and contexts.shape[1:] == self._shape:
            self._take(Taken(contexts, (), None, self._clock() + DELAY_S))

    def flush(self) -> None:
        """Keep the answers so far, and score those whose true next vectors have waited for `DELAY_S` seconds."""
        while self._step():
            pass

    def _takes(self, shape: tuple[int, ...], alias: str) -> bool:
        """Return whether contexts of this shape `(T, D)`, which `alias` has answered, are paired."""
        if alias == Alias.PRIMARY or self._alias is None:
            self._alias = alias
        if shape != self._shape and alias == self._alias and shape[0] > 1:
            self._shape = shape
            self._one = 1, *shape
            self._middles = shape[1] // 2, shape[1] + shape[1] // 2
            self._store = self._open(self._board.width(shape[1]))
            self._taken.clear()
            self._rows = 0
            self._arrived.clear()
        return shape == self._shape

    def _is_sampled(self, contexts: Floats) -> bool:
        """Return whether one context `(1, T, D)` is a part of a pair that is sampled."""
        first, second = self._middles
        share = self._share.now
        return _draw(contexts, first) < share or _draw(contexts, second) < share

    def _take(self, taken: Taken) -> None:
        if self._rows < MAX_WAITING:
            self._taken.append(taken)
            self._rows += len(taken.contexts)
            if self._timer is None or (self._rows >= STEP and not self._is_soon):
                self._wake()

    def _wake(self) -> None:
        """Handle what waits later; in the next turn of the event loop if there is much of it."""
        if self._rows >= STEP or self._is_due():
            if self._timer:
                self._timer.cancel()
            self._is_soon = True
            self._timer = asyncio.get_running_loop().call_soon(self._run, context=Context())
        elif self._timer is None and (self._taken or self._arrived):
            self._timer = asyncio.get_running_loop().call_later(PAUSE_S, self._run, context=Context())

    def _run(self) -> None:
        self._timer = None
        self._is_soon = False
        with self._catch:
            self._step()
        self._wake()

    def _step(self) -> bool:
        """Read at most `STEP` contexts, score as many; return whether more is to be done now."""
        assert self._store
        with self._share.work():
            answered = [each for taken in self._pop(STEP) for each in self._read(taken)]
            for author in {each.author for each in answered}:
                self._keep(self._store, author, [each for each in answered if each.author == author])
            self._score(self._store, self._pop_due(STEP))
        return bool(self._taken) or self._is_due()

    def _pop(self, most: int) -> Iterator[Taken]:
        """Remove contexts that are not read yet, at most `most` of them."""
        while most and self._taken:
            contexts, answers, author, due = taken = self._taken.popleft()
            count = min(most, len(contexts))
            if count < len(contexts):
                self._taken.appendleft(Taken(contexts[count:], answers[count:], author, due))
                taken = Taken(contexts[:count], answers[:count], author, due)
            self._rows -= count
            most -= count
            yield taken

    def _read(self, taken: Taken) -> Iterator[Answered]:
        """Yield the answers that are sampled; let the contexts that are wait for them."""
        contexts, answers, author, due = taken
        first, second = self._middles
        share = self._share.now
        is_copy = len(contexts) == 1 and contexts.base is None
        for row, context in enumerate(contexts):
            is_kept = author is not None and _draw(context, second) < share
            ends_one = due < math.inf and _draw(context, first) < share
            if is_kept or ends_one:
                earlier, later = _digest(context[:-1]), _digest(context[1:])
                # a context of one repeated vector would be its own successor
                if author and is_kept and later != earlier:
                    yield Answered(later, answers[row], context[0], Author(*author))
                if ends_one and later != earlier and len(self._arrived) < MAX_WAITING:
                    self._arrived.append(Arrival(earlier, context if is_copy else context.copy(), due))

    def _keep(self, store: PairStore, author: Author, answered: Sequence[Answered]) -> None:
        counts = Counter([each.digest for each in answered])
        # one of those that are alike, in the order of `counts`
        distinct = [*{each.digest: each for each in answered}.values()]
        waiting = np.fromiter(counts.values(), np.uint64, len(counts))
        store.put(_as_words([*counts]), self._board.identify(author), waiting, self._board.pack(distinct))
        self._board.count_kept(author, len(answered))

    def _score(self, store: PairStore, arrivals: Sequence[Arrival]) -> None:
        if arrivals:
            pairs = store.take(_as_words([each.digest for each in arrivals]))
            if len(pairs.rows):
                self._board.count(pairs, [each.context for each in arrivals])

    def _pop_due(self, count: int) -> list[Arrival]:
        due: list[Arrival] = []
        while len(due) < count and self._is_due():
            due.append(self._arrived.popleft())
        return due

    def _is_due(self) -> bool:
        """Return whether the context that has waited longest may be looked up."""
        arrived = self._arrived
        return bool(arrived) and (len(arrived) > MAX_WAITING // 2 or arrived[0].due <= self._clock())


def _draw(vectors: Floats, place: int) -> float:
    """Return a number from 0 to 1 that follows from the number of `vectors` at a place."""
    return vectors.item(place) * SPREAD % 1.0


def _as_words(digests: Sequence[bytes]) -> Digests:
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def _digest(vectors: Floats) -> bytes:
    return xxh3_128_digest(np.ascontiguousarray(vectors).data)
