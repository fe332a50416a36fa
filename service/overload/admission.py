"""Admission: rows and bytes in flight, reserved at the door, and no client holds more than its share of either.

A request's bytes are reserved as they come, few ahead: what is declared and not sent keeps nobody out. Its rows are
reserved when the body is whole: who sends slowly keeps no net from working. A request that would find no room for a
row, or for all bytes that it declares, is refused on its head all the same. Long bodies leave some room to short ones.
A request is let in where there is room for one row, however many it has, or else would have to wait for small ones
for ever; how many it has is known once it is decoded, before anybody else has his turn.

Where there is no room, a client that holds less than its share, the limit over the clients there are, is let in
beyond it, and the others wait until it is theirs again: max-min fairness. A client alone may use all. One that was
lately let in with less than half of its share is let in beyond that, too: where a share is a few rows, chance has who
asks for a tenth of it hold all of it for a moment. Nor is it refused for what the limit falls to for a moment only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from lvm.errors import ClientLimit, Overloaded
from service.overload.limiter import Kind
from service.settings import Settings
from service.telemetry.metrics import Metrics

LONGEST_S = 60  # most that Retry-After says
LAP_S = 0.25  # over which rows served are counted
SMOOTHING = 0.3  # weight of the last lap
FIRST = 2**16  # bytes of a body that are reserved ahead, and of one that is short
LONG_SHARE = 7 / 8  # of all bytes, that long bodies may hold
LATELY_S = 1.0  # over which, and the same before, rows let in are counted


class Limit(Protocol):
    """How many rows may be in flight, and how many but for a moment in which there may be fewer."""

    rows: float

    @property
    def lasting(self) -> float:
        """`rows`, when that moment is over."""
        ...

    def observe(self, kind: Kind, seconds: float, in_flight: int, now: float) -> None:
        """Learn that a request of that kind took so long, with so many rows in flight."""
        ...

    def refuse(self, now: float) -> None:
        """Learn that somebody was refused."""
        ...


class Held:
    """What a client holds."""

    __slots__ = ("requests", "rows", "size")

    def __init__(self) -> None:
        self.requests = self.rows = self.size = 0


class Taken:
    """The rows let in since a time, all and by client."""

    __slots__ = ("_clients", "rows", "since")

    def __init__(self, since: float) -> None:
        self.since, self.rows = since, 0
        self._clients: dict[str, int] = {}

    def add(self, client: str, rows: int) -> None:
        """Count rows of `client`."""
        self._clients[client] = self._clients.get(client, 0) + rows
        self.rows += rows

    def of(self, client: str) -> int:
        """Return the rows of `client`."""
        return self._clients.get(client, 0)


class Admission:
    """Who is inside, with how many rows and bytes; refuses, without waiting, what there is no room for.

    Knows a client as long as a request of it is inside.
    """

    def __init__(
        self,
        limit: Limit,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.limit, self.rows, self.size = limit, 0, 0
        self.clients: dict[str, Held] = {}
        self.max_size = round(settings.max_in_flight_mb * 1e6)
        self._max_long = round(LONG_SHARE * self.max_size)
        self._clock, self._metrics = clock, metrics
        self._since, self._served, self._rate = clock(), 0, 0.0
        self._taken, self._before = Taken(self._since), Taken(self._since)

    def check_row(self, client: str) -> None:
        """Raise `Overloaded` or `ClientLimit`, the limit being reached, where `client` has its share of rows."""
        held, others = self._look(client)
        share, lasting = self.limit.rows / (others + 1), self.limit.lasting
        room = lasting if lasting >= others + 1 and self._is_modest(client, others) else share
        if held.rows + 1 <= room:
            return
        self.limit.refuse(self._clock())
        raise self._refusal("rows", others > 0 and held.rows >= share)

    def take(self, client: str, rows: int) -> None:
        """Learn that rows of `client` were let in."""
        now = self._clock()
        if (lap := now - self._taken.since) >= LATELY_S:
            self._taken, self._before = Taken(now), self._taken if lap < 2 * LATELY_S else Taken(now)
        self._taken.add(client, rows)

    def room(self, size: int) -> int:
        """Return how many bytes may be in flight for a body of `size` bytes to be let in."""
        return self.max_size if size <= FIRST else self._max_long

    def check_size(self, client: str, more: int, room: int) -> None:
        """Raise `Overloaded` or `ClientLimit` where `more` bytes are more than the share of `client` of the `room`."""
        held, others = self._look(client)
        share = room / (others + 1)
        if held.size + more > share:
            raise self._refusal("bytes", others > 0 and held.size >= share)

    def backlog_s(self) -> int:
        """Return in how many whole seconds the rows in flight will have been served, 1 to 60."""
        return max(1, min(LONGEST_S, math.ceil(self.rows / self._rate))) if self._rate else 1

    def serve(self, route: str, made_by: str, rows: int, seconds: float) -> None:
        """Learn that rows of a request were served in so many seconds."""
        now = self._clock()
        self.limit.observe((route, made_by, rows.bit_length()), seconds, self.rows, now)
        self._served += rows
        lap = now - self._since
        if lap >= LAP_S:
            rate = self._served / lap
            self._rate += (rate - self._rate) * SMOOTHING if self._rate else rate
            self._since, self._served = now, 0

    def observe(self) -> None:
        """Bring the gauges up to date."""
        self._metrics.limit_rows.set(self.limit.rows)
        self._metrics.in_flight_rows.set(self.rows)
        self._metrics.in_flight_bytes.set(self.size)

    def _look(self, client: str) -> tuple[Held, int]:
        held = self.clients.get(client)
        return held or Held(), len(self.clients) - (held is not None)

    def _is_modest(self, client: str, others: int) -> bool:
        """Return whether `client` was lately let in with less than half of its share of all that were."""
        taken = self._taken.of(client) + self._before.of(client)
        return others > 0 and 2 * taken * (others + 1) < self._taken.rows + self._before.rows

    def _refusal(self, what: str, over_share: bool) -> Overloaded | ClientLimit:
        self._metrics.refusals.inc("client" if over_share else what)
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
        """Raise `Overloaded` or `ClientLimit` where there is no room for a row: it is no use to send the body."""
        admission = self._admission
        if admission.rows >= admission.limit.rows:
            admission.check_row(self.client)

    def expect(self, size: int) -> None:
        """Hold the first bytes of a body; raises `Overloaded` or `ClientLimit` where `size` find no room."""
        if size > FIRST:
            self._check_size(size, size)
        self.grow(min(size, FIRST))

    def grow(self, size: int) -> None:
        """Hold `size` bytes, where that is more than before; raises `Overloaded` or `ClientLimit`."""
        admission, more = self._admission, size - self.size
        if more <= 0:
            return
        self._check_size(size, more)
        held = self._held or self._come_in()
        self.size = size
        held.size += more
        admission.size += more

    def _check_size(self, size: int, more: int) -> None:
        admission = self._admission
        if admission.size + more > admission.room(size) and admission.size:
            admission.check_size(self.client, more, admission.room(size))

    def enter(self) -> None:
        """Hold one row; raises as `check`."""
        self.check()
        held = self._held or self._come_in()
        self.rows += 1
        held.rows += 1
        self._admission.rows += 1

    def settle(self, rows: int) -> None:
        """Hold as many rows as were decoded."""
        held, more = self._held, rows - self.rows
        if held is None:
            return
        self._admission.take(self.client, rows)
        self.rows = rows
        held.rows += more
        self._admission.rows += more

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

    def _come_in(self) -> Held:
        held = self._held = self._admission.clients.setdefault(self.client, Held())
        held.requests += 1
        return held
