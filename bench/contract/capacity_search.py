"""C, the highest open-loop rate that holds: by doubling, then bisection, then confirmation."""

from __future__ import annotations

from collections.abc import Callable

# Largest ratio of the bracket's ends when the search is done.
CLOSE = 1.08
# The next rate after one that was not confirmed, as a ratio to it.
STEP_DOWN = 0.85
# Requests per second that no service reaches.
MOST = 1e5


class NoCapacity(RuntimeError):
    """Not even the lowest rate holds."""


def find(holds: Callable[[float], bool], confirmed: Callable[[float], bool], start: float) -> float:
    """Return the highest rate that holds, within 8 %, from `start` up by doubling; both functions try one rate.

    Raises:
        NoCapacity: no rate from a sixteenth of `start` on holds, or is confirmed.
    """
    low, high = _bracket(holds, start)
    while high / low > CLOSE:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    while not confirmed(low):
        low *= STEP_DOWN
        if low < start / 16:
            raise NoCapacity(f"no rate from {low:.1f}/s on is confirmed")
    return low


def _bracket(holds: Callable[[float], bool], start: float) -> tuple[float, float]:
    """Return neighbours in the row of doubled rates of which the lower holds and the higher does not."""
    rate = start
    while not holds(rate):
        rate /= 2
        if rate < start / 16:
            raise NoCapacity(f"the service missed its limits even at {rate * 2:.1f} requests/s, the lowest rate tried")
    while rate < MOST and holds(2 * rate):
        rate *= 2
    return rate, 2 * rate
