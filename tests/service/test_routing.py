"""The router and its breaker: who answers, why, and never more than one change of trust a hold time."""

from __future__ import annotations

import asyncio
from time import monotonic

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from service.engine import Floats, Prediction
from service.errors import BreakerOpen, Expired, ModelFailed, Overloaded, ServiceError, Unavailable, UnknownModel
from service.metrics import Metrics
from service.routing import Breaker, Router
from service.settings import Settings
from tests.fakes import contexts

HOLD_S, WINDOW, FAILURES = 10.0, 8, 4


class FakeEngine:
    shape, encoder = (5, 8), "fake"

    def __init__(self, alias: str, name: str, error: ServiceError | None = None) -> None:
        self.alias, self.name, self.error = alias, name, error
        self.deadlines: list[float] = []

    async def predict(self, batch: Floats, deadline: float) -> Prediction:
        self.deadlines.append(deadline)
        if self.error:
            raise self.error
        return Prediction(np.zeros((len(batch), 8), np.float32), self.name, "v", 0, 0, len(batch))


def router(primary: ServiceError | None = None, fallback: ServiceError | None = None) -> Router:
    engines = {"primary": FakeEngine("primary", "amn", primary), "fallback": FakeEngine("fallback", "gru", fallback)}
    return Router(engines, Settings(), Metrics())


async def ask(made: Router, seconds: float = 2.0) -> tuple[str, str | None]:
    routed = await made.predict(contexts(), made.chain(None, "realtime"), monotonic() + seconds)
    return routed.served_by, routed.fallback_reason


@pytest.mark.parametrize("error", [ModelFailed("x"), Expired("x"), Overloaded("x"), Unavailable("x")])
def test_what_is_not_the_callers_fault_falls_back(error: ServiceError) -> None:
    assert asyncio.run(ask(router(error))) == ("fallback", error.reason)


def test_the_last_error_is_told_when_nothing_is_left() -> None:
    with pytest.raises(Overloaded):
        asyncio.run(ask(router(ModelFailed("x"), Overloaded("x"))))


def test_the_first_engine_may_use_its_share_of_the_time_and_the_last_all_of_it() -> None:
    made = router(ModelFailed("x"))
    began = monotonic()
    asyncio.run(ask(made, 100))
    first, last = (made.engines[alias].deadlines[0] - began for alias in ("primary", "fallback"))  # type: ignore[attr-defined]
    assert first == pytest.approx(50, abs=1)
    assert last == pytest.approx(100, abs=1)


def test_chains_follow_profile_and_name() -> None:
    made = router()
    assert [engine.alias for engine in made.chain(None, "realtime")] == ["primary", "fallback"]
    assert [engine.alias for engine in made.chain(None, "batch")] == ["fallback", "primary"]
    assert [engine.alias for engine in made.chain("gru", "realtime")] == ["fallback"]
    with pytest.raises(UnknownModel):
        made.chain("lstm", "realtime")
    made.engines.clear()  # type: ignore[attr-defined]
    with pytest.raises(Unavailable):
        made.chain(None, "realtime")


def test_a_hurried_caller_cannot_open_the_breaker() -> None:
    async def scenario() -> None:
        made = router(Expired("x"))
        for _ in range(50):
            await ask(made, 0.01)
        assert made.breakers["primary"].state == "closed"
        for _ in range(Settings().breaker_failures):
            await ask(made, 2.0)
        assert made.breakers["primary"].state == "open"

    asyncio.run(scenario())


def test_overload_says_nothing_about_the_net() -> None:
    made = router(Overloaded("x"))
    for _ in range(50):
        asyncio.run(ask(made))
    assert made.breakers["primary"].state == "closed"


def test_an_open_breaker_with_nothing_behind_is_unavailable_with_retry_after() -> None:
    made = router(ModelFailed("x"))
    del made.engines["fallback"]  # type: ignore[attr-defined]
    for _ in range(Settings().breaker_failures):
        with pytest.raises(ModelFailed):
            asyncio.run(ask(made))
    with pytest.raises(BreakerOpen) as refusal:
        asyncio.run(ask(made))
    assert refusal.value.retry_after


class BreakerMachine(RuleBasedStateMachine):
    """Any calls, any outcomes, any passing of time: the promises of the breaker hold."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.breaker = Breaker(FAILURES, WINDOW, HOLD_S, clock=lambda: self.now)
        self.calls: list[int] = []
        self.probe: int | None = None
        self.trusted = True
        self.turned_at: float | None = None

    @rule(seconds=st.floats(0, 2 * HOLD_S))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def call(self) -> None:
        state = self.breaker.state
        token = self.breaker.allow()
        if state == "closed":
            assert token is not None
            self.calls.append(token)
        else:
            assert (token is not None) == (state == "half_open" and self.probe is None)
            self.probe = token if token is not None else self.probe

    @rule(ok=st.booleans(), late=st.booleans())
    def a_call_ends(self, ok: bool, late: bool) -> None:
        if self.probe is not None and not late:
            self.breaker.record(self.probe, ok=ok)
            self.probe = None
        elif self.calls:
            before = self.breaker.state
            self.breaker.record(self.calls.pop(), ok=ok)
            assert self.breaker.state == before or before == "closed"  # only the probe ends what is open

    @rule(late=st.booleans())
    def a_call_says_nothing(self, late: bool) -> None:
        if self.probe is not None and not late:
            self.breaker.forget(self.probe)
            self.probe = None
        elif self.calls:
            self.breaker.forget(self.calls.pop())

    @invariant()
    def trust_changes_at_most_once_a_hold_time(self) -> None:
        trusted = self.breaker.state == "closed"
        if trusted != self.trusted:
            assert self.turned_at is None or self.now - self.turned_at >= HOLD_S
            self.trusted, self.turned_at = trusted, self.now


BreakerMachine.TestCase.settings = hypothesis_settings(max_examples=60, stateful_step_count=60, deadline=None)
TestBreaker = BreakerMachine.TestCase


def test_enough_failures_open_it_one_probe_goes_through_and_closes_it() -> None:
    now = [0.0]
    breaker = Breaker(FAILURES, WINDOW, HOLD_S, clock=lambda: now[0])
    for _ in range(FAILURES):
        token = breaker.allow()
        assert token is not None
        breaker.record(token, ok=False)
    assert breaker.state == "open"
    assert breaker.allow() is None
    now[0] += HOLD_S
    assert breaker.state == "half_open"
    probe, *others = [breaker.allow() for _ in range(3)]
    assert probe is not None
    assert others == [None, None]
    breaker.record(probe, ok=True)
    assert breaker.state == "closed"
