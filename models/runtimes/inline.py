"""Whether a call takes less time than a hand-over to a thread and back."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

# A hand-over takes 0.1 ms in each direction, and more if threads contend for the interpreter.
MAX_INLINE_S = 0.5e-3
# Repeat at least this often, and for this long: other threads interrupt some runs, but not all.
MIN_RUNS = 5
MIN_SECONDS = 0.1


def can_run_inline(work: Callable[[], object], clock: Callable[[], float] = perf_counter) -> bool:
    """Return whether the fastest of several runs of `work`, warmed up before, takes at most `MAX_INLINE_S` seconds."""
    until, runs = clock() + MIN_SECONDS, 0
    while runs < MIN_RUNS or clock() < until:
        if _seconds(work, clock) <= MAX_INLINE_S:
            return True
        runs += 1
    return False


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    work()
    return clock() - began
