"""Whether work takes less than handing it to a thread and back would."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

QUICK_S = 0.5e-3  # a hand-over takes 0.1 ms in each direction, and more where threads contend for the interpreter


def is_quick(work: Callable[[], object]) -> bool:
    """Say whether the best of five runs of `work`, warm already, takes at most `QUICK_S` seconds."""
    return min(_seconds(work) for _ in range(5)) <= QUICK_S


def _seconds(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began
