"""The index store: where else a corpus is searched, behind a breaker; while it is away, `search.py` searches here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Protocol

from models.retrieval.milvus import IndexUnavailable
from models.retrieval.retriever import Hit, Search
from service.engines.breaker import Breaker
from service.settings import Settings
from service.telemetry.log import logger

LEAST = 0.4  # share of a full wait, below which a failure would tell nothing, and cost the connection all the same


class BuildLike(Protocol):
    """A version's vectors in a store: `models.retrieval.milvus.MilvusCollection`, or a fake of it."""

    def set_timeout(self, seconds: float) -> None:
        """Let all that is asked until the next call of this take so many seconds together."""
        ...


class RemoteLike(Protocol):
    """A retriever whose indexes are in the store."""

    @property
    def is_exact(self) -> bool:
        """Whether hits are the true top-k."""
        ...

    def search_batch(self, searches: list[Search], lap: Callable[[str], None]) -> Sequence[list[Hit]]:
        """Return the hits of each search, as `models.retrieval.retriever.Retriever`; raises `IndexUnavailable`."""
        ...


class IndexStore:
    """Searches a version's corpus in the store, in the search engine's thread, while the breaker trusts it."""

    def __init__(
        self, remote: RemoteLike, build: BuildLike, settings: Settings, clock: Callable[[], float] = monotonic
    ) -> None:
        self.remote, self._build, self._clock = remote, build, clock
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_window, settings.breaker_hold_s, clock)
        self._timeout_s, self._share = settings.milvus_timeout_ms / 1000, settings.primary_share
        self._least_s = LEAST * min(self._timeout_s, settings.timeout_ms / 1000 * self._share)
        self._away: type[IndexUnavailable] | None = None

    def search_batch(self, searches: list[Search], until: float, lap: Callable[[str], None]) -> Sequence[list[Hit]]:
        """Return the hits of each search; `until`, on the clock, the most hurried of them wants its answer.

        Raises:
            IndexUnavailable: there was none in its share of the time, that is too short to ask, or the store failed
                too often and is left alone.
        """
        patience = min(self._timeout_s, (until - self._clock()) * self._share)
        if patience < self._least_s:
            raise IndexUnavailable("no time to ask")
        token = self.breaker.allow()
        if token is None:
            raise (self._away or IndexUnavailable)("left alone for a while")
        self._build.set_timeout(patience)
        try:
            hits = self.remote.search_batch(searches, lap)
        except IndexUnavailable as error:
            self._note(error)
            self.breaker.record(token, ok=False)
            raise
        except BaseException:
            self.breaker.forget(token)
            raise
        self._note(None)
        self.breaker.record(token, ok=True)
        return hits

    def _note(self, away: IndexUnavailable | None) -> None:
        """Say once that the store is away, and once that it is back."""
        if away and self._away is None:
            logger().warning("index store away", reason=str(away))
        elif self._away and away is None:
            logger().info("index store back")
        self._away = type(away) if away else None
