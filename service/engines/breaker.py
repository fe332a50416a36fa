"""The circuit breaker: decides whether to call an engine that has failed. A state machine on a monotonic clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

STATES = {"closed": 0.0, "half_open": 0.5, "open": 1.0}


class BreakerLimits(NamedTuple):
    """When a breaker opens, and for how long at least: the first arguments of `Breaker`."""

    failures: int
    window: int
    hold_s: float


class Breaker:
    """Opens when `failures` of the last `window` calls failed; then allows one probe per hold time.

    Between two changes (closed to open, open to closed) there are at least `hold_s` seconds of `clock`. Only a failure
    opens it, and only a probe that succeeds closes it. A probe without a result makes way for the next.
    """

    def __init__(self, failures: int, window: int, hold_s: float, clock: Callable[[], float] = monotonic) -> None:
        self._failures = failures
        self._hold_s = hold_s
        self._clock = clock
        self._recent: deque[bool] = deque(maxlen=window)
        self._changed = -hold_s + clock()
        self._is_open = False
        self._is_probing = False
        self._token = 0  # of the calls since the last change

    @property
    def state(self) -> str:
        """closed, open, or half_open (the next call is, or one is, the probe)."""
        if not self._is_open:
            return "closed"
        return "half_open" if self._is_probing or not self.hold_left_s else "open"

    @property
    def hold_left_s(self) -> float:
        """Seconds until it may change again, or 0."""
        return max(0.0, self._hold_s - (self._clock() - self._changed))

    def allow(self) -> int | None:
        """Return a token for one call, or None if no call is allowed; in half-open, the first call is the probe."""
        if self._is_open:
            if self._is_probing or self.hold_left_s:
                return None
            self._is_probing = True
            self._token += 1
        return self._token

    def record(self, token: int, *, ok: bool) -> None:
        """Record the result of the call with this token; tokens from before the last change are ignored."""
        if token != self._token:
            return
        if self._is_open:
            self._is_probing = False
            self._change(is_open=not ok)
            return
        self._recent.append(ok)
        if not ok and self._recent.count(False) >= self._failures and not self.hold_left_s:
            self._change(is_open=True)

    def release(self, token: int) -> None:
        """End the call with this token without a result: it proves nothing about the engine."""
        if token == self._token:
            self._is_probing = False

    def _change(self, *, is_open: bool) -> None:
        self._is_open = is_open
        self._changed = self._clock()
        self._token += 1
        self._recent.clear()
