"""The knee of a worker: the highest rate at which p99 keeps the objective and fewer than one in a thousand err.

It is looked for by the up-and-down method (Dixon and Mood, 1948): a probe that holds makes the next rate a step higher,
one that does not a step lower, and the mean of the rates is the one that holds every other time. Simulation and
machine are asked in the same way, as the knee depends on how long one looks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.capacity.costs import Costs
from bench.capacity.simulation import Outcome, Simulation, Worker
from loadtest.driver import schedule
from loadtest.plan import Wire
from service.overload.limiter import AdaptiveLimit

READING = 0.5  # of what the event loop spends on a request, before the net has it
ERRORS = 0.001  # of all arrivals
PROBE_S, WARM_UP = 5.0, 0.2  # and share of it that goes before
PROBES = 30  # of a simulation: its knee is known to 4 %
LEAST, MOST = 500, 5_000  # arrivals of a probe: fewer say little, more take long to simulate
LEAP, STEP = 1.25, 1.05  # from probe to probe, until the first that does not hold and from there on
BATCHES = 4  # may be in flight at most, as `service.app` has it


class NoKnee(ValueError):
    """An objective that is not kept however few requests come."""


def worker_of(costs: Costs, net: str, wire: Wire, rows: int, cores: float = 1.0) -> Worker:
    """Return the worker that serves `net` over `wire`; raises `BadCosts`."""
    known, request = costs.net(net, wire)
    spent = request.at(rows)
    return Worker(rows, READING * spent, (1 - READING) * spent, known.batch, known.is_inline, cores)


def offer(worker: Worker, rate: float, seconds: float = PROBE_S, seed: int = 0) -> Outcome:
    """Return what becomes of Poisson arrivals at `rate` per second, after a warm-up of a fifth of the time more."""
    seconds = min(max(seconds, LEAST / rate), MOST / rate)
    arrivals = schedule(rate, (1 + WARM_UP) * seconds, "poisson", seed).tolist()  # as the driver sends them
    limit = AdaptiveLimit(BATCHES * worker.max_batch, 0.0)
    return Simulation(worker, limit).run(arrivals).after(WARM_UP * seconds)


def knee(worker: Worker, p99_ms: float, probes: int = PROBES) -> float:
    """Return the knee in requests per second; raises `NoKnee`."""
    seed = 0

    def holds(rate: float) -> bool:
        nonlocal seed
        seed += 1
        found = offer(worker, rate, seed=seed)
        return found.refused < ERRORS and found.p_ms(99) <= p99_ms

    return up_and_down(holds, worker.most_per_second / 2, probes)


def up_and_down(holds: Callable[[float], bool], start: float, probes: int) -> float:
    """Return the rate that holds every other time, by so many probes from `start` on.

    Raises:
        NoKnee: not even a thousandth of `start` holds.
    """
    rate = start
    while not holds(rate):
        rate /= LEAP
        if rate < start / 1000:
            raise NoKnee("the objective is less than a request takes alone")
    while holds(rate * LEAP):
        rate *= LEAP
    rates = [rate * LEAP**0.5]
    for _ in range(probes):
        rates.append(rates[-1] * (STEP if holds(rates[-1]) else 1 / STEP))
    return float(np.exp(np.mean(np.log(rates[len(rates) // 4 :]))))
