"""The priority of a thread: threads that load versions have a lower one than threads that answer requests."""

from __future__ import annotations

import os
import sys
import threading

# a tenth of the processor if another thread wants it
NICE = 10
_this_thread = threading.local()


def lower_priority() -> None:
    """Lower the priority of this thread permanently."""
    _this_thread.has_lowered_priority = True
    # on other systems a priority belongs to a process
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))


def has_lowered_priority() -> bool:
    """Return whether this thread has a lower priority; threads that it starts inherit that."""
    return getattr(_this_thread, "has_lowered_priority", False)
