"""Background tasks that survive exceptions, and calls in threads that may hang."""

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
    """A context that catches exceptions. It logs the first one in a row of failures."""

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
    """Await `step` for ever, `pause_s` seconds before each time; log its exceptions."""
    catch = CatchAndLog(task)
    while True:
        await asyncio.sleep(pause_s)
        with catch:
            await step()


async def catch_and_log(task: str, work: Awaitable[object]) -> None:
    """Await `work`; log its exception."""
    with CatchAndLog(task):
        await work


class SerialExecutor:
    """Runs calls one after another in a daemon thread, which does not delay the exit of the process.

    `asyncio.to_thread` is for calls that cannot hang: the exit waits for its threads.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._is_open = False

    async def run(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Return the result of `function`, or raise its exception. A call that is cancelled in time does not run."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def call() -> None:
            if result.done():
                return
            try:
                settle: tuple[Callable[..., None], Any] = result.set_result, function(*arguments, **options)
            except Exception as error:
                settle = result.set_exception, error
            # RuntimeError: the loop is closed.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, result, *settle)

        self._open()
        self._calls.put(call)
        return await result

    def close(self) -> None:
        """End the thread after the calls that are queued."""
        if self._is_open:
            self._is_open = False
            self._calls.put(None)

    async def shutdown(self, timeout: float) -> None:
        """Close, and wait up to `timeout` seconds for the queued calls.

        A process may abort if it exits while a C++ library loads a net.
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
    """Makes one call at a time in an executor. Callers that come while it runs share its result."""

    def __init__(self, executor: SerialExecutor, function: Callable[[], T]) -> None:
        self._executor = executor
        self._function = function
        self._running: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        """Return the result of the function, or raise its exception. A cancelled caller does not cancel the call."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._executor.run(self._function))
        return await asyncio.shield(self._running)


def _settle(result: asyncio.Future[Any], settle: Callable[[Any], None], outcome: Any) -> None:
    # The caller may have been cancelled meanwhile.
    if not result.done():
        settle(outcome)
