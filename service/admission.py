"""Admission: rows and bytes in flight, reserved at the door, and no client holds more than its share of either.

A request's bytes are reserved as soon as its head declares them (or, chunked, as they come); its rows, of which the
bytes tell the number until they are decoded, when the body is whole: who sends slowly keeps no net from working. A
request that would find no room for its rows is refused on its head all the same. It is let in where there is room,
however many rows it has, or else would have to wait for small ones for ever.

Where there is no room, a client that holds less than its share, the limit over the clients there are, is let in
beyond it, and the others wait until it is theirs again: max-min fairness. A client alone may use all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from service.concurrency import Kind
from service.errors import ClientLimit, Overloaded
from service.metrics import Metrics
from service.settings import Settings

JSON_NUMBER = 12  # bytes of a number in JSON, about
LONGEST_S = 60  # most that Retry-After says
LAP_S = 0.25  # over which rows served are counted
SMOOTHING = 0.3  # weight of the last lap


class Limit(Protocol):
    """How many rows may be in flight."""

    rows: float

    def observe(self, kind: Kind, seconds: float, in_flight: int) -> None:
        """Learn that a request of that kind took so long, with so many rows in flight."""
        ...

    def refuse(self) -> None:
        """Learn that somebody was refused."""
        ...


class Held:
    """What a client holds."""

    __slots__ = ("requests", "rows", "size")

    def __init__(self) -> None:
        self.requests = self.rows = self.size = 0


class Admission:
    """Who is inside, with how many rows and bytes; refuses, without waiting, what there is no room for.

    `numbers` tells how many numbers are in one row. Knows a client as long as a request of it is inside.
    """

    def __init__(
        self,
        limit: Limit,
        settings: Settings,
        metrics: Metrics,
        numbers: Callable[[], int],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.limit, self.rows, self.size = limit, 0, 0
        self.clients: dict[str, Held] = {}
        self._max_size, self._max_rows = round(settings.max_in_flight_mb * 1e6), settings.max_rows
        self._numbers, self._clock, self._metrics = numbers, clock, metrics
        self._since, self._served, self._rate = clock(), 0, 0.0

    def estimate(self, media_type: bytes, size: int) -> int:
        """Return how many rows a body of `size` bytes holds: exactly where it is octets."""
        number = JSON_NUMBER if b"octet" not in media_type else 2 if b"float16" in media_type else 4
        return max(1, min(self._max_rows, size // (number * self._numbers())))

    def check_rows(self, client: str) -> None:
        """Raise `Overloaded` or `ClientLimit` where no row of `client` would be let in now."""
        if self.rows < self.limit.rows:
            return
        held, others = self._look(client)
        share = self.limit.rows / (others + 1)
        if held.rows + 1 > share:
            self.limit.refuse()
            raise self._refusal("rows", others > 0 and held.rows >= share)

    def check_size(self, client: str, size: int) -> None:
        """Raise `Overloaded` or `ClientLimit` where there is no room for `size` more bytes of `client`."""
        if self.size + size <= self._max_size or not self.size:
            return
        held, others = self._look(client)
        share = self._max_size / (others + 1)
        if held.size + size > share:
            raise self._refusal("bytes", others > 0 and held.size >= share)

    def backlog_s(self) -> int:
        """Return in how many whole seconds the rows in flight will have been served, 1 to 60."""
        return max(1, min(LONGEST_S, math.ceil(self.rows / self._rate))) if self._rate else 1

    def serve(self, rows: int) -> None:
        """Count rows that were served."""
        self._served += rows
        lap = self._clock() - self._since
        if lap >= LAP_S:
            rate = self._served / lap
            self._rate += (rate - self._rate) * SMOOTHING if self._rate else rate
            self._since, self._served = self._since + lap, 0

    def observe(self) -> None:
        """Bring the gauges up to date."""
        self._metrics.limit_rows.set(self.limit.rows)
        self._metrics.in_flight_rows.set(self.rows)
        self._metrics.in_flight_bytes.set(self.size)

    def _look(self, client: str) -> tuple[Held, int]:
        held = self.clients.get(client)
        return held or Held(), len(self.clients) - (held is not None)

    def _refusal(self, what: str, over_share: bool) -> Overloaded | ClientLimit:
        self._metrics.refusals.add("client" if over_share else what)
        retry = self.backlog_s()
        if over_share:
            return ClientLimit("this client has its share in flight, and others want theirs", retry_after=retry)
        return Overloaded(f"no room for more {what} in flight", retry_after=retry)


class Place:
    """What one request holds: from its head on its bytes, from its last byte on its rows, in the end nothing."""

    __slots__ = ("_admission", "_held", "client", "rows", "size")

    def __init__(self, admission: Admission, client: str) -> None:
        self._admission, self.client = admission, client
        self._held: Held | None = None
        self.rows = self.size = 0

    def check(self) -> None:
        """Raise as `Admission.check_rows`: it would be no use to send the body."""
        self._admission.check_rows(self.client)

    def grow(self, size: int) -> None:
        """Hold `size` bytes, where that is more than before; raises as `Admission.check_size`."""
        more = size - self.size
        if more <= 0:
            return
        self._admission.check_size(self.client, more)
        self._hold(0, more)

    def enter(self, media_type: bytes) -> None:
        """Hold the rows that the bytes held make; raises as `Admission.check_rows`."""
        self._admission.check_rows(self.client)
        self._hold(self._admission.estimate(media_type, self.size), 0)

    def settle(self, rows: int) -> None:
        """Hold as many rows as were decoded."""
        if self._held:
            self._hold(rows - self.rows, 0)

    def serve(self, kind: tuple[str, str], seconds: float) -> None:
        """Tell that the rows were served in so many seconds, and how that was done."""
        admission = self._admission
        admission.serve(self.rows)
        admission.limit.observe((*kind, self.rows.bit_length()), seconds, admission.rows)

    def leave(self) -> None:
        """Hold nothing any more, however often it is said."""
        held, self._held = self._held, None
        if held is None:
            return
        admission = self._admission
        admission.rows -= self.rows
        admission.size -= self.size
        held.rows -= self.rows
        held.size -= self.size
        held.requests -= 1
        if not held.requests:
            del admission.clients[self.client]

    def _hold(self, rows: int, size: int) -> None:
        admission, held = self._admission, self._held
        if held is None:
            held = self._held = admission.clients.setdefault(self.client, Held())
            held.requests += 1
        self.rows += rows
        self.size += size
        held.rows += rows
        held.size += size
        admission.rows += rows
        admission.size += size
