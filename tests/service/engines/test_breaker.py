"""The breaker against a model of it, for any calls, results and times; then its promises one by one."""

from __future__ import annotations

import inspect
import random
import time
from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.engines.breaker import Breaker

HOLD_S, WINDOW, FAILURES = 10.0, 8, 4


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def end(breaker: Breaker, *outcomes: bool) -> None:
    """Make calls with these results, one after the other."""
    for ok in outcomes:
        token = breaker.allow()
        assert token is not None
        breaker.record(token, ok=ok)


class BreakerMachine(RuleBasedStateMachine):
    """For any sequence of calls and times, the breaker is in the state of a plain model."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = Breaker(FAILURES, WINDOW, HOLD_S, self.clock)
        self.is_open = False
        self.changed = -HOLD_S
        self.recent: deque[bool] = deque(maxlen=WINDOW)
        self.calls: list[int] = []  # allowed since the last change
        self.stale: list[int] = []  # allowed before it
        self.probe: int | None = None

    def held(self) -> bool:
        return self.clock.now - self.changed >= HOLD_S

    def turn(self, *, is_open: bool) -> None:
        assert self.held(), "two changes within one hold time"
        self.is_open, self.changed = is_open, self.clock.now
        self.recent.clear()
        self.stale += self.calls
        self.calls.clear()

    @rule(seconds=st.floats(0, 1.5 * HOLD_S))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def a_call_begins(self) -> None:
        token = self.breaker.allow()
        if not self.is_open:
            assert token is not None, "closed, and a call was not allowed"
            self.calls.append(token)
        elif self.held() and self.probe is None:
            assert token is not None, "half-open, and no probe was allowed"
            self.probe = token
        else:
            assert token is None, "a second probe, or one within the hold time"

    @precondition(lambda self: self.calls)
    @rule(ok=st.booleans(), which=st.integers(0))
    def a_call_ends(self, ok: bool, which: int) -> None:
        self.breaker.record(self.calls.pop(which % len(self.calls)), ok=ok)
        self.recent.append(ok)
        if not ok and self.recent.count(False) >= FAILURES and self.held():
            self.turn(is_open=True)

    @precondition(lambda self: self.calls)
    @rule(which=st.integers(0))
    def a_call_ends_without_a_result(self, which: int) -> None:
        self.breaker.release(self.calls.pop(which % len(self.calls)))

    @precondition(lambda self: self.stale)
    @rule(ok=st.sampled_from([True, False, None]), which=st.integers(0))
    def a_call_from_before_the_last_change_ends(self, ok: bool | None, which: int) -> None:
        token = self.stale.pop(which % len(self.stale))
        if ok is None:
            self.breaker.release(token)
        else:
            self.breaker.record(token, ok=ok)

    @precondition(lambda self: self.probe is not None)
    @rule(ok=st.sampled_from([True, False, None]))
    def the_probe_ends(self, ok: bool | None) -> None:
        token, self.probe = self.probe, None
        assert token is not None
        if ok is None:
            self.breaker.release(token)
            return
        self.breaker.record(token, ok=ok)
        self.is_open, self.changed = not ok, self.clock.now

    @precondition(lambda self: self.probe is None)
    @rule()
    def a_probe_is_allowed_after_the_hold_time(self) -> None:
        self.clock.now += self.breaker.hold_left_s + 1e-6  # a sum of floats may fall short
        token = self.breaker.allow()
        assert token is not None, "a deadlock"
        self.breaker.release(token)

    @invariant()
    def it_is_in_the_state_of_the_model(self) -> None:
        half = self.probe is not None or self.held()
        assert self.breaker.state == (("half_open" if half else "open") if self.is_open else "closed")
        assert 0 <= self.breaker.hold_left_s <= HOLD_S


BreakerMachine.TestCase.settings = hypothesis_settings(max_examples=60, stateful_step_count=60)
TestBreaker = BreakerMachine.TestCase


def test_opens_after_enough_failures_and_closes_after_a_successful_probe() -> None:
    clock = Clock()
    breaker = Breaker(FAILURES, WINDOW, HOLD_S, clock)
    end(breaker, *[False] * FAILURES)
    assert (breaker.state, breaker.allow(), breaker.hold_left_s) == ("open", None, HOLD_S)
    clock.now += HOLD_S
    assert breaker.state == "half_open"
    probe, *others = [breaker.allow() for _ in range(3)]
    assert probe is not None
    assert others == [None, None]
    breaker.record(probe, ok=True)
    assert breaker.state == "closed"


@given(st.lists(st.booleans(), max_size=200))
def test_stays_closed_below_the_limit_of_failures_in_every_window(wanted: list[bool]) -> None:
    breaker, recent = Breaker(FAILURES, WINDOW, HOLD_S, Clock()), deque([True] * WINDOW, maxlen=WINDOW)
    for ok in wanted:
        recent.append(ok or list(recent)[1:].count(False) >= FAILURES - 1)
        end(breaker, recent[-1])
    assert breaker.state == "closed"


@given(st.lists(st.booleans(), max_size=40))
def test_closes_at_most_one_hold_time_after_an_engine_recovers(before: list[bool]) -> None:
    clock = Clock()
    breaker = Breaker(FAILURES, WINDOW, HOLD_S, clock)
    for ok in before:
        token = breaker.allow()
        if token is not None:
            breaker.record(token, ok=ok)
        clock.now += 1
    clock.now += HOLD_S
    end(breaker, *[True] * 100)
    assert breaker.state == "closed"


def test_a_success_does_not_open_it_after_failures_within_the_hold_time() -> None:
    clock = Clock()
    breaker = Breaker(FAILURES, WINDOW, HOLD_S, clock)
    end(breaker, *[False] * FAILURES)
    clock.now += HOLD_S
    end(breaker, True, *[False] * FAILURES)
    clock.now += HOLD_S
    end(breaker, True)
    assert breaker.state == "closed"


@pytest.mark.parametrize("seed", range(5))
def test_changes_at_most_once_per_hold_time_at_50_percent_errors(seed: int) -> None:
    clock, draw, changes = Clock(), random.Random(seed), [-HOLD_S]
    breaker = Breaker(FAILURES, WINDOW, HOLD_S, clock)
    for _ in range(10_000):
        was_closed = breaker.state == "closed"
        token = breaker.allow()
        if token is not None:
            breaker.record(token, ok=draw.random() < 0.5)
        if (breaker.state == "closed") != was_closed:
            changes.append(clock.now)
        clock.now += 0.125
    assert len(changes) > 10
    assert min(after - before for before, after in pairwise(changes)) >= HOLD_S


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 1.0])
def test_is_open_at_most_half_of_the_time_if_probes_succeed(share: float) -> None:
    clock, draw, not_allowed, calls = Clock(), random.Random(0), 0, 10_000
    breaker = Breaker(FAILURES, WINDOW, HOLD_S, clock)
    for _ in range(calls):
        is_probe = breaker.state == "half_open"
        token = breaker.allow()
        if token is None:
            not_allowed += 1
        else:
            breaker.record(token, ok=is_probe or draw.random() >= share)
        clock.now += 0.125
    assert not_allowed <= calls / 2


def test_uses_a_monotonic_clock() -> None:
    assert inspect.signature(Breaker).parameters["clock"].default is time.monotonic
