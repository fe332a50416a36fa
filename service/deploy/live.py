"""Live: keeps predictions and searches of one process until later contexts show what came next, and scores them."""

from __future__ import annotations

from mmap import mmap
from time import monotonic
from typing import Any

from models.retrieval.retriever import SAME_COSINE, Search
from models.vectors import Floats
from service.deploy.deployments import Deployments
from service.engines.authors import Author, Authors
from service.engines.live_ranks import Found, LiveRanks
from service.engines.live_scores import LiveScores
from service.engines.pairing import Pairing
from service.settings import Settings
from service.telemetry.metrics import Metrics

# Searches are kept in a share of the memory: an answer takes less of it than a prediction.
SEARCH_SHARE = 8
TIMEOUT_S = 5.0


class Live:
    """The pairing of predictions, and that of searches.

    `memory` is shared with other processes, or None.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, deployments: Deployments, memory: mmap | None = None
    ) -> None:
        self._deployments = deployments
        self._scores = LiveScores(metrics, Authors(self._predictors))
        ranks = LiveRanks(metrics, Authors(), self._find)
        block = memoryview(memory or mmap(-1, round(settings.truth_mb * 1e6)))
        size = len(block) // SEARCH_SHARE
        self.predictions = Pairing(block[size:], settings.truth_share, settings.truth_s, self._scores)
        self.searches = Pairing(block[:size], settings.truth_share, settings.truth_s, ranks)

    def summary(self) -> dict[str, Any]:
        """Return the scores of all processes, for JSON."""
        return self._scores.summary()

    def _predictors(self) -> list[Author]:
        infos = [engine.info for engine in self._deployments.engines.values()]
        return [Author(info.alias, info.name, info.version) for info in infos]

    async def _find(self, vectors: Floats) -> Found:
        """Return the row of the passage that has each of the vectors `(m, D)`; None if the corpus holds none."""
        engine = self._deployments.retriever_engine
        if engine is None or engine.info.shape[1] != vectors.shape[1]:
            return Found("", [None] * len(vectors))
        found = await engine.run([Search(vector, 1) for vector in vectors], monotonic() + TIMEOUT_S)
        rows = [hits[0].row if hits and hits[0].score >= SAME_COSINE else None for hits in found.hits]
        return Found(f"{found.searched.name}/{found.searched.version}", rows)
