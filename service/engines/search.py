"""Search: the adapter by which an engine runs a retriever. Queries or contexts in, passages out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from time import perf_counter
from typing import NamedTuple, Self

from lvm.errors import Invalid
from models.registry.alias import Alias
from models.retrieval.filters import BadFilter
from models.retrieval.retriever import MMR_POOL, Hit, Retriever, Search
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
    """The hits of each search of a request, the stages of its batches, what was searched, and the seconds before.

    `queue_s` includes the time that was lost to an external index that did not answer.
    """

    hits: list[list[Hit]]
    stages: Stages
    searched: CorpusInfo
    queue_s: float = 0.0
    degraded: str | None = None  # why the external index, if there is one, was not used
    reranked: bool = False  # whether a reranker ordered the hits

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


Part = tuple[list[Search], float]  # searches of one request, and its deadline
# Searches of a part. More would keep other requests waiting for long, as one search takes up to a millisecond.
PART_SEARCHES = 16
# Candidates that are found, ordered and made hits in about the time of one search for few.
SEARCH_CANDIDATES = 25


class SearchAdapter:
    """Runs one retriever. A request that takes the time of more than `PART_SEARCHES` searches runs in parts."""

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

    async def answer(
        self, searches: list[Search], deadline: float, batcher: MicroBatcher[Part, SearchResult]
    ) -> SearchResult:
        """Return what the searches of one request find; raises `Invalid` if the corpus cannot apply their filter."""
        self.check(searches)
        tickets = await batcher.submit(_parts(searches, deadline), deadline)
        found = tickets[0].answer if len(tickets) == 1 else _joined([ticket.answer for ticket in tickets])
        return found._replace(
            queue_s=tickets[-1].queue_s + found.queue_s, reranked=any(map(self.retriever.is_reranked, searches))
        )

    def check(self, searches: list[Search]) -> None:
        """Raise `Invalid` if the corpus cannot apply the filter, which is the same for all searches of a request."""
        wanted = searches[0].filter
        try:
            if wanted is not None:
                self.retriever.check_filter(wanted)
        except BadFilter as error:
            name = error.field[:100].replace("~", "~0").replace("/", "~1")
            raise Invalid(str(error), pointer=f"/filter/{name}") from error

    def run(self, items: list[Part], watch: Callable[[Floats], None]) -> Sequence[SearchResult]:
        """Return what the searches of each part find."""
        searches = [search for part, _ in items for search in part]
        for search in searches[:SAMPLE]:
            inputs = search.context if search.query is None else search.query[None]
            if inputs is not None:
                watch(inputs[None])
        found = self._find(searches, min([deadline for _, deadline in items]))
        hits = iter(found.hits)
        return [found._replace(hits=list(islice(hits, len(part)))) for part, _ in items]

    def stages(self, result: SearchResult | None, seconds: float) -> Stages:
        """Return the stages of a batch; `result` does not include the wait before the batch yet."""
        if result is None:
            return (("search", seconds),)
        return (("queue", result.queue_s), *result.stages) if result.queue_s else result.stages

    def _find(self, searches: list[Search], deadline: float) -> SearchResult:
        timer = StageTimer()
        hits = self.retriever.search_batch(searches, timer.end)
        return SearchResult(hits, timer.stages, self._searched)


def _parts(searches: list[Search], deadline: float) -> list[tuple[Part, int]]:
    """Return the parts in which a request runs, with the searches of each."""
    parts: list[list[Search]] = [[]]
    cost = 0
    for search in searches:
        candidates = search.k if search.mmr is None else max(search.k, MMR_POOL)
        more = 1 + candidates // SEARCH_CANDIDATES
        if parts[-1] and cost + more > PART_SEARCHES:
            parts.append([])
            cost = 0
        parts[-1].append(search)
        cost += more
    return [((part, deadline), len(part)) for part in parts]


def _joined(parts: list[SearchResult]) -> SearchResult:
    """Return the results of the parts of a request as one: stages add up, and one part may degrade it."""
    stages: dict[str, float] = {}
    for part in parts:
        for stage, seconds in part.stages:
            stages[stage] = stages.get(stage, 0.0) + seconds
    last = parts[-1]
    return last._replace(
        hits=[hits for part in parts for hits in part.hits],
        stages=tuple(stages.items()),
        searched=last.searched._replace(is_exact=all(part.searched.is_exact for part in parts)),
        degraded=next((part.degraded for part in parts if part.degraded), None),
    )


def make_search_engine(model: SearchAdapter, settings: Settings, metrics: Metrics) -> Engine[SearchAdapter]:
    """Return the engine that serves the corpus of `model`."""
    limits = BatchLimits(settings.max_batch, settings.max_queue)
    return Engine(model, limits, metrics, runs_inline=model.runs_inline)
