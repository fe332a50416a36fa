"""Replicas by queue wait: what is told of the load, and what follows from it."""

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
def test_replicas_follow_the_wait_up_and_the_work_down(
    replicas: int, wait_s: float, busy: float, wanted: float
) -> None:
    told = {name: dict.fromkeys(range(replicas), value) for name, value in ((QUEUE_WAIT, wait_s), (BUSY, busy))}
    context = SimpleNamespace(aggregated_metrics=told, current_num_replicas=replicas, target_num_replicas=replicas)
    assert QueueWait(0.02)(context) == (pytest.approx(wanted), {})


def test_a_replica_that_has_not_told_is_not_taken_for_idle() -> None:
    told = {QUEUE_WAIT: {0: 0.001, 1: 0.001}, BUSY: {0: 0.9, 1: 0.9}}
    context = SimpleNamespace(aggregated_metrics=told, current_num_replicas=4, target_num_replicas=4)
    assert QueueWait(0.02)(context) == (4, {})


def test_where_nothing_is_known_yet_nothing_changes() -> None:
    context = SimpleNamespace(aggregated_metrics={}, current_num_replicas=1, target_num_replicas=3)
    assert QueueWait()(context) == (3, {})


def test_a_load_tells_means_and_begins_anew() -> None:
    load = LoadStats()
    load.add(0.2, 0.1, requests=2)
    load.add(0.4, 0.1, requests=2)
    told = load.read()
    assert told[QUEUE_WAIT] == pytest.approx(0.3)
    assert 0 < told[BUSY] <= 1
    assert load.read()[QUEUE_WAIT] == 0
