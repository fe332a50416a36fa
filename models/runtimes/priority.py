"""The priority of a thread: what loads beside traffic gives way to what answers callers meanwhile."""

from __future__ import annotations

import os
import sys
import threading

NICE = 10  # a tenth of the processor, where somebody else wants it
_this_thread = threading.local()


def give_way() -> None:
    """Have this thread give way, for good."""
    _this_thread.gives_way = True
    if sys.platform == "linux":  # elsewhere a priority is a process's, not a thread's
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))


def gives_way() -> bool:
    """Return whether this thread gives way; so would any thread that it starts."""
    return getattr(_this_thread, "gives_way", False)
