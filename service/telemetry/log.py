"""One event a line on stderr, never a vector or token: JSON, or columns where a person looks on.

One thread of each process writes the lines. A caller that logs never waits and never fails, whatever happens to stderr.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import select
import sys
import threading
from collections.abc import Callable, Mapping
from functools import cache
from queue import SimpleQueue
from random import random
from time import monotonic
from typing import Any

import structlog

Logger = structlog.typing.FilteringBoundLogger
MOST_FAILURES = 10  # lines a second: a log shall not be what a busy service is busy with
MOST_BYTES = 2**18  # of lines that wait to be written: some eight hundred
FLUSH_S = 1.0  # at the end, for what is queued; a reader that stalls must not hold up a stop
STDERR = 2


class LogWriter(io.RawIOBase):
    """Writes lines to the descriptor `fd` in a thread of its own, each by one write.

    A line that cannot be written, or that does not fit behind those that wait, is dropped and counted.
    """

    def __init__(self, fd: int, most_bytes: int = MOST_BYTES) -> None:
        self._fd, self._most = fd, most_bytes
        self._queue: SimpleQueue[bytes | threading.Event] = SimpleQueue()
        self._lock = threading.RLock()  # a finalizer may log at any point, also in a thread that holds it
        self._waiting = self._dropped = 0
        self._count: Callable[[], object] = self._remember
        self._is_torn = False
        threading.Thread(target=self._work, name="log", daemon=True).start()

    def writable(self) -> bool:
        """Return True: text streams ask."""
        return True

    def write(self, data: Any) -> int:
        """Have a line written later; return its bytes."""
        line = bytes(data)
        with self._lock:
            if self._waiting + len(line) > self._most:
                self._count()
            else:
                self._waiting += len(line)
                self._queue.put(line)
        return len(line)

    def close(self) -> None:
        """Stay open: the stream over it may be replaced by another."""

    def on_drop(self, count: Callable[[], object]) -> None:
        """Call `count` for each line that is dropped, and at once for those that were before anybody counted."""
        with self._lock:
            self._count = count
            for _ in range(self._dropped):
                count()
            self._dropped = 0

    def drain(self, timeout: float = FLUSH_S) -> None:
        """Wait until what is queued is written, `timeout` seconds at most."""
        written = threading.Event()
        self._queue.put(written)
        written.wait(timeout)

    def _remember(self) -> None:
        self._dropped += 1

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            is_written = self._put(item)
            with self._lock:
                self._waiting -= len(item)
                if not is_written:
                    self._count()

    def _put(self, line: bytes) -> bool:
        """Write a line, on a line of its own if the last one was cut short; return whether all of it was written."""
        rest = b"\n" + line if self._is_torn else line
        size = len(rest)
        try:
            while rest:
                rest = rest[self._write_some(rest) :]
        except OSError:
            self._is_torn = self._is_torn or len(rest) < size
            return False
        self._is_torn = False
        return True

    def _write_some(self, data: bytes) -> int:
        """Write as much as fits; wait if the descriptor does not block and is full."""
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            room = select.poll()
            room.register(self._fd, select.POLLOUT)
            room.poll()
            return 0


class Lines:
    """What structlog writes to: a line an event."""

    def __init__(self, sink: LogWriter) -> None:
        self._sink = sink

    def msg(self, line: str) -> None:
        """Have a line written."""
        self._sink.write(f"{line}\n".encode(errors="backslashreplace"))

    debug = info = warning = warn = error = err = exception = critical = fatal = msg


@cache
def log_writer() -> LogWriter:
    """Return what writes the log of this process."""
    made = LogWriter(STDERR)
    atexit.register(made.drain)
    return made


def configure(level: str, **who: str | int) -> None:
    """Send events of at least `level`, and the warnings and uncaught exceptions of all code, to stderr.

    Each line has the fields `who`: which of several processes speaks.
    """
    sys.stderr = io.TextIOWrapper(log_writer(), encoding="utf-8", errors="backslashreplace", line_buffering=True)
    marks: list[structlog.typing.Processor] = [
        _naming(who),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    is_watched = os.isatty(STDERR)
    render = structlog.dev.ConsoleRenderer() if is_watched else structlog.processors.JSONRenderer()
    lines = Lines(log_writer())
    structlog.configure(
        processors=[*marks, render],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=False,
    )
    others = logging.StreamHandler(sys.stderr)
    theirs = [structlog.stdlib.add_logger_name, *marks]
    others.setFormatter(structlog.stdlib.ProcessorFormatter(processor=render, foreign_pre_chain=theirs))
    logging.basicConfig(handlers=[others], level=logging.WARNING, force=True)
    _log_what_nobody_caught()


def _naming(who: Mapping[str, str | int]) -> structlog.typing.Processor:
    """Return what adds `who` to an event; what the event says itself stays."""
    return lambda _, __, event: {**who, **event}


def _log_what_nobody_caught() -> None:
    """Make an event of a warning, and of an exception that ends a thread, a finalizer or the process."""
    logging.captureWarnings(True)

    def tell(args: threading.ExceptHookArgs | sys.UnraisableHookArgs) -> None:
        if args.exc_type is not SystemExit:
            logger().error("unexpected", exc_info=args.exc_value)

    threading.excepthook = sys.unraisablehook = tell
    sys.excepthook = lambda _, error, __: logger().error("unexpected", exc_info=error)


def logger() -> Logger:
    """Return the process's logger."""
    log: Logger = structlog.get_logger()
    return log


class AccessLog:
    """A line a request: for `share` of them, and for what failed here (5xx), as far as `MOST_FAILURES` a second go."""

    def __init__(
        self, share: float, draw: Callable[[], float] = random, clock: Callable[[], float] = monotonic
    ) -> None:
        self.share, self._draw, self._clock = share, draw, clock
        self._second = self._failures = self._left_out = 0

    def wants(self, status: int) -> bool:
        """Say whether a request that ended with `status` gets a line."""
        if self.share and self._draw() < self.share:
            return True
        return status >= 500 and self._has_room()

    def write(self, status: int, **fields: str | float) -> None:
        """Write a line, without fields that are empty; `left_out` counts the failures before it that have none."""
        said = {name: value for name, value in fields.items() if value != ""}
        if self._left_out:
            said["left_out"], self._left_out = self._left_out, 0
        if status >= 500:
            logger().error("request failed", status=status, **said)
        else:
            logger().info("request", status=status, **said)

    def _has_room(self) -> bool:
        second = int(self._clock())
        if second != self._second:
            self._second, self._failures = second, 0
        self._failures += 1
        self._left_out += self._failures > MOST_FAILURES
        return self._failures <= MOST_FAILURES
