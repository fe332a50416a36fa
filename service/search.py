"""The search engine: one loaded corpus with its batcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from models.retriever import Hit, Search
from service.batching import Batch, MicroBatcher, Ticket
from service.engine import Versioned, identity
from service.metrics import Metrics
from service.settings import Settings


class RetrieverLike(Versioned, Protocol):
    """What a search engine runs: `models.retriever.Retriever`, or a fake of it."""

    @property
    def dim(self) -> int:
        """D."""
        ...

    @property
    def is_exact(self) -> bool:
        """Whether hits are the true top-k."""
        ...

    @property
    def is_quick(self) -> bool:
        """Whether it is sure to end, and a search takes less than the way to a thread and back."""
        ...

    def search_batch(self, searches: list[Search]) -> Sequence[list[Hit]]:
        """Return the hits of each search, in order."""
        ...


class SearchEngine:
    """Serves one retriever; one batch of searches runs at a time."""

    alias = "retriever"

    def __init__(self, retriever: RetrieverLike, settings: Settings, metrics: Metrics) -> None:
        self.retriever = retriever
        self.identity = identity(retriever)
        self._metrics = metrics
        self._rows = metrics.batch_rows.of(self.alias)
        self.batcher: MicroBatcher[Search, list[Hit]] = MicroBatcher(
            retriever.search_batch,
            name=self.alias,
            max_rows=settings.max_batch,
            max_queue=settings.max_queue,
            on_batch=self._observe,
            inline=retriever.is_quick,
        )

    async def search(self, search: Search, deadline: float) -> Ticket[Search, list[Hit]]:
        """Return the ticket of `search` with its hits; raises as `MicroBatcher.submit`."""
        return (await self.batcher.submit([(search, 1)], deadline))[0]

    def _observe(self, batch: Batch) -> None:
        self._rows.observe(batch.rows)
        self._metrics.batch_released.add(self.alias, batch.reason)
