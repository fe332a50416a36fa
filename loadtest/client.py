"""An HTTP/1.1 client for load: a LIFO pool of keep-alive connections, one request on each, no retries."""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import cast
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from loadtest.record import Failure, Record

IDLE = -1


class Connection(asyncio.Protocol):
    """One connection; carries the arrival `index`, or IDLE, and parses the answer to it."""

    transport: asyncio.Transport
    version: bytes | None = None
    served_by: bytes | None = None
    retry_after = False
    index = IDLE
    answers = 0
    heard = False

    def __init__(self, pool: "Pool") -> None:
        """Belong to `pool`."""
        self.pool = pool
        self.body: list[bytes] = []
        self.on_body = self.body.append
        self.parser = HttpResponseParser(self)  # last: it looks its callbacks up now

    def send(self, index: int, request: bytes) -> None:
        """Write the request of arrival `index`."""
        self.index, self.heard, self.retry_after = index, False, False
        self.version = self.served_by = None
        self.body.clear()
        self.transport.write(request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Tell the pool that the connection stands."""
        self.transport = cast(asyncio.Transport, transport)
        self.pool.ready(self)

    def data_received(self, data: bytes) -> None:
        """Parse what came; bytes nobody asked for, or that are not HTTP, end the connection."""
        self.heard = True
        try:
            self.parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self.pool.record.blame(error)
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the pool that the connection is gone."""
        self.pool.gone(self, exc)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep the headers that say who answered, and whether to come again."""
        name = name.lower()
        if name == b"x-model-version":
            self.version = value
        elif name == b"x-served-by":
            self.served_by = value
        elif name == b"retry-after":
            self.retry_after = value.isdigit()

    def on_message_complete(self) -> None:
        """Tell the pool that the answer is whole."""
        if self.index != IDLE:
            self.answers += 1
            self.pool.answered(self)


class Pool:
    """Sends arrivals and records what became of each; at most `limit` connections, beyond it they queue.

    The timeout (seconds) runs from the intended start, so waiting for a connection counts.
    """

    def __init__(
        self,
        url: str,
        requests: Sequence[bytes],
        is_right: Callable[[int, bytes | None, bytes], bool],
        record: Record,
        limit: int,
        timeout: float,
        source: str | None = None,
    ) -> None:
        """Address the host of `url` from `source`; arrival i sends request i % n, `is_right(i % n, version, body)`."""
        address = urlsplit(url)
        secure = address.scheme == "https"
        self.host, self.port = address.hostname or "", address.port or (443 if secure else 80)
        self.ssl = ssl.create_default_context() if secure else None
        self.source = (source, 0) if source else None
        self.requests, self.is_right, self.record = requests, is_right, record
        self.limit, self.timeout = limit, timeout
        self.idle: list[Connection] = []
        self.connections: set[Connection] = set()
        self.waiting: deque[int] = deque()
        self.opening: set[asyncio.Task[None]] = set()
        self.remaining = len(record)
        self.finished = asyncio.Event()

    def dispatch(self, index: int) -> None:
        """Start arrival `index`: on the idle connection used last, else on a new one, else in the queue."""
        self.record.fired[index] = monotonic()
        if self.idle:
            self._send(self.idle.pop(), index)
        else:
            self.waiting.append(index)
            self._grow()

    def ready(self, connection: Connection) -> None:
        """Take in a new connection."""
        self.connections.add(connection)
        self.record.opened += 1
        self.record.peak = max(self.record.peak, len(self.connections))
        self._reuse(connection)

    def answered(self, connection: Connection) -> None:
        """Record the answer on `connection`, then reuse it unless the server asked to close."""
        record, index = self.record, connection.index
        status, body = connection.parser.get_status_code(), b"".join(connection.body)
        record.version[index] = record.versions.code(connection.version)
        record.served_by[index] = record.servers.code(connection.served_by)
        record.retry_after[index] = connection.retry_after
        version, connection.index = connection.version, IDLE
        self._finish(index, status)
        if connection.parser.should_keep_alive():
            self._reuse(connection)
        else:
            connection.transport.close()
        record.invalid[index] = status == 200 and not self.is_right(index % len(self.requests), version, body)

    def gone(self, connection: Connection, error: Exception | None) -> None:
        """Forget a closed connection; the arrival it carried is lost."""
        self.connections.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)
        if connection.index != IDLE:
            self.record.blame(error or EOFError("closed by the server"))
            self._finish(connection.index, _loss(connection))
            connection.index = IDLE
        self._grow()

    def expire(self) -> None:
        """Give up on every arrival whose timeout has passed."""
        overdue = monotonic() - self.timeout
        while self.waiting and self.record.intended[self.waiting[0]] <= overdue:
            self._finish(self.waiting.popleft(), Failure.TIMEOUT)
        for connection in tuple(self.connections):
            if connection.index != IDLE and self.record.intended[connection.index] <= overdue:
                self._finish(connection.index, Failure.TIMEOUT)
                connection.index = IDLE
                connection.transport.abort()

    async def close(self) -> None:
        """Close every connection and stop opening more."""
        self.waiting.clear()
        for task in self.opening:
            task.cancel()
        await asyncio.gather(*self.opening, return_exceptions=True)
        for connection in tuple(self.connections):
            connection.transport.close()
        await asyncio.sleep(0)

    def _send(self, connection: Connection, index: int) -> None:
        self.record.sent[index] = monotonic()
        connection.send(index, self.requests[index % len(self.requests)])

    def _reuse(self, connection: Connection) -> None:
        if self.waiting:
            self._send(connection, self.waiting.popleft())
        else:
            self.idle.append(connection)

    def _grow(self) -> None:
        wanted = min(len(self.waiting), self.limit - len(self.connections))
        for _ in range(wanted - len(self.opening)):
            task = asyncio.get_running_loop().create_task(self._open())
            self.opening.add(task)
            task.add_done_callback(self._opened)

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.timeout):
                await loop.create_connection(
                    lambda: Connection(self), self.host, self.port, ssl=self.ssl, local_addr=self.source
                )
        except TimeoutError as error:
            self.record.blame(error)  # the arrivals that waited for it expire by themselves
        except OSError as error:
            self.record.blame(error)
            if self.waiting:
                self._finish(self.waiting.popleft(), Failure.REFUSED)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self.opening.discard(task)
        self._grow()

    def _finish(self, index: int, outcome: int) -> None:
        self.record.done[index] = monotonic()
        self.record.outcome[index] = outcome
        self.remaining -= 1
        if not self.remaining:
            self.finished.set()


def _loss(connection: Connection) -> Failure:
    if connection.heard:
        return Failure.LOST_PARTIAL
    return Failure.LOST_REUSED if connection.answers else Failure.LOST_FRESH
