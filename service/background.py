"""Background tasks: no exception ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import NoReturn

from service.log import logger


class Guarded:
    """A context that an exception does not leave; it is logged, once until the context is left without one."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._is_failing = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if isinstance(error, Exception) and not self._is_failing:
            logger().error("background task failed", task=self._task, exc_info=error)
        self._is_failing = error is not None
        return isinstance(error, Exception)


async def repeat(task: str, step: Callable[[], Awaitable[object]], pause_s: float) -> NoReturn:
    """Await `step` again and again, `pause_s` seconds before each, whatever it raises."""
    guarded = Guarded(task)
    while True:
        await asyncio.sleep(pause_s)
        with guarded:
            await step()


async def guard(task: str, work: Awaitable[object]) -> None:
    """Await `work`, whatever it raises."""
    with Guarded(task):
        await work
