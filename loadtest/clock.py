"""An alarm at a time of `time.monotonic()`: it never spins and is exact to tens of microseconds on Linux.

An alarm has one pending wake-up at most.
"""

import asyncio
import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable

_MONOTONIC, _ABSTIME = 1, 1
_FLAGS = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)


class _TimerSpec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class TimerfdAlarm:
    """An alarm on a Linux timerfd; the loop's timers round to milliseconds, which latencies would show."""

    def __init__(self, ring: Callable[[], None]) -> None:
        """Watch a new timerfd in the running loop and call `ring` when it expires."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.timerfd_create(_MONOTONIC, _FLAGS)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._expired)

    def at(self, when: float) -> None:
        """Ring at `when` (seconds of `time.monotonic()`), or at once if that has passed."""
        seconds, nanoseconds = divmod(max(int(when * 1e9), 1), 1_000_000_000)
        spec = _TimerSpec(0, 0, seconds, nanoseconds)
        self._libc.timerfd_settime(self._fd, _ABSTIME, ctypes.byref(spec), None)

    def close(self) -> None:
        """Never ring again."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _expired(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
        self._ring()


class LoopAlarm:
    """The portable alarm: the event loop's own timer, late by up to a millisecond."""

    def __init__(self, ring: Callable[[], None]) -> None:
        """Call `ring` in the running loop."""
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None

    def at(self, when: float) -> None:
        """Ring at `when` (seconds of `time.monotonic()`), or at once if that has passed."""
        self.close()
        self._handle = self._loop.call_later(max(0.0, when - time.monotonic()), self._ring)

    def close(self) -> None:
        """Never ring again."""
        if self._handle is not None:
            self._handle.cancel()


def alarm(ring: Callable[[], None]) -> TimerfdAlarm | LoopAlarm:
    """Return the most exact alarm this platform has."""
    return TimerfdAlarm(ring) if sys.platform == "linux" else LoopAlarm(ring)
