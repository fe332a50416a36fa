"""One event a line on stderr, never a vector or token: JSON, or columns where a person looks on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from random import random
from time import monotonic

import structlog

Logger = structlog.typing.FilteringBoundLogger
MOST_FAILURES = 10  # lines a second: a log shall not be what a busy service is busy with


def configure(level: str) -> None:
    """Send events of at least `level`, and the warnings of other packages, to stderr."""
    marks: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    render = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*marks, render],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    others = logging.StreamHandler(sys.stderr)
    theirs = [structlog.stdlib.add_logger_name, *marks]
    others.setFormatter(structlog.stdlib.ProcessorFormatter(processor=render, foreign_pre_chain=theirs))
    logging.basicConfig(handlers=[others], level=logging.WARNING, force=True)


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
