"""Live scores: how near the predictions are to the true next vectors, by alias and version."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from models.evaluate import baselines
from service.engines.authors import Author, Authors
from service.engines.vector_board import Scored, VectorBoard, cosines
from service.telemetry.metrics import BASELINES, DISTANCES, NET, RANKS, Metrics


class LiveScores(VectorBoard):
    """Counts the scores of predictions in `metrics`, by alias and version, beside those of the baselines."""

    def __init__(self, metrics: Metrics, authors: Authors) -> None:
        self._metrics = metrics
        self._authors = authors

    def identify(self, author: Author) -> int:
        """Return the number of an author."""
        return self._authors.identify(author)

    def count_kept(self, author: Author, count: int) -> None:
        """Count predictions that wait for their true next vectors."""
        self._metrics.live_predictions.add(count, author.alias, "kept")

    def count_scores(self, scored: Scored) -> None:
        """Count scores. Those of an author that this process does not know are left out."""
        known = baselines(scored.contexts.shape[1], None)
        beside = [cosines(known[name](scored.contexts), scored.truths) for name in BASELINES]
        distances = np.maximum(1 - np.stack([scored.cosines, *beside]), 0)
        numbers = np.array(scored.authors)
        for number in dict.fromkeys(scored.authors):
            if author := self._authors.find(number):
                chosen = distances[:, numbers == number]
                for name, values in zip((NET, *BASELINES), chosen.tolist(), strict=True):
                    self._metrics.live_distance.labels(*author, name).observe(*values)
                self._metrics.live_predictions.add(chosen.shape[1], author.alias, "scored")

    def summary(self) -> dict[str, Any]:
        """Return the live scores of all processes, for JSON.

        The interval holds the mean cosine of a version with 95 % confidence, if windows are independent.
        """
        counted = self._metrics
        distances, predictions, ranks, reciprocals = counted.totals(
            counted.live_distance, counted.live_predictions, counted.live_rank, counted.live_reciprocal_rank
        )
        return {
            # another process may have made some of the histograms of a version, and counted nothing yet
            "versions": [
                _version(author, distances)
                for author in dict.fromkeys(key[:3] for key in distances)
                if all(sum(distances.get((*author, name), ())[:-1]) for name in (NET, *BASELINES))
            ],
            "retrieval": [
                {"id": corpus, "query": query, **_ranks(numbers, reciprocals[corpus, query])}
                for (corpus, query), numbers in ranks.items()
                if sum(numbers[:-1]) and (corpus, query) in reciprocals
            ],
            "aliases": _by_alias(predictions),
        }


def _version(author: tuple[str, ...], distances: Mapping[tuple[str, ...], Sequence[float]]) -> dict[str, Any]:
    known = {name: 1 - _mean(distances[*author, name]) for name in BASELINES}
    figures = _figures(distances[*author, NET])
    margin = figures["cosine"] - max(known.values())
    return {"alias": author[0], "id": "/".join(author[1:]), **figures, "margin": margin, "baselines": known}


def _mean(numbers: Sequence[float]) -> float:
    *counts, total = numbers
    return total / max(sum(counts), 1)


def _figures(numbers: Sequence[float]) -> dict[str, Any]:
    """Return the count, the mean and its 95 % interval of the cosines, by the numbers of a histogram of distances."""
    counts = np.array(numbers[:-1])
    pairs = float(counts.sum())
    mean = 1 - _mean(numbers)
    # the middle of each bucket
    width = DISTANCES[1] - DISTANCES[0]
    middles = 1 - (np.array([*DISTANCES, DISTANCES[-1] + width]) - width / 2)
    variance = float(counts @ (middles - mean) ** 2) / max(pairs - 1, 1)
    half = 1.96 * math.sqrt(variance / pairs)
    return {"pairs": int(pairs), "cosine": mean, "interval": [mean - half, mean + half]}


def _ranks(numbers: Sequence[float], reciprocals: Sequence[float]) -> dict[str, Any]:
    """Return R@k and MRR of the numbers of the histograms of ranks and their reciprocals."""
    counts = list(accumulate(numbers[:-1]))
    recalls = {f"R@{rank:g}": count / counts[-1] for rank, count in zip(RANKS, counts, strict=False)}
    return {"pairs": int(counts[-1]), **recalls, "MRR": _mean(reciprocals)}


def _by_alias(predictions: Mapping[tuple[str, ...], float]) -> dict[str, dict[str, int]]:
    found: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for (alias, outcome), count in predictions.items():
        found[str(alias)][outcome] = int(count)
    return found
