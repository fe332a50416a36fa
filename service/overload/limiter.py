"""The limit of rows in flight, found by measuring: what waits in vain gains nobody throughput, only delay.

Source: the gradient controllers of Netflix's concurrency-limits (Gradient2Limit) and of Envoy's adaptive concurrency
filter: compare what a request takes now with the least it ever took, let in fewer as the ratio grows. Here a kind of
request (route, engine, rows by powers of two) is compared with its own kind, and a micro-batch may make it take several
times the least before the limit falls, for throughput still grows until then. As in BBR's ProbeRTT, a least is
forgotten after two periods and, under load, measured anew with few rows in flight. As in CoDel, a delay that does not
stay is a burst, and let in. As in TCP, the way up is a small step at a time: one lull in an overload, answered with a
limit twice as high, would fill the queue for the rest of it.
"""

from __future__ import annotations

from statistics import median

LEAST = 32  # rows: fewer starve the batches
PROBE = 2  # rows in flight while the least is measured anew
BURST = (0.25, 0.5)  # of the most rows may come at once; more that nobody uses would only be what an overload fills
BURST_S = 0.1  # within which they are served, between these bounds: what is served alone says too little of batches
SPARE = 2  # times the peak that the limit may lie above it besides
SHRINK = 0.97  # of the limit, a lap, down to there: a burst comes again within seconds
SLACK_S = 0.005  # of delay that nobody minds, however quick the request
STRETCH = 3.0  # times its least that a request may take besides: a batch runs, one forms, and both have grown
HEAVY = 2.0  # times what it may take: no burst that a second lap could show to be over
LAP_S = 0.1  # between two changes of the limit
SAMPLES = 5  # at least, for a change
PERIOD_S = 30.0  # after two of which a least is forgotten
PROBE_S = 0.2  # at the end of a period, where somebody was refused just then

Kind = tuple[str, str, int]


class FixedLimit:
    """As many rows as one says."""

    def __init__(self, rows: int) -> None:
        self.rows: float = rows

    @property
    def lasting(self) -> float:
        """The limit."""
        return self.rows

    def observe(self, kind: Kind, seconds: float, in_flight: int, now: float) -> None:
        """Learn nothing."""

    def refuse(self, now: float) -> None:
        """Learn nothing."""


class AdaptiveLimit:
    """Falls while requests take longer than `STRETCH` times their least and `SLACK_S`, rises while they do not.

    It falls only where it binds, that is, refuses somebody; and it starts at `most` rows, but does not stay far above
    what is used. Times, of any clock that never goes back, come from outside.
    """

    def __init__(self, most: int, now: float) -> None:
        self.rows = self._most = float(most)
        self._least = float(min(LEAST, most))
        self._lap = self._period = self._cut = now
        self._stretches: list[float] = []
        self._peak = 0
        self._refused = self._stands = False
        self._before_probe: float | None = None
        self._recent: dict[Kind, float] = {}
        self._earlier: dict[Kind, float] = {}

    @property
    def lasting(self) -> float:
        """The limit, but for a probe, which lasts a moment."""
        return self.rows if self._before_probe is None else self._before_probe

    def observe(self, kind: Kind, seconds: float, in_flight: int, now: float) -> None:
        """Learn that a request of that kind took so long, with so many rows in flight at its end, its own included."""
        recent = self._recent[kind] = min(seconds, self._recent.get(kind, seconds))
        self._peak = max(self._peak, in_flight)
        if seconds <= now - self._cut:  # what began before the limit fell says nothing of it
            self._stretches.append(seconds / (STRETCH * min(recent, self._earlier.get(kind, recent)) + SLACK_S))
        if now - self._lap >= LAP_S and len(self._stretches) >= SAMPLES:
            self._turn(now)

    def refuse(self, now: float) -> None:
        """Learn that somebody was refused."""
        self._refused = True
        if self._before_probe is not None:
            self._turn(now)

    def _turn(self, now: float) -> None:
        before = self.rows
        if self._before_probe is None:
            self._adapt(median(self._stretches))
        elif now - self._lap < PROBE_S:
            return
        else:
            self.rows, self._before_probe = self._before_probe, None
        self._lap = now
        if self._lap - self._period >= PERIOD_S:
            self._renew()
        self._peak, self._refused = 0, False
        self._stretches.clear()
        if self.rows < before:
            self._cut = now

    def _adapt(self, stretch: float) -> None:
        stood, self._stands = self._stands, stretch > 1 and self._refused
        if self._stands and (stood or stretch > HEAVY):
            rows = min(self.rows, max(self._peak, self._least)) / stretch + self.rows**0.5
        elif stretch > 1:
            return
        else:
            rows = self._towards(max(SPARE * self._peak, self._burst()))
        self.rows = min(self._most, max(self._least, rows))

    def _towards(self, room: float) -> float:
        return min(room, self.rows + self.rows**0.5) if self.rows < room else max(room, self.rows * SHRINK)

    def _burst(self) -> float:
        """Return how many rows may come at once, by the kind that is quickest per row."""
        few, many = (share * self._most for share in BURST)
        leasts = (*self._earlier.items(), *self._recent.items())
        row_s = min(seconds / 2 ** (bits - 1) for (_, _, bits), seconds in leasts)
        return many if many * row_s <= BURST_S else max(few, BURST_S / row_s)

    def _renew(self) -> None:
        self._earlier, self._recent, self._period = self._recent, {}, self._lap
        if self._refused:
            self._before_probe, self.rows = self.rows, min(PROBE, self._most)
