"""While the store is away, callers are answered from here, and told so; nobody waits for it twice."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, sleep
from typing import Any

import httpx
import pytest

from models.retrieval.milvus import IndexUnavailable, NotPushed
from models.retrieval.retriever import Hit, Search
from service.engines.external_index import IndexStore
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


def store_of(build: FakeBuild, clock: Callable[[], float] = monotonic, **settings: Any) -> IndexStore:
    return build.within_reach_of(retriever(), Settings(**settings), clock=clock)


def search(store: IndexStore, until: float = 1e9) -> list[Hit]:
    return store.search_batch([Search(contexts(1)[0][0], 3)], until, lambda stage: None)[0]


def fails(store: IndexStore, until: float = 1e9) -> str:
    with pytest.raises(IndexUnavailable) as caught:
        search(store, until)
    return caught.value.reason


def test_a_store_that_keeps_failing_is_left_alone_until_the_hold_is_over_then_probed() -> None:
    """One probe finds it back: no restart."""
    clock, build = Clock(), FakeBuild()
    store = store_of(build, clock, breaker_failures=3, breaker_hold_s=5)
    build.fault = NotPushed("no collection")
    assert [fails(store) for _ in range(9)] == ["index_stale"] * 9
    assert (len(build.asked), store.breaker.state) == (3, "open")
    build.fault = None
    assert fails(store) == "index_stale"
    clock.now += 5
    assert len(search(store)) == 3
    assert (len(build.asked), store.breaker.state) == (4, "closed")


def test_it_waits_no_longer_than_the_share_of_the_most_hurried_caller() -> None:
    """The other share is for the search here."""
    clock, build = Clock(), FakeBuild()
    store = store_of(build, clock, milvus_timeout_ms=250, primary_share=0.5)
    search(store, until=clock.now + 2)
    search(store, until=clock.now + 0.3)
    assert build.seconds == [0.25, pytest.approx(0.15)]


def test_a_caller_in_a_hurry_turns_the_store_off_for_nobody() -> None:
    """It is not asked, and its connection stays. A wait worth the name counts, also one that began behind another's."""
    clock = Clock()

    class Slow(FakeBuild):
        def find(self, *asked: Any) -> list[list[int]]:
            clock.now += self.seconds[-1]
            raise IndexUnavailable("slow")

    for milliseconds, left_s, asked in ((250, 0.1, 0), (250, 2.0, 1), (5000, 1.0, 1)):
        build = Slow()
        store = store_of(build, clock, breaker_failures=1, milvus_timeout_ms=milliseconds)
        fails(store, until=clock.now + left_s)
        assert (len(build.seconds), store.breaker.state) == (asked, "open" if asked else "closed")


@pytest.fixture
def build() -> FakeBuild:
    return FakeBuild()


@pytest.fixture
def server(serve: Serve, build: FakeBuild) -> Running:
    settings = Settings(breaker_failures=2, breaker_hold_s=0.1)
    return serve(corpus=bundle, index_store=lambda known: build.within_reach_of(known, settings))


def retrieve(server: Running, **body: Any) -> httpx.Response:
    return server.http.post("/retrieve", json=body)


def marks(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    return answer.status_code, answer.json().get("fallback_reason"), answer.headers.get("x-fallback-reason")


@pytest.mark.parametrize("body", [{"context": CONTEXT}, {"query": QUERY}, {"context": CONTEXT, "model": "amn"}])
def test_while_the_store_is_away_answers_are_the_same_and_marked(
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
    until(lambda: marks(retrieve(server, **body)) == (200, None, None), "the store to be asked again")
    assert server.http.get("/models").json()["aliases"]["retriever"]["breaker"] == "closed"


def test_a_wait_for_the_store_in_vain_is_told_as_queue(serve: Serve) -> None:
    """Else the stages of a slow answer would not add up to it."""

    class Slow(FakeBuild):
        def find(self, *asked: Any) -> list[list[int]]:
            sleep(0.05)
            raise IndexUnavailable("slow")

    server = serve(corpus=bundle, index_store=lambda known: Slow().within_reach_of(known, Settings()))
    assert retrieve(server, context=CONTEXT).json()["timing_ms"]["queue"] > 45


def test_a_net_that_fell_back_says_so_first(serve: Serve, build: FakeBuild) -> None:
    """One reason is told, the net's: the answer may differ by it."""
    build.fault = IndexUnavailable("gone")
    server = serve(amn=raises, index_store=lambda known: build.within_reach_of(known, Settings()))
    answer = retrieve(server, context=CONTEXT)
    assert marks(answer) == (200, "model_failed", "model_failed")
    assert server.metric("lvm_fallbacks_total", reason="index_away") == 1


def test_a_breaker_that_is_open_shows_in_the_metrics(server: Running, build: FakeBuild) -> None:
    """As that of the retriever."""
    build.fault = IndexUnavailable("gone")
    for _ in range(2):
        retrieve(server, query=QUERY)
    server.http.get("/metrics")
    assert server.metric("lvm_breaker_open", engine="retriever") > 0
