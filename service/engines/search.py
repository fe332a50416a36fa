"""The search engine: one loaded corpus with its batcher."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import perf_counter
from typing import NamedTuple, Protocol, Self

from models.drift import ReferenceStats
from models.registry.alias import Alias
from models.retrieval.article_index import ArticleIndex
from models.retrieval.corpus import Passages
from models.retrieval.index import VectorIndex
from models.retrieval.milvus import IndexUnavailable
from models.retrieval.retriever import Hit, Search
from service.engines.batcher import Batch, MicroBatcher
from service.engines.drift import ROWS, Guard
from service.engines.engine import Versioned, identity
from service.engines.external_index import IndexStore, RemoteLike
from service.engines.stats import Conduct, is_telling
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import StageTimes, export_remote_spans


class RetrieverLike(Versioned, Protocol):
    """What a search engine runs: `models.retrieval.retriever.Retriever`, or a fake of it."""

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

    @property
    def reference_stats(self) -> ReferenceStats | None:
        """The space of its vectors, None where that is not known."""
        ...

    @property
    def corpus(self) -> Passages:
        """Its passages."""
        ...

    @property
    def article_index(self) -> ArticleIndex:
        """The articles of its corpus."""
        ...

    @property
    def query_maker(self) -> tuple[str, str] | None:
        """Name and version of what makes queries of contexts, or None where a predictor must."""
        ...

    @property
    def reranks(self) -> bool:
        """Whether hits for a context can be reranked."""
        ...

    @property
    def indexes(self) -> Mapping[str, VectorIndex]:
        """What it searches, by name."""
        ...

    def with_indexes(self, indexes: Mapping[str, VectorIndex]) -> RemoteLike:
        """Return a retriever of the same passages that searches `indexes` instead of its own."""
        ...

    def search_batch(self, searches: list[Search], lap: Callable[[str], None]) -> Sequence[list[Hit]]:
        """Return the hits of each search, in order; call `lap` with the name of each stage as it ends."""
        ...


Asked = tuple[Search, float]  # and until when, on the monotonic clock


class Searched(NamedTuple):
    """What was searched: name and version of a corpus, what makes its queries, and where it lies, of several places."""

    name: str
    version: str
    is_exact: bool
    query_maker: tuple[str, str] | None
    replica: str = ""

    @classmethod
    def of(cls, retriever: RetrieverLike) -> Self:
        """Return what a retriever searches."""
        return cls(retriever.name, retriever.version, retriever.is_exact, retriever.query_maker)


class Found(NamedTuple):
    """The hits of one search, the seconds of the stages of its batch, what was searched, and the seconds until then.

    Those hold what was spent on a store in vain.
    """

    hits: list[Hit]
    stages: tuple[tuple[str, float], ...]
    searched: Searched
    queue_s: float = 0.0
    degraded: str | None = None  # why it was searched here and not in the store, where there is one

    @property
    def infer_s(self) -> float:
        """Seconds that the batch ran."""
        return sum(seconds for _, seconds in self.stages)


class Stopwatch:
    """Notes the seconds since the last lap."""

    def __init__(self) -> None:
        self._since = perf_counter()
        self.stages: tuple[tuple[str, float], ...] = ()

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = perf_counter()
        self.stages = (*self.stages, (stage, now - self._since))
        self._since = now


Ask = Callable[[Search, float], Awaitable[Found]]


class SearchEngine:
    """Serves one retriever; one batch of searches runs at a time, in `index_store` first where there is one.

    Where there is an `ask`, that searches, elsewhere.
    """

    alias = Alias.RETRIEVER

    def __init__(
        self,
        retriever: RetrieverLike,
        settings: Settings,
        metrics: Metrics,
        index_store: IndexStore | None = None,
        ask: Ask | None = None,
    ) -> None:
        self.retriever, self.index_store = retriever, index_store
        self.identity = identity(retriever)
        self._metrics = metrics
        self._rows = metrics.batch_rows.labels(self.alias)
        self.shape = (retriever.card.context_length, retriever.dim)
        self.guard = Guard(retriever.reference_stats, self.alias, metrics) if retriever.reference_stats else None
        self.conduct = Conduct()
        self._searched, self._ask = Searched.of(retriever), ask
        self.batcher: MicroBatcher[Asked, Found] = MicroBatcher(
            self._run,
            name=self.alias,
            max_rows=settings.max_batch,
            max_queue=settings.max_queue,
            on_batch=self._observe,
            inline=ask is not None or (retriever.is_quick and index_store is None),
            laps=_laps,
        )

    async def search(self, search: Search, deadline: float) -> Found:
        """Return what `search` finds; raises as `MicroBatcher.submit`, or as the `ask` does."""
        try:
            found = await self._search(search, deadline)
        except Exception as error:
            self.conduct.failed += is_telling(error, patient=False)
            raise
        self.conduct.answered += 1
        return found

    async def _search(self, search: Search, deadline: float) -> Found:
        if self._ask is None:
            ticket = (await self.batcher.submit([((search, deadline), 1)], deadline))[0]
            return ticket.answer._replace(queue_s=ticket.queue_s + ticket.answer.queue_s)
        found = await self._ask(search, deadline)
        export_remote_spans(self.alias, found.queue_s, found.stages)
        return found

    def _run(self, asked: list[Asked]) -> list[Found]:
        searches = [search for search, _ in asked]
        if self.guard:
            self._guard(self.guard, searches)
        if self.index_store is None:
            return self._run_here(searches)
        began, watch = perf_counter(), Stopwatch()
        try:
            each = self.index_store.search_batch(searches, min([deadline for _, deadline in asked]), watch.lap)
        except IndexUnavailable as error:
            return self._run_here(searches, error.reason, perf_counter() - began)
        searched = self._searched._replace(is_exact=self.index_store.remote.is_exact)
        return [Found(hits, watch.stages, searched) for hits in each]

    def _run_here(self, searches: list[Search], degraded: str | None = None, waited_s: float = 0.0) -> list[Found]:
        watch = Stopwatch()
        each = self.retriever.search_batch(searches, watch.lap)
        return [Found(hits, watch.stages, self._searched, waited_s, degraded) for hits in each]

    def _guard(self, guard: Guard, searches: list[Search]) -> None:
        for search in searches[:ROWS]:
            asked = search.context if search.query is None else search.query[None]
            if asked is not None:
                guard.watch(asked[None])

    def _observe(self, batch: Batch) -> None:
        self._rows.observe(batch.rows)
        self._metrics.batch_released.inc(self.alias, batch.reason)


def _laps(found: Found | None, seconds: float) -> StageTimes:
    """Return what the seconds of a batch went into; its searches have not been told yet what they waited before it."""
    if found is None:
        return (("search", seconds),)
    return (("queue", found.queue_s), *found.stages) if found.queue_s else found.stages
