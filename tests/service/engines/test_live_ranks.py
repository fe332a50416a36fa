"""Live ranks: a later context shows at which place a search had the passage that came next."""

from __future__ import annotations

import asyncio
import mmap

import numpy as np
import pytest

from lvm.errors import Overloaded
from models.retrieval.corpus import Chunk
from models.retrieval.retriever import Hit
from models.vectors import Floats, normalise
from service.engines.authors import Author, Authors
from service.engines.live_ranks import Found, LiveRanks
from service.engines.live_scores import LiveScores
from service.engines.pairing import DELAY_S, Pairing
from service.telemetry.metrics import Metrics

T, D = 5, 16
CORPUS = "wiki/1"
AUTHOR = Author("retriever", CORPUS, "amn/v1")
VECTORS = normalise(np.random.default_rng(0).standard_normal((20, D)))


class Corpus:
    """The passages of `VECTORS`, as version `name`."""

    def __init__(self, name: str = CORPUS, error: Exception | None = None) -> None:
        self.name = name
        self.error = error

    async def find(self, vectors: Floats) -> Found:
        if self.error:
            raise self.error
        return Found(self.name, np.argmax(vectors @ VECTORS.T, axis=1).tolist())


def summary(corpus: Corpus, place: int) -> list[dict[str, object]]:
    """Return what is counted if a reader reads `VECTORS`, and each search has the next passage at `place`."""

    async def scenario() -> None:
        now = [0.0]
        pairing = Pairing(mmap.mmap(-1, 1 << 20), 1, 60, LiveRanks(metrics, Authors(), corpus.find), lambda: now[0])
        for start in range(len(VECTORS) - T + 1):
            answer = [*range(100, 99 + place), start + T, *range(200, 250)]
            hits = [Hit(row, 0.0, Chunk(1, "One", row, "text")) for row in answer]
            pairing.add(VECTORS[None, start : start + T], [hits], AUTHOR)
        now[0] += DELAY_S
        pairing.flush()
        await asyncio.sleep(0.01)

    metrics = Metrics()
    asyncio.run(scenario())
    found: list[dict[str, object]] = LiveScores(metrics, Authors()).summary()["retrieval"]
    return found


@pytest.mark.parametrize("place", [1, 3, 10])
def test_counts_at_which_place_the_next_passage_was(place: int) -> None:
    (found,) = summary(Corpus(), place)
    assert found["id"] == CORPUS
    assert found["pairs"] == len(VECTORS) - T
    assert found["MRR"] == pytest.approx(1 / place)
    assert (found["R@1"], found["R@5"]) == (float(place == 1), float(place <= 5))


def test_answers_of_a_corpus_that_was_replaced_meanwhile_do_not_count() -> None:
    assert summary(Corpus("wiki/2"), 1) == []


def test_a_corpus_that_is_overloaded_counts_nothing_and_logs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert summary(Corpus(error=Overloaded("full")), 1) == []
    assert "failed" not in "".join(capfd.readouterr())
