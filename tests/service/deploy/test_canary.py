"""The canary: what a version does in its first minute decides, and nothing else."""

from __future__ import annotations

import asyncio
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.vectors import Floats, normalise
from service.deploy.canary import (
    COMPARE_EVERY_S,
    MIN_BATCHES,
    MIN_COMPARISONS,
    MIN_FAILURES,
    Canary,
)
from service.engines.pairing import DELAY_S
from service.engines.predict import Prediction
from service.engines.stats import EngineStats
from service.settings import Settings
from tests.fakes import contexts, mean_of

BATCH = st.tuples(st.integers(1, 128), st.floats(1e-5, 1))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def stats(answered: int = 0, failed: int = 0, batches: list[tuple[int, float]] | None = None) -> EngineStats:
    made = EngineStats()
    made.answered, made.failed = answered, failed
    for rows, seconds in batches or []:
        made.add_batch(rows, seconds)
    return made


def fault(new: EngineStats, incumbent: EngineStats | None = None, **settings: float) -> str:
    return Canary(new, incumbent or EngineStats(), Settings(**settings)).fault() or ""  # type: ignore[arg-type]


def prediction(vectors: Floats) -> Prediction:
    return Prediction(vectors, "amn", "v", 0, 0, len(vectors))


async def answers(canary: Canary, clock: Clock, count: int, sign: int) -> None:
    """Have the incumbent answer the mean to `count` contexts, and the canary `sign` times that."""

    async def incumbent(batch: Floats, deadline: float) -> Prediction:
        return prediction(2 * mean_of(batch))

    for _ in range(count):
        clock.now += COMPARE_EVERY_S
        canary.comparer.maybe_compare(incumbent, contexts(), prediction(sign * mean_of(contexts())))
        await canary.comparer.wait()


@given(st.lists(BATCH, min_size=1, max_size=200))
def test_latency_is_the_95th_percentile_by_batch_size(batches: list[tuple[int, float]]) -> None:
    for doubling, pace in stats(batches=batches).latency_by_size().items():
        seconds = sorted(s for rows, s in batches if rows.bit_length() == doubling)
        assert pace.batches == len(seconds)
        assert pace.seconds == pytest.approx(seconds[math.ceil(0.95 * len(seconds)) - 1], rel=0.06)


@given(st.lists(BATCH, max_size=200), st.integers(0, 1000), st.integers(0, 10))
def test_keeps_a_version_like_the_incumbent(batches: list[tuple[int, float]], ok: int, bad: int) -> None:
    assert not fault(stats(ok + 200, bad, batches), stats(ok, bad, batches))


@pytest.mark.parametrize(
    ("answered", "failed", "falls"),
    [(0, MIN_FAILURES, True), (0, MIN_FAILURES - 1, False), (94, 6, True), (95, 5, False), (10**6, 0, False)],
)
def test_rejects_too_many_failures(answered: int, failed: int, falls: bool) -> None:
    assert ("LVM_WATCH_ERRORS is 0.05" in fault(stats(answered, failed))) is falls


@pytest.mark.parametrize(("times", "falls"), [(3.5, False), (4.5, True)])
def test_rejects_slower_batches_of_the_same_size(times: float, falls: bool) -> None:
    old = stats(batches=[(1, 0.010)] * MIN_BATCHES + [(100, 0.050)] * MIN_BATCHES)
    new = stats(batches=[(1, 0.010 * times)] * MIN_BATCHES + [(100, 0.050 * times)] * MIN_BATCHES)
    assert ("LVM_WATCH_SLOWER is 4" in fault(new, old)) is falls


def test_larger_batches_are_not_slower_ones() -> None:
    old = stats(batches=[(1, 0.010)] * MIN_BATCHES * 9 + [(100, 0.500)] * MIN_BATCHES)
    assert not fault(stats(batches=[(100, 0.500)] * MIN_BATCHES), old)
    assert not fault(stats(batches=[(64, 9.0)] * MIN_BATCHES), stats(batches=[(1, 0.010)] * MIN_BATCHES)), (
        "the incumbent had no such batches"
    )


def test_quicker_than_the_least_objective_is_quick_enough() -> None:
    old, new = stats(batches=[(1, 0.0001)] * MIN_BATCHES), stats(batches=[(1, 0.010)] * MIN_BATCHES)
    assert not fault(new, old)
    assert fault(new, old, slo_ms=(1,)), "1 ms is the least objective, and 10 ms is ten times that"


def test_a_few_slow_batches_prove_nothing() -> None:
    old = stats(batches=[(1, 0.010)] * 100)
    assert not fault(stats(batches=[(1, 0.010)] * 96 + [(1, 5.0)] * 4), old)
    assert not fault(stats(batches=[(1, 1.0)] * (MIN_BATCHES - 1)), old), "too few"


def test_rejects_answers_unlike_the_incumbents() -> None:
    async def scenario() -> None:
        clock = Clock()
        canary = Canary(EngineStats(), EngineStats(), Settings(), clock)
        await answers(canary, clock, MIN_COMPARISONS - 1, sign=-1)
        assert canary.fault() is None, "too few"
        await answers(canary, clock, 1, sign=-1)
        assert "mean cosine -1.000" in str(canary.fault())
        await answers(canary, clock, MIN_COMPARISONS * 19, sign=1)
        assert canary.fault() is None

    asyncio.run(scenario())


def test_the_window_ends_by_the_clock() -> None:
    clock = Clock()
    canary = Canary(EngineStats(), EngineStats(), Settings(watch_s=60), clock)
    clock.now += 59
    assert not canary.is_over
    clock.now += 1
    assert canary.is_over


def test_the_verdict_is_the_first_fault_or_none_at_the_end() -> None:
    async def scenario() -> None:
        clock, new = Clock(), stats()
        waiting = asyncio.create_task(Canary(new, EngineStats(), Settings(watch_s=60), clock).verdict(0.001))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        new.failed = MIN_FAILURES
        assert "LVM_WATCH_ERRORS" in str(await waiting)
        passing = Canary(stats(), EngineStats(), Settings(watch_s=60), clock)
        clock.now += 60
        assert await passing.verdict(0.001) is None

    asyncio.run(scenario())


def test_asks_the_incumbent_one_context_at_a_time_and_not_too_often() -> None:
    async def scenario() -> None:
        clock, asked, go = Clock(), list[int](), asyncio.Event()

        async def incumbent(batch: Floats, deadline: float) -> Prediction:
            asked.append(len(batch))
            await go.wait()
            return prediction(mean_of(batch))

        comparer = Canary(EngineStats(), EngineStats(), Settings(), clock).comparer
        batch = contexts(4)
        for _ in range(3):
            comparer.maybe_compare(incumbent, batch, prediction(mean_of(batch)))
            await asyncio.sleep(0)
            clock.now += COMPARE_EVERY_S
        assert asked == [1], "it has not answered the first yet"
        go.set()
        await comparer.wait()
        for _ in range(3):
            comparer.maybe_compare(incumbent, batch, prediction(mean_of(batch)))
            await comparer.wait()
        assert asked == [1, 1]

    asyncio.run(scenario())


async def reads(canary: Canary, clock: Clock, articles: int, noise: float) -> None:
    """Have readers go through articles; the canary answers the mean and `noise`, the incumbent the mean."""
    draw = np.random.default_rng(0)

    async def incumbent(batch: Floats, deadline: float) -> Prediction:
        return prediction(mean_of(batch))

    for _ in range(articles):
        topic = draw.standard_normal(64)
        article = normalise(topic + 0.5 * draw.standard_normal((9, 64)))
        for start in range(5):
            clock.now += COMPARE_EVERY_S
            context = article[None, start : start + 5]
            away = noise * normalise(draw.standard_normal((1, 64)))
            canary.observe(incumbent, context, prediction(normalise(mean_of(context) + away)))
            await canary.comparer.wait()
    # what arrived waits for so long
    clock.now += 2 * DELAY_S
    canary.flush()
    canary.flush()


@pytest.mark.parametrize(("noise", "falls"), [(0.0, False), (0.02, False), (0.5, True)])
def test_falls_if_the_next_contexts_show_worse_predictions(noise: float, falls: bool) -> None:
    async def scenario() -> str:
        clock = Clock()
        canary = Canary(EngineStats(), EngineStats(), Settings(watch_agreement=-1), clock)
        await reads(canary, clock, 40, noise)
        return canary.fault() or ""

    fault = asyncio.run(scenario())
    assert bool(fault) == falls
    if falls:
        assert re.search(r"true next vectors 0\.\d+ below the incumbent's on \d+ contexts, LVM_WATCH_WORSE is", fault)
