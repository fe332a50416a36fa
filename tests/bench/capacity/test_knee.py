"""The knee is found on a machine and in simulation, and moves as it should."""

import numpy as np
import pytest

from bench.capacity.costs import Costs, Line
from bench.capacity.knee import BATCHES, STEP, NoKnee, knee, simulate, up_and_down, worker_of
from bench.capacity.simulation import Worker
from service.app import create_app
from service.settings import Settings

GRU = Worker(8, 0.00008, 0.00008, Line(0.002, 0.0006), is_inline=False)


@pytest.mark.parametrize("limit", [3.0, 90.0, 101.0, 4321.0])
def test_finds_a_sharp_limit_within_a_step(limit: float) -> None:
    assert limit / STEP <= up_and_down(lambda rate: rate <= limit, 100.0, 14) <= limit * STEP


def test_finds_the_middle_of_a_noisy_limit() -> None:
    random = np.random.default_rng(0)
    found = up_and_down(lambda rate: rate <= 1000 * random.normal(1, 0.05), 300.0, 60)
    assert found == pytest.approx(1000, rel=0.03)


def test_rejects_an_objective_that_no_rate_holds() -> None:
    with pytest.raises(NoKnee):
        up_and_down(lambda rate: False, 100.0, 4)
    with pytest.raises(NoKnee):
        knee(GRU, p99_ms=1.0, probes=4)


def test_knee_rises_with_the_objective_and_the_core_up_to_full_batches() -> None:
    half = Worker(8, 0.00008, 0.00008, Line(0.002, 0.0006), is_inline=False, cores=0.5)
    strict, patient, slow = knee(GRU, 50.0, 8), knee(GRU, 100.0, 8), knee(half, 100.0, 8)
    assert slow < 0.7 * patient
    assert strict < patient < GRU.most_per_second


def test_beyond_the_knee_goodput_stays_and_the_rest_is_rejected() -> None:
    over = simulate(GRU, 2 * GRU.most_per_second, 5.0)
    assert over.rejected == pytest.approx(0.5, abs=0.1)
    assert over.goodput > 0.8 * GRU.most_per_second


def test_admits_as_many_rows_as_the_service() -> None:
    served = create_app(Settings()).state.admission.limit.rows
    assert served == BATCHES * Worker.max_batch == BATCHES * Settings().max_batch


def test_worker_has_the_measured_costs(costs: Costs) -> None:
    worker = worker_of(costs, "gru", "json", 8, cores=0.5)
    assert worker.read_s + worker.answer_s == pytest.approx(0.0001 + 8 * 0.00006)
    assert (worker.is_inline, worker.cores) == (False, 0.5)
    assert worker.batch.at(8) == 0.006
