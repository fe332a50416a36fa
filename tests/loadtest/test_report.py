"""Figures come from the record: exact counts, measured latencies, a verdict for each threshold."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadtest import plot, report
from loadtest.plan import Plan
from loadtest.record import Failure, Record

KEYS = {
    "config", "sent", "answered", "statuses", "failures", "versions", "served_by", "error_rate",
    "offered_rate", "achieved_rate", "goodput", "latency_ms", "service_ms", "generator_lag_ms",
    "thresholds", "ok",
}  # fmt: skip


def make_plan(**settings: Any) -> Plan:
    return Plan(**{"url": "http://host", "rate": 100.0, "seconds": 1.0, **settings})


def make_record(count: int = 100, start: float = 1000.0, lag: float = 0.0) -> Record:
    """Arrival i is due at i x 10 ms, is sent `lag` seconds late and answered 200 after i + 1 ms."""
    record = Record(start, (i / 100 for i in range(count)))
    for i, due in enumerate(record.intended):
        record.fired[i] = record.sent[i] = due + lag
        record.done[i] = record.sent[i] + (i + 1) / 1000
        record.outcome[i] = 200
    return record


def test_percentiles_are_by_nearest_rank_and_from_the_intended_start() -> None:
    summary = report.summarise(make_plan(), make_record(lag=0.005))
    service = {"mean": 50.5, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "p999": 100, "max": 100}
    assert summary.service_ms == pytest.approx(service, abs=1e-3)
    assert summary.latency_ms == pytest.approx({k: v + 5 for k, v in service.items()}, abs=1e-3)
    assert summary.generator_lag_ms["p99"] == pytest.approx(5, abs=1e-3)


def test_every_arrival_is_counted_once() -> None:
    record = make_record()
    for index, kind in enumerate(Failure):
        record.outcome[index] = kind
    record.sent[list(Failure).index(Failure.REFUSED)] = 0.0
    record.outcome[20], record.outcome[21], record.invalid[22] = 503, 504, True
    summary = report.summarise(make_plan(), record)
    assert summary.failures == {"refused": 1, "lost": 3, "timeout": 1, "invalid": 1}
    assert summary.statuses == {"200": 93, "503": 1, "504": 1}
    failed = summary.failures["refused"] + summary.failures["lost"] + summary.failures["timeout"]
    assert summary.arrivals == summary.answered + failed == 100
    assert summary.sent == 99
    assert summary.error_rate == pytest.approx(0.08)
    assert summary.goodput == pytest.approx(92 / 1.09)


def test_figures_leave_out_the_warm_up() -> None:
    record = make_record()
    record.outcome[29], record.outcome[30] = 500, 501
    summary = report.summarise(make_plan(seconds=0.7, warmup=0.3), record)
    assert (summary.warmup_sent, summary.arrivals) == (30, 70)
    assert summary.statuses == {"200": 69, "501": 1}


@pytest.mark.parametrize(
    ("limits", "broken"),
    [
        ({}, []),
        ({"max_p99_ms": 99.1, "min_goodput": 90.0}, []),
        ({"max_p99_ms": 98.0}, ["p99_ms"]),
        ({"min_goodput": 101.0, "max_p99_ms": 1.0}, ["p99_ms", "goodput"]),
        ({"max_error_rate": -1.0}, ["error_rate"]),
    ],
)
def test_thresholds_decide(limits: dict[str, float], broken: list[str]) -> None:
    summary = report.summarise(make_plan(**limits), make_record())
    assert [threshold.name for threshold in summary.thresholds if not threshold.ok] == broken
    assert summary.ok == (not broken)


def test_latency_limit_without_answers_is_broken() -> None:
    record = make_record()
    for index in range(len(record)):
        record.outcome[index] = Failure.LOST_FRESH
    summary = report.summarise(make_plan(max_p99_ms=1000.0, max_error_rate=1.0), record)
    assert [threshold.name for threshold in summary.thresholds if not threshold.ok] == ["p99_ms"]
    assert "BROKEN p99_ms none" in report.to_text(summary)


@pytest.mark.parametrize(("lag", "warned"), [(0.009, False), (0.011, True)])
def test_warns_if_the_generator_is_behind_its_schedule(lag: float, warned: bool) -> None:
    assert bool(report.summarise(make_plan(), make_record(lag=lag)).warnings) is warned


def test_late_requests_do_not_count_as_offered() -> None:
    record = make_record()
    for index in range(85, 100):
        record.sent[index] += 1.0
    summary = report.summarise(make_plan(), record)
    assert (summary.intended_rate, summary.offered_rate) == (100, 85)
    assert [threshold.name for threshold in summary.thresholds if not threshold.ok] == ["offered_rate"]
    assert not summary.ok
    assert "was not offered" in " ".join(summary.warnings)
    assert report.summarise(make_plan(min_offered=0.8), record).ok


def test_json_of_a_run_is_one_object_and_of_a_scenario_a_list() -> None:
    good = report.summarise(make_plan(), make_record())
    bad = report.summarise(make_plan(max_p99_ms=1.0), make_record())
    assert json.loads(report.to_json([good])).keys() >= KEYS
    scenario = json.loads(report.to_json([good, bad], "two"))
    assert (scenario["scenario"], scenario["ok"]) == ("two", False)
    assert [step["ok"] for step in scenario["steps"]] == [True, False]


def test_writes_reports(tmp_path: Path) -> None:
    summaries = [report.summarise(make_plan(name=name), make_record()) for name in ("a", "b")]
    report.write(tmp_path / "new", summaries, "two")
    assert json.loads((tmp_path / "new/report.json").read_text())["ok"]
    rows = (tmp_path / "new/report.md").read_text().splitlines()
    assert rows[0].count("|") == rows[1].count("|") == rows[2].count("|")
    assert rows[2].startswith("| a | json predict x 1 | 100.0 |")


@pytest.mark.parametrize("outcome", [200, 503])
def test_draws_a_picture_even_without_good_answers(tmp_path: Path, outcome: int) -> None:
    record = make_record()
    for index in range(10, len(record)):
        record.outcome[index] = outcome
    for index in range(10):
        record.outcome[index] = Failure.TIMEOUT
    plot.draw(tmp_path / "new/run.png", make_plan(), record)
    assert (tmp_path / "new/run.png").read_bytes().startswith(b"\x89PNG")
