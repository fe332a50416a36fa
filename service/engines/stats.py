"""An engine's conduct: what it answered, what it failed, how long its batches take. Written by the event loop only."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import ceil, log2
from typing import NamedTuple

from lvm.errors import Expired, ModelFailed
from service.settings import Settings

STEPS = 8  # of a doubling of time: seconds are known to 9 %
LEAST_S = 1e-7  # no batch is quicker, and a clock may stand still
SHARE = 0.95  # of the batches that took no longer: the last few are the machine's


def full_wait_s(settings: Settings) -> float:
    """Return the seconds that tell of a hang: a first engine's share of a caller who said nothing, and 1 % off."""
    return settings.timeout_ms / 1000 * settings.primary_share * 0.99


class Pace(NamedTuple):
    """How many batches of about the same rows there were, and the seconds that 95 % of them took at most."""

    batches: int
    seconds: float


class Conduct:
    """The record of one engine, from its first call on."""

    __slots__ = ("_seconds", "answered", "failed")

    def __init__(self) -> None:
        self.answered = self.failed = 0  # calls; those that say nothing about the engine are neither
        self._seconds: dict[int, Counter[int]] = defaultdict(Counter)

    def note(self, rows: int, seconds: float) -> None:
        """Remember a batch."""
        self._seconds[rows.bit_length()][round(log2(seconds + LEAST_S) * STEPS)] += 1

    def paces(self) -> dict[int, Pace]:
        """Return the paces by doublings of rows: 1 row, 2 to 3, 4 to 7, and so on."""
        return {doubling: _pace(counts) for doubling, counts in self._seconds.items()}


def _pace(counts: Counter[int]) -> Pace:
    batches = counts.total()
    left = ceil(SHARE * batches)
    for step in sorted(counts):
        left -= counts[step]
        if left <= 0:
            break
    return Pace(batches, 2 ** (step / STEPS))


def is_telling(error: BaseException, *, patient: bool) -> bool:
    """Say whether an error tells against the engine that was called; `patient` callers gave it a full wait.

    A caller in a hurry, or one whose rows alone fail, proves nothing; only a full wait tells of a hang.
    """
    return (isinstance(error, ModelFailed) and not error.alone) or (isinstance(error, Expired) and patient)
