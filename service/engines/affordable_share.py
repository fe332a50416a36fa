"""A share of items to work on, so that the work takes no more than a share of the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Seconds between two changes: both parts of a pair should see the same share.
PERIOD_S = 0.25


class AffordableShare:
    """The share of items `now`: at most `share`, and by halves less if the work takes more than `most` of the time.

    `clock` counts the seconds that pass, `work_clock` those that the thread works.
    """

    def __init__(self, share: float, most: float, clock: Callable[[], float], work_clock: Callable[[], float]) -> None:
        self.now = self._share = share
        self._most = most
        self._clock = clock
        self._work_clock = work_clock
        self._since = clock()
        self._worked = 0.0

    @contextmanager
    def work(self) -> Iterator[None]:
        """Count what is done in this context as work."""
        began = self._work_clock()
        try:
            yield
        finally:
            self._worked += self._work_clock() - began
            self._adapt()

    def _adapt(self) -> None:
        passed = self._clock() - self._since
        if passed < PERIOD_S:
            return
        part = self._worked / passed
        if part > self._most:
            self.now /= 2
        # twice as much work must not be too much again
        elif part < 0.4 * self._most:
            self.now = min(2 * self.now, self._share)
        self._since += passed
        self._worked = 0.0
