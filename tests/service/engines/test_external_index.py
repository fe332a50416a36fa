"""While the external index is away, searches fall back to the own index, and say so."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, sleep
from typing import Any

import httpx
import pytest

from models.retrieval.milvus import IndexUnavailable, NotPushed
from models.retrieval.retriever import Search
from service.engines.external_index import ExternalSearchAdapter
from service.engines.search import SearchResult
from service.settings import Settings
from tests.conftest import Running, until
from tests.fakes import FakeBuild, T, bundle, contexts, corpus, raises, retriever

CONTEXT = corpus().vectors[2 : 2 + T].tolist()
QUERY = corpus().vectors[3].tolist()
Serve = Callable[..., Running]


class Clock:
    """A clock that a test turns."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def model_of(build: FakeBuild, clock: Callable[[], float] = monotonic, **settings: Any) -> ExternalSearchAdapter:
    return build.search_model(retriever(), Settings(**settings), clock=clock)


def search(model: ExternalSearchAdapter, deadline: float = 1e9) -> SearchResult:
    (found,) = model.run([([Search(contexts(1)[0][0], 3)], deadline)], lambda inputs: None)
    assert len(found.hits[0]) == 3
    return found


def test_opens_the_breaker_of_an_index_that_keeps_failing_then_probes_it() -> None:
    """One probe is enough: no restart."""
    clock, build = Clock(), FakeBuild()
    model = model_of(build, clock, breaker_failures=3, breaker_hold_s=5)
    build.fault = NotPushed("no collection")
    assert [search(model).degraded for _ in range(9)] == ["index_stale"] * 9
    assert (len(build.asked), model.breaker.state) == (3, "open")
    build.fault = None
    assert search(model).degraded == "index_stale"
    clock.now += 5
    assert search(model).degraded is None
    assert (len(build.asked), model.breaker.state) == (4, "closed")


def test_waits_no_longer_than_the_share_of_the_shortest_deadline() -> None:
    """The rest is for the search in the own index."""
    clock, build = Clock(), FakeBuild()
    model = model_of(build, clock, milvus_timeout_ms=250, primary_share=0.5)
    search(model, deadline=clock.now + 2)
    search(model, deadline=clock.now + 0.3)
    assert build.seconds == [0.25, pytest.approx(0.15)]


def test_a_short_deadline_does_not_open_the_breaker() -> None:
    """The index is not asked, and its connection stays. A wait that is long enough counts."""
    clock = Clock()

    class Slow(FakeBuild):
        def find(self, *asked: Any) -> list[list[int]]:
            clock.now += self.seconds[-1]
            raise IndexUnavailable("slow")

    for milliseconds, left_s, asked in ((250, 0.1, 0), (250, 2.0, 1), (5000, 1.0, 1)):
        build = Slow()
        model = model_of(build, clock, breaker_failures=1, milvus_timeout_ms=milliseconds)
        assert search(model, deadline=clock.now + left_s).degraded == "index_away"
        assert (len(build.seconds), model.breaker.state) == (asked, "open" if asked else "closed")


@pytest.fixture
def build() -> FakeBuild:
    return FakeBuild()


@pytest.fixture
def server(serve: Serve, build: FakeBuild) -> Running:
    settings = Settings(breaker_failures=2, breaker_hold_s=0.1)
    return serve(corpus=bundle, search_model=lambda known: build.search_model(known, settings))


def retrieve(server: Running, **body: Any) -> httpx.Response:
    return server.http.post("/retrieve", json=body)


def marks(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    return answer.status_code, answer.json().get("fallback_reason"), answer.headers.get("x-fallback-reason")


@pytest.mark.parametrize("body", [{"context": CONTEXT}, {"query": QUERY}, {"context": CONTEXT, "model": "amn"}])
def test_answers_are_the_same_while_the_index_is_away_and_say_so(
    server: Running, build: FakeBuild, body: dict[str, Any]
) -> None:
    """In body, header and metrics; never a 503; and no longer once it is back."""
    well = retrieve(server, **body, k=4)
    build.fault = IndexUnavailable("gone")
    away = [retrieve(server, **body, k=4) for _ in range(6)]
    assert marks(well) == (200, None, None)
    assert {marks(answer) for answer in away} == {(200, "index_away", "index_away")}
    assert all(answer.json()["results"] == well.json()["results"] for answer in away)
    assert server.metric("lvm_fallbacks_total", reason="index_away") == 6
    assert server.metric("lvm_requests_total", route="/retrieve", outcome="fallback") == 6
    build.fault = None
    until(lambda: marks(retrieve(server, **body)) == (200, None, None), "the index to be asked again")
    assert server.http.get("/models").json()["aliases"]["retriever"]["breaker"] == "closed"


def test_counts_a_vain_wait_for_the_index_as_queue(serve: Serve) -> None:
    """Otherwise the stages of a slow answer would not add up to it."""

    class Slow(FakeBuild):
        def find(self, *asked: Any) -> list[list[int]]:
            sleep(0.05)
            raise IndexUnavailable("slow")

    server = serve(corpus=bundle, search_model=lambda known: Slow().search_model(known, Settings()))
    assert retrieve(server, context=CONTEXT).json()["timing_ms"]["queue"] > 45


def test_gives_the_reason_of_the_net_before_that_of_the_index(serve: Serve, build: FakeBuild) -> None:
    """An answer has one reason; the net's may change the answer."""
    build.fault = IndexUnavailable("gone")
    server = serve(amn=raises, search_model=lambda known: build.search_model(known, Settings()))
    answer = retrieve(server, context=CONTEXT)
    assert marks(answer) == (200, "model_failed", "model_failed")
    assert server.metric("lvm_fallbacks_total", reason="index_away") == 1


def test_shows_the_open_breaker_in_the_metrics(server: Running, build: FakeBuild) -> None:
    """As the breaker of the retriever."""
    build.fault = IndexUnavailable("gone")
    for _ in range(2):
        retrieve(server, query=QUERY)
    server.http.get("/metrics")
    assert server.metric("lvm_breaker_open", engine="retriever") > 0
