"""Remote engines: the seam between a process that decodes requests and one that runs models.

A `RemoteEngine` is called as an `Engine` is. How the request gets to the model is the `EngineProvider`'s business: over
the socket of the device worker (`service/processes/device_client.py`), or by Ray (`service/ray/`). Batching, the drift
detector, the canary and loading are where the model is; breakers and fallbacks are on this side. An answer names the
version that made it, which may be newer than the one that was called.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from models.retrieval.retriever import Retriever, Search
from models.vectors import Floats
from service.engines.batcher import MicroBatcher
from service.engines.engine import Deployed, Engine, EngineInfo
from service.engines.predict import PredictAdapter, Prediction
from service.engines.search import SearchAdapter, SearchResult
from service.telemetry.tracing import export_remote_spans

RemotePredict = Callable[[Floats, float], Awaitable[Prediction]]  # contexts `(n, T, D)`, deadline
RemoteSearch = Callable[[list[Search], float], Awaitable[SearchResult]]  # searches, deadline


@dataclass(frozen=True)
class RemoteEngine:
    """An engine whose model runs in another process.

    `predict` answers, or raises `Unavailable` or `Expired`, by its deadline on the monotonic clock, whatever happens to
    the other process; if its caller is cancelled, so is the request there.
    """

    info: EngineInfo
    predict: RemotePredict

    async def run(self, contexts: Floats, deadline: float) -> Prediction:
        """Return the next vectors of contexts `(n, T, D)`; raises as `predict` does."""
        prediction = await self.predict(contexts, deadline)
        export_remote_spans(self.info.alias, prediction.queue_s, (("infer", prediction.infer_s),))
        return prediction

    def warning(self) -> str | None:
        """Return what is wrong with the last inputs, or None."""
        return self.info.warning


PredictEngine = Engine[PredictAdapter] | RemoteEngine


class RemoteSearchAdapter(SearchAdapter):
    """Searches a corpus in another process; what else is asked of the corpus, `retriever` answers here."""

    def __init__(self, retriever: Retriever, search: RemoteSearch) -> None:
        super().__init__(retriever)
        self.runs_inline = True  # nothing is ever batched here
        self._search = search

    async def answer(self, searches: list[Search], deadline: float, batcher: MicroBatcher[Any, Any]) -> SearchResult:
        """Return what the searches of one request find there; raises as `SearchAdapter.answer`."""
        self.check(searches)
        found = await self._search(searches, deadline)
        export_remote_spans(self.info.alias, found.queue_s, found.stages)
        return found


class EngineSet(NamedTuple):
    """The remote engines by alias, `candidate` included, and since when each serves; empty while out of reach.

    `search` searches the corpus in another process, if there is one; it is the same in every set of a provider.
    """

    engines: Mapping[str, RemoteEngine]
    deployed: Mapping[str, Deployed]
    search: RemoteSearch | None = None


class EngineProvider(Protocol):
    """Supplies remote engines (`create_app(..., provider=)`)."""

    async def open(self, set_remote_engines: Callable[[EngineSet], None]) -> None:
        """Call `set_remote_engines` now and after every change; return after the first call.

        A call comes before any answer of a new engine.
        """
        ...

    async def close(self) -> None:
        """Close, when every request is answered."""
        ...
