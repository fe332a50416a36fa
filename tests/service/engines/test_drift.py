"""The drift detector warns within a hundred requests, and never fails a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from models.drift import ReferenceStats
from models.vectors import Floats
from service.engines.drift import BLOCK, MIN_ALIGNMENT, DriftDetector
from service.telemetry.metrics import Metrics
from tests.conftest import Running
from tests.fakes import D, T, corpus

Serve = Callable[..., Running]
OCTETS = {"content-type": "application/octet-stream"}


def around(direction: int, count: int, seed: int) -> Floats:
    """Return contexts `(count, T, D)` that point, by and large, along one axis."""
    noise = 0.1 * np.random.default_rng(seed).standard_normal((count, T, D))
    vectors = np.eye(D)[direction] + noise
    unit: Floats = (vectors / np.linalg.norm(vectors, axis=2, keepdims=True)).astype(np.float32)
    return unit


def detector() -> DriftDetector:
    return DriftDetector(ReferenceStats.from_contexts(around(0, 64, seed=0)), "primary", Metrics())


def watched(*contexts: Floats) -> DriftDetector:
    made = detector()
    for context in contexts:
        for row in context:
            made.watch(row[None])
    return made


def test_does_not_warn_about_inputs_of_the_reference() -> None:
    made = watched(around(0, 100, seed=1))
    assert made.drift
    assert made.warning() is None


@pytest.mark.parametrize(
    ("foreign", "told"),
    [(2 * around(0, 2 * BLOCK, seed=2), "unit length"), (around(3, 2 * BLOCK, seed=3), "another encoder")],
)
def test_warns_within_a_hundred_requests_and_stops_when_inputs_are_right(foreign: Floats, told: str) -> None:
    made = watched(around(0, 70, seed=1), foreign)
    assert len(foreign) < 100
    assert told in str(made.warning())
    for row in around(0, 2 * BLOCK, seed=4):
        made.watch(row[None])
    assert made.warning() is None


def test_shows_the_warning_in_metrics_and_models(serve: Serve) -> None:
    server = serve()
    for vector in corpus().vectors.repeat(5, axis=0):
        query = (5 * vector).tobytes()
        assert server.http.post("/retrieve?k=1", content=query, headers=OCTETS).status_code == 200
    body = server.http.get("/models").json()
    assert "unit length" in body["aliases"]["retriever"]["warning"]
    assert body["aliases"]["primary"]["warning"] is None
    assert server.http.get("/metrics").status_code == 200
    assert server.metric("lvm_input_drift", engine="retriever", figure="norm") > 100
    assert server.metric("lvm_input_norm_count", engine="retriever") == 100
    limits = {"norm": 2, "neighbour_cosine": 2, "alignment": MIN_ALIGNMENT}
    assert {figure: server.metric("lvm_input_drift_limit", figure=figure) for figure in limits} == limits


@pytest.mark.parametrize(("policy", "status"), [("accept", 200), ("normalise", 200), ("refuse", 422)])
def test_the_norm_policy_decides_what_becomes_of_lengths(serve: Serve, policy: str, status: int) -> None:
    server = serve(norm_policy=policy)
    context = around(0, 1, seed=5)[0]
    stretched = context.copy()
    stretched[3] *= 2
    for body in ({"context": stretched.tolist()}, {"contexts": [context.tolist(), stretched.tolist()]}):
        answer = server.http.post("/predict", json=body)
        assert answer.status_code == status
        if status == 422:
            assert answer.json()["pointer"] == ("/context/3" if "context" in body else "/contexts/1/3")
    assert server.http.post("/predict", json={"context": context.tolist()}).status_code == 200
    alone = server.http.post("/predict", content=stretched.tobytes(), headers=OCTETS)
    plain = server.http.post("/predict", content=context.tobytes(), headers=OCTETS)
    if policy != "refuse":
        same: Any = np.allclose(alone.json()["vector"], plain.json()["vector"], atol=1e-5)
        assert same == (policy == "normalise")


def test_rejects_zero_vectors_if_it_must_normalise(serve: Serve) -> None:
    answer = serve(norm_policy="normalise").http.post("/predict", json={"context": [[0.0] * D] * T})
    assert (answer.status_code, answer.json()["pointer"]) == (422, "/context/0")
