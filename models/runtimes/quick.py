"""Whether work takes less than handing it to a thread and back would."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

QUICK_S = 0.5e-3  # a hand-over takes 0.1 ms in each direction, and more where threads contend for the interpreter
RUNS, MOST_S = 5, 0.1  # at least, seconds of trying: what loads beside traffic is interrupted, but not in every run


def is_quick(work: Callable[[], object], clock: Callable[[], float] = perf_counter) -> bool:
    """Say whether a run of `work`, warm already, takes at most `QUICK_S` seconds of `clock`: the best of several."""
    until, runs = clock() + MOST_S, 0
    while runs < RUNS or clock() < until:
        if _seconds(work, clock) <= QUICK_S:
            return True
        runs += 1
    return False


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    work()
    return clock() - began
