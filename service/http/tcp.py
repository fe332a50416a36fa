"""What the kernel knows of a connection whose other side sends no more."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from typing import NamedTuple

CLOSED = 7  # TCP_CLOSE: the connection was reset
TIMES = struct.Struct("B51xII")  # struct tcp_info: state, ms since the last data and since the last acknowledgement
PROMPT_MS = 100


class Ending(NamedTuple):
    """How the other side ended: by a reset, or by a FIN so many milliseconds behind its last data."""

    is_reset: bool
    fin_ms: int

    @property
    def closed_after_sending(self) -> bool:
        """Whether the FIN came right behind the data. A client that gives up waits before it closes."""
        return self.fin_ms <= PROMPT_MS


def ending(transport: asyncio.Transport) -> Ending:
    """Return how the other side of a connection ended; elsewhere than on Linux, by a prompt FIN.

    The FIN is the last acknowledgement that came in, unless something was sent since.
    """
    connection = transport.get_extra_info("socket")
    if sys.platform != "linux" or connection is None:
        return Ending(False, 0)
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TIMES.size)
    except OSError:
        return Ending(True, 0)
    state, data_ms, acknowledged_ms = TIMES.unpack(info)
    return Ending(state == CLOSED, data_ms - acknowledged_ms)
