"""The router: which engine answers, and why it was not the first. A breaker per engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Literal, NamedTuple, Protocol

from service.engine import Floats, Prediction
from service.errors import BreakerOpen, Expired, ModelFailed, Unavailable, UnknownModel
from service.metrics import Metrics
from service.settings import Settings

Profile = Literal["realtime", "batch"]
ORDER: Mapping[Profile, tuple[str, ...]] = {
    "realtime": ("primary", "fallback"),
    "batch": ("fallback", "primary"),  # the customer's advice: GRU first for batch work
}
STATES = {"closed": 0.0, "half_open": 0.5, "open": 1.0}


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


class Breaker:
    """Opens when `failures` of the last `window` calls failed; then lets one probe through a hold time.

    Between two changes of trust (closed to open, open to closed) lies at least `hold_s` seconds.
    """

    def __init__(self, failures: int, window: int, hold_s: float, clock: Callable[[], float] = monotonic) -> None:
        self._failures, self._hold_s, self._clock = failures, hold_s, clock
        self._recent: deque[bool] = deque(maxlen=window)
        self._changed = -hold_s + clock()
        self._open = False
        self._probing = False
        self._era = 0

    @property
    def state(self) -> str:
        """closed, open, or half_open (the next call is, or one is, the probe)."""
        if not self._open:
            return "closed"
        return "half_open" if self._probing or self._held() else "open"

    def allow(self) -> int | None:
        """Return a pass for one call, None where none may go through; half-open, the first is the probe."""
        if self._open:
            if self._probing or not self._held():
                return None
            self._probing = True
            self._era += 1
        return self._era

    def record(self, token: int, *, ok: bool) -> None:
        """Tell how the call with this pass ended; passes of an earlier state say nothing any more."""
        if token != self._era:
            return
        if self._open:
            self._probing = False
            self._turn(open_=not ok)
            return
        self._recent.append(ok)
        if self._recent.count(False) >= self._failures and self._held():
            self._turn(open_=True)

    def forget(self, token: int) -> None:
        """Tell that the call with this pass ended without saying anything about the engine."""
        if token == self._era:
            self._probing = False

    def _held(self) -> bool:
        return self._clock() - self._changed >= self._hold_s

    def _turn(self, *, open_: bool) -> None:
        self._open, self._changed = open_, self._clock()
        self._era += 1
        self._recent.clear()


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
        self._patience = settings.timeout_ms / 1000 * settings.primary_share
        self._metrics = metrics
        self.breakers = {
            alias: Breaker(settings.breaker_failures, settings.breaker_window, settings.breaker_hold_s)
            for alias in ORDER["realtime"]
        }

    def chain(self, model: str | None, profile: Profile) -> list[EngineLike]:
        """Return the engines to try, in order; a model named otherwise than `primary` is the only one.

        Raises:
            UnknownModel: no served alias, and no model behind one, is called `model`.
            Unavailable: nothing is loaded.
        """
        if model is None or model == ORDER["realtime"][0]:
            found = [self.engines[alias] for alias in ORDER[profile] if alias in self.engines]
            if not found:
                raise Unavailable("no model is loaded")
            return found
        for alias, engine in self.engines.items():
            if model in (alias, engine.name):
                return [engine]
        served = sorted({*self.engines, *(engine.name for engine in self.engines.values())})
        raise UnknownModel(f"no model called that is served; there are {', '.join(served)}")

    async def predict(self, contexts: Floats, chain: list[EngineLike], deadline: float) -> Routed:
        """Return the answer of the first engine of `chain` that gives one before `deadline`.

        Raises:
            Unavailable, Expired: no engine of the chain answered; the error is the last one's.
        """
        reason: str | None = None
        for engine in chain[:-1]:
            now = monotonic()
            try:
                return await self._try(engine, contexts, now + (deadline - now) * self._share, reason)
            except (Unavailable, Expired) as error:
                reason = reason or error.reason
                self._metrics.rejections.add(engine.alias, error.reason)
        try:
            return await self._try(chain[-1], contexts, deadline, reason)
        except (Unavailable, Expired) as error:
            self._metrics.rejections.add(chain[-1].alias, error.reason)
            raise

    async def _try(self, engine: EngineLike, contexts: Floats, deadline: float, reason: str | None) -> Routed:
        current = self.engines.get(engine.alias, engine)  # it may have been swapped while another was tried
        engine = current if (current.shape, current.encoder) == (engine.shape, engine.encoder) else engine
        breaker = self.breakers.get(engine.alias)
        if breaker is None:
            return Routed(await engine.predict(contexts, deadline), engine.alias, reason)
        token = breaker.allow()
        if token is None:
            raise BreakerOpen(f"{engine.alias} failed too often")
        patient = deadline - monotonic() >= self._patience * 0.99
        try:
            prediction = await engine.predict(contexts, deadline)
        except BaseException as error:
            # A caller in a hurry must not open the breaker: only a full wait tells of a hang.
            # Nor must one whose rows alone fail.
            if (isinstance(error, ModelFailed) and not error.alone) or (isinstance(error, Expired) and patient):
                breaker.record(token, ok=False)
            else:
                breaker.forget(token)
            raise
        breaker.record(token, ok=True)
        if reason:
            self._metrics.fallbacks.add(reason)
        return Routed(prediction, engine.alias, reason)

    def observe(self) -> None:
        """Bring the gauges of the breakers up to date."""
        for alias, breaker in self.breakers.items():
            self._metrics.breaker.set(STATES[breaker.state], alias)
