"""Accepts every connection that waits, so that admission can answer or reject its request at once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

# Connections in one turn of the event loop, after which others get their turn.
MOST_AT_ONCE = 512


class Acceptor:
    """Accepts, in each turn of the event loop, the connections that the loop's own server leaves waiting.

    uvloop accepts one connection a turn. If turns are long, since answers are large or the service is overloaded, new
    connections would wait in the queue of the kernel. Admission could not reject them there, and probes would wait too.
    """

    def __init__(self, listener: socket.socket, make_protocol: Callable[[], asyncio.BaseProtocol]) -> None:
        self._make_protocol = make_protocol
        # The loop watches each descriptor once, and its own server has that of `listener`.
        self._listener = listener.dup()
        self._listener.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[object]] = set()
        # The loop's own server, which is cheaper, takes the first connection of a turn.
        self._loop.add_reader(self._listener, self._loop.call_soon, self._accept_waiting)

    async def close(self) -> None:
        """Accept no more; return when every connection that was accepted is served."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()
        await asyncio.gather(*self._opening)

    def _accept_waiting(self) -> None:
        # No connection waits any more, or there is no descriptor for it; or the acceptor is closed.
        with contextlib.suppress(OSError):
            for _ in range(MOST_AT_ONCE):
                self._open(self._listener.accept()[0])

    def _open(self, connection: socket.socket) -> None:
        task = self._loop.create_task(self._serve(connection))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _serve(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except OSError:
            connection.close()
