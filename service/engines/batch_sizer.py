"""How many rows are worth a batch, found by measuring: past some size a batch only makes all in it wait for all of it.

A device gains by larger batches until its arithmetic is busy; from there on twice the rows take twice the time, or,
where they no longer fit a cache, more. So a batch may be as long as is quick, and longer only where that saves time.
"""

from __future__ import annotations

QUICK_S = 0.02  # nobody minds to wait so long for the others in a batch
GAIN = 0.85  # of a row's time in batches half as large: who gains less than that does not gain by waiting
CREEP = 1.02  # a batch, by which what a row took at least is forgotten; a stall of the machine counts for no more
LAPS = 1000  # batches after which sizes that were not worth it are tried again


class Sizing:
    """The most rows of a batch, of `most` at first; learns what batches take, by doublings of their rows."""

    def __init__(self, most: int) -> None:
        self.rows = self._most = most
        self._each: list[float | None] = [None] * (most.bit_length() + 1)  # seconds of a row, by doubling
        self._left = LAPS

    def learn(self, rows: int, seconds: float) -> None:
        """Learn that a batch took so long."""
        size, each = min(rows, self._most).bit_length(), seconds / rows
        known = self._each[size]
        self._each[size] = each if known is None else min(each, known * CREEP)
        if seconds > QUICK_S:
            self.rows = self._worth()
        self._left -= 1
        if not self._left:
            self._try_again()

    def _worth(self) -> int:
        """Return the most rows of the largest batches that are quick, or save time beside those half as large."""
        least: float | None = None
        for size, each in enumerate(self._each):
            if each is None:
                continue
            fewest = 1 << size >> 1
            if least is not None and each * fewest > QUICK_S and each > GAIN * least:
                return fewest - 1
            least = each
        return self._most

    def _try_again(self) -> None:
        self._left = LAPS
        known = self.rows.bit_length() + 1
        self._each[known:] = [None] * (len(self._each) - known)
        self.rows = self._most
