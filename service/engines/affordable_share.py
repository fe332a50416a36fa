"""A share of items to work on, so that the work takes little of the time that other work needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Seconds between two changes: both parts of a pair should see the same share.
PERIOD_S = 0.25
# What the work may take: a part of the time in which the thread would be idle, and this part of all time at least.
OF_IDLE, AT_LEAST = 0.05, 0.005


class AffordableShare:
    """The share of items `now`: at most `share`, and by halves less while the work takes too much time.

    `clock` counts the seconds that pass, `thread_clock` those in which the thread is not idle.
    """

    def __init__(self, share: float, clock: Callable[[], float], thread_clock: Callable[[], float]) -> None:
        self.now = self._share = share
        self._clock = clock
        self._thread_clock = thread_clock
        self._since = clock(), thread_clock()
        self._worked = 0.0

    @contextmanager
    def work(self) -> Iterator[None]:
        """Count what is done in this context as the work."""
        began = self._thread_clock()
        try:
            yield
        finally:
            ended = self._thread_clock()
            self._worked += ended - began
            self._adapt(self._clock(), ended)

    def _adapt(self, now: float, busy: float) -> None:
        passed = now - self._since[0]
        if passed < PERIOD_S:
            return
        idle = passed - (busy - self._since[1] - self._worked)
        most = max(OF_IDLE * idle, AT_LEAST * passed)
        if self._worked > most:
            self.now /= 2
        # twice as much work must not be too much again
        elif self._worked < 0.4 * most:
            self.now = min(2 * self.now, self._share)
        self._since = now, busy
        self._worked = 0.0
