"""Search in an external index (Milvus) first, and in the version's own index if the external one fails."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, perf_counter

from models.retrieval.milvus import IndexUnavailable, MilvusCollection
from models.retrieval.retriever import Hit, Retriever, Search
from service.engines.breaker import Breaker
from service.engines.search import SearchAdapter, SearchResult, StageTimer
from service.settings import Settings
from service.telemetry.log import logger

MIN_SHARE = 0.4  # of a full wait: a failure after less would prove nothing, and cost the connection all the same


class ExternalSearchAdapter(SearchAdapter):
    """Searches a corpus in an external index, behind a circuit breaker, and falls back to its own index.

    `retriever` has its own indexes. Those of `external`, a retriever of the same corpus, are in the collection `build`.
    """

    def __init__(
        self,
        retriever: Retriever,
        external: Retriever,
        build: MilvusCollection,
        settings: Settings,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        super().__init__(retriever)
        self.runs_inline = False
        self.breaker: Breaker = Breaker(
            settings.breaker_failures, settings.breaker_window, settings.breaker_hold_s, clock
        )
        self._external = external
        self._build = build
        self._clock = clock
        self._timeout_s = settings.milvus_timeout_ms / 1000
        self._share = settings.primary_share
        self._min_s = MIN_SHARE * min(self._timeout_s, settings.timeout_ms / 1000 * self._share)
        self._failure: type[IndexUnavailable] | None = None  # of the last search there

    def _find(self, searches: list[Search], deadline: float) -> SearchResult:
        began = perf_counter()
        timer = StageTimer()
        try:
            hits = self._find_externally(searches, deadline, timer)
        except IndexUnavailable as error:
            waited_s = perf_counter() - began
            return super()._find(searches, deadline)._replace(queue_s=waited_s, degraded=error.reason)
        searched = self._searched._replace(is_exact=self._external.is_exact)
        return SearchResult(hits, timer.stages, searched)

    def _find_externally(self, searches: list[Search], deadline: float, timer: StageTimer) -> list[list[Hit]]:
        """Return the hits of each search; the external index gets its share of the time until `deadline`.

        Raises:
            IndexUnavailable: it did not answer in that time, the time is too short to ask, or the breaker is open.
        """
        timeout_s = min(self._timeout_s, (deadline - self._clock()) * self._share)
        if timeout_s < self._min_s:
            raise IndexUnavailable("too little of the time limit is left to ask Milvus")
        token = self.breaker.allow()
        if token is None:
            raise (self._failure or IndexUnavailable)("the breaker is open")
        self._build.set_timeout(timeout_s)
        answers = self._build.answers
        try:
            hits = self._external.search_batch(searches, timer.end)
        except IndexUnavailable as error:
            self._log(error)
            self.breaker.record(token, ok=False)
            raise
        except BaseException:
            self.breaker.release(token)
            raise
        # A filter of few rows is searched here: that says nothing about the external index.
        if self._build.answers == answers:
            self.breaker.release(token)
            return hits
        self._log(None)
        self.breaker.record(token, ok=True)
        return hits

    def _log(self, failure: IndexUnavailable | None) -> None:
        """Log once when the external index fails, and once when it is back."""
        if failure and self._failure is None:
            logger().warning("index store away", reason=str(failure))
        elif self._failure and failure is None:
            logger().info("index store back")
        self._failure = type(failure) if failure else None
