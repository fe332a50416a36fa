"""How many replicas there should be, by how long requests wait. Knows nothing of Ray."""

from __future__ import annotations

from time import perf_counter
from typing import Any

QUEUE_WAIT, BUSY = "queue_wait_s", "busy"
MAX_BUSY = 0.7  # share of a replica's time: the rest evens out arrivals
MAX_FACTOR = 2.0  # per decision: waits grow faster than the load that causes them


class LoadStats:
    """The wait of requests, and the time that batches ran, since the last `read`."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._since = perf_counter()
        self._requests = 0
        self._waited_s = 0.0
        self._ran_s = 0.0

    def add(self, waited_s: float, ran_s: float, requests: int) -> None:
        """Count a request that waited and then ran in a batch of `requests` in all."""
        self._requests += 1
        self._waited_s += waited_s
        self._ran_s += ran_s / requests

    def read(self) -> dict[str, float]:
        """Return the mean wait in seconds and the busy share of the time, and reset both."""
        passed_s = perf_counter() - self._since
        stats = {QUEUE_WAIT: self._waited_s / max(self._requests, 1), BUSY: min(1.0, self._ran_s / passed_s)}
        self._reset()
        return stats


class QueueWait:
    """Autoscaling policy for Serve: more replicas if requests wait over `target_s`, one fewer if the others can."""

    def __init__(self, target_s: float = 0.02) -> None:
        self._target_s = target_s

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Return how many replicas there should be; Ray applies bounds, factors and delays."""
        known = context.aggregated_metrics or {}
        replicas = context.current_num_replicas
        waits, busy = ([*known.get(name, {}).values()] for name in (QUEUE_WAIT, BUSY))
        if not replicas or not waits:
            return context.target_num_replicas, {}
        excess = sum(waits) / len(waits) / self._target_s
        if excess > 1:
            return replicas * min(excess, MAX_FACTOR), {}
        # a replica that has not reported may be busy
        others_can = len(busy) >= replicas and sum(busy) < MAX_BUSY * (replicas - 1)
        return replicas - 1 if others_can else replicas, {}
