"""Runs a plan: an open loop, whose requests start on time whatever the server does, or a closed one."""

import asyncio
import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic

import numpy as np
import numpy.typing as npt
import uvloop

from loadtest import clock, contexts
from loadtest.payloads import Answers, Exchange, encode
from loadtest.plan import Arrivals, Plan
from loadtest.pool import Check, Pool
from loadtest.record import Record

Progress = Callable[[int, int], None]

_LEAD_S = 0.02
_TICK_S = 0.25


def schedule(rate: float, seconds: float, arrivals: Arrivals, seed: int) -> npt.NDArray[np.float64]:
    """Return the arrival times of an open loop, seconds from its start, at `rate` per second; Poisson is seeded."""
    if arrivals == "fixed":
        return np.arange(round(rate * seconds)) / rate
    mean = rate * seconds
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(mean + 10 * mean**0.5 + 10))
    times = np.cumsum(gaps)
    return times[times < seconds]


class OpenLoop:
    """Starts each request at its intended time; after a delay all that are due start at once, none is skipped."""

    def __init__(self, times: Sequence[float], start: Callable[[int], None]) -> None:
        """Call `start(i)` at `times[i]`, seconds of `time.monotonic()` in rising order."""
        self.times = times
        self.total = len(times)
        self.next = 0
        self._start = start
        self._alarm = clock.alarm(self._ring)

    async def begin(self) -> None:
        """Arm the alarm for the first request."""
        if len(self.times):
            self._alarm.at(self.times[0])

    def close(self) -> None:
        """Start no more requests."""
        self._alarm.close()

    def _ring(self) -> None:
        now = monotonic()
        while self.next < self.total and self.times[self.next] <= now:
            self.next += 1
            self._start(self.next - 1)
        if self.next < self.total:
            self._alarm.at(self.times[self.next])


class ClosedLoop:
    """Keeps a request in flight on every connection for some seconds: each response starts the next request."""

    def __init__(self, pool: Pool, seconds: float) -> None:
        self._pool = pool
        self._seconds = seconds
        self._end = 0.0
        pool.on_finish = self._next

    @property
    def total(self) -> int:
        """The requests until now; how many there will be is not known before the end."""
        return len(self._pool.record)

    async def begin(self) -> None:
        """Connect, which is no part of any latency, then start the first request on every connection."""
        await self._pool.connect()
        self._pool.record.start = monotonic()
        self._end = self._pool.record.start + self._seconds
        for _ in range(self._pool.plan.connections):
            self._pool.add()

    def close(self) -> None:
        """Start no more requests."""
        self._end = 0.0

    def _next(self) -> None:
        if monotonic() < self._end:
            self._pool.add()


def run(plan: Plan, progress: Progress | None = None) -> Record:
    """Run one plan to its last response, failure or timeout; `progress(finished, total)` as it goes.

    Raises:
        PlanError: contexts or answers cannot be read.
    """
    vectors = contexts.load(Path(plan.contexts) if plan.contexts else contexts.SHIPPED)
    exchange = Exchange(plan.route, plan.wire, plan.rows, vectors.shape[-1], plan.query)
    requests = encode(exchange, plan.url, plan.headers, vectors)
    check = Answers.read(exchange, Path(plan.answers)).difference if plan.answers else exchange.difference
    with _no_collector():
        return uvloop.run(_drive(plan, requests, check, progress))


async def _drive(plan: Plan, requests: Sequence[bytes], check: Check, progress: Progress | None) -> Record:
    seconds = plan.warmup + plan.seconds
    offsets = () if plan.is_closed else schedule(plan.rate, seconds, plan.arrivals, plan.seed).tolist()
    record = Record(monotonic() + _LEAD_S, offsets)
    pool = Pool(plan, requests, check, record)
    loop = ClosedLoop(pool, seconds) if plan.is_closed else OpenLoop(record.intended, pool.dispatch)
    try:
        await loop.begin()
        await _watch(pool, loop, min(_TICK_S, plan.timeout / 20), progress)
    finally:
        loop.close()
        await pool.close()
    return record


async def _watch(pool: Pool, loop: OpenLoop | ClosedLoop, tick: float, progress: Progress | None) -> None:
    while pool.unfinished:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(tick):
                await pool.finished.wait()
        pool.expire()
        if progress is not None:
            progress(loop.total - pool.unfinished, loop.total)


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    # A full collection stops the generator for longer than the service takes to respond.
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
