"""The open loop: arrivals are laid out before the run and fire on time, whatever the server does."""

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
from loadtest.client import Pool
from loadtest.payloads import Answers, Exchange, encode
from loadtest.plan import Arrivals, Plan, PlanError
from loadtest.record import Record

Progress = Callable[[int, int], None]
Check = Callable[[int, bytes | None, bytes], bool]

_LEAD_S = 0.02
_TICK_S = 0.25


def schedule(rate: float, seconds: float, arrivals: Arrivals, seed: int) -> npt.NDArray[np.float64]:
    """Lay out arrival times (seconds from the start) at `rate` per second; Poisson is seeded."""
    if arrivals == "fixed":
        return np.arange(round(rate * seconds)) / rate
    mean = rate * seconds
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(mean + 10 * mean**0.5 + 10))
    times = np.cumsum(gaps)
    return times[times < seconds]


class Pacer:
    """Fires each arrival at its time; after a delay all that are due fire at once, none is skipped."""

    def __init__(self, times: Sequence[float], fire: Callable[[int], None]) -> None:
        """Call `fire(i)` at `times[i]`, seconds of `time.monotonic()` in rising order."""
        self.times, self.fire, self.next = times, fire, 0
        self.alarm = clock.alarm(self._ring)

    def start(self) -> None:
        """Arm the alarm for the first arrival."""
        if len(self.times):
            self.alarm.at(self.times[0])

    def close(self) -> None:
        """Fire no more."""
        self.alarm.close()

    def _ring(self) -> None:
        now = monotonic()
        while self.next < len(self.times) and self.times[self.next] <= now:
            self.next += 1
            self.fire(self.next - 1)
        if self.next < len(self.times):
            self.alarm.at(self.times[self.next])


def run(plan: Plan, progress: Progress | None = None) -> Record:
    """Run one plan to its last answer, failure or timeout; `progress(finished, total)` as it goes."""
    vectors = contexts.load(Path(plan.contexts) if plan.contexts else contexts.SHIPPED)
    exchange = Exchange(plan.route, plan.wire, plan.rows, vectors.shape[-1], plan.query)
    requests = encode(exchange, plan.url, plan.headers, vectors)
    offsets = schedule(plan.rate, plan.warmup + plan.seconds, plan.arrivals, plan.seed).tolist()
    check = _check(exchange, plan.answers)
    with _no_collector():
        return uvloop.run(_drive(plan, requests, check, offsets, progress))


def _check(exchange: Exchange, answers: str | None) -> Check:
    if answers is None:
        return lambda index, version, body: exchange.is_whole(body)
    try:
        with np.load(answers, allow_pickle=False) as file:
            return Answers(exchange, dict(file)).is_right
    except (OSError, ValueError) as error:
        raise PlanError(f"{answers}: {error}") from error


async def _drive(
    plan: Plan,
    requests: Sequence[bytes],
    check: Check,
    offsets: Sequence[float],
    progress: Progress | None,
) -> Record:
    record = Record(offsets, monotonic() + _LEAD_S)
    pool = Pool(plan.url, requests, check, record, plan.connections, plan.timeout, plan.source)
    pacer = Pacer(record.intended, pool.dispatch)
    pacer.start()
    try:
        await _watch(pool, len(record), min(_TICK_S, plan.timeout / 20), progress)
    finally:
        pacer.close()
        await pool.close()
    return record


async def _watch(pool: Pool, total: int, tick: float, progress: Progress | None) -> None:
    while pool.remaining:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(tick):
                await pool.finished.wait()
        pool.expire()
        if progress is not None:
            progress(total - pool.remaining, total)


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    # A full collection stops the generator for longer than the service takes to answer.
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
