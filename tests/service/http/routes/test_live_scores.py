"""Live scores over HTTP: predictions are scored by the contexts that follow, unless the caller declines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from models.vectors import Floats
from tests.conftest import Running, until
from tests.fakes import D, T, corpus, octets_of

Start = Callable[..., Running]
CHUNKS = 9
PAIRS = CHUNKS - T


@pytest.fixture
def windows() -> Floats:
    """The contexts of an article, in order."""
    vectors = np.random.default_rng(0).standard_normal((CHUNKS, D)).astype("<f4")
    return np.stack([vectors[start : start + T] for start in range(CHUNKS - T + 1)])


def send_json(http: httpx.Client, context: Floats, **headers: str) -> None:
    http.post("/predict", json={"context": context.tolist()}, headers=headers).raise_for_status()


def send_octets(http: httpx.Client, context: Floats, **headers: str) -> None:
    http.post("/predict", content=context.tobytes(), headers=octets_of(context) | headers).raise_for_status()


def send_tensor(http: httpx.Client, context: Floats, **headers: str) -> None:
    tensor = {"name": "context", "shape": [1, T, D], "datatype": "FP32", "data": context.ravel().tolist()}
    http.post("/v2/models/primary/infer", json={"inputs": [tensor]}, headers=headers).raise_for_status()


def live(http: httpx.Client) -> Any:
    return http.get("/models").json()["live"]


def scored(http: httpx.Client, alias: str = "primary") -> int:
    found: int = live(http)["aliases"].get(alias, {}).get("scored", 0)
    return found


@pytest.mark.parametrize("send", [send_json, send_octets, send_tensor])
def test_every_wire_is_scored(serve: Start, windows: Floats, send: Callable[..., None]) -> None:
    http = serve(truth_share=1).http
    for context in windows:
        send(http, context)
    until(lambda: scored(http) == PAIRS, "scores")
    (version,) = live(http)["versions"]
    assert version["alias"] == "primary"
    assert version["id"].startswith("amn/")
    assert version["interval"][0] <= version["cosine"] <= version["interval"][1]


def test_a_context_in_json_shows_the_score_of_one_in_octets(serve: Start, windows: Floats) -> None:
    http = serve(truth_share=1).http
    for place, context in enumerate(windows):
        (send_json, send_octets)[place % 2](http, context)
    until(lambda: scored(http) == PAIRS, "scores")


def test_a_fallback_is_scored_as_itself(serve: Start, windows: Floats) -> None:
    http = serve(truth_share=1).http
    for context in windows:
        http.post("/predict", json={"context": context.tolist(), "model": "gru"}).raise_for_status()
    until(lambda: scored(http, "fallback") == PAIRS, "scores")


def test_nothing_of_a_request_that_declines_is_kept(serve: Start, windows: Floats) -> None:
    http = serve(truth_share=1).http
    for context in windows:
        send_octets(http, context, **{"X-Live-Score": "off"})
    for context in windows[:2]:
        send_octets(http, context, **{"X-Live-Score": "on"})
    until(lambda: scored(http) == 1, "a score")
    assert live(http)["aliases"]["primary"]["kept"] == 2


def test_rejects_an_unknown_wish(serve: Start, windows: Floats) -> None:
    http = serve().http
    answer = http.post("/predict", json={"context": windows[0].tolist()}, headers={"X-Live-Score": "no"})
    assert answer.status_code == 422
    assert "X-Live-Score" in answer.json()["detail"]


def test_is_absent_if_nothing_is_sampled(serve: Start, windows: Floats) -> None:
    http = serve(truth_share=0).http
    send_json(http, windows[0])
    assert live(http) is None


def test_scores_appear_in_a_scrape(serve: Start, windows: Floats) -> None:
    http = serve(truth_share=1).http
    for context in windows:
        send_octets(http, context)
    until(lambda: scored(http) == PAIRS, "scores")
    lines = http.get("/metrics").text.splitlines()
    assert f'lvm_live_coverage{{alias="primary"}} {PAIRS / len(windows)!r}' in lines
    (count,) = [line for line in lines if line.startswith("lvm_live_distance_count") and "weighted_mean" in line]
    assert count.endswith(f" {PAIRS}")


@pytest.fixture
def passages() -> Floats:
    """The passages of an article of the corpus, as contexts in order."""
    vectors = corpus().vectors[:CHUNKS].astype("<f4")
    return np.stack([vectors[start : start + T] for start in range(CHUNKS - T + 1)])


def retrieve(http: httpx.Client, context: Floats, **options: Any) -> list[int]:
    answer = http.post("/retrieve", json={"context": context.tolist(), **options}).raise_for_status()
    return [hit["id"] for hit in answer.json()["results"]]


def test_searches_are_scored_by_the_passage_that_came_next(serve: Start, passages: Floats) -> None:
    http = serve(truth_share=1).http
    found = [retrieve(http, context, k=8) for context in passages]
    until(lambda: scored(http, "retriever") == PAIRS, "ranks")
    (ranks,) = live(http)["retrieval"]
    places = [hits.index(T + start) + 1 if T + start in hits else None for start, hits in enumerate(found[:-1])]
    assert ranks["pairs"] == PAIRS
    assert ranks["R@5"] == pytest.approx(np.mean([place is not None and place <= 5 for place in places]))
    assert ranks["MRR"] == pytest.approx(np.mean([1 / place if place else 0 for place in places]))


@pytest.mark.parametrize("options", [{"k": 2}, {"filter": {"article": [0, 1]}}, {"exclude": [3]}, {"mmr": 0.5}])
def test_searches_with_options_that_change_the_ranks_are_not_scored(
    serve: Start, passages: Floats, options: dict[str, Any]
) -> None:
    http = serve(truth_share=1).http
    for context in passages:
        retrieve(http, context, **options)
    for context in passages[:2]:
        retrieve(http, context)
    until(lambda: scored(http, "retriever") == 1, "a rank")
    assert live(http)["aliases"]["retriever"]["kept"] == 2


def test_what_the_corpus_does_not_hold_is_not_counted(serve: Start, windows: Floats, passages: Floats) -> None:
    http = serve(truth_share=1).http
    for context in [*windows, *passages[:2]]:
        retrieve(http, context)
    until(lambda: scored(http, "retriever") == 1, "a rank")
    assert live(http)["aliases"]["retriever"]["kept"] == len(windows) + 2
