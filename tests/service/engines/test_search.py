"""A search or prediction in another process: the answer says what made it, and where."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import pytest

from lvm.errors import Overloaded
from models.retrieval.retriever import Hit, Search
from models.vectors import Floats
from service.app import create_app
from service.engines.engine import Deployed, EngineInfo
from service.engines.predict import Prediction
from service.engines.remote import EngineSet, RemoteEngine, RemoteSearchAdapter
from service.engines.search import CorpusInfo, SearchResult, make_search_engine
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Span, Tracer, current_span
from tests.conftest import running
from tests.fakes import D, FakeLoader, T, contexts, corpus, mean_of, registry_of, retriever

INFO = EngineInfo("primary", "amn", "1", "0" * 64, "fake", (T, D), "fake")
SEARCHED = CorpusInfo("elsewhere", "20270101-000000000000", True, None, "shelf-7")


class Provider:
    """Provides a net and a search, whose queue is full if `k` is 2."""

    async def open(self, set_remote_engines: Callable[[EngineSet], None]) -> None:
        engines = {"primary": RemoteEngine(INFO, self.predict)}
        set_remote_engines(EngineSet(engines, {"primary": Deployed("amn/1", "now")}, self.search))

    async def close(self) -> None:
        return

    async def predict(self, asked: Floats, deadline: float) -> Prediction:
        return Prediction(mean_of(asked), "amn", "2", 0.125, 0.25, len(asked), "shelf-3")

    async def search(self, searches: list[Search], deadline: float) -> SearchResult:
        if searches[0].k == 2:
            raise Overloaded("all read", retry_after=7)
        return SearchResult([[Hit(4, 0.5, corpus().chunk(4))]], (("search", 0.25),), SEARCHED, 0.125)


def test_a_remote_search_names_its_replica_and_passes_on_errors(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, primary="amn", retriever="corpus")
    settings = Settings(registry=registry.root)
    with running(create_app(settings, FakeLoader(amn=mean_of), provider=Provider()), settings) as server:
        found = server.http.post("/retrieve", json={"query": [1.0] * D, "k": 1})
        refused = server.http.post("/retrieve", json={"query": [1.0] * D, "k": 2})
    body = found.json()
    assert (body["corpus"], body["corpus_version"], [hit["id"] for hit in body["results"]]) == (*SEARCHED[:2], [4])
    assert body["timing_ms"] | {"decode": 0} == {"decode": 0, "queue": 125.0, "search": 250.0}
    assert found.headers["x-replica"] == "shelf-7"
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "7")


def test_does_not_connect_to_an_external_index_if_the_search_is_remote(tmp_path: Path) -> None:
    """The breaker of a connection without use would mislead."""
    registry = registry_of(tmp_path, primary="amn", retriever="corpus")
    settings, connected = Settings(registry=registry.root), list[object]()
    loaders = FakeLoader(amn=mean_of, search_model=connected.append)
    with running(create_app(settings, loaders, provider=Provider()), settings) as server:
        assert server.http.post("/retrieve", json={"query": [1.0] * D, "k": 1}).status_code == 200
    assert connected == []


def test_a_remote_prediction_names_its_version_and_replica(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, primary="amn", retriever="corpus")
    settings = Settings(registry=registry.root)
    with running(create_app(settings, FakeLoader(amn=mean_of), provider=Provider()), settings) as server:
        made = server.http.post("/predict", json={"context": contexts()[0].tolist()})
    assert (made.headers["x-model-version"], made.headers["x-replica"]) == ("2", "shelf-3")


def test_traces_the_wait_and_the_run_of_a_remote_engine() -> None:
    """The batch runs in another process, which knows of no trace."""

    async def scenario() -> None:
        spans, provider = list[Span](), Provider()
        engine = make_search_engine(RemoteSearchAdapter(retriever(), provider.search), Settings(), Metrics())
        await RemoteEngine(INFO, provider.predict).run(contexts(), monotonic() + 9)
        current_span.set(Tracer(spans.append, share=1).start(None))
        await RemoteEngine(INFO, provider.predict).run(contexts(), monotonic() + 9)
        await engine.run([Search(contexts()[0, 0], 1)], monotonic() + 9)
        assert [(span.name, span.attributes["lvm.engine"]) for span in spans] == [
            ("queue", "primary"), ("infer", "primary"), ("queue", "retriever"), ("search", "retriever"),
        ]  # fmt: skip
        lasted = [(span.end_ns - span.start_ns) / 1e9 for span in spans]
        assert lasted == pytest.approx([0.125, 0.25, 0.125, 0.25])
        assert [span.start_ns for span in spans[1::2]] == [span.end_ns for span in spans[::2]]

    asyncio.run(scenario())
