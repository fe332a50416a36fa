"""The log: one event a line on stderr, as JSON, or in columns on a terminal. It never has a vector or a token.

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

from service.settings import unknown_settings

Logger = structlog.typing.FilteringBoundLogger
# Lines for failed requests, per second. The log must not be what keeps a busy service busy.
MAX_FAILURES = 10
# Bytes of lines that wait to be written, about eight hundred lines.
MAX_BYTES = 2**18
# Seconds at exit for queued lines. A reader that stalls must not delay the exit further.
FLUSH_S = 1.0
STDERR = 2


class LogWriter(io.RawIOBase):
    """Writes lines to the descriptor `fd` in a thread, each with one write.

    A line is dropped and counted if it cannot be written, or if more than `max_bytes` wait already.
    """

    def __init__(self, fd: int, max_bytes: int = MAX_BYTES) -> None:
        self._fd = fd
        self._max_bytes = max_bytes
        self._queue: SimpleQueue[bytes | threading.Event] = SimpleQueue()
        # Reentrant: a finalizer may log at any time, also in a thread that holds the lock.
        self._lock = threading.RLock()
        self._waiting = 0
        self._dropped = 0
        self._count_drop: Callable[[], object] = self._remember_drop
        self._is_torn = False
        threading.Thread(target=self._work, name="log", daemon=True).start()

    def writable(self) -> bool:
        """Return True. `io.TextIOWrapper` asks."""
        return True

    def write(self, data: Any) -> int:
        """Queue a line; return its length in bytes."""
        line = bytes(data)
        with self._lock:
            if self._waiting + len(line) > self._max_bytes:
                self._count_drop()
            else:
                self._waiting += len(line)
                self._queue.put(line)
        return len(line)

    def close(self) -> None:
        """Stay open: a replaced `sys.stderr` closes its stream."""

    def on_drop(self, count: Callable[[], object]) -> None:
        """Call `count` for each dropped line, at once for the lines that are dropped already."""
        with self._lock:
            self._count_drop = count
            for _ in range(self._dropped):
                count()
            self._dropped = 0

    def drain(self, timeout: float = FLUSH_S) -> None:
        """Wait until the queued lines are written, `timeout` seconds at most."""
        written = threading.Event()
        self._queue.put(written)
        written.wait(timeout)

    def _remember_drop(self) -> None:
        self._dropped += 1

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            is_written = self._write_line(item)
            with self._lock:
                self._waiting -= len(item)
                if not is_written:
                    self._count_drop()

    def _write_line(self, line: bytes) -> bool:
        """Write a line, after a line break if the last line was cut short; return whether it was written in full."""
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
        """Write as much as fits. If the descriptor does not block and is full, wait for room."""
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            room = select.poll()
            room.register(self._fd, select.POLLOUT)
            room.poll()
            return 0


@cache
def log_writer() -> LogWriter:
    """Return the writer of this process's log."""
    writer = LogWriter(STDERR)
    atexit.register(writer.drain)
    return writer


def configure(level: str, **process: str | int) -> None:
    """Send events of at least `level`, and the warnings and uncaught exceptions of all code, to stderr.

    Each line has the fields `process`, which identify the process.
    """
    sys.stderr = io.TextIOWrapper(log_writer(), encoding="utf-8", errors="backslashreplace", line_buffering=True)
    fields: list[structlog.typing.Processor] = [
        _add_fields(process),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    is_terminal = os.isatty(STDERR)
    render = structlog.dev.ConsoleRenderer() if is_terminal else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*fields, render],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    _log_libraries([structlog.stdlib.add_logger_name, *fields], render)
    _log_uncaught()


def _add_fields(fields: Mapping[str, str | int]) -> structlog.typing.Processor:
    """Return a processor that adds `fields` to an event. A field of the event itself takes precedence."""
    return lambda _, __, event: {**fields, **event}


def _log_libraries(processors: list[structlog.typing.Processor], render: structlog.typing.Processor) -> None:
    """Write the warnings of libraries, which use the standard library's logging, in the same format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=render, foreign_pre_chain=processors))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)


def _log_uncaught() -> None:
    """Log an exception that ends a thread, a finalizer or the process."""

    def log(args: threading.ExceptHookArgs | sys.UnraisableHookArgs) -> None:
        if args.exc_type is not SystemExit:
            logger().error("unexpected", exc_info=args.exc_value)

    threading.excepthook = sys.unraisablehook = log
    sys.excepthook = lambda _, error, __: logger().error("unexpected", exc_info=error)


def logger() -> Logger:
    """Return the process's logger."""
    log: Logger = structlog.get_logger()
    return log


def warn_of_unknown_settings() -> None:
    """Log the variables that are no settings, and so have no effect."""
    for name, nearest in unknown_settings(os.environ):
        logger().warning("unknown setting", name=name, nearest=nearest)


class AccessLog:
    """Lines for requests: for a share of all, and for requests that failed here (5xx), `MAX_FAILURES` a second."""

    def __init__(
        self, share: float, draw: Callable[[], float] = random, clock: Callable[[], float] = monotonic
    ) -> None:
        self.share = share
        self._draw = draw
        self._clock = clock
        self._second = 0
        self._failures = 0
        self._left_out = 0

    def wants(self, status: int) -> bool:
        """Return whether a request that ended with `status` gets a line."""
        if self.share and self._draw() < self.share:
            return True
        return status >= 500 and self._has_room()

    def write(self, status: int, **fields: str | float) -> None:
        """Write a line without empty fields. `left_out` counts the failures before it that got no line."""
        shown = {name: value for name, value in fields.items() if value != ""}
        if self._left_out:
            shown["left_out"] = self._left_out
            self._left_out = 0
        if status >= 500:
            logger().error("request failed", status=status, **shown)
        else:
            logger().info("request", status=status, **shown)

    def _has_room(self) -> bool:
        second = int(self._clock())
        if second != self._second:
            self._second = second
            self._failures = 0
        self._failures += 1
        self._left_out += self._failures > MAX_FAILURES
        return self._failures <= MAX_FAILURES
