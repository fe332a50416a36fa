"""The knee of a worker: the highest rate at which p99 keeps the objective and fewer than one in a thousand err.

It is found by the up-and-down method (Dixon and Mood, 1948): after a probe that holds the next rate is a step higher,
after one that does not a step lower, and the mean of the rates is the one that holds every other time. Simulation and
machine are probed in the same way, since the knee depends on how long a probe is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.capacity.costs import Costs
from bench.capacity.simulation import Simulation, SimulationResult, Worker
from bench.contract.measures import MAX_ERRORS
from loadtest.driver import schedule
from loadtest.plan import Wire
from service.overload.limiter import AdaptiveLimit

# Fraction of the event loop's time for a request that it spends before the net runs.
READING = 0.5
# Seconds of a probe, and the warm-up before it as a fraction of them.
PROBE_S, WARM_UP = 5.0, 0.2
# Probes of a simulation: its knee is known to 4 %.
PROBES = 30
# Requests of a probe: fewer show little, more take long to simulate.
LEAST, MOST = 500, 5_000
# Ratio of rates from probe to probe, until the first that does not hold and from there on.
LEAP, STEP = 1.25, 1.05
# Batches that may be in flight at most, as in `service.app`.
BATCHES = 4


class NoKnee(ValueError):
    """No rate of requests is low enough to keep the objective."""


def worker_of(costs: Costs, net: str, wire: Wire, rows: int, cores: float = 1.0) -> Worker:
    """Return the worker that serves `net` over `wire`; raises `BadCosts`."""
    known, request = costs.net(net, wire)
    spent = request.at(rows)
    return Worker(rows, READING * spent, (1 - READING) * spent, known.batch, known.is_inline, cores)


def simulate(worker: Worker, rate: float, seconds: float = PROBE_S, seed: int = 0) -> SimulationResult:
    """Simulate Poisson arrivals at `rate` per second for `seconds`, after a warm-up of a fifth of that."""
    seconds = min(max(seconds, LEAST / rate), MOST / rate)
    # As the load tester sends them.
    arrivals = schedule(rate, (1 + WARM_UP) * seconds, "poisson", seed).tolist()
    limit = AdaptiveLimit(BATCHES * worker.max_batch, 0.0)
    return Simulation(worker, limit).run(arrivals).after(WARM_UP * seconds)


def knee(worker: Worker, p99_ms: float, probes: int = PROBES) -> float:
    """Return the knee in requests per second; raises `NoKnee`."""
    seed = 0

    def holds(rate: float) -> bool:
        nonlocal seed
        seed += 1
        found = simulate(worker, rate, seed=seed)
        return found.rejected < MAX_ERRORS and found.p_ms(99) <= p99_ms

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
            raise NoKnee("the p99 limit is below the time of a single request on an idle worker")
    while holds(rate * LEAP):
        rate *= LEAP
    rates = [rate * LEAP**0.5]
    for _ in range(probes):
        rates.append(rates[-1] * (STEP if holds(rates[-1]) else 1 / STEP))
    return float(np.exp(np.mean(np.log(rates[len(rates) // 4 :]))))
