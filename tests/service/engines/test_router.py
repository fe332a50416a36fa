"""The router: which engine answers, why, and the Retry-After if none does."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from time import monotonic

import numpy as np
import pytest

from lvm.errors import (
    BreakerOpen,
    Draining,
    Expired,
    ModelFailed,
    Overloaded,
    ServiceError,
    Unavailable,
    UnknownModel,
)
from models.vectors import Floats
from service.engines.breaker import Breaker
from service.engines.engine import EngineInfo
from service.engines.predict import Prediction
from service.engines.router import Profile, Router, make_router
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.fakes import contexts
from tests.scraping import scrape


class FakeEngine:
    def __init__(self, alias: str, name: str, error: ServiceError | None = None) -> None:
        self.info = EngineInfo(alias, name, "v", "0" * 64, "fake", (5, 8), "fake")
        self.error = error
        self.deadlines: list[float] = []

    async def run(self, batch: Floats, deadline: float) -> Prediction:
        self.deadlines.append(deadline)
        if self.error:
            raise self.error
        return Prediction(np.zeros((len(batch), 8), np.float32), self.info.name, "v", 0, 0, len(batch))


class Hanging(FakeEngine):
    async def run(self, batch: Floats, deadline: float) -> Prediction:
        return await asyncio.get_running_loop().create_future()


def router(primary: ServiceError | None = None, fallback: ServiceError | None = None) -> Router:
    engines = {"primary": FakeEngine("primary", "amn", primary), "fallback": FakeEngine("fallback", "gru", fallback)}
    return make_router(engines, Settings(), Metrics())


async def ask(made: Router, seconds: float = 2.0) -> tuple[str, str | None]:
    routed = await made.predict(contexts(), made.chain(None, "realtime").engines, monotonic() + seconds)
    return routed.served_by, routed.fallback_reason


@pytest.mark.parametrize("error", [ModelFailed("x"), Expired("x"), Overloaded("x"), Unavailable("x")])
def test_falls_back_after_an_error_of_the_engine(error: ServiceError) -> None:
    assert asyncio.run(ask(router(error))) == ("fallback", error.reason)


def test_raises_the_last_error_if_every_engine_failed() -> None:
    with pytest.raises(Overloaded):
        asyncio.run(ask(router(ModelFailed("x"), Overloaded("x"))))


def test_gives_the_first_engine_its_share_of_the_time_and_the_last_all_of_it() -> None:
    made = router(ModelFailed("x"))
    began = monotonic()
    asyncio.run(ask(made, 100))
    first, last = (made.engines[alias].deadlines[0] - began for alias in ("primary", "fallback"))  # type: ignore[attr-defined]
    assert first == pytest.approx(50, abs=1)
    assert last == pytest.approx(100, abs=1)


def three(primary: ServiceError | None = None, fallback: ServiceError | None = None) -> Router:
    """Return a router of three engines; the last was loaded first."""
    last = FakeEngine("fallback-2", "lstm")
    return make_router({"fallback-2": last, **router(primary, fallback).engines}, Settings(), Metrics())


def test_asks_the_fallbacks_one_after_another_and_gives_the_first_reason() -> None:
    assert asyncio.run(ask(three(ModelFailed("x")))) == ("fallback", "model_failed")
    assert asyncio.run(ask(three(ModelFailed("x"), Overloaded("x")))) == ("fallback-2", "model_failed")


def test_every_engine_but_the_last_gets_its_share_of_what_is_left() -> None:
    made = three(ModelFailed("x"), ModelFailed("x"))
    made.engines["fallback-2"].error = ModelFailed("x")  # type: ignore[attr-defined]
    began = monotonic()
    with pytest.raises(ModelFailed):
        asyncio.run(ask(made, 100))
    order = ("primary", "fallback", "fallback-2")
    given = [made.engines[alias].deadlines[0] - began for alias in order]  # type: ignore[attr-defined]
    assert given == pytest.approx([50, 50, 100], abs=1), "fakes take no time: half of 100, half of 100, all"


def test_each_fallback_has_a_breaker_of_its_own() -> None:
    made = three(ModelFailed("x"), ModelFailed("x"))
    for _ in range(Settings().breaker_failures):
        assert asyncio.run(ask(made)) == ("fallback-2", "model_failed")
    assert asyncio.run(ask(made)) == ("fallback-2", "breaker_open")
    states = {alias: made.breakers[alias].state for alias in made.engines}
    assert states == {"primary": "open", "fallback": "open", "fallback-2": "closed"}


def test_shows_the_breakers_of_further_fallbacks_only_if_they_are_there() -> None:
    for made, shown in ((router(), 2), (three(), 3)):
        metrics = Metrics()
        again = make_router(made.engines, Settings(), metrics)
        again.update_gauges()
        assert scrape(metrics)[0].decode().count("lvm_breaker_open{") == shown


def aliases(made: Router, model: str | None, profile: Profile) -> list[str]:
    return [engine.info.alias for engine in made.chain(model, profile).engines]


def test_chains_follow_profile_and_name() -> None:
    many = three()
    assert aliases(many, None, "realtime") == ["primary", "fallback", "fallback-2"]
    assert aliases(many, None, "batch") == ["fallback", "fallback-2", "primary"]
    assert aliases(many, "fallback-2", "realtime") == ["fallback-2"]
    made = router()
    assert aliases(made, None, "realtime") == ["primary", "fallback"]
    assert aliases(made, None, "batch") == ["fallback", "primary"]
    assert aliases(made, "gru", "realtime") == ["fallback"]
    with pytest.raises(UnknownModel):
        made.chain("lstm", "realtime")
    made.engines.clear()  # type: ignore[attr-defined]
    for model in (None, "fallback", "gru"):  # the device worker is away: the model may exist
        with pytest.raises(Unavailable):
            made.chain(model, "realtime")


def test_a_short_deadline_does_not_open_the_breaker() -> None:
    async def scenario() -> None:
        made = router(Expired("x"))
        for _ in range(50):
            await ask(made, 0.01)
        assert made.breakers["primary"].state == "closed"
        for _ in range(Settings().breaker_failures):
            await ask(made, 2.0)
        assert made.breakers["primary"].state == "open"

    asyncio.run(scenario())


def test_overload_does_not_open_the_breaker() -> None:
    made = router(Overloaded("x"))
    for _ in range(50):
        asyncio.run(ask(made))
    assert made.breakers["primary"].state == "closed"


def test_an_open_breaker_without_a_fallback_has_a_retry_after() -> None:
    made = router(ModelFailed("x"))
    del made.engines["fallback"]  # type: ignore[attr-defined]
    for _ in range(Settings().breaker_failures):
        with pytest.raises(ModelFailed):
            asyncio.run(ask(made))
    with pytest.raises(BreakerOpen) as refusal:
        asyncio.run(ask(made))
    assert refusal.value.retry_after == Settings().breaker_hold_s


def test_the_shortest_retry_after_wins() -> None:
    made = router(ModelFailed("x", retry_after=2), BreakerOpen("x", retry_after=5))
    with pytest.raises(BreakerOpen) as refusal:
        asyncio.run(ask(made))
    assert refusal.value.retry_after == 2
    with pytest.raises(ModelFailed) as failure:
        asyncio.run(ask(router(Expired("x"), ModelFailed("x"))))
    assert failure.value.retry_after == 1


def test_a_cancelled_probe_makes_way_for_the_next() -> None:
    async def scenario() -> None:
        made = router(ModelFailed("x"))
        made.breakers["primary"] = Breaker(1, 1, 1e-9)
        assert await ask(made) == ("fallback", "model_failed")
        made.engines["primary"] = Hanging("primary", "amn")  # type: ignore[index]
        probe = asyncio.create_task(ask(made))
        await asyncio.sleep(0)
        assert await ask(made) == ("fallback", "breaker_open")
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        made.engines["primary"] = FakeEngine("primary", "amn")  # type: ignore[index]
        assert await ask(made) == ("primary", None)

    asyncio.run(scenario())


def test_asks_the_successor_of_an_engine_that_was_replaced_since_the_chain_was_resolved() -> None:
    async def scenario() -> None:
        made = router(Draining("retired"))
        chain = made.chain(None, "realtime").engines
        made.engines["primary"] = FakeEngine("primary", "newer")  # type: ignore[index]
        routed = await made.predict(contexts(), chain, monotonic() + 2)
        assert (routed.prediction.model, routed.served_by, routed.fallback_reason) == ("newer", "primary", None)

    asyncio.run(scenario())


def test_does_not_ask_a_successor_with_another_input_space() -> None:
    async def scenario() -> None:
        made = router(Draining("retired"))
        chain = made.chain(None, "realtime").engines
        other = FakeEngine("primary", "newer")
        other.info = replace(other.info, encoder="another")
        made.engines["primary"] = other  # type: ignore[index]
        routed = await made.predict(contexts(), chain, monotonic() + 2)
        assert (routed.served_by, routed.fallback_reason, other.deadlines) == ("fallback", "draining", [])

    asyncio.run(scenario())
