"""The share of items to work on falls by halves while the work takes too much time, and rises again."""

from __future__ import annotations

import pytest

from service.engines.affordable_share import PERIOD_S, AffordableShare


class Machine:
    """A clock, and a thread that works a part of the time."""

    def __init__(self, share: float) -> None:
        self.now = self.worked = 0.0
        self.share = AffordableShare(share, 0.02, lambda: self.now, lambda: self.worked)

    def run(self, periods: int, seconds: float) -> float:
        """Work `seconds` in each period, for the share that is wanted; return the share in the end."""
        for _ in range(periods):
            with self.share.work():
                self.worked += seconds * self.share.now
                self.now += PERIOD_S
        return self.share.now


def test_the_share_stays_while_the_work_takes_little_time() -> None:
    assert Machine(1).run(20, seconds=0.015 * PERIOD_S) == 1


@pytest.mark.parametrize(("part", "expected"), [(0.03, 0.5), (0.2, 0.0625), (1.0, 0.015625)])
def test_the_share_falls_until_the_work_takes_two_percent_of_the_time(part: float, expected: float) -> None:
    machine = Machine(1)
    assert machine.run(20, seconds=part * PERIOD_S) == expected
    before = machine.worked
    machine.run(100, seconds=part * PERIOD_S)
    assert machine.worked - before <= 0.02 * 100 * PERIOD_S


def test_the_share_rises_to_what_was_asked_for_if_the_load_falls() -> None:
    machine = Machine(0.5)
    assert machine.run(20, seconds=1.0 * PERIOD_S) < 0.05
    assert machine.run(20, seconds=0.001 * PERIOD_S) == 0.5


def test_the_share_does_not_change_within_a_period() -> None:
    machine = Machine(1)
    for _ in range(9):
        with machine.share.work():
            machine.worked += 1.0
            machine.now += PERIOD_S / 10
    assert machine.share.now == 1
