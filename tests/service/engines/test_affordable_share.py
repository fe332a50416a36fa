"""The share of items to work on falls by halves while the work takes too much time, and rises again."""

from __future__ import annotations

import pytest

from service.engines.affordable_share import PERIOD_S, AffordableShare


class Machine:
    """A thread that is busy with requests for a part of the time, and works for the share of items beside them."""

    def __init__(self, share: float, busy: float) -> None:
        self.now = self.used = 0.0
        self.busy = busy
        self.share = AffordableShare(share, lambda: self.now, lambda: self.used)

    def run(self, periods: int, part: float) -> float:
        """Work `part` of the time if the share is 1; return the part of the last period that was spent on it."""
        spent = 0.0
        for _ in range(periods):
            spent = part * self.share.now
            self.used += self.busy * PERIOD_S
            with self.share.work():
                self.used += spent * PERIOD_S
                self.now += PERIOD_S
        return spent


@pytest.mark.parametrize(("busy", "part"), [(0.0, 0.045), (0.5, 0.022), (0.99, 0.0047)])
def test_the_share_stays_while_the_work_takes_little_time(busy: float, part: float) -> None:
    machine = Machine(1, busy)
    machine.run(20, part)
    assert machine.share.now == 1


@pytest.mark.parametrize(("busy", "most"), [(0.0, 0.05), (0.5, 0.025), (0.8, 0.01), (0.99, 0.005)])
@pytest.mark.parametrize("part", [0.12, 0.5, 1.0])
def test_the_work_takes_a_twentieth_of_idle_time_or_half_a_percent(busy: float, most: float, part: float) -> None:
    machine = Machine(1, busy)
    assert 0.4 * most < machine.run(20, part) <= most


def test_the_share_rises_to_what_was_asked_for_if_the_load_falls() -> None:
    machine = Machine(0.5, busy=0.9)
    machine.run(20, part=1.0)
    assert machine.share.now < 0.05
    machine.run(20, part=0.001)
    assert machine.share.now == 0.5


def test_the_share_does_not_change_within_a_period() -> None:
    machine = Machine(1, busy=0.0)
    for _ in range(9):
        with machine.share.work():
            machine.used += 1.0
            machine.now += PERIOD_S / 10
    assert machine.share.now == 1
