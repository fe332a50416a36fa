"""Probation: a version that was promoted while serving is judged by what it does, beside the one before it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic

import numpy as np

from models.vectors import Floats
from service.engines.predict import Prediction
from service.engines.stats import EngineStats
from service.settings import Settings
from service.telemetry.tracing import current_span

FAILURES, BATCHES, CONTEXTS = 5, 50, 30  # the least that say something
EVERY_S = 0.05  # seconds between two comparisons: few beside the requests, enough within any window
PATIENCE_S = 5.0


class Probation:
    """The verdict on `conduct`, for `watch_s` seconds from now, beside what `incumbent` did until now."""

    def __init__(
        self, incumbent: EngineStats, conduct: EngineStats, settings: Settings, clock: Callable[[], float] = monotonic
    ) -> None:
        self._before, self._conduct, self._bounds, self._clock = incumbent.latency_by_size(), conduct, settings, clock
        self._until = clock() + settings.watch_s
        self._least_s = min(settings.slo_ms, default=0.0) / 1000  # quicker than this is quick enough
        self._cosines, self._compared = 0.0, 0

    @property
    def is_over(self) -> bool:
        """Whether the window has ended."""
        return self._clock() >= self._until

    def compare(self, cosine: float) -> None:
        """Take note of how far an answer agrees with the incumbent's."""
        self._cosines += cosine
        self._compared += 1

    def fault(self) -> str | None:
        """Return what is out of bounds so far and by how much, None where nothing is."""
        return self._failing() or self._dragging() or self._disagreeing()

    def _failing(self) -> str | None:
        failed, most = self._conduct.failed, self._bounds.watch_errors
        calls = failed + self._conduct.answered
        if failed < FAILURES or failed <= most * calls:
            return None
        return f"{failed} of {calls} calls failed, LVM_WATCH_ERRORS is {most:g}"

    def _dragging(self) -> str | None:
        now = self._conduct.latency_by_size()
        both = [(now[rows], self._before[rows]) for rows in now.keys() & self._before.keys()]
        both = [(new, old) for new, old in both if min(new.batches, old.batches) >= BATCHES]
        theirs = sum(new.batches * max(old.seconds, self._least_s) for new, old in both)
        ratio = sum(new.batches * new.seconds for new, _ in both) / theirs if theirs else 0.0
        if ratio <= self._bounds.watch_slower:
            return None
        took = f"batches take {ratio:.1f} times as long as the incumbent's of as many rows"
        return f"{took}, LVM_WATCH_SLOWER is {self._bounds.watch_slower:g}"

    def _disagreeing(self) -> str | None:
        least, mean = self._bounds.watch_agreement, self._cosines / max(self._compared, 1)
        if self._compared < CONTEXTS or mean >= least:
            return None
        told = f"mean cosine {mean:.3f} to the incumbent's answers to {self._compared} contexts"
        return f"{told}, LVM_WATCH_AGREEMENT is {least:g}"


class Witness:
    """Asks the incumbent what it would have answered, one context at a time; callers neither wait nor fail with it."""

    def __init__(
        self,
        ask: Callable[[Floats, float], Awaitable[Prediction]],
        tell: Callable[[float], None],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._ask, self._tell, self._clock = ask, tell, clock
        self._next = clock()
        self._running: asyncio.Task[None] | None = None

    def consider(self, contexts: Floats, prediction: Prediction) -> None:
        """Compare the first of contexts `(n, T, D)` with its prediction, later, if it is time for one."""
        now = self._clock()
        if now < self._next or self._running:
            return
        self._next = now + EVERY_S
        self._running = asyncio.create_task(self._compare(contexts[:1], prediction.vectors[0]))
        self._running.add_done_callback(self._rest)

    def _rest(self, task: asyncio.Task[None]) -> None:
        self._running = None

    async def _compare(self, context: Floats, vector: Floats) -> None:
        current_span.set(None)  # the caller's trace is of what the caller waited for
        try:
            theirs = (await self._ask(context, self._clock() + PATIENCE_S)).vectors[0]
        except Exception:  # the incumbent's troubles say nothing about the version on probation
            return
        self._tell(_cosine(theirs, vector))


def _cosine(one: Floats, other: Floats) -> float:
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.vecdot(one, other)) / lengths if lengths else 0.0
