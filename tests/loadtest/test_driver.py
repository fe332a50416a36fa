"""An open loop keeps its schedule whatever the server does, a closed one waits for each response."""

from typing import Any

import numpy as np
import pytest

from loadtest import driver
from loadtest.plan import Plan
from loadtest.report import measured


def test_fixed_arrivals_are_evenly_spaced() -> None:
    np.testing.assert_allclose(driver.schedule(4.0, 1.5, "fixed", 0), [0, 0.25, 0.5, 0.75, 1.0, 1.25])


def test_poisson_arrivals_are_seeded_and_have_the_rate_and_spread_of_a_poisson_process() -> None:
    times = driver.schedule(1000.0, 20.0, "poisson", 7)
    gaps = np.diff(times)
    assert len(times) == pytest.approx(20_000, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert times[-1] < 20.0
    np.testing.assert_array_equal(times, driver.schedule(1000.0, 20.0, "poisson", 7))
    assert not np.array_equal(times[:50], driver.schedule(1000.0, 20.0, "poisson", 8)[:50])


def test_stall_is_charged_to_every_request_that_waits_for_it(serve: Any, drive: Any) -> None:
    stall = 0.3
    fake = serve(lambda n: {"hang": stall} if n == 20 else {})
    summary = drive(fake.url, rate=200.0, seconds=1.0, connections=1)
    # 40 of 200 arrivals fall into the first 0.2 s of the stall, so each of them waits 0.1 s or more.
    assert summary.latency_ms["p90"] >= 100
    assert summary.latency_ms["p99"] >= 250
    assert summary.latency_ms["max"] >= stall * 1000
    # One slow request in two hundred: a closed loop would have shown this p99 instead.
    assert summary.service_ms["p99"] < summary.latency_ms["p99"]


def test_sends_nothing_early_and_keeps_times_in_order(serve: Any) -> None:
    plan = Plan(url=serve().url, rate=300.0, seconds=0.2, arrivals="poisson", wire="octet")
    samples = measured(plan, driver.run(plan))
    assert (samples.fired >= samples.intended).all()
    assert (samples.sent >= samples.fired).all()
    assert (samples.done >= samples.sent).all()
    assert (samples.latency_ms >= samples.service_ms).all()


def test_sends_the_warm_up_but_leaves_it_out_of_the_figures(serve: Any, drive: Any) -> None:
    fake = serve(lambda n: {"status": 503} if n < 10 else {})
    summary = drive(fake.url, rate=100.0, seconds=0.2, warmup=0.1, connections=1)
    assert (summary.warmup_sent, summary.sent, len(fake.requests)) == (10, 20, 30)
    assert summary.statuses == {"200": 20}


def test_reports_progress_up_to_the_end(serve: Any) -> None:
    seen: list[tuple[int, int]] = []
    driver.run(Plan(url=serve().url, rate=100.0, seconds=0.1), lambda *counts: seen.append(counts))
    assert seen[-1] == (10, 10)


def test_closed_loop_keeps_its_connections_busy_and_no_more(serve: Any, drive: Any) -> None:
    fake = serve(lambda n: {"hang": 0.01})
    summary = drive(fake.url, arrivals="closed", rate=0.0, connections=3, seconds=0.2)
    assert fake.peak == 3
    assert summary.connections == {"opened": 3, "peak": 3}
    assert summary.sent == summary.answered == len(fake.requests) > 3
    assert summary.failures == {"refused": 0, "lost": 0, "timeout": 0, "invalid": 0}
    assert summary.ok


def test_closed_loop_waits_for_a_slow_response_instead_of_sending_more(serve: Any, drive: Any) -> None:
    fake = serve(lambda n: {"hang": 0.3})
    summary = drive(fake.url, arrivals="closed", rate=0.0, connections=1, seconds=0.1)
    assert summary.answered == summary.sent == len(fake.requests) == 1


@pytest.mark.parametrize("trouble", [{"cut": 0}, {"hang": 5.0}])
def test_closed_loop_goes_on_after_a_lost_or_late_response(serve: Any, drive: Any, trouble: dict[str, Any]) -> None:
    fake = serve(lambda n: trouble if n == 1 else {})
    summary = drive(fake.url, arrivals="closed", rate=0.0, connections=1, seconds=0.4, timeout=0.1)
    assert summary.failures["lost"] + summary.failures["timeout"] == 1
    assert summary.answered == summary.sent - 1 > 1


def test_closed_loop_ends_in_time_without_a_server(closed_url: str, drive: Any) -> None:
    summary = drive(closed_url, arrivals="closed", rate=0.0, connections=2, seconds=0.1)
    assert summary.failures["refused"] == summary.arrivals > 1
