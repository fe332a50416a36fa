"""Search: the adapter by which an engine runs a retriever. Queries or contexts in, passages out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple, Self

from models.registry.alias import Alias
from models.retrieval.retriever import Hit, Retriever, Search
from models.vectors import Floats
from service.engines.batcher import BatchLimits, MicroBatcher
from service.engines.breaker import Breaker
from service.engines.drift import SAMPLE
from service.engines.engine import Engine, EngineInfo, Stages
from service.settings import Settings
from service.telemetry.metrics import Metrics


class CorpusInfo(NamedTuple):
    """The corpus that was searched: its name and version, what makes its queries of contexts, and the replica."""

    name: str
    version: str
    is_exact: bool
    query_maker: tuple[str, str] | None
    replica: str = ""  # that searched, if there are several

    @classmethod
    def of(cls, retriever: Retriever) -> Self:
        """Return what a retriever searches."""
        return cls(retriever.name, retriever.version, retriever.is_exact, retriever.query_maker)


class SearchResult(NamedTuple):
    """The hits of one search, the stages of its batch, what was searched, and the seconds before the batch.

    `queue_s` includes the time that was lost to an external index that did not answer.
    """

    hits: list[Hit]
    stages: Stages
    searched: CorpusInfo
    queue_s: float = 0.0
    degraded: str | None = None  # why the external index, if there is one, was not used

    @property
    def infer_s(self) -> float:
        """Seconds that the batch ran."""
        return sum(seconds for _, seconds in self.stages)


class StageTimer:
    """Takes the seconds of one stage after another."""

    def __init__(self) -> None:
        self._since = perf_counter()
        self.stages: Stages = ()

    def end(self, stage: str) -> None:
        """End a stage; the next one begins."""
        now = perf_counter()
        self.stages = (*self.stages, (stage, now - self._since))
        self._since = now


Query = tuple[Search, float]  # a search and its deadline


class SearchAdapter:
    """Runs one retriever."""

    breaker: Breaker | None = None  # of an external index

    def __init__(self, retriever: Retriever) -> None:
        card = retriever.card
        shape = card.context_length, retriever.dim
        self.info = EngineInfo(
            Alias.RETRIEVER, retriever.name, retriever.version, retriever.sha256, retriever.runtime, shape, card.encoder
        )
        self.retriever = retriever
        self.runs_inline = retriever.runs_inline
        self.reference = retriever.reference_stats
        self._searched = CorpusInfo.of(retriever)

    async def answer(self, search: Search, deadline: float, batcher: MicroBatcher[Query, SearchResult]) -> SearchResult:
        """Return what `search` finds."""
        (ticket,) = await batcher.submit([((search, deadline), 1)], deadline)
        return ticket.answer._replace(queue_s=ticket.queue_s + ticket.answer.queue_s)

    def run(self, items: list[Query], watch: Callable[[Floats], None]) -> Sequence[SearchResult]:
        """Return what each search finds."""
        searches = [search for search, _ in items]
        for search in searches[:SAMPLE]:
            inputs = search.context if search.query is None else search.query[None]
            if inputs is not None:
                watch(inputs[None])
        return self._find(searches, min([deadline for _, deadline in items]))

    def stages(self, result: SearchResult | None, seconds: float) -> Stages:
        """Return the stages of a batch; `result` does not include the wait before the batch yet."""
        if result is None:
            return (("search", seconds),)
        return (("queue", result.queue_s), *result.stages) if result.queue_s else result.stages

    def _find(self, searches: list[Search], deadline: float) -> list[SearchResult]:
        timer = StageTimer()
        each = self.retriever.search_batch(searches, timer.end)
        return [SearchResult(hits, timer.stages, self._searched) for hits in each]


def make_search_engine(model: SearchAdapter, settings: Settings, metrics: Metrics) -> Engine[SearchAdapter]:
    """Return the engine that serves the corpus of `model`."""
    limits = BatchLimits(settings.max_batch, settings.max_queue)
    return Engine(model, limits, metrics, runs_inline=model.runs_inline)
