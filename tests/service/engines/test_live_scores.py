"""Live scores: a later context of the same reader shows how good a prediction was."""

from __future__ import annotations

import asyncio
import mmap
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from models.evaluate import baselines
from models.vectors import Floats, normalise
from service.engines.authors import MAX_VERSIONS, Author, Authors
from service.engines.live_scores import LiveScores
from service.engines.pairing import DELAY_S, MAX_WAITING, STEP, Pairing
from service.telemetry.metrics import BASELINES, Metrics

T, D = 5, 16
AUTHOR = Author("primary", "amn", "v1")


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Service:
    """Live scores of a process, with the metrics that it counts in."""

    def __init__(
        self, share: float = 1, memory: mmap.mmap | None = None, authors: Callable[[], Iterable[Author]] = tuple
    ) -> None:
        self.clock = Clock()
        memory = memory or mmap.mmap(-1, 1 << 22)
        self.scores = LiveScores(Metrics(), Authors(authors))
        self.pairing = Pairing(memory, share, 60, self.scores, self.clock)

    def answer(self, contexts: Floats, author: Author = AUTHOR) -> None:
        """Predict the mean of each context `(n, T, D)`."""
        self.pairing.add(contexts, contexts.mean(axis=1), author)

    def summary(self) -> dict[str, Any]:
        """Return the scores of all contexts so far."""
        for _ in range(2):
            self.clock.now += 2 * DELAY_S
            self.pairing.flush()
        return self.scores.summary()

    def pairs(self) -> int:
        """Return how many predictions have met their true next vector."""
        return sum(version["pairs"] for version in self.summary()["versions"])


def article(chunks: int = 12, seed: int = 0) -> Floats:
    return normalise(np.random.default_rng(seed).standard_normal((chunks, D)))


def windows(vectors: Floats) -> Floats:
    return np.stack([vectors[start : start + T] for start in range(len(vectors) - T + 1)])


def in_loop(scenario: Callable[[], None]) -> None:
    async def run() -> None:
        scenario()

    asyncio.run(run())


def read(service: Service, contexts: Floats) -> None:
    """Send contexts one by one."""
    for context in contexts:
        service.answer(context[None])


def test_a_reader_of_an_article_shows_the_score_of_every_prediction_but_the_last() -> None:
    def scenario() -> None:
        service = Service()
        contexts = windows(article())
        read(service, contexts)
        summary = service.summary()
        truths = contexts[1:, -1]
        expected = np.vecdot(normalise(contexts[:-1].mean(axis=1)), truths)
        (version,) = summary["versions"]
        assert version["id"] == "amn/v1"
        assert version["pairs"] == len(contexts) - 1
        assert version["cosine"] == pytest.approx(expected.mean(), abs=5e-4)
        assert version["interval"][0] < version["cosine"] < version["interval"][1]
        known = baselines(T, None)
        for name in BASELINES:
            cosine = np.vecdot(normalise(known[name](contexts[:-1])), truths).mean()
            assert version["baselines"][name] == pytest.approx(cosine, abs=5e-4)
        assert summary["aliases"] == {"primary": {"kept": len(contexts), "scored": len(contexts) - 1}}

    in_loop(scenario)


def test_windows_of_one_request_are_paired_in_any_order() -> None:
    def scenario() -> None:
        service = Service()
        service.answer(windows(article())[::-1])
        assert service.pairs() == 7

    in_loop(scenario)


@pytest.mark.parametrize(
    ("contexts", "pairs"),
    [
        (np.repeat(windows(article())[:1], 5, axis=0), 0),
        (np.ones((4, T, D), np.float32), 0),
        (windows(np.tile(article(1), (9, 1))), 0),
        (windows(article())[::2], 0),
        (np.concatenate([windows(article())] * 2), 14),
        (np.concatenate([windows(article())[:5], windows(article())[3:]]), 8),
    ],
    ids=["repeated", "constant", "one vector", "every second", "two readers", "goes back"],
)
def test_a_prediction_is_scored_once_for_each_reader_who_goes_on(contexts: Floats, pairs: int) -> None:
    def scenario() -> None:
        service = Service()
        read(service, contexts)
        assert service.pairs() == pairs

    in_loop(scenario)


def test_two_readers_side_by_side_count_both() -> None:
    def scenario() -> None:
        service = Service()
        read(service, np.repeat(windows(article()), 2, axis=0))
        assert service.pairs() == 14

    in_loop(scenario)


def test_contexts_that_have_nothing_to_do_with_each_other_are_not_paired() -> None:
    def scenario() -> None:
        service = Service()
        draw = np.random.default_rng(0)
        for _ in range(40):
            service.answer(draw.standard_normal((500, T, D)).astype(np.float32))
        assert service.pairs() == 0

    in_loop(scenario)


def test_a_sample_has_both_parts_of_a_pair_or_neither() -> None:
    def scenario() -> None:
        service = Service(share=0.3)
        for seed in range(40):
            read(service, windows(article(30, seed)))
        counts = service.summary()["aliases"]["primary"]
        assert 0.25 < counts["kept"] / (40 * 26) < 0.35
        # the last window of an article has no successor
        assert counts["kept"] - counts["scored"] <= 40

    in_loop(scenario)


def test_processes_that_share_memory_score_each_other() -> None:
    def scenario() -> None:
        memory = mmap.mmap(-1, 1 << 22)
        first, second = (Service(memory=memory, authors=lambda: [AUTHOR]) for _ in range(2))
        contexts = windows(article())
        for place, context in enumerate(contexts):
            (first, second)[place % 2].answer(context[None])
        first.pairing.flush()
        assert second.pairs() + first.pairs() == len(contexts) - 1

    in_loop(scenario)


def test_contexts_of_another_shape_or_of_one_vector_are_left_alone() -> None:
    def scenario() -> None:
        service = Service()
        service.answer(np.ones((3, 1, D), np.float32))
        read(service, windows(article()))
        service.answer(windows(article())[:, :3])
        assert service.pairs() == 7

    in_loop(scenario)


def test_versions_beyond_the_limit_share_a_label() -> None:
    def scenario() -> None:
        service = Service()
        for number in range(MAX_VERSIONS + 5):
            contexts = windows(article(seed=number))
            for context in contexts:
                service.answer(context[None], Author("primary", "amn", f"v{number}"))
        versions = service.summary()["versions"]
        assert len(versions) == MAX_VERSIONS + 1
        assert sum(version["pairs"] for version in versions) == 7 * (MAX_VERSIONS + 5)

    in_loop(scenario)


def test_scores_appear_without_further_requests() -> None:
    async def scenario() -> None:
        metrics = Metrics()
        scores = LiveScores(metrics, Authors())
        pairing = Pairing(mmap.mmap(-1, 1 << 20), 1, 60, scores)
        contexts = windows(article())
        pairing.add(contexts, contexts.mean(axis=1), AUTHOR)
        async with asyncio.timeout(10):
            while not scores.summary()["aliases"].get("primary", {}).get("scored"):
                await asyncio.sleep(0.02)

    asyncio.run(scenario())


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6, 1e9])
def test_the_score_does_not_depend_on_the_length_of_the_vectors(size: float) -> None:
    def scenario() -> None:
        first, second = Service(), Service()
        read(first, windows(article()))
        read(second, windows(article() * np.float32(size)))
        (expected,), (found,) = (each.summary()["versions"] for each in (first, second))
        assert found["cosine"] == pytest.approx(expected["cosine"], abs=1e-3)
        assert found["baselines"] == pytest.approx(expected["baselines"], abs=1e-3)

    in_loop(scenario)


def test_a_true_next_vector_of_zeros_scores_nothing() -> None:
    def scenario() -> None:
        service = Service()
        vectors = article()
        vectors[-1] = 0
        read(service, windows(vectors))
        assert service.pairs() == 6

    in_loop(scenario)


def test_begins_again_if_the_primary_reads_another_shape() -> None:
    def scenario() -> None:
        service = Service()
        read(service, windows(article()))
        service.summary()
        other = np.tile(article(9, seed=3), (1, 2))
        for length in (3, 4):
            for start in range(9 - length + 1):
                service.answer(other[None, start : start + length])
            service.summary()
        assert service.pairs() == 7 + 6 + 5

    in_loop(scenario)


def test_pairs_the_shape_of_the_primary_if_a_fallback_reads_another() -> None:
    def scenario() -> None:
        service = Service()
        fallback = Author("fallback", "gru", "v1")
        wide = windows(np.tile(article(), (1, 2)))
        service.answer(wide[:1], fallback)
        for context, other in zip(windows(article()), wide, strict=True):
            service.answer(context[None])
            service.answer(other[None], fallback)
        assert service.pairs() == 7

    in_loop(scenario)


def test_memory_that_is_too_small_keeps_nothing() -> None:
    def scenario() -> None:
        service = Service(memory=mmap.mmap(-1, 1))
        read(service, windows(article()))
        assert service.pairs() == 0

    in_loop(scenario)


def test_what_waits_keeps_no_request_in_memory() -> None:
    async def scenario() -> None:
        service = Service()
        body = windows(article(3 * STEP))
        request = weakref.ref(body)
        service.answer(body[1:])
        del body
        service.pairing.flush()
        assert request() is None
        assert service.pairs() > 2 * STEP

    asyncio.run(scenario())


def test_one_turn_of_the_event_loop_reads_a_part_of_a_large_request() -> None:
    async def scenario() -> None:
        service = Service()
        service.answer(windows(article(3 * STEP)))
        await asyncio.sleep(0)
        assert service.scores.summary()["aliases"]["primary"]["kept"] == STEP
        for _ in range(4):
            await asyncio.sleep(0)
        assert service.summary()["aliases"]["primary"]["kept"] == 3 * STEP - T + 1

    asyncio.run(scenario())


class BrokenScores(LiveScores):
    """Fails at every answer."""

    def identify(self, author: Author) -> int:
        raise RuntimeError("broken")


def test_a_fault_in_the_scores_breaks_no_answer() -> None:
    async def scenario() -> None:
        pairing = Pairing(mmap.mmap(-1, 1 << 20), 1, 60, BrokenScores(Metrics(), Authors()))
        contexts = windows(article(4 * STEP))
        for _ in range(4):
            pairing.add(contexts, contexts.mean(axis=1), AUTHOR)
            await asyncio.sleep(0)

    asyncio.run(scenario())


def test_versions_that_another_process_has_not_counted_yet_are_left_out() -> None:
    metrics = Metrics()
    metrics.live_distance.labels(*AUTHOR, "net")
    metrics.live_rank.labels("corpus/1", "amn/v1")
    summary = LiveScores(metrics, Authors()).summary()
    assert summary["versions"] == summary["retrieval"] == []
    for name in BASELINES:
        metrics.live_distance.labels(*AUTHOR, name)
    assert LiveScores(metrics, Authors()).summary()["versions"] == []


def test_contexts_are_scored_while_further_answers_keep_coming() -> None:
    async def scenario() -> None:
        service = Service()
        for seed in range(3 * MAX_WAITING // 400):
            for context in windows(article(104, seed)):
                service.answer(context[None])
                await asyncio.sleep(0)
        scored = service.scores.summary()["aliases"]["primary"]["scored"]
        assert scored > MAX_WAITING // 8

    asyncio.run(scenario())
