"""Background tasks that no exception ends, and threads for calls that may hang."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar

from service.telemetry.log import logger

P = ParamSpec("P")
T = TypeVar("T")


class CatchAndLog:
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
    guarded = CatchAndLog(task)
    while True:
        await asyncio.sleep(pause_s)
        with guarded:
            await step()


async def catch_and_log(task: str, work: Awaitable[object]) -> None:
    """Await `work`, whatever it raises."""
    with CatchAndLog(task):
        await work


class SerialExecutor:
    """Runs one call after the other in a thread of its own, for which nobody waits when the process ends.

    `asyncio.to_thread` is for what comes back by itself: the end of a process waits for its threads.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._is_open = False

    async def run(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Return what `function` returns, or raise what it raises."""
        loop = asyncio.get_running_loop()
        end: asyncio.Future[T] = loop.create_future()

        def call() -> None:
            if end.done():
                return  # who waited has left
            try:
                settle: tuple[Callable[..., None], Any] = end.set_result, function(*arguments, **options)
            except Exception as error:
                settle = end.set_exception, error
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_settle, end, *settle)

        self._open()
        self._calls.put(call)
        return await end

    def close(self) -> None:
        """Let the thread go, once it comes back."""
        if self._is_open:
            self._is_open = False
            self._calls.put(None)

    async def shutdown(self, timeout: float) -> None:
        """Let the thread go, and wait `timeout` seconds at most for what runs in it.

        A process that ends while a library of C++ loads a net may abort.
        """
        if self._is_open:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.run(int), timeout)
        self.close()

    def _open(self) -> None:
        if not self._is_open:
            self._is_open = True
            Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while call := self._calls.get():
            call()


class SingleFlight(Generic[T]):
    """One reading at a time, beside, that everybody who asks meanwhile shares."""

    def __init__(self, executor: SerialExecutor, read: Callable[[], T]) -> None:
        self._executor, self._read = executor, read
        self._reading: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        """Return what is read, or raise what that raises; who leaves does not end it."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._executor.run(self._read))
        return await asyncio.shield(self._reading)


def _settle(end: asyncio.Future[Any], settle: Callable[[Any], None], outcome: Any) -> None:
    if not end.done():  # else who waited was cancelled
        settle(outcome)
