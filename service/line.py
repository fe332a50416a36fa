"""The line between a process and its supervisor: a byte a second from one that is well; at its end, time to go."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable


def beat(line: socket.socket) -> None:
    """Say that all is well; the first time, that it is ready."""
    with contextlib.suppress(OSError):
        line.send(b".")


def when_lost(line: socket.socket, call: Callable[[], object]) -> None:
    """Call `call` once the supervisor is gone; from the running event loop."""
    loop = asyncio.get_running_loop()

    def lost() -> None:
        loop.remove_reader(line)
        call()

    loop.add_reader(line, lost)
