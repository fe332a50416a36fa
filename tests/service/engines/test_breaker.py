"""The breaker held to a model of it, at any calls, outcomes and passing of time; and its promises one by one."""

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
    """A clock that stands until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def end(breaker: Breaker, *outcomes: bool) -> None:
    """Let calls through that end so, one after the other."""
    for ok in outcomes:
        token = breaker.allow()
        assert token is not None
        breaker.record(token, ok=ok)


class BreakerMachine(RuleBasedStateMachine):
    """Any interleaving of calls and clock: the breaker is in the state that a plain model of it says."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = Breaker(FAILURES, WINDOW, HOLD_S, self.clock)
        self.is_open = False
        self.changed = -HOLD_S
        self.recent: deque[bool] = deque(maxlen=WINDOW)
        self.calls: list[int] = []  # let through since the last change
        self.stale: list[int] = []  # let through before it
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
    def a_call_asks(self) -> None:
        token = self.breaker.allow()
        if not self.is_open:
            assert token is not None, "closed, and a call was refused"
            self.calls.append(token)
        elif self.held() and self.probe is None:
            assert token is not None, "half-open, and no probe was let through"
            self.probe = token
        else:
            assert token is None, "a second probe, or one within the hold time"

    @precondition(lambda self: self.calls)
    @rule(ok=st.booleans(), which=st.integers(0))
    def a_call_ends(self, ok: bool, which: int) -> None:
        self.breaker.record(self.calls.pop(which % len(self.calls)), ok=ok)
        self.recent.append(ok)
        if self.recent.count(False) >= FAILURES and self.held():
            self.turn(is_open=True)

    @precondition(lambda self: self.calls)
    @rule(which=st.integers(0))
    def a_call_says_nothing(self, which: int) -> None:
        self.breaker.forget(self.calls.pop(which % len(self.calls)))

    @precondition(lambda self: self.stale)
    @rule(ok=st.sampled_from([True, False, None]), which=st.integers(0))
    def a_call_of_an_earlier_era_ends(self, ok: bool | None, which: int) -> None:
        token = self.stale.pop(which % len(self.stale))
        if ok is None:
            self.breaker.forget(token)
        else:
            self.breaker.record(token, ok=ok)

    @precondition(lambda self: self.probe is not None)
    @rule(ok=st.sampled_from([True, False, None]))
    def the_probe_ends(self, ok: bool | None) -> None:
        token, self.probe = self.probe, None
        assert token is not None
        if ok is None:
            self.breaker.forget(token)
            return
        self.breaker.record(token, ok=ok)
        self.is_open, self.changed = not ok, self.clock.now

    @precondition(lambda self: self.probe is None)
    @rule()
    def patience_is_always_rewarded(self) -> None:
        self.clock.now += self.breaker.hold_left_s + 1e-6  # a sum of floats may fall short
        token = self.breaker.allow()
        assert token is not None, "a deadlock"
        self.breaker.forget(token)

    @invariant()
    def it_is_in_the_state_of_the_model(self) -> None:
        half = self.probe is not None or self.held()
        assert self.breaker.state == (("half_open" if half else "open") if self.is_open else "closed")
        assert 0 <= self.breaker.hold_left_s <= HOLD_S


BreakerMachine.TestCase.settings = hypothesis_settings(max_examples=60, stateful_step_count=60, deadline=None)
TestBreaker = BreakerMachine.TestCase


def test_enough_failures_open_it_one_probe_goes_through_and_closes_it() -> None:
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
def test_fewer_failures_than_the_limit_in_every_window_send_no_call_elsewhere(wanted: list[bool]) -> None:
    breaker, recent = Breaker(FAILURES, WINDOW, HOLD_S, Clock()), deque([True] * WINDOW, maxlen=WINDOW)
    for ok in wanted:
        recent.append(ok or list(recent)[1:].count(False) >= FAILURES - 1)
        end(breaker, recent[-1])
    assert breaker.state == "closed"


@given(st.lists(st.booleans(), max_size=40))
def test_an_engine_that_is_well_again_is_shunned_for_one_hold_time_at_most(before: list[bool]) -> None:
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


@pytest.mark.parametrize("seed", range(5))
def test_at_50_percent_errors_it_changes_at_most_once_a_hold_time(seed: int) -> None:
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
def test_an_engine_whose_probes_succeed_is_shunned_for_half_of_the_time_at_most(share: float) -> None:
    clock, draw, shunned, calls = Clock(), random.Random(0), 0, 10_000
    breaker = Breaker(FAILURES, WINDOW, HOLD_S, clock)
    for _ in range(calls):
        is_probe = breaker.state == "half_open"
        token = breaker.allow()
        if token is None:
            shunned += 1
        else:
            breaker.record(token, ok=is_probe or draw.random() >= share)
        clock.now += 0.125
    assert shunned <= calls / 2


def test_its_clock_is_one_that_nobody_sets() -> None:
    assert inspect.signature(Breaker).parameters["clock"].default is time.monotonic
