"""The breaker: whether an engine that failed is to be tried. A state machine on a monotonic clock, and nothing else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic

STATES = {"closed": 0.0, "half_open": 0.5, "open": 1.0}


class Breaker:
    """Opens when `failures` of the last `window` calls failed; then lets one probe through a hold time.

    Between two changes of trust (closed to open, open to closed) lie at least `hold_s` seconds of `clock`. Nothing
    but a probe closes it, and a probe that says nothing makes way for the next.
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
        return "half_open" if self._probing or not self.hold_left_s else "open"

    @property
    def hold_left_s(self) -> float:
        """Seconds until it may change again, 0 where it may now."""
        return max(0.0, self._hold_s - (self._clock() - self._changed))

    def allow(self) -> int | None:
        """Return a pass for one call, None where none may go through; half-open, the first is the probe."""
        if self._open:
            if self._probing or self.hold_left_s:
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
        if self._recent.count(False) >= self._failures and not self.hold_left_s:
            self._turn(open_=True)

    def forget(self, token: int) -> None:
        """Tell that the call with this pass ended without saying anything about the engine."""
        if token == self._era:
            self._probing = False

    def _turn(self, *, open_: bool) -> None:
        self._open, self._changed = open_, self._clock()
        self._era += 1
        self._recent.clear()
