"""Admission control: limits on the rows and bytes in flight, shared fairly among clients.

A request reserves bytes as its body arrives, so a length that is declared and not sent keeps no other request out. It
reserves rows once its body is complete, so a slow upload does not idle a model. A request is rejected on its head if
there is no room for a row, or for the length that it declares. Long bodies leave some room for short ones. Room for one
row admits a request of any number of rows: otherwise a large request could wait forever. The number of rows is known
once the body is decoded.

If there is no room, a client that holds less than its fair share (the limit divided by the number of clients) is
admitted beyond the limit, and the others are rejected until they are below theirs: max-min fairness. A client alone may
use all. A client that was recently admitted with less than half of its fair share is admitted beyond that, too: if a
share is only a few rows, chance makes a client that asks for a tenth of it hold all of it for a moment. Nor is such a
client rejected because of a short probe of the limiter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from lvm.errors import ClientLimit, Overloaded
from service.overload.limiter import Limit
from service.settings import Settings
from service.telemetry.metrics import Metrics

MAX_RETRY_S = 60  # largest Retry-After
RATE_WINDOW_S = 0.25  # over which served rows are counted
SMOOTHING = 0.3  # weight of the last such window
SHORT_BODY = 2**16  # bytes of a body that are reserved ahead; a longer body is a long one
LONG_SHARE = 7 / 8  # of all bytes, that long bodies may hold
RECENT_S = 1.0  # of admitted rows that count as recent, together with those of the same time before


class ClientUsage:
    """What a client holds: requests, rows, bytes."""

    requests = rows = size = 0


@dataclass
class AdmittedRows:
    """The rows admitted since a time: all, and by client."""

    since: float
    rows: int = 0
    by_client: dict[str, int] = field(default_factory=dict)


class Admission:
    """The rows and bytes in flight, by client; rejects at once what has no room.

    A client is known while it has a request in flight.
    """

    def __init__(
        self,
        limit: Limit,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.limit = limit
        self.rows = self.size = 0
        self.clients: dict[str, ClientUsage] = {}
        self._max_size = round(settings.max_in_flight_mb * 1e6)
        self._max_long = round(LONG_SHARE * self._max_size)
        self._clock = clock
        self._metrics = metrics
        self._rate = 0.0  # rows served a second, smoothed
        self._served = 0
        self._served_since = clock()
        self._recent = AdmittedRows(self._served_since)
        self._earlier = AdmittedRows(self._served_since)

    def admit(self, client: str, size: int) -> Permit:
        """Return a permit for one row and the `size` bytes of a complete body; raises as `check_row`.

        Room is checked before a permit is made, so that a rejection costs little.
        """
        if self.rows >= self.limit.rows:
            self.check_row(client)
        if self.size + size > self._max_long:
            self.check_size(client, size, size)
        permit = Permit(self, client)
        permit.hold(1, size)
        self.record_admitted(client, 1)
        return permit

    def check_row(self, client: str) -> None:
        """Check that there is room for a row of `client`.

        Raises:
            Overloaded: the limit is reached.
            ClientLimit: the limit is reached, and the client holds its fair share of it.
        """
        if self.rows < self.limit.rows:
            return
        usage, others = self._usage(client)
        share, sustained = self.limit.rows / (others + 1), self.limit.sustained
        is_light = sustained >= others + 1 and self._is_far_below_fair_share(client, others)
        if usage.rows + 1 <= (sustained if is_light else share):
            return
        self.limit.record_rejection(self._clock())
        raise self._rejection("rows", others > 0 and usage.rows >= share)

    def check_size(self, client: str, size: int, more: int) -> None:
        """Check that there is room for `more` bytes of a body of `size` bytes; raises as `check_row`."""
        room = self._max_size if size <= SHORT_BODY else self._max_long
        if self.size + more <= room or not self.size:
            return
        usage, others = self._usage(client)
        share = room / (others + 1)
        if usage.size + more > share:
            raise self._rejection("bytes", others > 0 and usage.size >= share)

    def record_admitted(self, client: str, rows: int) -> None:
        """Count rows of `client` that were admitted."""
        now = self._clock()
        age = now - self._recent.since
        if age >= RECENT_S:
            self._earlier = self._recent if age < 2 * RECENT_S else AdmittedRows(now)
            self._recent = AdmittedRows(now)
        recent = self._recent
        recent.rows += rows
        recent.by_client[client] = recent.by_client.get(client, 0) + rows

    def record_served(self, route: str, model: str, rows: int, seconds: float) -> None:
        """Count rows of a request that was served in `seconds`, and has just been released."""
        now = self._clock()
        self._served += rows
        elapsed = now - self._served_since
        if elapsed >= RATE_WINDOW_S:
            rate = self._served / elapsed
            self._rate += (rate - self._rate) * SMOOTHING if self._rate else rate
            self._served_since, self._served = now, 0
        self.limit.observe((route, model, rows.bit_length()), seconds, self.rows + rows, now)

    def retry_after_s(self) -> int:
        """Return in how many whole seconds the rows in flight will have been served, 1 to `MAX_RETRY_S`."""
        return max(1, min(MAX_RETRY_S, math.ceil(self.rows / self._rate))) if self._rate else 1

    def update_gauges(self) -> None:
        """Update the gauges."""
        self._metrics.limit_rows.set(self.limit.rows)
        self._metrics.in_flight_rows.set(self.rows)
        self._metrics.in_flight_bytes.set(self.size)

    def _usage(self, client: str) -> tuple[ClientUsage, int]:
        """Return what a client holds, and how many other clients there are."""
        usage = self.clients.get(client)
        return usage or ClientUsage(), len(self.clients) - (usage is not None)

    def _is_far_below_fair_share(self, client: str, others: int) -> bool:
        """Return whether `client` had less than half of its fair share of the rows admitted recently."""
        rows = self._recent.by_client.get(client, 0) + self._earlier.by_client.get(client, 0)
        return others > 0 and 2 * rows * (others + 1) < self._recent.rows + self._earlier.rows

    def _rejection(self, resource: str, over_share: bool) -> Overloaded | ClientLimit:
        self._metrics.refusals.inc("client" if over_share else resource)
        retry_after = self.retry_after_s()
        if over_share:
            detail = "this client has its fair share of requests in flight, and other clients are waiting"
            return ClientLimit(detail, retry_after=retry_after)
        return Overloaded(f"no room for more {resource} in flight", retry_after=retry_after)


@dataclass(eq=False, slots=True)
class Permit:
    """What one request holds: bytes as its body arrives, rows once the body is complete, nothing once released."""

    _admission: Admission
    _client: str
    _usage: ClientUsage | None = None
    rows: int = 0
    size: int = 0

    def reserve(self, size: int, declared: int = 0) -> None:
        """Hold `size` bytes in all.

        Args:
            size: bytes of the body, as far as it has arrived.
            declared: length of the whole body; its first bytes are reserved ahead.

        Raises:
            Overloaded, ClientLimit: there is no room for `size`, or for `declared` bytes.
        """
        if declared > SHORT_BODY:
            self._admission.check_size(self._client, declared, declared)
            declared = SHORT_BODY
        if declared > size:
            size = declared
        more = size - self.size
        if more <= 0:
            return
        self._admission.check_size(self._client, size, more)
        self.hold(0, more)

    def set_rows(self, rows: int) -> None:
        """Hold `rows` rows: 1 once the body is complete and `check_row` found room, then as many as were decoded."""
        if self.rows and self._usage is None:
            return  # released
        self._admission.record_admitted(self._client, rows - self.rows)
        self.hold(rows - self.rows, 0)

    def release(self) -> None:
        """Release everything. Idempotent."""
        usage, self._usage = self._usage, None
        if usage is None:
            return
        admission = self._admission
        admission.rows -= self.rows
        admission.size -= self.size
        usage.rows -= self.rows
        usage.size -= self.size
        usage.requests -= 1
        if not usage.requests:
            del admission.clients[self._client]

    def hold(self, rows: int, size: int) -> None:
        """Hold so many rows and bytes more, without a check."""
        admission, usage = self._admission, self._usage
        if usage is None:
            usage = self._usage = admission.clients.setdefault(self._client, ClientUsage())
            usage.requests += 1
        self.rows += rows
        self.size += size
        usage.rows += rows
        usage.size += size
        admission.rows += rows
        admission.size += size
