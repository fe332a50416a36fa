"""The heartbeat socket between a process and its supervisor: the process sends a byte a second while it is well.

If the supervisor exits, its end of the socket closes, and the process drains. It drains at `SIGNALS`, too.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from time import sleep

SIGNALS = signal.SIGTERM, signal.SIGINT
# Seconds between two checks of the parent's process id.
POLL_S = 1.0


def send_heartbeat(heartbeats: socket.socket) -> None:
    """Send one byte without blocking. The first reports that the process is ready, later ones that it is alive."""
    with contextlib.suppress(OSError):
        heartbeats.send(b".", socket.MSG_DONTWAIT)


def on_supervisor_exit(
    heartbeats: socket.socket, directory: Path, callback: Callable[[], object], timeout_s: float
) -> None:
    """When the supervisor has exited, remove its `directory` and call `callback` in a thread.

    The thread ends the process `timeout_s` seconds later, also if the event loop hangs.
    """
    heartbeats = heartbeats.dup()
    supervisor = os.getppid()

    def wait() -> None:
        closed = select.poll()
        closed.register(heartbeats, select.POLLIN)
        while not closed.poll(POLL_S * 1000) and os.getppid() == supervisor:
            pass
        shutil.rmtree(directory, ignore_errors=True)
        callback()
        sleep(timeout_s)
        os._exit(1)

    threading.Thread(target=wait, name="supervisor-exit", daemon=True).start()
