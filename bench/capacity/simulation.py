"""One serving process as a queueing network in discrete events: an event loop, a net, and the cores they share.

The event loop does, turn by turn, what is to be called soon and then what can be read. A net that is quick enough runs
there; any other is a second station: when it is free, it takes what has queued, up to a full batch, as in
`service.engines.batcher`. If both have only one core, each works at half speed (processor sharing, Kleinrock 1967).
Admission and the size of batches are decided by the classes that decide them in the service.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import inf, nan
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.engines.batch_sizer import BatchSizer
from service.engines.batcher import MAX_QUEUED_PARTS
from service.overload.limiter import Limit

Begin: TypeAlias = Callable[[], float]
End: TypeAlias = Callable[[], None]


class Cost(Protocol):
    """Seconds by a count: `costs.Line` or `costs.Curve`."""

    def at(self, count: float) -> float:
        """Return the seconds for `count`."""
        ...


@dataclass(frozen=True)
class Worker:
    """What one process spends on requests of `rows` contexts: seconds of a core.

    `read_s` and `answer_s` of the event loop; a batch of n rows costs `batch.at(n)`, on the event loop if `is_inline`.
    """

    rows: int
    read_s: float
    answer_s: float
    batch: Cost
    is_inline: bool
    cores: float = 1.0
    max_batch: int = 128

    @property
    def most_per_second(self) -> float:
        """Requests a second that no more than its cores allow, all batches of the best size."""
        loop_s = self.read_s + self.answer_s
        net_s = self.rows * min(self.batch.at(rows) / rows for rows in range(1, self.max_batch + 1))
        if self.is_inline:
            return min(1.0, self.cores) / (loop_s + net_s)
        return 1 / max((loop_s + net_s) / self.cores, loop_s, net_s)


@dataclass(frozen=True)
class SimulationResult:
    """Arrival times, seconds until each answer (NaN if it was rejected), and how long the cores worked."""

    arrived_s: NDArray[np.float64]
    latency_s: NDArray[np.float64]
    ended_s: float
    busy_s: float
    batches: int
    began_s: float = 0.0

    @property
    def rejected(self) -> float:
        """The fraction of requests that were rejected."""
        return float(np.isnan(self.latency_s).mean()) if len(self.latency_s) else 0.0

    @property
    def goodput(self) -> float:
        """Answers per second."""
        return float((~np.isnan(self.latency_s)).sum()) / (self.ended_s - self.began_s)

    def after(self, begin_s: float) -> SimulationResult:
        """Return the outcome without the arrivals before `begin_s`."""
        kept = self.arrived_s >= begin_s
        return replace(self, arrived_s=self.arrived_s[kept], latency_s=self.latency_s[kept], began_s=begin_s)

    def p_ms(self, percentile: float) -> float:
        """Return a percentile of the answers' latency, by nearest rank; infinite without any."""
        answered = self.latency_s[~np.isnan(self.latency_s)]
        return float(np.percentile(answered, percentile, method="inverted_cdf")) * 1e3 if len(answered) else inf


class Station:
    """Does jobs one after the other; the cost of a job is known when it begins."""

    def __init__(self) -> None:
        self.left = 0.0
        self._end: End | None = None
        self._queue: deque[tuple[Begin, End]] = deque()

    @property
    def is_busy(self) -> bool:
        """Whether a job is under way."""
        return self._end is not None

    def put(self, begin: Begin, end: End) -> None:
        """Queue a job."""
        self._queue.append((begin, end))
        self.start()

    def start(self) -> None:
        """Begin the next job, if there is one and none is under way."""
        if self._end is None and self._queue:
            begin, self._end = self._queue.popleft()
            self.left = begin()

    def finish(self) -> None:
        """End the job under way and begin the next."""
        end, self._end = self._end, None
        assert end is not None
        end()
        self.start()


class EventLoop(Station):
    """Works in turns: all that is to be called soon by now, then all sockets that can be read by now."""

    def __init__(self) -> None:
        super().__init__()
        # To be called soon, and sockets.
        self._next: list[deque[tuple[Begin, End]]] = [deque(), deque()]
        self._turn = 0

    def put(self, begin: Begin, end: End) -> None:
        """Do a job soon."""
        self._next[0].append((begin, end))
        self.start()

    def receive(self, begin: Begin, end: End) -> None:
        """Do a job when sockets are read."""
        self._next[1].append((begin, end))
        self.start()

    def start(self) -> None:
        """Begin the next job of this turn or of the next."""
        if not self.is_busy and not self._queue:
            self._turn = self._turn if not self._next[1 - self._turn] else 1 - self._turn
            self._queue, self._next[self._turn] = self._next[self._turn], deque()
        super().start()


class SimulatedRequest:
    """One request: when it arrived and was admitted, its rows not yet in the queue, and its parts that are."""

    __slots__ = ("arrived", "index", "parts", "rows", "since")

    def __init__(self, index: int, arrived: float, rows: int) -> None:
        self.index = index
        self.arrived = arrived
        self.since = arrived
        self.rows = rows
        self.parts = 0


class Simulation:
    """One run of one worker; without a `limit` it admits every request."""

    def __init__(self, worker: Worker, limit: Limit | None = None) -> None:
        self._worker, self._limit = worker, limit
        self._loop = EventLoop()
        self._net: Station = self._loop if worker.is_inline else Station()
        self._stations = [self._loop] if worker.is_inline else [self._loop, self._net]
        self._kind = ("/predict", "", worker.rows.bit_length())
        self._now = self._busy = 0.0
        self._in_flight = self._batches = 0
        self._sizing = BatchSizer(worker.max_batch)
        self._waiting: deque[tuple[SimulatedRequest, int]] = deque()
        self._will_run = False
        self._latency: list[float] = []

    def run(self, arrivals: Iterable[float]) -> SimulationResult:
        """Simulate requests that arrive at `arrivals`, seconds in rising order."""
        times = list(arrivals)
        for index, at in enumerate(times):
            self._advance(at)
            self._now = at
            self._latency.append(nan)
            self._arrive(SimulatedRequest(index, at, self._worker.rows))
        self._advance(inf)
        return SimulationResult(np.array(times), np.array(self._latency), self._now, self._busy, self._batches)

    def _advance(self, until: float) -> None:
        """Let the stations work until then, or until nothing is left to do."""
        while busy := [station for station in self._stations if station.is_busy]:
            speed = min(1.0, self._worker.cores / len(busy))
            first = min(busy, key=lambda station: station.left)
            ends = self._now + first.left / speed
            span = min(ends, until) - self._now
            self._busy += span * speed * len(busy)
            self._now += span
            for station in busy:
                station.left -= span * speed
            if ends > until:
                return
            first.left = 0.0
            first.finish()

    def _arrive(self, request: SimulatedRequest) -> None:
        self._loop.receive(lambda: self._worker.read_s, lambda: self._enter(request))

    def _enter(self, request: SimulatedRequest) -> None:
        if self._limit and self._in_flight >= self._limit.rows:
            self._limit.record_rejection(self._now)
            return
        self._in_flight += self._worker.rows
        request.since = self._now
        for _ in range(MAX_QUEUED_PARTS):
            self._queue(request)
        self._run_batch()

    def _queue(self, request: SimulatedRequest) -> None:
        """Queue the next part of a request, if there is one: parts of other requests run between them."""
        if request.rows:
            rows = min(request.rows, self._worker.max_batch)
            request.rows, request.parts = request.rows - rows, request.parts + 1
            self._waiting.append((request, rows))

    def _run_batch(self) -> None:
        if self._waiting and not self._will_run:
            self._will_run = True
            batch: list[SimulatedRequest] = []
            self._net.put(lambda: self._gather(batch), lambda: self._deliver(batch))

    def _gather(self, batch: list[SimulatedRequest]) -> float:
        """Fill `batch` with what waits and fits; return its cost in seconds."""
        rows = 0
        while self._waiting and (not batch or rows + self._waiting[0][1] <= self._sizing.rows):
            request, part = self._waiting.popleft()
            rows += part
            batch.append(request)
        self._batches += 1
        seconds = self._worker.batch.at(rows)
        self._sizing.learn(rows, seconds)
        return seconds

    def _deliver(self, batch: list[SimulatedRequest]) -> None:
        self._will_run = False
        for request in batch:
            request.parts -= 1
            self._queue(request)
            if not request.parts:
                self._loop.put(lambda: self._worker.answer_s, partial(self._answer, request))
        self._run_batch()

    def _answer(self, request: SimulatedRequest) -> None:
        self._latency[request.index] = self._now - request.arrived
        if self._limit:
            self._limit.observe(self._kind, self._now - request.since, self._in_flight, self._now)
        self._in_flight -= self._worker.rows
