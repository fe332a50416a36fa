"""The shadow compares the answers of the candidate, and no caller notices."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from models.drift import ReferenceStats
from models.registry.alias import Alias
from models.vectors import Floats, normalise
from service.deploy.deployments import Slot
from service.deploy.shadow import MAX_RUNNING, Coherence, Shadow
from service.deploy.shadow_report import summarize_shadow
from service.engines.engine import Deployed, Engine, EngineInfo
from service.engines.pairing import DELAY_S
from service.engines.predict import Prediction
from service.engines.remote import PredictEngine
from service.engines.router import Routed
from service.engines.search import SearchAdapter, make_search_engine
from service.settings import Settings
from service.telemetry.metrics import COHERENCES, Metrics
from tests.conftest import until
from tests.fakes import D, T, contexts, mean_of, retriever
from tests.scraping import scrape


class Candidate:
    """An engine that answers by a function, when it may."""

    def __init__(self, answer: Any = mean_of) -> None:
        self.info = EngineInfo("candidate", "gmn", "v", "0" * 64, "fake", (T, D), "fake")
        self.answer, self.asked = answer, 0
        self.go = asyncio.Event()
        self.go.set()

    async def run(self, batch: Floats, deadline: float) -> Prediction:
        self.asked += len(batch)
        await self.go.wait()
        return Prediction(self.answer(batch), "gmn", "v", 0.0, 0.003, 1)


def answered(batch: Floats, batch_rows: int = 1) -> Routed:
    return Routed(Prediction(mean_of(batch), "amn", "v", 0.0, 0.001, batch_rows), "primary", None)


def shadow(
    candidate: PredictEngine | None, metrics: Metrics, search: Engine[SearchAdapter] | None = None, share: float = 1
) -> Shadow:
    engines = {Alias.CANDIDATE: candidate, Alias.RETRIEVER: search}
    slots = {alias: Slot(engine, Deployed("gmn/v", "now")) for alias, engine in engines.items() if engine}
    return Shadow(slots, share, metrics, draw=lambda: 0.5)


def report(metrics: Metrics) -> dict[str, Any]:
    return summarize_shadow(scrape(metrics)[0].decode())


def test_compares_and_reports_answers() -> None:
    async def scenario() -> None:
        metrics = Metrics()
        engine = make_search_engine(SearchAdapter(retriever()), Settings(), metrics)
        made = shadow(Candidate(), metrics, engine)
        for seed in range(3):
            batch = contexts(4, seed)
            made.maybe_compare(batch, answered(batch))
        await made.wait()
        found = report(metrics)
        assert found["requests"] == {"compared": 3, "skipped": 0, "failed": 0}
        assert found["cosine"] == pytest.approx(1, abs=1e-6)
        assert found["overlap"] == 1
        assert found["extra_seconds"] == pytest.approx(0.002)

    asyncio.run(scenario())


def test_reports_how_far_answers_differ() -> None:
    async def scenario() -> None:
        metrics = Metrics()
        made = shadow(Candidate(lambda batch: -mean_of(batch)), metrics)
        made.maybe_compare(contexts(), answered(contexts(), batch_rows=7))
        await made.wait()
        found = report(metrics)
        assert found["cosine"] == pytest.approx(-1, abs=1e-6)
        assert found["cosine_p10"] == 0
        assert found["overlap"] is None, "there is no corpus"
        assert found["extra_seconds"] is None, "the answer came in a batch of seven"

    asyncio.run(scenario())


def test_counts_errors_of_the_candidate_and_no_more() -> None:
    def breaks(batch: Floats) -> Floats:
        raise RuntimeError("no kernel")

    async def scenario() -> None:
        metrics = Metrics()
        made = shadow(Candidate(breaks), metrics)
        made.maybe_compare(contexts(), answered(contexts()))
        await made.wait()
        assert report(metrics)["requests"] == {"compared": 0, "skipped": 0, "failed": 1}

    asyncio.run(scenario())


def test_skips_comparisons_while_many_run() -> None:
    async def scenario() -> None:
        metrics, candidate = Metrics(), Candidate()
        candidate.go.clear()
        made = shadow(candidate, metrics)
        for _ in range(MAX_RUNNING + 5):
            made.maybe_compare(contexts(), answered(contexts()))
        candidate.go.set()
        await made.wait()
        assert candidate.asked == MAX_RUNNING
        assert report(metrics)["requests"] == {"compared": MAX_RUNNING, "skipped": 5, "failed": 0}

    asyncio.run(scenario())


@pytest.mark.parametrize("why", ["no candidate", "another shape", "not sampled"])
def test_asks_only_a_candidate_of_the_same_shape_for_sampled_requests(why: str) -> None:
    async def scenario() -> None:
        metrics, candidate = Metrics(), Candidate()
        if why == "another shape":
            candidate.info = replace(candidate.info, shape=(T, D + 1))
        made = shadow(None if why == "no candidate" else candidate, metrics, share=0.5 if why == "not sampled" else 1)
        made.maybe_compare(contexts(), answered(contexts()))
        await made.wait()
        assert candidate.asked == 0
        assert report(metrics) == {
            "requests": {"compared": 0, "skipped": 0, "failed": 0},
            "cosine": None, "overlap": None, "extra_seconds": None, "cosine_p10": None,
            "differences": {},
        }  # fmt: skip

    asyncio.run(scenario())


def test_a_service_shadows_its_candidate_until_the_alias_is_removed(serve: Any, tmp_path: Any) -> None:
    server = serve(shadow_share=1)
    registry = server.app.state.deployments.registry
    registry.point("candidate", registry.resolve("fallback"), why="maybe")
    until(lambda: "candidate" in server.http.get("/models").json()["aliases"], "the candidate to be loaded")
    answer = server.http.post("/predict", json={"context": contexts()[0].tolist()})
    assert answer.json()["served_by"] == "primary"
    until(lambda: server.metric("lvm_shadow_total", outcome="compared") == 1, "the comparison")
    (registry.root / "candidate").unlink()
    until(lambda: "candidate" not in server.http.get("/models").json()["aliases"], "the candidate to be let go")
    assert server.http.post("/predict", json={"context": contexts()[0].tolist()}).status_code == 200
    assert server.metric("lvm_shadow_total", outcome="compared") == 1


@pytest.mark.parametrize("reader", ["lets it", "declines"])
def test_later_contexts_show_whether_the_candidate_is_nearer(serve: Any, reader: str) -> None:
    """The primary answers the mean, the candidate the first vector of the context, which is further away."""
    server = serve(shadow_share=1, gru=lambda batch: batch[:, 0])
    registry = server.app.state.deployments.registry
    registry.point("candidate", registry.resolve("fallback"), why="maybe")
    until(lambda: "candidate" in server.http.get("/models").json()["aliases"], "the candidate to be loaded")
    draw = np.random.default_rng(0)
    headers = {"X-Live-Score": "off"} if reader == "declines" else {}
    for _ in range(12):
        article = normalise(draw.standard_normal(D) + 0.5 * draw.standard_normal((T + 6, D)))
        for start in range(7):
            body = {"context": article[start : start + T].tolist()}
            server.http.post("/predict", json=body, headers=headers).raise_for_status()
            compared = 1 + server.metric("lvm_shadow_total", outcome="compared")

    def shown() -> Any:
        return summarize_shadow(server.http.get("/metrics").text)["differences"]

    if reader == "declines":
        time.sleep(2 * DELAY_S)
        assert shown() == {}
        return
    assert compared > 20
    until(lambda: shown().get("all", {"pairs": 0})["pairs"] >= 20, "the true next vectors")
    found = shown()
    low, high = found["all"]["interval"]
    assert low < found["all"]["mean"] < high < 0
    assert found["all"]["pairs"] == sum(found[level]["pairs"] for level in found.keys() - {"all"})


def test_coherence_is_a_third_of_what_the_net_was_trained_on() -> None:
    draw = np.random.default_rng(0)
    batch = normalise(draw.standard_normal((3000, 1, D)) + draw.standard_normal((3000, T, D)))
    levels = Coherence(ReferenceStats.from_contexts(batch[:500])).levels(batch)
    counts = [levels.count(level) / 3000 for level in COHERENCES]
    assert counts == pytest.approx([1 / 3] * 3, abs=0.07)
    assert set(Coherence(None).levels(batch)) == {"middle"}
