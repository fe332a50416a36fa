"""An HTTP/1.1 client for load: a LIFO pool of keep-alive connections, one request at a time on each, no retries."""

import asyncio
import math
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import cast
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from loadtest.plan import Plan
from loadtest.record import Failure, Record

IDLE = -1

# Returns how far the body of response i is from the expected one, given its version; infinity if it is invalid.
Check = Callable[[int, bytes | None, bytes], float]


class ClientConnection(asyncio.Protocol):
    """One connection; carries the request `index`, or IDLE, and parses the response to it."""

    transport: asyncio.Transport
    version: bytes | None = None
    served_by: bytes | None = None
    retry_after = False
    index = IDLE
    responses = 0
    has_received = False

    def __init__(self, pool: "Pool") -> None:
        self.pool = pool
        self.body: list[bytes] = []
        self.on_body = self.body.append
        # The parser looks up its callbacks now, so it comes last.
        self.parser = HttpResponseParser(self)

    def send(self, index: int, request: bytes) -> None:
        """Write request `index`."""
        self.index = index
        self.has_received = False
        self.retry_after = False
        self.version = None
        self.served_by = None
        self.body.clear()
        self.transport.write(request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Add the connection to the pool."""
        self.transport = cast(asyncio.Transport, transport)
        self.pool.ready(self)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes; unexpected bytes, or bytes that are not HTTP, end the connection."""
        self.has_received = True
        try:
            self.parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self.pool.record.blame(error)
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection from the pool."""
        self.pool.gone(self, exc)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep the headers that name the version and the server, and Retry-After."""
        name = name.lower()
        if name == b"x-model-version":
            self.version = value
        elif name == b"x-served-by":
            self.served_by = value
        elif name == b"retry-after":
            self.retry_after = value.isdigit()

    def on_message_complete(self) -> None:
        """Hand the whole response to the pool."""
        if self.index != IDLE:
            self.responses += 1
            self.pool.answered(self)


class Pool:
    """Sends the requests of a plan and records what happens to each.

    It has at most `plan.connections` connections; beyond them requests wait. The timeout runs from the intended start,
    so waiting counts. Request i sends `requests[i % n]`. One of `plan.check_every` responses is checked:
    `check(i % n, version, body)` must be at most `plan.tolerance`.
    """

    def __init__(self, plan: Plan, requests: Sequence[bytes], check: Check, record: Record) -> None:
        address = urlsplit(plan.url)
        secure = address.scheme == "https"
        self.host = address.hostname or ""
        self.port = address.port or (443 if secure else 80)
        self.ssl = ssl.create_default_context() if secure else None
        self.source = (plan.source, 0) if plan.source else None
        self.plan = plan
        self.requests = requests
        self.check = check
        self.record = record
        self.idle: list[ClientConnection] = []
        self.connections: set[ClientConnection] = set()
        self.waiting: deque[int] = deque()
        self.opening: set[asyncio.Task[None]] = set()
        self.unfinished = len(record)
        self.finished = asyncio.Event()
        # Called after every response or failure, before `finished` is set: a closed loop adds its next request.
        self.on_finish: Callable[[], None] = lambda: None

    async def connect(self) -> None:
        """Open all connections in advance; a request that finds too few tries again."""
        await asyncio.gather(*(self._open() for _ in range(self.plan.connections)))

    def add(self) -> None:
        """Record a request intended now and start it."""
        self.unfinished += 1
        self.dispatch(self.record.add(monotonic()))

    def dispatch(self, index: int) -> None:
        """Start request `index` on the idle connection used last, else on a new one; else it waits."""
        self.record.fired[index] = monotonic()
        if self.idle:
            self._send(self.idle.pop(), index)
        else:
            self.waiting.append(index)
            self._grow()

    def ready(self, connection: ClientConnection) -> None:
        """Add a new connection."""
        self.connections.add(connection)
        self.record.opened += 1
        self.record.peak = max(self.record.peak, len(self.connections))
        self._reuse(connection)

    def answered(self, connection: ClientConnection) -> None:
        """Record the response on `connection`, then reuse it unless the server asked to close."""
        done = monotonic()
        record = self.record
        index = connection.index
        status = connection.parser.get_status_code()
        version = connection.version
        body = b"".join(connection.body)
        record.version[index] = record.versions.code(version)
        record.served_by[index] = record.servers.code(connection.served_by)
        record.retry_after[index] = connection.retry_after
        connection.index = IDLE
        if connection.parser.should_keep_alive():
            self._reuse(connection)
        else:
            connection.transport.close()
        self._finish(index, status, done)
        # The next request is already on its way, so checking does not delay it.
        if status == 200 and index % self.plan.check_every == 0:
            self._check(index, version, body)

    def gone(self, connection: ClientConnection, error: Exception | None) -> None:
        """Forget a closed connection; the request that it carried is lost."""
        self.connections.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)
        if connection.index != IDLE:
            self.record.blame(error or EOFError("closed by the server"))
            self._finish(connection.index, _loss(connection), monotonic())
            connection.index = IDLE
        self._grow()

    def expire(self) -> None:
        """Give up on every request whose timeout has passed."""
        now = monotonic()
        overdue = now - self.plan.timeout
        while self.waiting and self.record.intended[self.waiting[0]] <= overdue:
            self._finish(self.waiting.popleft(), Failure.TIMEOUT, now)
        for connection in tuple(self.connections):
            if connection.index != IDLE and self.record.intended[connection.index] <= overdue:
                self._finish(connection.index, Failure.TIMEOUT, now)
                connection.index = IDLE
                connection.transport.abort()

    async def close(self) -> None:
        """Close every connection and open no more."""
        self.waiting.clear()
        for task in self.opening:
            task.cancel()
        await asyncio.gather(*self.opening, return_exceptions=True)
        for connection in tuple(self.connections):
            connection.transport.close()
        await asyncio.sleep(0)

    def _send(self, connection: ClientConnection, index: int) -> None:
        self.record.sent[index] = monotonic()
        connection.send(index, self.requests[index % len(self.requests)])

    def _reuse(self, connection: ClientConnection) -> None:
        if self.waiting:
            self._send(connection, self.waiting.popleft())
        else:
            self.idle.append(connection)

    def _grow(self) -> None:
        wanted = min(len(self.waiting), self.plan.connections - len(self.connections))
        for _ in range(wanted - len(self.opening)):
            task = asyncio.get_running_loop().create_task(self._open())
            self.opening.add(task)
            task.add_done_callback(self._opened)

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.plan.timeout):
                await loop.create_connection(
                    lambda: ClientConnection(self), self.host, self.port, ssl=self.ssl, local_addr=self.source
                )
        except TimeoutError as error:
            # The requests that wait for the connection expire by themselves.
            self.record.blame(error)
        except OSError as error:
            self.record.blame(error)
            if self.waiting:
                self._finish(self.waiting.popleft(), Failure.REFUSED, monotonic())

    def _opened(self, task: asyncio.Task[None]) -> None:
        self.opening.discard(task)
        self._grow()

    def _finish(self, index: int, outcome: int, done: float) -> None:
        self.record.done[index] = done
        self.record.outcome[index] = outcome
        self.unfinished -= 1
        self.on_finish()
        if not self.unfinished:
            self.finished.set()

    def _check(self, index: int, version: bytes | None, body: bytes) -> None:
        difference = self.check(index % len(self.requests), version, body)
        self.record.checked += 1
        self.record.invalid[index] = not difference <= self.plan.tolerance
        if math.isfinite(difference):
            self.record.difference = max(self.record.difference, difference)


def _loss(connection: ClientConnection) -> Failure:
    if connection.has_received:
        return Failure.LOST_PARTIAL
    return Failure.LOST_REUSED if connection.responses else Failure.LOST_FRESH
