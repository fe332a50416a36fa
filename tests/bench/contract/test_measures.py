"""A broken promise shows in the figure of that promise."""

from typing import Any

import numpy as np
import pytest

from bench.contract import measures
from loadtest.samples import Samples
from tests.made_samples import make


def _beyond(load: Any, capacity: float = 100.0, steady: float = 10.0, slo: float = 100.0) -> dict[str, Any]:
    return measures.overload(load, (0.0, 1.0), capacity, steady, slo)


def test_overload_with_proper_rejections_meets_the_limits() -> None:
    served, refused = make(-1, 1), make(0, 1, rate=900, outcome=503, retry_after=True, latency_ms=2.0)
    figures = _beyond(Samples.joined([served, refused]))
    assert figures["goodput_by_c"] == pytest.approx(1.0, abs=0.02)
    assert figures["p99_by_limit"] == pytest.approx(0.5)
    assert figures["rejected_p99_ms"] == pytest.approx(2.0)
    assert (figures["unexpected"], figures["without_retry_after"]) == (0, 0)


def test_counts_rejections_without_retry_after_and_unexpected_answers() -> None:
    wrong = make(0, 0.05, good=False)
    parts = [make(0, 1), make(0, 0.1, outcome=503), make(0, 0.2, outcome=504), make(0, 0.1, outcome=-3), wrong]
    figures = _beyond(Samples.joined(parts))
    assert figures["without_retry_after"] == 10
    assert figures["unexpected"] == 20 + 10 + 5


def test_latency_limit_is_the_lower_of_twice_the_steady_one_and_the_slo() -> None:
    load = make(0, 1, latency_ms=30.0)
    assert _beyond(load, steady=10.0, slo=100.0)["p99_by_limit"] == pytest.approx(1.5)
    assert _beyond(load, steady=50.0, slo=20.0)["p99_by_limit"] == pytest.approx(1.5)


def test_load_that_was_not_offered_measures_nothing() -> None:
    load = make(0, 1, sent=np.r_[np.arange(90) / 100, np.full(10, 3.0)])
    figures = _beyond(load)
    assert not figures["is_offered"]
    assert figures["goodput_by_c"] is figures["p99_by_limit"] is figures["unexpected"] is None


@pytest.mark.parametrize(("slow_s", "expected"), [(0, 0.0), (2, 2.0), (7, 7.0), (9, None)])
def test_recovery_ends_with_three_normal_seconds(slow_s: int, expected: float | None) -> None:
    latency = np.where(np.arange(1000) < slow_s * 100, 200.0, 10.0)
    load = Samples.joined([make(0, 10), make(20, 30, latency_ms=latency)])
    assert measures.recovery(load, (0, 10), (20, 30)) == expected


def test_recovery_waits_for_the_success_share_too() -> None:
    outcome = np.where(np.arange(1000) < 400, 503, 200)
    load = Samples.joined([make(0, 10), make(20, 30, outcome=outcome)])
    assert measures.recovery(load, (0, 10), (20, 30)) == 4.0


def test_promotions_compare_requests_in_a_swap_with_those_between() -> None:
    version = np.where(np.arange(1000) < 500, "a", "b")
    in_swap = (np.arange(1000) >= 450) & (np.arange(1000) < 550)
    outcome = np.where(np.arange(1000) == 700, 503, 200)
    good = (outcome == 200) & (np.arange(1000) != 800)
    load = make(0, 10, version=version, latency_ms=np.where(in_swap, 40.0, 10.0), outcome=outcome, good=good)
    figures = measures.promotions(load, (0, 10), [(4.5, 5.5)])
    assert figures["p99_by_steady"] == pytest.approx(4.0)
    assert (figures["failed"], figures["wrong"], figures["versions"]) == (1, 1, 2)


def test_memory_that_grows_a_mebibyte_in_ten_minutes_has_a_slope_of_one() -> None:
    at = np.arange(0.0, 1200.0)
    assert measures.slope_mib(at, 3e8 + at / 600 * 2**20) == pytest.approx(1.0)
    assert measures.slope_mib(at, np.full(1200, 3e8)) == pytest.approx(0.0, abs=1e-6)


def test_shutdown_shows_stale_readiness_and_lost_requests() -> None:
    probes = make(0, 2, outcome=np.where(np.arange(200) <= 103, 200, 503))
    outcome = np.full(200, 200)
    outcome[150:160], outcome[170], outcome[171] = -3, 500, 503
    sent = np.arange(200) / 100
    sent[150:155] = 0.0
    figures = measures.shutdown(make(0, 2, outcome=outcome, sent=sent), probes, signalled=1.0)
    assert figures["ready_for_s"] == pytest.approx(0.03)
    assert figures["was_unready"] == 96
    assert (figures["unanswered"], figures["unexpected"], figures["answered"]) == (5, 1, 190)


def test_timeline_counts_every_request_once() -> None:
    load = Samples.joined([make(0, 2), make(1, 2, outcome=429), make(1, 1.5, outcome=-2)])
    known = measures.timeline(load, (0, 2))
    assert (known["good"], known["refused"], known["other"]) == ([100, 100], [0, 100], [0, 50])
