"""Work aside: done in a thread that gives way to those that answer callers meanwhile, as loading is beside traffic."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

NICE = 10  # a tenth of the processor, where somebody else wants it
_this_thread = threading.local()


def open_aside() -> ThreadPoolExecutor:
    """Return an executor of one thread that gives way."""
    return ThreadPoolExecutor(1, thread_name_prefix="aside", initializer=_give_way)


def gives_way() -> bool:
    """Return whether this thread gives way; so would, for ever, any thread that it starts."""
    return getattr(_this_thread, "gives_way", False)


def _give_way() -> None:
    _this_thread.gives_way = True
    if sys.platform == "linux":  # elsewhere a priority is a process's, not a thread's
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))
