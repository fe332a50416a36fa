"""A reader's traffic scores what a real server predicts, and is the evidence that a promotion asks for."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from models.registry.registry import Registry
from models.retrieval.corpus import read_corpus
from models.vectors import Floats
from models.windows import windows
from service.deploy.shadow_report import summarize_shadow
from tests.conftest import LVM, PATIENCE_S, Process, until
from tests.fakes import octets_of

CONTEXTS = 150
OCTETS = {"accept": "application/octet-stream"}


def read(http: httpx.Client, contexts: Floats, headers: dict[str, str]) -> Floats:
    """Send contexts one by one, as a reader does; return the predictions."""
    headers = {**octets_of(contexts[:1]), **OCTETS, **headers}
    contents = [context.tobytes() for context in contexts]
    answers = [http.post("/predict", content=content, headers=headers).raise_for_status() for content in contents]
    return np.stack([np.frombuffer(answer.content, np.float32) for answer in answers])


def test_pairs_of_a_reader_score_a_server_and_let_its_candidate_be_promoted(
    shipped: Path, process: Callable[..., Process]
) -> None:
    registry = Registry(shipped)
    candidate = next(version for version in registry.versions() if version.name == "gmn")
    registry.point("candidate", candidate, why="to be compared")
    server = process(LVM_SHADOW_SHARE="1", LVM_TRUTH_SHARE="1")
    data = windows(read_corpus(registry.resolve("retriever").path), 5)
    contexts, truths = data.contexts()[:CONTEXTS], data.targets()[:CONTEXTS]
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
        # what a request declines must not hold for the next one of its connection
        read(http, contexts[::-1], {"x-live-score": "off"})
        predicted = read(http, contexts, {})

    # a window is scored if the next one begins with its last four vectors
    is_scored = [*(np.abs(contexts[:-1, 1:] - contexts[1:, :-1]).max(axis=(1, 2)) == 0), False]
    pairs = sum(is_scored)
    assert pairs > CONTEXTS / 2

    def live() -> dict[str, dict[str, float]]:
        found = httpx.get(f"{server.url}/models", timeout=PATIENCE_S).json()["live"]
        return {version["id"]: version for version in found["versions"]}

    def differences() -> dict[str, dict[str, float]]:
        found = summarize_shadow(httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text)["differences"]
        assert isinstance(found, dict)
        return found

    until(lambda: sum(version["pairs"] for version in live().values()) == pairs, "all pairs")
    (score,) = live().values()
    cosines = np.vecdot(predicted, truths)[is_scored]
    assert score["cosine"] == pytest.approx(cosines.mean(), abs=5e-4)
    until(lambda: differences().get("all", {}).get("pairs", 0) > 30, "pairs of both versions")

    env = {**os.environ, "LVM_REGISTRY": str(registry.root)}
    command = [LVM, "promote", "primary", candidate.id, "--evidence", server.url, "--min-pairs", "30"]
    promoted = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert promoted.returncode == 0, promoted.stderr
    assert registry.resolve("primary") == candidate
    assert "live: cosine" in registry.ledger()[-1].why
