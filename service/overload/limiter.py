"""An adaptive limit on the rows in flight, found by measuring: beyond it, waiting adds delay and no throughput.

Sources: the gradient controllers of Netflix's concurrency-limits (Gradient2Limit) and of Envoy's adaptive concurrency
filter compare the latency of a request with the lowest ever seen, and lower the limit as the ratio grows. Here a
request is compared with others of its group (route, engine, rows by powers of two), and micro-batching may make it take
several times the lowest before the limit falls, because throughput still grows until then. As in BBR's ProbeRTT, the
lowest latency expires after two periods and, under load, is measured again with few rows in flight. As in CoDel, a
delay that does not last is a burst, and is admitted. As in TCP, the limit grows in small steps: if one lull in an
overload doubled the limit, the queue would be full for the rest of the overload.
"""

from __future__ import annotations

import math
from statistics import median

MIN_ROWS = 32  # fewer starve the batches
PROBE_ROWS = 2  # in flight while the lowest latency is measured again
BURST = (0.25, 0.5)  # smallest and largest burst, as shares of the largest limit; unused room would fill in an overload
BURST_S = 0.1  # in which a burst between these bounds can be served, at the rate of rows that are served alone
HEADROOM = 2  # times the peak of rows in flight, to which the limit shrinks
SHRINK = 0.97  # of the limit per interval, because bursts come back within seconds
SLACK_S = 0.005  # of delay that is always tolerated
MAX_RATIO = 3.0  # of latency to the lowest: one batch runs, the next one forms, and both have grown
HEAVY = 2.0  # times the tolerated latency; such a delay lowers the limit at once
INTERVAL_S = 0.1  # between two changes of the limit
MIN_SAMPLES = 5  # for a change
PERIOD_S = 30.0  # two of which the lowest latency is kept
PROBE_S = 0.2  # of a probe at the end of a period, if a request was rejected just before

LatencyGroup = tuple[str, str, int]


class FixedLimit:
    """A constant limit."""

    def __init__(self, rows: int) -> None:
        self.rows: float = rows

    @property
    def sustained(self) -> float:
        """The limit."""
        return self.rows

    def observe(self, group: LatencyGroup, seconds: float, in_flight: int, now: float) -> None:
        """Ignore it."""

    def record_rejection(self, now: float) -> None:
        """Ignore it."""


class AdaptiveLimit:
    """Falls while requests take longer than `MAX_RATIO` times their lowest latency plus `SLACK_S`; else it rises.

    It falls only if requests are rejected. It starts at `most` rows, and shrinks towards what is used. The caller
    passes the time `now`, in seconds of any monotonic clock.
    """

    def __init__(self, most: int, now: float) -> None:
        self.rows = self._most = float(most)
        self._least = float(min(MIN_ROWS, most))
        self._changed = self._period_since = self._fell = now
        self._ratios: list[float] = []
        self._peak = 0
        self._rejected = self._is_high = False
        self._before_probe: float | None = None
        self._lowest: dict[LatencyGroup, float] = {}
        self._lowest_before: dict[LatencyGroup, float] = {}

    @property
    def sustained(self) -> float:
        """The limit, without the effect of a probe."""
        return self.rows if self._before_probe is None else self._before_probe

    def observe(self, group: LatencyGroup, seconds: float, in_flight: int, now: float) -> None:
        """Record the latency of a request; `in_flight` are the rows in flight at its end, including its own."""
        lowest = self._lowest.get(group, math.inf)
        if seconds < lowest:
            lowest = self._lowest[group] = seconds
        if in_flight > self._peak:
            self._peak = in_flight
        if seconds <= now - self._fell:  # the request began after the limit last fell
            before = self._lowest_before.get(group, lowest)
            self._ratios.append(seconds / (MAX_RATIO * (before if before < lowest else lowest) + SLACK_S))
        if now - self._changed >= INTERVAL_S and len(self._ratios) >= MIN_SAMPLES:
            self._change(now)

    def record_rejection(self, now: float) -> None:
        """Record that a request was rejected."""
        self._rejected = True
        if self._before_probe is not None:
            self._change(now)

    def _change(self, now: float) -> None:
        before = self.rows
        if self._before_probe is None:
            self._adapt(median(self._ratios))
        elif now - self._changed < PROBE_S:
            return
        else:
            self.rows, self._before_probe = self._before_probe, None
        self._changed = now
        if self._changed - self._period_since >= PERIOD_S:
            self._start_period()
        self._peak, self._rejected = 0, False
        self._ratios.clear()
        if self.rows < before:
            self._fell = now

    def _adapt(self, ratio: float) -> None:
        was_high, self._is_high = self._is_high, ratio > 1 and self._rejected
        if self._is_high and (was_high or ratio > HEAVY):
            rows = min(self.rows, max(self._peak, self._least)) / ratio + self.rows**0.5
        elif ratio > 1:
            return
        else:
            rows = self._towards(max(HEADROOM * self._peak, self._burst_rows()))
        self.rows = min(self._most, max(self._least, rows))

    def _towards(self, room: float) -> float:
        return min(room, self.rows + self.rows**0.5) if self.rows < room else max(room, self.rows * SHRINK)

    def _burst_rows(self) -> float:
        """Return the rows of a burst, from the group of requests that is quickest per row."""
        few, many = (share * self._most for share in BURST)
        lowest = (*self._lowest_before.items(), *self._lowest.items())
        row_s = min(seconds / 2 ** (bits - 1) for (_, _, bits), seconds in lowest)
        return many if many * row_s <= BURST_S else max(few, BURST_S / row_s)

    def _start_period(self) -> None:
        self._lowest_before, self._lowest, self._period_since = self._lowest, {}, self._changed
        if self._rejected:
            self._before_probe, self.rows = self.rows, min(PROBE_ROWS, self._most)


Limit = FixedLimit | AdaptiveLimit
