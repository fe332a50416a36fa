"""Tasks that start at once.

Most requests are answered without waiting, or wait for one future only. `asyncio.create_task` runs the first step of a
coroutine in the next turn of the event loop; asyncio has eager tasks from Python 3.12 on. `EagerTask` implements what
asyncio's documentation asks of a third-party task ("Extending", task lifetime support).
"""

from __future__ import annotations

import asyncio
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import Any, Generic, TypeVar

from service.telemetry.log import logger

T = TypeVar("T")


class EagerTask(Generic[T]):
    """Runs a coroutine; its first step runs at once, so no other task may be running.

    `on_done` is called once, with the result; with None if the coroutine was cancelled or failed.
    """

    _waits_for: Any = None
    _must_cancel = False
    _cancels = 0

    def __init__(
        self, coroutine: Coroutine[Any, Any, T], on_done: Callable[[T | None], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._coroutine: Coroutine[Any, Any, T] | None = coroutine
        self._on_done = on_done
        self._loop = loop
        self._context = copy_context()
        self._context.run(self._step)

    def done(self) -> bool:
        """Return whether the coroutine has ended."""
        return self._coroutine is None

    def cancel(self, msg: object = None) -> bool:
        """Raise `CancelledError` in the coroutine, where it waits."""
        if self._coroutine is None:
            return False
        self._cancels += 1
        if self._waits_for is None or not self._waits_for.cancel(msg):
            self._must_cancel = True
        return True

    def cancelling(self) -> int:
        """Return how many calls of `cancel` were not undone."""
        return self._cancels

    def uncancel(self) -> int:
        """Undo one call of `cancel`; return how many are left."""
        self._cancels = max(0, self._cancels - 1)
        return self._cancels

    def _step(self, _: object = None, error: BaseException | None = None) -> None:
        coroutine = self._coroutine
        if coroutine is None:
            return
        self._waits_for = result = None
        if self._must_cancel:
            self._must_cancel = False
            error = asyncio.CancelledError()
        _enter_task(self._loop, self)  # type: ignore[arg-type]  # asyncio does not name what a task has to have
        try:
            waits_for = coroutine.send(None) if error is None else coroutine.throw(error)
        except StopIteration as end:
            result = end.value
        except asyncio.CancelledError:
            pass
        except BaseException as failure:
            logger().error("unexpected", exc_info=failure)
        else:
            if getattr(waits_for, "_asyncio_future_blocking", False):
                waits_for._asyncio_future_blocking = False
                waits_for.add_done_callback(self._step, context=self._context)
                self._waits_for = waits_for
                self._must_cancel = self._must_cancel and not waits_for.cancel()
            else:
                self._step_again(waits_for)
            return
        finally:
            _leave_task(self._loop, self)  # type: ignore[arg-type]
            error = None  # its traceback holds this frame
        self._coroutine = None
        self._on_done(result)

    def _step_again(self, waits_for: object) -> None:
        """Take the next step in the next turn of the event loop: after `asyncio.sleep(0)`, or with an error."""
        error = None
        if waits_for is not None:
            error = RuntimeError(f"a handler awaited {waits_for!r}, which is not a future of asyncio")
        self._loop.call_soon(self._step, None, error, context=self._context)
