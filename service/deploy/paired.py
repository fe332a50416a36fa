"""Paired scores: whether one version predicts worse than another, by the true next vectors of the same contexts.

It may be asked after every pair, however many come: the error rate is that of all answers together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from xxhash import xxh3_64_intdigest

from models.vectors import Floats
from service.engines.authors import Author
from service.engines.vector_board import Scored, VectorBoard

# How often a version that is not worse may be called worse.
ERROR_RATE = 0.005
# Fewer pairs decide nothing, since the bound assumes that their mean is nearly normal.
MIN_PAIRS = 50
# Contexts that are remembered, so that each counts once.
MAX_SEEN = 1 << 17
# The bound is tightest after about so many pairs.
TYPICAL_PAIRS = 300


@dataclass(slots=True)
class PairedTest:
    """Differences of the cosines of two versions, new less old.

    It takes the pairs as independent: if they are alike, its error rate is higher.

    Source of the bound: Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, Time-uniform central limit theory and
    asymptotic confidence sequences, 2021, one-sided.
    """

    pairs: int = 0
    _sum: float = 0.0
    _squares: float = 0.0

    def add(self, differences: Iterable[float]) -> None:
        """Take the differences of more pairs."""
        for difference in differences:
            self.pairs += 1
            self._sum += difference
            self._squares += difference * difference

    @property
    def mean(self) -> float:
        """The mean difference; 0 without pairs."""
        return self._sum / max(self.pairs, 1)

    def is_worse_by(self, tolerance: float) -> bool:
        """Return whether the new version is worse by more than `tolerance`, with an error rate of `ERROR_RATE`."""
        return self.pairs >= MIN_PAIRS and self.mean + self._radius() < -tolerance

    def _radius(self) -> float:
        """Return what the true mean exceeds the mean by at no time, but for the error rate."""
        count = self.pairs
        variance = max(self._squares / count - self.mean**2, 0.0) * count / (count - 1)
        log = -2 * math.log(2 * ERROR_RATE)
        # the paper's rho squared, for a bound that is tightest after `TYPICAL_PAIRS`
        scale = (log + math.log(log + 1)) / TYPICAL_PAIRS
        spread = count * scale + 1
        factor = 2 * spread / (count * count * scale) * math.log(1 + math.sqrt(spread) / (2 * ERROR_RATE))
        return math.sqrt(variance * factor)


class PairedScores(VectorBoard):
    """The board of a `Pairing` that keeps the predictions of two versions for the same contexts.

    `add` is called with the differences of their cosines `(p,)`, new less old, and the contexts `(p, T, D)`. Each
    context counts once: callers who repeat a few contexts show no more than these.
    """

    NEW = Author("", "", "new")
    OLD = Author("", "", "old")

    def __init__(self, add: Callable[[Floats, Floats], None]) -> None:
        self._add = add
        self._seen: set[int] = set()

    def identify(self, author: Author) -> int:
        """Return the number of an author: 1 of the new version, 0 of the old one."""
        return int(author == self.NEW)

    def count_kept(self, author: Author, count: int) -> None:
        """Do nothing: only pairs count."""

    def count_scores(self, scored: Scored) -> None:
        """Add the differences of the contexts that both versions predicted."""
        found: defaultdict[int, dict[int, int]] = defaultdict(dict)
        for place, (row, author) in enumerate(zip(scored.rows, scored.authors, strict=True)):
            found[row][author] = place
        both = [
            (places[0], places[1])
            for places in found.values()
            if len(places) == 2 and self._is_new(scored.contexts[places[1]])
        ]
        if both:
            old, new = np.array(both).T
            self._add(scored.cosines[new] - scored.cosines[old], scored.contexts[new])

    def _is_new(self, context: Floats) -> bool:
        """Return whether a context `(T, D)` was not among the last ones; remember it."""
        digest = xxh3_64_intdigest(np.ascontiguousarray(context).data)
        if digest in self._seen:
            return False
        if len(self._seen) >= MAX_SEEN:
            self._seen.clear()
        self._seen.add(digest)
        return True
