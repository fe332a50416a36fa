"""Work runs inline if its fastest run is short enough; the measurement takes a bounded time."""

from __future__ import annotations

import pytest

from models.runtimes.inline import MAX_INLINE_S, MIN_RUNS, MIN_SECONDS, can_run_inline


class Work:
    """Work with the given durations, the last one repeated, on a fake clock."""

    def __init__(self, *seconds: float) -> None:
        self._seconds, self.now, self.runs = list(seconds), 0.0, 0

    def __call__(self) -> None:
        self.now += self._seconds[min(self.runs, len(self._seconds) - 1)]
        self.runs += 1

    def runs_inline(self) -> bool:
        return can_run_inline(self, lambda: self.now)


@pytest.mark.parametrize("interrupted", [0, 1, 9])
def test_one_fast_run_is_enough(interrupted: int) -> None:
    assert Work(*[0.01] * interrupted, MAX_INLINE_S / 2).runs_inline()


@pytest.mark.parametrize(
    ("seconds", "runs"), [(2 * MAX_INLINE_S, MIN_SECONDS / MAX_INLINE_S / 2), (MIN_SECONDS, MIN_RUNS)]
)
def test_slow_work_is_detected_within_the_limit(seconds: float, runs: float) -> None:
    work = Work(seconds)
    assert not work.runs_inline()
    assert work.runs == pytest.approx(runs, abs=1)
