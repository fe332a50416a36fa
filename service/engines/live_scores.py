"""Live scores: how good the answers are, by the contexts that callers send later.

A caller who reads an article sends overlapping contexts. The first T - 1 vectors of a context are then the last T - 1
of an earlier one, byte for byte, and its last vector is the true next vector of that earlier context. So a prediction
is scored when that context arrives, without labels.
"""

from __future__ import annotations

import asyncio
import math
import mmap
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from models.evaluate import baselines
from models.vectors import Floats, normalise
from service.engines.pair_store import Digests, Pairs, PairStore
from service.telemetry.metrics import BASELINES, LIVE_COSINES, Metrics

# Rows that are handled together, and the longest that they wait for it in seconds.
BLOCK = 256
PAUSE_S = 0.25
# Contexts wait longer than predictions, because another process may still be about to keep the prediction.
DELAY_S = 2 * PAUSE_S
MAX_WAITING = 8
# Versions of an alias that have scores of their own in one process; further ones share a label.
MAX_VERSIONS = 16
OTHER = "other"


class Author(NamedTuple):
    """Who predicts: an alias, and the version that it serves."""

    alias: str
    model: str
    version: str


class Predicted(NamedTuple):
    """A prediction `(D,)`, the first vector `(D,)` of its context, and the digest of the other vectors."""

    digest: bytes
    vector: Floats
    first: Floats
    author: Author


class Arrivals(NamedTuple):
    """Contexts `(T, D)`, the digests of their first T - 1 vectors, and when they may be looked up."""

    due: float
    digests: Digests
    contexts: Sequence[Floats]


class LiveScores:
    """Keeps a share of the predictions until their true next vectors arrive, then counts their scores.

    Args:
        memory: where predictions are kept. Processes that share it score each other's predictions.
        share: of the predictions. The digest decides, so that both parts of a pair are chosen, or neither.
        seconds: how long a prediction is kept at most.
        metrics: where scores are counted.
        authors: returns who predicts now, in any process that shares the memory.
    """

    def __init__(
        self,
        memory: mmap.mmap | bytearray,
        share: float,
        seconds: float,
        metrics: Metrics,
        authors: Callable[[], Iterable[Author]] = tuple,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._open = partial(PairStore, memory, seconds=seconds, clock=clock)
        self._below = digest_below(share)
        self._clock = clock
        self._pairs: PairStore | None = None
        self._shape: tuple[int, ...] = ()
        self._board = ScoreBoard(metrics, authors)
        self.summary = self._board.summary
        self._predicted: list[Predicted] = []
        self._arrived: list[tuple[bytes, Floats]] = []
        self._waiting: deque[Arrivals] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, contexts: Floats, predictions: Floats, author: Author) -> None:
        """Take the predictions `(n, D)` of contexts `(n, T, D)`; their scores follow later.

        Contexts of another shape than the first ones are not scored.
        """
        if contexts.shape[1:] != self._shape and not self._begin(contexts.shape[1:]):
            return
        # of a vector, and of a context, in bytes
        vector = 4 * contexts.shape[2]
        size = vector * contexts.shape[1]
        # now, since the vectors are in the cache of the processor
        data = np.ascontiguousarray(contexts).data.cast("B")
        below = self._below
        for row in range(len(contexts)):
            start = row * size
            later = xxh3_128_digest(data[start + vector : start + size])
            earlier = xxh3_128_digest(data[start : start + size - vector])
            # a context of one repeated vector would be its own successor
            if later != earlier:
                if later < below:
                    self._predicted.append(Predicted(later, predictions[row], contexts[row, 0], author))
                if earlier < below:
                    self._arrived.append((earlier, contexts[row]))
        self._schedule()

    def flush(self) -> None:
        """Keep the predictions so far, and score those whose true next vectors have waited for `DELAY_S` seconds."""
        if self._timer:
            self._timer.cancel()
        self._timer = None
        assert self._pairs
        predicted, self._predicted = self._predicted, []
        for author in {each.author for each in predicted}:
            self._keep(self._pairs, author, [each for each in predicted if each.author == author])
        arrived, self._arrived = self._arrived, []
        now = self._clock()
        if arrived:
            digests, contexts = zip(*arrived, strict=True)
            self._waiting.append(Arrivals(now + DELAY_S, _as_words(digests), contexts))
        while self._waiting and (self._waiting[0].due <= now or len(self._waiting) > MAX_WAITING):
            _, digests_due, contexts_due = self._waiting.popleft()
            self._board.score(self._pairs.take(digests_due), contexts_due)
        self._schedule()

    def _begin(self, shape: tuple[int, ...]) -> bool:
        """Return whether contexts of this shape `(T, D)` are scored from now on."""
        if self._shape or shape[0] < 2:
            return False
        self._shape = shape
        self._pairs = self._open(shape[1])
        return True

    def _schedule(self) -> None:
        if len(self._predicted) >= BLOCK or len(self._arrived) >= BLOCK:
            self.flush()
        elif self._timer is None and (self._predicted or self._arrived or self._waiting):
            self._timer = asyncio.get_running_loop().call_later(PAUSE_S, self.flush)

    def _keep(self, pairs: PairStore, author: Author, predicted: Sequence[Predicted]) -> None:
        counts = Counter([each.digest for each in predicted])
        # one of those that are alike, in the order of `counts`
        distinct = {each.digest: each for each in predicted}.values()
        digests, vectors, firsts, _ = zip(*distinct, strict=True)
        number = self._board.identify(author)
        waiting = np.fromiter(counts.values(), np.uint64, len(counts))
        pairs.put(_as_words(digests), number, waiting, np.stack(vectors), np.stack(firsts))
        self._board.count_kept(author, len(predicted))


class ScoreBoard:
    """Counts the scores of predictions, by alias and version, beside those of the baselines."""

    def __init__(self, metrics: Metrics, authors: Callable[[], Iterable[Author]]) -> None:
        self._metrics = metrics
        self._current = authors
        self._authors: dict[int, Author] = {}
        self._versions: defaultdict[str, set[Author]] = defaultdict(set)
        self._baseline_sums = np.zeros(len(BASELINES))

    def identify(self, author: Author) -> int:
        """Return the number of an author, the same in every process; remember its name."""
        number = xxh3_64_intdigest("\0".join(author).encode())
        if number not in self._authors:
            versions = self._versions[author.alias]
            versions.add(author if len(versions) < MAX_VERSIONS else Author(author.alias, OTHER, OTHER))
            self._authors[number] = author if author in versions else Author(author.alias, OTHER, OTHER)
        return number

    def count_kept(self, author: Author, count: int) -> None:
        """Count predictions that wait for their true next vectors."""
        self._metrics.live_predictions.add(count, author.alias, "kept")

    def score(self, pairs: Pairs, contexts: Sequence[Floats]) -> None:
        """Count the scores of `pairs`; the `contexts` `(T, D)` end with the true next vectors.

        Predictions of an author that this process does not know are not counted.
        """
        if not len(pairs.rows):
            return
        later = np.stack([contexts[row] for row in pairs.rows.tolist()])
        truths = normalise(later[:, -1])
        earlier = np.concatenate([pairs.firsts[:, None], later[:, :-1]], axis=1)
        known = baselines(earlier.shape[1], None)
        by_baseline = np.stack([_cosines(known[name](earlier), truths) for name in BASELINES])
        self._baseline_sums += by_baseline.sum(axis=1)
        cosines = _cosines(pairs.predictions, truths)
        margins = cosines - by_baseline[self._baseline_sums.argmax()]
        for name, values in zip(BASELINES, by_baseline.tolist(), strict=True):
            self._metrics.live_baseline_cosine.labels(name).observe(*values)
        for number, cosine, margin in zip(pairs.authors.tolist(), cosines.tolist(), margins.tolist(), strict=True):
            author = self._author(number)
            if author:
                self._metrics.live_cosine.labels(*author).observe(cosine)
                self._metrics.live_margin.labels(*author).observe(margin)
                self._metrics.live_predictions.inc(author.alias, "scored")

    def summary(self) -> dict[str, Any]:
        """Return the live scores of all processes, for JSON.

        The interval holds the mean cosine of a version with 95 % confidence, if windows are independent.
        """
        counted = self._metrics
        cosines, margins, known, predictions = counted.totals(
            counted.live_cosine, counted.live_margin, counted.live_baseline_cosine, counted.live_predictions
        )
        versions = [
            {"alias": author[0], "id": "/".join(author[1:]), **_figures(numbers), "margin": _mean(margins[author])}
            for author, numbers in cosines.items()
        ]
        return {
            "versions": versions,
            "baselines": {name: _mean(numbers) for (name,), numbers in known.items()},
            "aliases": _by_alias(predictions),
        }

    def _author(self, number: int) -> Author | None:
        if number not in self._authors:
            for author in self._current():
                self.identify(author)
        return self._authors.get(number)


def digest_below(share: float) -> bytes:
    """Return what the digests of a share of all vectors are below."""
    return b"\xff" * 17 if share >= 1 else int(share * 2**128).to_bytes(16, "big")


def _as_words(digests: Sequence[bytes]) -> Digests:
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def _cosines(vectors: Floats, truths: Floats) -> Floats:
    found: Floats = np.vecdot(normalise(vectors), truths)
    return found


def _mean(numbers: Sequence[float]) -> float:
    *counts, total = numbers
    return total / max(sum(counts), 1)


def _figures(numbers: Sequence[float]) -> dict[str, Any]:
    """Return the count, the mean and its 95 % interval of the numbers of a histogram of cosines."""
    counts = np.array(numbers[:-1])
    pairs = float(counts.sum())
    mean = _mean(numbers)
    # the middle of each bucket; cosines beyond the last edge are equal to it but for rounding
    width = LIVE_COSINES[1] - LIVE_COSINES[0]
    middles = np.array([*LIVE_COSINES, LIVE_COSINES[-1] + width / 2]) - width / 2
    variance = float(counts @ (middles - mean) ** 2) / max(pairs - 1, 1)
    half = 1.96 * math.sqrt(variance / pairs)
    return {"pairs": int(pairs), "cosine": mean, "interval": [mean - half, mean + half]}


def _by_alias(predictions: Mapping[tuple[str, ...], float]) -> dict[str, dict[str, int]]:
    found: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for (alias, outcome), count in predictions.items():
        found[str(alias)][outcome] = int(count)
    return found
