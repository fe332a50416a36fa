"""Live scores: how near the predictions are to the true next vectors, by alias and version."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from models.evaluate import baselines
from service.engines.pairing import Author, Scored, cosines
from service.telemetry.metrics import BASELINES, LIVE_COSINES, Metrics

# Versions of an alias that have scores of their own in one process; further ones share a label.
MAX_VERSIONS = 16
OTHER = "other"


class LiveScores:
    """Counts the scores of predictions in `metrics`, by alias and version, beside those of the baselines.

    `authors` returns who predicts now, in any process that shares the memory of the predictions.
    """

    def __init__(self, metrics: Metrics, authors: Callable[[], Iterable[Author]] = tuple) -> None:
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

    def count(self, scored: Scored) -> None:
        """Count scores. Those of an author that this process does not know are left out."""
        known = baselines(scored.contexts.shape[1], None)
        by_baseline = np.stack([cosines(known[name](scored.contexts), scored.truths) for name in BASELINES])
        self._baseline_sums += by_baseline.sum(axis=1)
        margins = scored.cosines - by_baseline[self._baseline_sums.argmax()]
        for name, values in zip(BASELINES, by_baseline.tolist(), strict=True):
            self._metrics.live_baseline_cosine.labels(name).observe(*values)
        for number, cosine, margin in zip(scored.authors, scored.cosines.tolist(), margins.tolist(), strict=True):
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
