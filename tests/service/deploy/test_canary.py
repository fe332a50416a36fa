"""Probation: what a version does in its first minute decides, and nothing that is not its doing."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.vectors import Floats
from service.deploy.canary import (
    BATCHES,
    CONTEXTS,
    EVERY_S,
    FAILURES,
    Probation,
    Witness,
)
from service.engines.predict import Prediction
from service.engines.stats import EngineStats
from service.settings import Settings
from service.telemetry.tracing import RequestSpan, Tracer, current_span
from tests.fakes import contexts, mean_of

BATCH = st.tuples(st.integers(1, 128), st.floats(1e-5, 1))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def conduct(answered: int = 0, failed: int = 0, batches: list[tuple[int, float]] | None = None) -> EngineStats:
    made = EngineStats()
    made.answered, made.failed = answered, failed
    for rows, seconds in batches or []:
        made.add_batch(rows, seconds)
    return made


def fault(new: EngineStats, old: EngineStats | None = None, **settings: float) -> str:
    return Probation(old or EngineStats(), new, Settings(**settings)).fault() or ""  # type: ignore[arg-type]


@given(st.lists(BATCH, min_size=1, max_size=200))
def test_a_pace_is_the_time_that_95_of_100_batches_took_at_most(batches: list[tuple[int, float]]) -> None:
    for doubling, pace in conduct(batches=batches).latency_by_size().items():
        seconds = sorted(s for rows, s in batches if rows.bit_length() == doubling)
        assert pace.batches == len(seconds)
        assert pace.seconds == pytest.approx(seconds[math.ceil(0.95 * len(seconds)) - 1], rel=0.06)


@given(st.lists(BATCH, max_size=200), st.integers(0, 1000), st.integers(0, 10))
def test_a_version_that_does_as_the_incumbent_did_stays(batches: list[tuple[int, float]], ok: int, bad: int) -> None:
    assert not fault(conduct(ok + 200, bad, batches), conduct(ok, bad, batches))


@pytest.mark.parametrize(
    ("answered", "failed", "falls"),
    [(0, FAILURES, True), (0, FAILURES - 1, False), (94, 6, True), (95, 5, False), (10**6, 0, False)],
)
def test_too_many_failures_are_a_fault(answered: int, failed: int, falls: bool) -> None:
    assert ("LVM_WATCH_ERRORS is 0.05" in fault(conduct(answered, failed))) is falls


@pytest.mark.parametrize(("times", "falls"), [(3.5, False), (4.5, True)])
def test_batches_that_take_longer_than_the_incumbents_of_as_many_rows_are_a_fault(times: float, falls: bool) -> None:
    old = conduct(batches=[(1, 0.010)] * BATCHES + [(100, 0.050)] * BATCHES)
    new = conduct(batches=[(1, 0.010 * times)] * BATCHES + [(100, 0.050 * times)] * BATCHES)
    assert ("LVM_WATCH_SLOWER is 4" in fault(new, old)) is falls


def test_larger_batches_than_before_are_no_drag() -> None:
    old = conduct(batches=[(1, 0.010)] * BATCHES * 9 + [(100, 0.500)] * BATCHES)
    assert not fault(conduct(batches=[(100, 0.500)] * BATCHES), old)
    assert not fault(conduct(batches=[(64, 9.0)] * BATCHES), conduct(batches=[(1, 0.010)] * BATCHES)), "no such before"


def test_what_is_quicker_than_the_least_objective_is_quick_enough() -> None:
    old, new = conduct(batches=[(1, 0.0001)] * BATCHES), conduct(batches=[(1, 0.010)] * BATCHES)
    assert not fault(new, old)
    assert fault(new, old, slo_ms=(1,)), "1 ms is the least: ten times that is a drag"


def test_a_few_slow_batches_are_the_machines() -> None:
    old = conduct(batches=[(1, 0.010)] * 100)
    assert not fault(conduct(batches=[(1, 0.010)] * 96 + [(1, 5.0)] * 4), old)
    assert not fault(conduct(batches=[(1, 1.0)] * (BATCHES - 1)), old), "too few to tell"


def test_answers_other_than_the_incumbents_are_a_fault() -> None:
    probation = Probation(EngineStats(), EngineStats(), Settings())
    for _ in range(CONTEXTS - 1):
        probation.compare(0.1)
    assert probation.fault() is None, "too few to tell"
    probation.compare(0.1)
    assert "mean cosine 0.100" in str(probation.fault())
    for _ in range(CONTEXTS * 9):
        probation.compare(0.9)
    assert probation.fault() is None


def test_the_window_ends_by_the_clock_it_was_given() -> None:
    clock = Clock()
    probation = Probation(EngineStats(), EngineStats(), Settings(watch_s=60), clock)
    clock.now += 59
    assert not probation.is_over
    clock.now += 1
    assert probation.is_over


def predicted(vectors: Floats) -> Prediction:
    return Prediction(vectors, "amn", "w", 0, 0, len(vectors))


class Incumbent:
    """Answers the mean, when it is let; or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.asked, self.go = error, 0, asyncio.Event()
        self.recorded: RequestSpan | None = None

    async def run(self, batch: Floats, deadline: float) -> Prediction:
        self.asked += len(batch)
        self.recorded = current_span.get()
        await self.go.wait()
        if self.error:
            raise self.error
        return Prediction(2 * mean_of(batch), "amn", "v", 0, 0, len(batch))


def test_the_incumbent_is_asked_one_context_at_a_time_and_not_too_often() -> None:
    async def scenario() -> None:
        clock, incumbent, told = Clock(), Incumbent(), list[float]()
        witness = Witness(incumbent.run, told.append, clock)
        batch = contexts(4)
        for _ in range(3):
            witness.consider(batch, predicted(mean_of(batch)))
            await asyncio.sleep(0)
            clock.now += EVERY_S
        assert (incumbent.asked, told) == (1, []), "it has not answered the first yet"
        incumbent.go.set()
        await asyncio.sleep(0.01)
        assert told == pytest.approx([1]), "of whatever length the vectors are"
        for _ in range(3):
            witness.consider(batch, predicted(-mean_of(batch)))
            await asyncio.sleep(0.01)
        assert told == pytest.approx([1, -1])

    asyncio.run(scenario())


def test_what_the_incumbent_does_is_no_part_of_the_callers_trace() -> None:
    async def scenario() -> None:
        incumbent = Incumbent()
        current_span.set(Tracer(lambda span: None, share=1).start(None))
        Witness(incumbent.run, lambda cosine: None, Clock()).consider(contexts(), predicted(mean_of(contexts())))
        await asyncio.sleep(0)
        assert (incumbent.asked, incumbent.recorded) == (1, None)
        incumbent.go.set()
        await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_the_incumbents_troubles_are_not_the_versions() -> None:
    async def scenario() -> None:
        clock, told = Clock(), list[float]()
        incumbent = Incumbent(RuntimeError("no kernel"))
        incumbent.go.set()
        witness = Witness(incumbent.run, told.append, clock)
        for _ in range(2):
            witness.consider(contexts(), predicted(np.zeros((1, 8), np.float32)))
            await asyncio.sleep(0.01)
            clock.now += EVERY_S
        assert (incumbent.asked, told) == (2, [])

    asyncio.run(scenario())
