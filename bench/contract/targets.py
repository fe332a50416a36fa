"""The figures F1 to F8 as data: name, limit, and where in the figures of its run each is found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bench.targets import Target
from loadtest.tables import Figures


def _beyond(times: str, goodput: float) -> tuple[Target, ...]:
    return (
        Target(f"F1 {times}: goodput / C", ">=", goodput, "x", ("during", "goodput_by_c")),
        Target(f"F1 {times}: answers that are no right 200, 429 or 503", "<=", 0, "", ("during", "unexpected")),
        Target(f"F1 {times}: refusals without Retry-After", "<=", 0, "", ("during", "without_retry_after")),
        Target(f"F1 {times}: p99 of probes", "<=", 50, "ms", ("probes", "p99_ms")),
        Target(f"F2 {times}: p99 / least of 2 x p99 at 0.7C and SLO", "<=", 1, "x", ("during", "p99_by_limit")),
        Target(f"F2 {times}: p99 of a rejection", "<=", 25, "ms", ("during", "rejected_p99_ms")),
        Target(f"F3 {times}: normal again after", "<=", 5, "s", ("recovery_s",)),
        _counted(times),
    )


def _counted(run: str) -> Target:
    return Target(f"F8 {run}: requests sent, less the sum over outcomes", "<=", 0, "", ("difference",))


BY_RUN: Mapping[str, tuple[Target, ...]] = {
    "2C": _beyond("2C", 0.95),
    "10C": _beyond("10C", 0.80),
    "promotions": (
        Target("F4 promotions that went live", ">=", 100, "", ("live",)),
        Target("F4 failed requests", "<=", 0, "", ("failed",)),
        Target("F4 answers with a row that is not the version's", "<=", 0, "", ("wrong",)),
        Target("F4 p99 during a swap / p99 between swaps", "<=", 1.5, "x", ("p99_by_steady",)),
        _counted("promotions"),
    ),
    "fairness": (
        Target("F5 success of 0.1C beside 10C", ">=", 0.99, "", ("success",)),
        _counted("fairness"),
    ),
    "soak": (
        Target("F6 slope of resident memory", "<=", 1, "MiB / 10 min", ("slope_mib",)),
        Target("F6 descriptors more than before", "<=", 0, "", ("grown", "descriptors")),
        Target("F6 threads more than before", "<=", 0, "", ("grown", "threads")),
        Target("F6 series more than before", "<=", 0, "", ("grown", "labels")),
        Target("F6 errors", "<=", 0.001, "", ("error_rate",)),
        _counted("soak"),
    ),
    "life": (
        Target("F7 start to ready, slowest", "<=", 5, "s", ("ready_s",)),
        Target("F7 readiness said 200 after SIGTERM for", "<=", 0.1, "s", ("ready_for_s",)),
        Target("F7 readiness was seen to say 503", ">=", 1, "times", ("was_unready",)),
        Target("F7 accepted requests without an answer", "<=", 0, "", ("unanswered",)),
        Target("F7 answers that are no right 200 or 503", "<=", 0, "", ("unexpected",)),
        Target("F7 exit / drain and grace", "<=", 1, "x", ("exit_by_grace",)),
        Target("F7 exit status", "<=", 0, "", ("exit_status",)),
    ),
}


def results(figures: Mapping[str, Figures], runs: Iterable[str]) -> list[dict[str, Any]]:
    """Return every target of `runs` as a row, by name; one without a value was not measured."""
    rows = [target.judge(figures.get(run, {})) for run in runs for target in BY_RUN[run]]
    return sorted(rows, key=lambda row: str(row["name"]).split()[0])
