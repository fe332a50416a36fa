"""The router: which engine answers, and why it was not the first. A breaker per engine (`breaker.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from time import monotonic
from typing import Literal, NamedTuple, Protocol

from lvm.errors import (
    BreakerOpen,
    Expired,
    Unavailable,
    UnknownModel,
)
from models.registry.alias import PREDICTORS, Alias
from models.vectors import Floats
from service.engines.breaker import STATES, Breaker
from service.engines.engine import (
    Prediction,
)
from service.engines.stats import full_wait_s, is_telling
from service.settings import Settings
from service.telemetry.metrics import Metrics

Profile = Literal["realtime", "batch"]
ORDER: Mapping[Profile, tuple[Alias, ...]] = {
    "realtime": (Alias.PRIMARY, Alias.FALLBACK),
    # the customer's advice: GRU first for batch work
    "batch": (Alias.FALLBACK, Alias.PRIMARY),
}


class EngineLike(Protocol):
    """What the router routes to: an `Engine`, or a fake of it."""

    @property
    def alias(self) -> str:
        """The alias it serves."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(T, D)."""
        ...

    @property
    def name(self) -> str:
        """The model's name."""
        ...

    @property
    def version(self) -> str:
        """The version, without the name."""
        ...

    @property
    def encoder(self) -> str:
        """The encoder whose vectors it reads."""
        ...

    @property
    def runtime(self) -> str:
        """What executes it."""
        ...

    async def predict(self, contexts: Floats, deadline: float) -> Prediction:
        """Map contexts `(n, T, D)` to a prediction before `deadline`."""
        ...


class Routed(NamedTuple):
    """A prediction, the alias that served it, and why it was not the first in order (or None)."""

    prediction: Prediction
    served_by: str
    fallback_reason: str | None


class Router:
    """Sends contexts to the engines of a mapping that others may change at any time."""

    def __init__(self, engines: Mapping[str, EngineLike], settings: Settings, metrics: Metrics) -> None:
        self.engines = engines
        self._share = settings.primary_share
        self._patience = full_wait_s(settings)
        self._metrics = metrics
        self.breakers: dict[str, Breaker] = {
            alias: Breaker(settings.breaker_failures, settings.breaker_window, settings.breaker_hold_s)
            for alias in PREDICTORS
        }

    def chain(self, model: str | None, profile: Profile) -> list[EngineLike]:
        """Return the engines to try, in order; a model named otherwise than `primary` is the only one.

        Raises:
            UnknownModel: no served alias, and no model behind one, is called `model`.
            Unavailable: nothing is loaded, so nobody knows what will be served.
        """
        if not self.engines:
            raise Unavailable("no model is loaded")
        if model is None or model == Alias.PRIMARY:
            return [self.engines[alias] for alias in ORDER[profile] if alias in self.engines]
        for alias, engine in self.engines.items():
            if model in (alias, engine.name):
                return [engine]
        served = sorted({*self.engines, *(engine.name for engine in self.engines.values())})
        raise UnknownModel(f'no model called that is served: "{model[:100]}"; there are {", ".join(served)}')

    async def predict(self, contexts: Floats, chain: list[EngineLike], deadline: float) -> Routed:
        """Return the answer of the first engine of `chain` that gives one before `deadline`.

        Raises:
            Unavailable, Expired: no engine of the chain answered; the error is the last one's, to be tried again
                when the first of them may.
        """
        failed: list[Unavailable | Expired] = []
        for engine in chain:
            now = monotonic()
            until = deadline if engine is chain[-1] else now + (deadline - now) * self._share
            try:
                return await self._try(engine, contexts, until, failed[0].reason if failed else None)
            except (Unavailable, Expired) as error:
                self._metrics.rejections.inc(engine.alias, error.reason)
                failed.append(error)
        raise _with_soonest(failed)

    async def _try(self, engine: EngineLike, contexts: Floats, deadline: float, reason: str | None) -> Routed:
        current = self.engines.get(engine.alias, engine)  # it may have been swapped while another was tried
        engine = current if (current.shape, current.encoder) == (engine.shape, engine.encoder) else engine
        breaker = self.breakers.get(engine.alias)
        if breaker is None:
            return Routed(await engine.predict(contexts, deadline), engine.alias, reason)
        token = breaker.allow()
        if token is None:
            raise BreakerOpen(f"{engine.alias} failed too often", retry_after=max(1, math.ceil(breaker.hold_left_s)))
        patient = deadline - monotonic() >= self._patience
        try:
            prediction = await engine.predict(contexts, deadline)
        except BaseException as error:
            if is_telling(error, patient=patient):
                breaker.record(token, ok=False)
            else:
                breaker.forget(token)
            raise
        breaker.record(token, ok=True)
        if reason:
            self._metrics.fallbacks.inc(reason)
        return Routed(prediction, engine.alias, reason)

    def observe(self) -> None:
        """Bring the gauges of the breakers up to date."""
        for alias, breaker in self.breakers.items():
            self._metrics.breaker.set(STATES[breaker.state], alias)


def _with_soonest(failed: list[Unavailable | Expired]) -> Unavailable | Expired:
    """Return the last error, its Retry-After the least of all where it has one."""
    last = failed[-1]
    if last.retry_after:
        last.retry_after = min(error.retry_after for error in failed if error.retry_after)
    return last
