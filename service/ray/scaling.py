"""How many replicas there should be, by how long requests wait; knows no Ray."""

from __future__ import annotations

from time import perf_counter
from typing import Any

QUEUE_WAIT, BUSY = "queue_wait_s", "busy"
FULL = 0.7  # of a replica's time: the rest evens out arrivals
TWICE = 2.0  # at a time: waits grow faster than the load that makes them


class Load:
    """How long requests waited, and for how much of the time batches ran, since last told."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._since, self._requests, self._waited_s, self._ran_s = perf_counter(), 0, 0.0, 0.0

    def note(self, waited_s: float, ran_s: float, requests: int) -> None:
        """Count a request that waited and then ran in a batch with others, `requests` in all."""
        self._requests += 1
        self._waited_s += waited_s
        self._ran_s += ran_s / requests

    def tell(self) -> dict[str, float]:
        """Return the mean wait in seconds and the busy share of the time, and begin anew."""
        passed_s = perf_counter() - self._since
        told = {QUEUE_WAIT: self._waited_s / max(self._requests, 1), BUSY: min(1.0, self._ran_s / passed_s)}
        self._begin()
        return told


class QueueWait:
    """Serve's autoscaling by how long requests wait: more replicas above `target_s`, one less where the others can."""

    def __init__(self, target_s: float = 0.02) -> None:
        self._target_s = target_s

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Return how many replicas there should be; Ray applies bounds, factors and delays."""
        known, replicas = context.aggregated_metrics or {}, context.current_num_replicas
        waits, busy = ([*known.get(name, {}).values()] for name in (QUEUE_WAIT, BUSY))
        if not replicas or not waits:
            return context.target_num_replicas, {}
        excess = sum(waits) / len(waits) / self._target_s
        if excess > 1:
            return replicas * min(excess, TWICE), {}
        others_can = len(busy) >= replicas and sum(busy) < FULL * (replicas - 1)  # who has not told may be busy
        return replicas - 1 if others_can else replicas, {}
