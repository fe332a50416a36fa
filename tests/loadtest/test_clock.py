"""An alarm rings once, never early, and never after it was closed."""

import asyncio
import sys
import time
from collections.abc import Callable

import pytest

from loadtest import clock

KINDS = [clock.LoopAlarm] + ([clock.TimerfdAlarm] if sys.platform == "linux" else [])
Kind = Callable[[Callable[[], None]], clock.TimerfdAlarm | clock.LoopAlarm]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ahead", [-1.0, 0.0, 0.02])
def test_alarm_rings_once_and_never_early(kind: Kind, ahead: float) -> None:
    async def ring() -> tuple[float, list[float]]:
        rung: list[float] = []
        alarm = kind(lambda: rung.append(time.monotonic()))
        due = time.monotonic() + ahead
        alarm.at(due)
        while not rung:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        alarm.close()
        return due, rung

    due, rung = asyncio.run(ring())
    assert len(rung) == 1
    # Event loops call a timer early by up to the resolution of their clock.
    assert rung[0] >= due - time.get_clock_info("monotonic").resolution


@pytest.mark.parametrize("kind", KINDS)
def test_closed_alarm_never_rings(kind: Kind) -> None:
    async def ring() -> list[int]:
        rung: list[int] = []
        alarm = kind(lambda: rung.append(1))
        alarm.at(time.monotonic() + 0.01)
        alarm.close()
        await asyncio.sleep(0.05)
        return rung

    assert asyncio.run(ring()) == []
