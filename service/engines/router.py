"""The router: sends a request to the first engine of a chain, and to the next if that fails. A breaker per alias."""

from __future__ import annotations

import math
from collections.abc import Mapping
from time import monotonic
from typing import Literal, NamedTuple

from lvm.errors import (
    BreakerOpen,
    Draining,
    Expired,
    Unavailable,
    UnknownModel,
)
from models.registry.alias import FALLBACKS, PREDICTORS, Alias, predictors_to_show
from models.vectors import Floats
from service.engines.breaker import STATES, Breaker, BreakerLimits
from service.engines.pairing import Pairing
from service.engines.predict import Prediction
from service.engines.remote import PredictEngine
from service.engines.stats import full_wait_s, is_engine_fault
from service.settings import Settings
from service.telemetry.metrics import Metrics

Profile = Literal["realtime", "batch"]
ORDER: Mapping[Profile, tuple[Alias, ...]] = {
    "realtime": PREDICTORS,
    # the customer's advice: GRU first for batch work
    "batch": (*FALLBACKS, Alias.PRIMARY),
}


class FallbackChain(NamedTuple):
    """The engines that may answer, in the order in which they are tried; the shape (T, D) that the first one reads."""

    engines: list[PredictEngine]
    shape: tuple[int, int]


class Routed(NamedTuple):
    """A prediction, the alias that served it, and why it was not the first of the chain, or None."""

    prediction: Prediction
    served_by: str
    fallback_reason: str | None


class Router:
    """Sends contexts to engines.

    Args:
        engines: by alias; the mapping may change at any time.
        metrics: where rejections and fallbacks are counted.
        share: of the time left, what every engine of a chain but the last may use.
        full_wait_s: a caller who waited so many seconds in vain shows that an engine hangs.
        breaker: the limits of the circuit breaker of each engine.
        pairing: scores the predictions later.
    """

    def __init__(
        self,
        engines: Mapping[str, PredictEngine],
        metrics: Metrics,
        *,
        share: float,
        full_wait_s: float,
        breaker: BreakerLimits,
        pairing: Pairing | None = None,
    ) -> None:
        self.engines = engines
        self._chains: dict[Profile, tuple[tuple[PredictEngine, ...], FallbackChain]] = {}
        self._pairing = pairing
        self._share = share
        self._full_wait_s = full_wait_s
        self._metrics = metrics
        self.breakers: dict[str, Breaker] = {alias: Breaker(*breaker) for alias in PREDICTORS}

    def chain(self, model: str | None, profile: Profile) -> FallbackChain:
        """Return the engines to try, in order; a model other than `primary` is the only one.

        Raises:
            UnknownModel: `model` is no alias that is served, and no name of a model that is.
            Unavailable: no model is loaded.
        """
        if not self.engines:
            raise Unavailable("no model is loaded")
        chain = self._chain(profile)
        if model is None or model == Alias.PRIMARY:
            return chain
        for engine in chain.engines:
            if model in (engine.info.alias, engine.info.name):
                return FallbackChain([engine], engine.info.shape)
        served = sorted({*self.engines, *(engine.info.name for engine in self.engines.values())})
        raise UnknownModel(f'unknown model "{model[:100]}"; available: {", ".join(served)}')

    def _chain(self, profile: Profile) -> FallbackChain:
        """Return the engines in the order of a profile, sorted again only if there are others."""
        engines = tuple(self.engines.values())
        known = self._chains.get(profile)
        if known is None or known[0] != engines:
            ordered = [self.engines[alias] for alias in ORDER[profile] if alias in self.engines]
            known = self._chains[profile] = engines, FallbackChain(ordered, ordered[0].info.shape)
        return known[1]

    async def predict(self, contexts: Floats, chain: list[PredictEngine], deadline: float) -> Routed:
        """Return the answer of the first engine of `chain` that gives one before `deadline`.

        Raises:
            Unavailable, Expired: the error of the last engine; its Retry-After is the shortest of all.
        """
        failures: list[Unavailable | Expired] = []
        for engine in chain:
            now = monotonic()
            until = deadline if engine is chain[-1] else now + (deadline - now) * self._share
            reason = failures[0].reason if failures else None
            try:
                prediction = await self._ask(engine, contexts, until)
            except (Unavailable, Expired) as error:
                self._metrics.rejections.inc(engine.info.alias, error.reason)
                failures.append(error)
                continue
            if reason:
                self._metrics.fallbacks.inc(reason)
            alias = engine.info.alias
            if self._pairing is not None:
                author = alias, prediction.model, prediction.version
                self._pairing.add(contexts, prediction.vectors, author)
            return Routed(prediction, alias, reason)
        raise _with_shortest_retry(failures)

    async def _ask(self, engine: PredictEngine, contexts: Floats, deadline: float) -> Prediction:
        """Ask one engine, if the breaker of its alias allows; if it is closed, ask the one that replaced it."""
        alias = engine.info.alias
        breaker = self.breakers[alias]
        token = breaker.allow()
        if token is None:
            raise BreakerOpen(f"{alias} failed too often", retry_after=max(1, math.ceil(breaker.hold_left_s)))
        had_full_wait = deadline - monotonic() >= self._full_wait_s
        try:
            prediction = await engine.run(contexts, deadline)
        except BaseException as error:
            if is_engine_fault(error, had_full_wait=had_full_wait):
                breaker.record(token, ok=False)
            else:
                breaker.release(token)
            successor = self._successor(engine) if isinstance(error, Draining) else None
            if successor is None:
                raise
        else:
            breaker.record(token, ok=True)
            return prediction
        return await self._ask(successor, contexts, deadline)

    def _successor(self, engine: PredictEngine) -> PredictEngine | None:
        """Return the engine that replaced `engine` since the chain was resolved, if it can answer the same request."""
        current = self.engines.get(engine.info.alias, engine)
        can_answer = current is not engine and current.info.input_space == engine.info.input_space
        return current if can_answer else None

    def update_gauges(self) -> None:
        """Bring the gauges of the breakers up to date."""
        for alias in predictors_to_show(self.engines):
            self._metrics.breaker.set(STATES[self.breakers[alias].state], alias)


def make_router(
    engines: Mapping[str, PredictEngine],
    settings: Settings,
    metrics: Metrics,
    pairing: Pairing | None = None,
) -> Router:
    """Return the router of `engines` with the limits of the settings."""
    return Router(
        engines,
        metrics,
        share=settings.primary_share,
        full_wait_s=full_wait_s(settings),
        breaker=BreakerLimits(settings.breaker_failures, settings.breaker_window, settings.breaker_hold_s),
        pairing=pairing,
    )


def _with_shortest_retry(failures: list[Unavailable | Expired]) -> Unavailable | Expired:
    """Return the last error; its Retry-After, if it has one, is the shortest of all."""
    last = failures[-1]
    if last.retry_after:
        last.retry_after = min(error.retry_after for error in failures if error.retry_after)
    return last
