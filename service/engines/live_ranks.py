"""Live ranks: at which place a search had the passage that came next, if the corpus holds it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import numpy as np

from lvm.errors import Expired, Unavailable
from models.vectors import Floats, normalise
from service.engines.authors import Author, Authors
from service.engines.pair_store import Bytes, Pairs
from service.engines.pairing import Answered, Board
from service.tasks import catch_and_log
from service.telemetry.metrics import Metrics

# Rows of an answer that are kept; a passage that comes later counts as not found.
MAX_ROWS = 50
NOT_FOUND = -1
# rank of a passage that was not found: beyond every edge of the histogram
NO_RANK = 1000.0


class Found(NamedTuple):
    """For each vector, the row of the passage that has it, or None; and the corpus that was searched."""

    corpus: str
    rows: Sequence[int | None]


# Looks up unit vectors `(m, D)`.
Find = Callable[[Floats], Awaitable[Found]]


class LiveRanks(Board):
    """Counts in `metrics` at which rank the answers, hits of the corpus, have the passage that came next.

    `find` looks up passages by their vectors. What the corpus does not hold is not counted, nor are answers of a corpus
    that was replaced meanwhile: their rows are other passages. The corpus is the model of the author.
    """

    def __init__(self, metrics: Metrics, authors: Authors, find: Find) -> None:
        self._metrics = metrics
        self._authors = authors
        self._find = find
        self._running: set[asyncio.Task[None]] = set()

    def identify(self, author: Author) -> int:
        """Return the number of an author."""
        return self._authors.identify(author)

    def count_kept(self, author: Author, count: int) -> None:
        """Count answers that wait for the passage that comes next."""
        self._metrics.live_predictions.add(count, author.alias, "kept")

    def width(self, dim: int) -> int:
        """Return the number of bytes of an answer."""
        return 4 * MAX_ROWS

    def pack(self, answered: Sequence[Answered]) -> Bytes:
        """Return the bytes of answers, sequences of hits."""
        packed = np.full((len(answered), MAX_ROWS), NOT_FOUND, np.int32)
        for row, each in zip(packed, answered, strict=True):
            rows = [hit.row for hit in each.answer[:MAX_ROWS]]
            row[: len(rows)] = rows
        return packed.view(np.uint8)

    def count(self, pairs: Pairs, contexts: Sequence[Floats]) -> None:
        """Score answers, later, by the last vectors of `contexts`."""
        truths = normalise(np.stack([contexts[row][-1] for row in pairs.rows.tolist()]))
        task = asyncio.create_task(catch_and_log("live ranks", self._count(pairs, truths)))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _count(self, pairs: Pairs, truths: Floats) -> None:
        answers = pairs.answers.view(np.int32).tolist()
        try:
            corpus, found = await self._find(truths)
        except (Unavailable, Expired):
            return
        for number, rows, truth in zip(pairs.authors.tolist(), answers, found, strict=True):
            author = self._authors.find(number)
            if author and author.model == corpus and truth is not None:
                rank = rows.index(truth) + 1 if truth in rows else None
                self._metrics.live_rank.labels(*author[1:]).observe(rank or NO_RANK)
                self._metrics.live_reciprocal_rank.labels(*author[1:]).observe(1 / rank if rank else 0.0)
                self._metrics.live_predictions.inc(author.alias, "scored")
