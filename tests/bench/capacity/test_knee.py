"""The knee is found where it is, by machine or simulation, and moves as it should."""

import numpy as np
import pytest

from bench.capacity.costs import Costs, Line
from bench.capacity.knee import BATCHES, STEP, NoKnee, knee, simulate, up_and_down, worker_of
from bench.capacity.simulation import Worker
from service.app import create_app
from service.settings import Settings

GRU = Worker(8, 0.00008, 0.00008, Line(0.002, 0.0006), is_inline=False)


@pytest.mark.parametrize("limit", [3.0, 90.0, 101.0, 4321.0])
def test_a_sharp_limit_is_found_within_a_step(limit: float) -> None:
    assert limit / STEP <= up_and_down(lambda rate: rate <= limit, 100.0, 14) <= limit * STEP


def test_a_limit_that_wavers_is_found_in_its_middle() -> None:
    random = np.random.default_rng(0)
    found = up_and_down(lambda rate: rate <= 1000 * random.normal(1, 0.05), 300.0, 60)
    assert found == pytest.approx(1000, rel=0.03)


def test_where_nothing_holds_there_is_no_knee() -> None:
    with pytest.raises(NoKnee):
        up_and_down(lambda rate: False, 100.0, 4)
    with pytest.raises(NoKnee):
        knee(GRU, p99_ms=1.0, probes=4)


def test_more_patience_and_more_of_a_core_move_the_knee_up_and_full_batches_bound_it() -> None:
    half = Worker(8, 0.00008, 0.00008, Line(0.002, 0.0006), is_inline=False, cores=0.5)
    strict, patient, slow = knee(GRU, 50.0, 8), knee(GRU, 100.0, 8), knee(half, 100.0, 8)
    assert slow < 0.7 * patient
    assert strict < patient < GRU.most_per_second


def test_beyond_the_knee_the_service_goes_on_and_refuses_the_rest() -> None:
    over = simulate(GRU, 2 * GRU.most_per_second, 5.0)
    assert over.rejected == pytest.approx(0.5, abs=0.1)
    assert over.goodput > 0.8 * GRU.most_per_second


def test_no_more_may_be_in_flight_than_in_the_service() -> None:
    served = create_app(Settings()).state.admission.limit.rows
    assert served == BATCHES * Worker.max_batch == BATCHES * Settings().max_batch


def test_a_worker_spends_what_was_measured(costs: Costs) -> None:
    worker = worker_of(costs, "gru", "json", 8, cores=0.5)
    assert worker.read_s + worker.answer_s == pytest.approx(0.0001 + 8 * 0.00006)
    assert (worker.is_inline, worker.cores) == (False, 0.5)
    assert worker.batch.at(8) == 0.006
