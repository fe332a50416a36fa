"""The simulation agrees with queueing theory, and batches and rejects by the rules of the service."""

from collections.abc import Sequence

import numpy as np
import pytest

from bench.capacity.costs import Line
from bench.capacity.simulation import Simulation, SimulationResult, Worker
from service.overload.limiter import FixedLimit

FREE = Line(0.0)


def poisson(rate: float, count: int) -> list[float]:
    times: list[float] = np.cumsum(np.random.default_rng(0).exponential(1 / rate, count)).tolist()
    return times


def threaded(batch: Line, rows: int = 1, loop_s: float = 0.0, cores: float = 2.0) -> Worker:
    return Worker(rows, loop_s / 2, loop_s / 2, batch, is_inline=False, cores=cores)


def seen(outcome: SimulationResult) -> float:
    """Return how many requests an arrival finds inside, on average."""
    leaves = outcome.arrived_s + outcome.latency_s
    found = [np.sum(leaves[:index] > at) for index, at in enumerate(outcome.arrived_s)]
    return float(np.mean(found))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_event_loop_alone_follows_the_pollaczek_khinchine_formula(load: float) -> None:
    service_s = 0.001
    worker = Worker(1, 0.0, service_s, FREE, is_inline=True)
    outcome = Simulation(worker).run(poisson(load / service_s, 20_000))
    assert outcome.latency_s.mean() == pytest.approx(service_s * (1 + load / (2 * (1 - load))), rel=0.03)
    assert outcome.busy_s / outcome.ended_s == pytest.approx(load, rel=0.02)


def test_requests_in_flight_follow_littles_law() -> None:
    worker = threaded(Line(0.002, 0.001), loop_s=0.001, cores=1.0)
    outcome = Simulation(worker).run(poisson(300, 4000))
    rate = len(outcome.arrived_s) / outcome.ended_s
    assert seen(outcome) == pytest.approx(rate * outcome.latency_s.mean(), rel=0.03)


def test_lone_request_takes_the_sum_of_its_parts() -> None:
    worker = threaded(Line(0.002, 0.001), rows=8, loop_s=0.004, cores=1.0)
    outcome = Simulation(worker).run([1.0])
    assert outcome.latency_s == pytest.approx([0.002 + 0.010 + 0.002])
    assert outcome.p_ms(99) == pytest.approx(14)


@pytest.mark.parametrize(("cores", "request_s"), [(2.0, 0.0002), (1.0, 0.0002 + 0.0001), (0.5, 2 * (0.0002 + 0.0001))])
def test_overload_is_answered_at_the_rate_of_full_batches(cores: float, request_s: float) -> None:
    worker = threaded(Line(0.0128, 0.0001), loop_s=0.0001, cores=cores)
    outcome = Simulation(worker).run(poisson(4 / request_s, 20_000))
    assert outcome.goodput == pytest.approx(1 / request_s, rel=0.03)
    assert worker.most_per_second == pytest.approx(1 / request_s)


@pytest.mark.parametrize(
    ("rows", "batches"),
    [
        (1, 2),  # one that found the net free, and all that waited for it
        (64, 6),  # two to a batch of 128
        (100, 11),  # a second one does not fit
    ],
)
def test_batch_holds_the_waiting_rows_up_to_its_limit(rows: int, batches: int) -> None:
    outcome = Simulation(threaded(Line(1.0), rows)).run([0.0, *[0.5] * 10])
    assert outcome.batches == batches


def test_parts_of_a_large_request_alternate_with_other_requests() -> None:
    worker = threaded(Line(1.0), rows=300)
    outcome = Simulation(worker).run([0.0, 0.5])
    assert outcome.batches == 5  # of the first, the first, the second, the second, and the rest of both
    assert outcome.latency_s.tolist() == pytest.approx([5.0, 4.5])


def test_event_loop_reads_all_arrivals_before_it_answers() -> None:
    worker = Worker(1, 1.0, 1.0, FREE, is_inline=True)
    outcome = Simulation(worker).run([0.0, 0.1, 0.2])
    assert outcome.latency_s.tolist() == pytest.approx([4.0, 4.9, 5.8])


@pytest.mark.parametrize("arrivals", [[0.0] * 5, poisson(100, 500)])
def test_rejects_requests_beyond_the_limit(arrivals: Sequence[float]) -> None:
    outcome = Simulation(threaded(Line(1.0), rows=8), FixedLimit(16)).run(arrivals)
    leaves = outcome.arrived_s + outcome.latency_s
    inside = [np.sum((outcome.arrived_s <= at) & (leaves > at)) for at in outcome.arrived_s]
    assert max(inside) == 2
    assert outcome.rejected > 0.5
    assert np.isnan(outcome.latency_s).sum() == round(outcome.rejected * len(arrivals))


def test_leaves_out_the_warm_up() -> None:
    outcome = Simulation(Worker(1, 1.0, 0.0, FREE, is_inline=True)).run([0.0, 5.0, 7.0]).after(2.0)
    assert outcome.arrived_s.tolist() == [5.0, 7.0]
    assert outcome.goodput == pytest.approx(2 / 6)
