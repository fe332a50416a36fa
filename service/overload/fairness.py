"""Fairness: clients take turns, however much each has queued; long work runs on the event loop in slices."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Hashable
from queue import Empty
from threading import Condition
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Work = Generator[None, None, T]


class RoundRobin(Generic[T]):
    """A queue in which clients take turns: one item of each, in order."""

    def __init__(self) -> None:
        self._queues: OrderedDict[Hashable, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __bool__(self) -> bool:
        return bool(self._queues)

    def put(self, client: Hashable, item: T) -> None:
        """Queue an item behind those of the same client."""
        self._queues.setdefault(client, deque()).append(item)

    def pop(self) -> tuple[Hashable, T]:
        """Return the next item and its client, whose next turn comes after those of all others."""
        client, queue = self._queues.popitem(last=False)
        item = queue.popleft()
        if queue:
            self._queues[client] = queue
        return client, item


class FairQueue(Generic[T]):
    """A `SimpleQueue` in which clients take turns; `client_of` returns the client of an item."""

    def __init__(self, client_of: Callable[[T], Hashable]) -> None:
        self._items: RoundRobin[T] = RoundRobin()
        self._client_of = client_of
        self._changed = Condition()

    def put(self, item: T) -> None:
        """Queue an item behind those of its client."""
        with self._changed:
            self._items.put(self._client_of(item), item)
            self._changed.notify()

    def get(self, *, timeout: float | None = None) -> T:
        """Wait for the next item and return it; raises `Empty` after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(self._items.__len__, timeout):
                raise Empty
            return self._items.pop()[1]

    def get_nowait(self) -> T:
        """Return the next item; raises `Empty` if it has no items."""
        return self.get(timeout=0)

    def empty(self) -> bool:
        """Return whether it has no items."""
        return not self._items

    def qsize(self) -> int:
        """Return the number of items."""
        with self._changed:
            return len(self._items)


class Slicer:
    """Runs long work on the event loop in slices: one slice a turn of the loop, clients in turn.

    Work is a generator that yields between slices. However much is queued, a new request waits for one slice.
    """

    def __init__(self) -> None:
        self._queued: RoundRobin[tuple[Work[Any], asyncio.Future[Any]]] = RoundRobin()
        self._is_scheduled = False

    async def run(self, client: Hashable, work: Work[T]) -> T:
        """Return what `work` returns, or raise what it raises; drop it if the caller is cancelled."""
        done = self.start(client, work)
        try:
            return await done
        finally:
            done.cancel()
            del done  # an exception of `work` holds this frame, which would wait for a garbage collection

    def start(self, client: Hashable, work: Work[T]) -> asyncio.Future[T]:
        """Queue `work` of `client`; return the future of its result, which may be cancelled."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queued.put(client, (work, done))
        self._schedule()
        return done

    def _schedule(self) -> None:
        if self._queued and not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._run_slice)

    def _run_slice(self) -> None:
        self._is_scheduled = False
        client, (work, done) = self._queued.pop()
        if done.done():
            work.close()
        elif _advance(work, done):
            self._queued.put(client, (work, done))
        # Up to Python 3.13.0 the frame of a generator that failed holds its callers', and so would the error of `done`.
        del done
        self._schedule()


def _advance(work: Work[T], done: asyncio.Future[T]) -> bool:
    """Run a slice of `work`; return whether there is more, else complete `done`."""
    try:
        next(work)
    except StopIteration as end:
        done.set_result(end.value)
    except Exception as error:  # without this frame: it holds `done`, which holds the error
        done.set_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
        del done
    else:
        return True
    return False
