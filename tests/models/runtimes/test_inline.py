"""Quick is what is quick when nothing interrupts it, and telling so takes a moment."""

from __future__ import annotations

import pytest

from models.runtimes.inline import MAX_INLINE_S, MIN_RUNS, MIN_SECONDS, can_run_inline


class Work:
    """Runs that take seconds as told, the last ever after, on a clock of their own."""

    def __init__(self, *seconds: float) -> None:
        self._seconds, self.now, self.runs = list(seconds), 0.0, 0

    def __call__(self) -> None:
        self.now += self._seconds[min(self.runs, len(self._seconds) - 1)]
        self.runs += 1

    def runs_inline(self) -> bool:
        return can_run_inline(self, lambda: self.now)


@pytest.mark.parametrize("interrupted", [0, 1, 9])
def test_what_is_interrupted_in_most_runs_is_quick_for_all_that(interrupted: int) -> None:
    assert Work(*[0.01] * interrupted, MAX_INLINE_S / 2).runs_inline()


@pytest.mark.parametrize(
    ("seconds", "runs"), [(2 * MAX_INLINE_S, MIN_SECONDS / MAX_INLINE_S / 2), (MIN_SECONDS, MIN_RUNS)]
)
def test_what_is_slow_is_slow_within_a_moment(seconds: float, runs: float) -> None:
    work = Work(seconds)
    assert not work.runs_inline()
    assert work.runs == pytest.approx(runs, abs=1)
