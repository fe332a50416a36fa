"""Autoscaling by queue wait: the load statistics, and the decision."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from service.ray.scaling import BUSY, QUEUE_WAIT, LoadStats, QueueWait


@pytest.mark.parametrize(
    ("replicas", "wait_s", "busy", "wanted"),
    [
        (2, 0.03, 0.9, 3.0),  # half as long again as it should be
        (2, 0.9, 1.0, 4.0),  # however long: twice as many at most
        (3, 0.001, 0.5, 3),  # two would be at 0.75
        (3, 0.001, 0.4, 2),  # two will be at 0.6
        (1, 0.0, 0.0, 1),
    ],
)
def test_adds_replicas_by_wait_and_removes_them_by_load(
    replicas: int, wait_s: float, busy: float, wanted: float
) -> None:
    told = {name: dict.fromkeys(range(replicas), value) for name, value in ((QUEUE_WAIT, wait_s), (BUSY, busy))}
    context = SimpleNamespace(aggregated_metrics=told, current_num_replicas=replicas, target_num_replicas=replicas)
    assert QueueWait(0.02)(context) == (pytest.approx(wanted), {})


def test_assumes_that_a_replica_without_statistics_is_busy() -> None:
    told = {QUEUE_WAIT: {0: 0.001, 1: 0.001}, BUSY: {0: 0.9, 1: 0.9}}
    context = SimpleNamespace(aggregated_metrics=told, current_num_replicas=4, target_num_replicas=4)
    assert QueueWait(0.02)(context) == (4, {})


def test_changes_nothing_without_statistics() -> None:
    context = SimpleNamespace(aggregated_metrics={}, current_num_replicas=1, target_num_replicas=3)
    assert QueueWait()(context) == (3, {})


def test_reads_the_means_and_resets_them() -> None:
    load = LoadStats()
    load.add(0.2, 0.1, requests=2)
    load.add(0.4, 0.1, requests=2)
    told = load.read()
    assert told[QUEUE_WAIT] == pytest.approx(0.3)
    assert 0 < told[BUSY] <= 1
    assert load.read()[QUEUE_WAIT] == 0
