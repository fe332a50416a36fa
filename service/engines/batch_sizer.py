"""The batch sizer: how many rows a batch should have, by measurement.

A device gains by larger batches until its arithmetic is busy. From there on twice the rows take twice the time, or more
if they no longer fit a cache: a larger batch only makes every row in it wait for all the others. So a batch may be as
large as is quick, and larger only if that saves time per row.
"""

from __future__ import annotations

QUICK_S = 0.02  # a batch that takes no longer may be as large as it likes
MAX_RATIO = 0.85  # of the time per row in batches half as large: a size that saves less than that gains nothing
DECAY = 1.02  # per batch, of the least time per row: a stall of the machine counts for no more
RETRY_AFTER = 1000  # batches, after which sizes that gained nothing are tried again


class BatchSizer:
    """Finds the most rows of a batch, `max_rows` at first, from what batches take, by doublings of their rows."""

    def __init__(self, max_rows: int) -> None:
        self.rows = max_rows
        self._max_rows = max_rows
        self._row_s: list[float | None] = [None] * (max_rows.bit_length() + 1)  # seconds per row, by doubling
        self._until_retry = RETRY_AFTER

    def learn(self, rows: int, seconds: float) -> None:
        """Learn that a batch of `rows` took `seconds`."""
        doubling = min(rows, self._max_rows).bit_length()
        row_s = seconds / rows
        known = self._row_s[doubling]
        self._row_s[doubling] = row_s if known is None else min(row_s, known * DECAY)
        if seconds > QUICK_S:
            self.rows = self._best_rows()
        self._until_retry -= 1
        if not self._until_retry:
            self._forget_larger()

    def _best_rows(self) -> int:
        """Return the most rows of the largest batches that are quick, or save time per row."""
        least: float | None = None
        for doubling, row_s in enumerate(self._row_s):
            if row_s is None:
                continue
            fewest = 1 << doubling >> 1
            if least is not None and row_s * fewest > QUICK_S and row_s > MAX_RATIO * least:
                return fewest - 1
            least = row_s
        return self._max_rows

    def _forget_larger(self) -> None:
        self._until_retry = RETRY_AFTER
        known = self.rows.bit_length() + 1
        self._row_s[known:] = [None] * (len(self._row_s) - known)
        self.rows = self._max_rows
