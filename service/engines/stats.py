"""Statistics of one engine: calls that it answered and failed, and how long its batches take."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import ceil, log2
from typing import NamedTuple

from lvm.errors import Expired, ModelFailed
from service.settings import Settings

STEPS = 8  # of a doubling of time: seconds are known to 9 %
LEAST_S = 1e-7  # no batch is quicker, and a clock may stand still
SHARE = 0.95  # of the batches took no longer: the slowest few are the machine's doing


def full_wait_s(settings: Settings) -> float:
    """Return the default time budget of the first engine of a chain, less 1 %; a longer answer counts as a hang."""
    return settings.timeout_ms / 1000 * settings.primary_share * 0.99


class BatchLatency(NamedTuple):
    """The number of batches of about the same size, and the 95th percentile of their seconds."""

    batches: int
    seconds: float


class EngineStats:
    """Counts of one engine since its first call; written by the event loop only."""

    __slots__ = ("_seconds", "answered", "failed")

    def __init__(self) -> None:
        # calls; an error that says nothing about the engine counts as neither
        self.answered = 0
        self.failed = 0
        self._seconds: dict[int, Counter[int]] = defaultdict(Counter)

    def add_batch(self, rows: int, seconds: float) -> None:
        """Count a batch of `rows` that took `seconds`."""
        self._seconds[rows.bit_length()][round(log2(seconds + LEAST_S) * STEPS)] += 1

    def latency_by_size(self) -> dict[int, BatchLatency]:
        """Return the latency of batches by doublings of rows: 1 row, 2 to 3, 4 to 7, and so on."""
        return {doubling: _latency(counts) for doubling, counts in self._seconds.items()}


def _latency(counts: Counter[int]) -> BatchLatency:
    batches = counts.total()
    left = ceil(SHARE * batches)
    for step in sorted(counts):
        left -= counts[step]
        if left <= 0:
            break
    return BatchLatency(batches, 2 ** (step / STEPS))


def is_engine_fault(error: BaseException, *, had_full_wait: bool) -> bool:
    """Return whether an error counts against the engine that was called.

    A caller with a short deadline, or one whose rows alone fail, proves nothing: only a full wait shows a hang.
    """
    return (isinstance(error, ModelFailed) and not error.alone) or (isinstance(error, Expired) and had_full_wait)
