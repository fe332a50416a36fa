"""Threads for what may hang: a share, a store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def aside(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Return what `function` does, or raise what it raises, in a thread that nobody waits for when the process ends.

    `asyncio.to_thread` is for what comes back by itself: the end of the process waits for its threads.
    """
    loop = asyncio.get_running_loop()
    end: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if end.done():
            return  # who waited was cancelled
        if error:
            end.set_exception(error)
        else:
            end.set_result(result)  # type: ignore[arg-type]  # T may be None itself

    def run() -> None:
        outcome: tuple[T | None, Exception | None]
        try:
            outcome = function(*arguments, **options), None
        except Exception as error:
            outcome = None, error
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, daemon=True).start()
    return await end
