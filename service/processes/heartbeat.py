"""The line between a process and its supervisor: a byte a second from one that is well; at its end, time to go."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from time import sleep

LOOK_S = 1.0  # between two looks at who the parent is


def send_heartbeat(line: socket.socket) -> None:
    """Send one byte: the first says that this process is ready, later ones that it is alive. Never blocks."""
    with contextlib.suppress(OSError):
        line.send(b".", socket.MSG_DONTWAIT)


def on_supervisor_exit(line: socket.socket, home: Path, call: Callable[[], object], most_s: float) -> None:
    """Call `call` once the supervisor is gone, and remove its directory `home`.

    End the process if it is still there `most_s` seconds later. A thread waits, so a process whose event loop hangs
    ends as well.
    """
    end = line.dup()
    supervisor = os.getppid()

    def wait() -> None:
        ended = select.poll()
        ended.register(end, select.POLLIN)
        while not ended.poll(LOOK_S * 1000) and os.getppid() == supervisor:
            pass
        shutil.rmtree(home, ignore_errors=True)
        call()
        sleep(most_s)
        os._exit(1)

    threading.Thread(target=wait, name="line", daemon=True).start()
