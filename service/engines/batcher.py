"""The micro-batcher: the rows that queue while the model runs form the next batch.

Callers live on the event loop. The model runs in one thread: tickets cross over in a queue and come back a batch at a
time. If a run costs less than the way to a thread and back, it runs on the event loop instead. The batcher is generic:
it knows items and how many rows each has, not what they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from time import monotonic, perf_counter
from typing import Any, Generic, NamedTuple, TypeVar

from lvm.errors import Draining, Expired, ModelFailed, Overloaded
from service.engines.batch_sizer import BatchSizer
from service.overload.fairness import FairQueue

MAX_FAILURES_IN_A_ROW = 3
MAX_QUEUED_PARTS = 2  # of one request: one runs, one is ready
ALONE = 8  # items in a row that came alone: the next one does not wait for others

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class BatchLimits:
    """Limits of a batcher: rows of a batch, rows in the queue, and seconds that a batch waits to fill up."""

    max_rows: int
    max_queue: int
    max_wait_s: float = 0.0


@dataclass(slots=True, eq=False)
class Ticket(Generic[Item, Answer]):
    """One item on its way through the batcher, with the future of its caller.

    When the future is done there is an `answer` or an `error`. `queue_s` and `run_s` are seconds; `batch_rows` the rows
    that ran together; `tag` what the batcher's `tag` returned when the item was submitted.
    """

    item: Item
    rows: int
    deadline: float
    future: asyncio.Future[None]
    tag: Any
    queued_at: float = field(default_factory=perf_counter)
    queue_s: float = 0.0
    run_s: float = 0.0
    batch_rows: int = 0
    answer: Answer = field(init=False)
    error: Exception | None = None


Queue = SimpleQueue["Ticket[Item, Answer] | None"] | FairQueue["Ticket[Item, Answer] | None"]


class Batch(NamedTuple):
    """A batch that ran: its rows, when it began (perf_counter), seconds, why it was released, and its tickets.

    `has_tags`: whether a ticket has a tag that is not None.
    """

    rows: int
    began: float
    seconds: float
    reason: str  # full | free | waited
    tickets: Sequence[Ticket[Any, Any]]
    has_tags: bool


Run = Callable[[list[Item]], Sequence["Answer | Exception"]]


class MicroBatcher(Generic[Item, Answer]):
    """Runs items in batches, in order, in one thread.

    A batch has up to `max_rows` rows, or fewer if larger batches gain nothing.

    Args:
        run: maps n items to n answers, in order; an answer that is an exception fails its item alone. If `run` raises,
            the items of the batch are run one by one, so that one bad item fails alone.
        name: of the thread.
        limits: of batches and of the queue.
        runs_inline: run on the event loop, one batch per iteration: for work that is sure to end and takes a fraction
            of a millisecond. A batch is then what was submitted since the last iteration of the loop. If the last
            `ALONE` items came alone, the next one runs at once.
        client_of: returns the client of an item; clients then take turns in the queue.
        tag: called when an item is submitted, in its caller's context; the ticket carries what it returns.
        on_batch: called on the event loop after each batch.
    """

    def __init__(
        self,
        run: Run[Item, Answer],
        *,
        name: str,
        limits: BatchLimits,
        runs_inline: bool = False,
        client_of: Callable[[Item], Hashable] | None = None,
        tag: Callable[[], Any] = lambda: None,
        on_batch: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self._run = run
        self._tag = tag
        self._on_batch = on_batch
        self._max_queue = limits.max_queue
        self._max_wait_s = limits.max_wait_s
        self._sizer = BatchSizer(limits.max_rows)
        self._loop = asyncio.get_running_loop()
        self._queue: Queue[Item, Answer] = SimpleQueue() if client_of is None else _fair_queue(client_of)
        self._waiting: dict[Ticket[Item, Answer], None] = {}
        self._next_expiry = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self.is_closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._rows_per_s = 0.0  # smoothed
        self._running_since: float | None = None
        self._left_over: Ticket[Item, Answer] | None = None  # did not fit into the last batch
        self._is_scheduled = False
        self._alone = 0  # submissions in a row before which nothing was scheduled
        self.pending_rows = 0
        self._thread = None if runs_inline else threading.Thread(target=self._work, name=f"batcher-{name}", daemon=True)
        if self._thread:
            self._thread.start()

    async def submit(self, items: Sequence[tuple[Item, int]], deadline: float) -> list[Ticket[Item, Answer]]:
        """Return the tickets of `items`, pairs of an item and its rows, when every answer is there.

        The batcher takes all items or none. At most `MAX_QUEUED_PARTS` of them are in the queue at a time, so that
        other requests run between the parts of a large one: a small one only needs room among those in the queue.
        `deadline` is on the monotonic clock.

        Raises:
            Overloaded: the rows do not fit into the queue.
            Draining: the batcher is closed, or its thread is dead.
            Expired: the deadline passed before there was an answer.
            Exception: the error of the first item that failed.
        """
        if len(items) == 1:
            return [await self.submit_one(*items[0], deadline)]
        rows = sum([size for _, size in items])
        self._check_room(rows, parts=len(items))
        self.pending_rows += rows
        tickets: list[Ticket[Item, Answer]] = []
        try:
            for item, size in items:
                if len(tickets) >= MAX_QUEUED_PARTS:
                    await tickets[-MAX_QUEUED_PARTS].future
                tickets.append(self._enqueue(item, size, deadline))
            for ticket in tickets[-MAX_QUEUED_PARTS:]:
                await ticket.future
        finally:
            self.pending_rows -= rows
            for ticket in tickets:
                self._discard(ticket)
        for ticket in tickets:
            if ticket.error is not None:
                raise ticket.error
        return tickets

    async def submit_one(self, item: Item, rows: int, deadline: float) -> Ticket[Item, Answer]:
        """Return the ticket of one item when its answer is there; otherwise as `submit`."""
        self._check_room(rows)
        if self._alone >= ALONE and not self._is_scheduled and deadline > monotonic():
            return self._run_at_once(item, rows, deadline)
        ticket = self._enqueue(item, rows, deadline)
        self.pending_rows += rows
        try:
            await ticket.future
        finally:
            self.pending_rows -= rows
            self._discard(ticket)
        if ticket.error is not None:
            raise ticket.error
        return ticket

    def retry_after_s(self) -> int:
        """Return in how many whole seconds the waiting rows will have run, at least 1."""
        return max(1, math.ceil(self.pending_rows / self._rows_per_s)) if self._rows_per_s else 1

    def stuck_s(self) -> float:
        """Return for how many seconds the running batch has run, infinite if the thread is dead."""
        if self._is_dead():
            return math.inf
        since = self._running_since
        return 0.0 if since is None else perf_counter() - since

    async def close(self, timeout: float) -> None:
        """Accept nothing more; return when all that was accepted is answered, or after `timeout` seconds."""
        self.is_closed = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        self._queue.put(None)

    def _is_dead(self) -> bool:
        return self._thread is not None and not self._thread.is_alive()

    # ---- on the event loop

    def _check_room(self, rows: int, parts: int = 1) -> None:
        """Raise `Draining` if no more rows are accepted, `Overloaded` if they do not fit into the queue.

        A small request only needs room beside the parts in the queue; the others come later.
        """
        if self.is_closed or (self._thread and self._is_dead()):
            raise Draining("this engine accepts no more requests")
        if max(self.pending_rows + rows, self._queue.qsize()) <= self._max_queue:
            return
        queued = sum(ticket.rows for ticket in self._waiting if not ticket.future.done())
        if parts > MAX_QUEUED_PARTS or max(queued + rows, self._queue.qsize()) > self._max_queue:
            raise Overloaded(f"{self.pending_rows} rows are waiting", retry_after=self.retry_after_s())

    def _enqueue(self, item: Item, rows: int, deadline: float) -> Ticket[Item, Answer]:
        ticket: Ticket[Item, Answer] = Ticket(item, rows, deadline, self._loop.create_future(), self._tag())
        self._waiting[ticket] = None
        self._idle.clear()
        if deadline < self._next_expiry:
            self._expire_at(deadline)
        self._queue.put(ticket)
        if self._thread is None:
            self._schedule()
        return ticket

    def _schedule(self) -> None:
        if self._is_scheduled:
            self._alone = 0
            return
        self._alone += 1
        self._is_scheduled = True
        self._loop.call_soon(self._run_next_inline)

    def _run_at_once(self, item: Item, rows: int, deadline: float) -> Ticket[Item, Answer]:
        """Run one item alone; what comes in the same iteration of the loop forms the next batch."""
        self._schedule()
        ticket: Ticket[Item, Answer] = Ticket(item, rows, deadline, self._loop.create_future(), self._tag())
        self._deliver(self._run_batch([ticket], [item], "free"))
        del ticket.item
        if ticket.error is not None:
            raise ticket.error
        return ticket

    def _discard(self, ticket: Ticket[Item, Answer]) -> None:
        if not ticket.future.done():
            ticket.future.cancel()  # the caller has left: the thread skips it
        del ticket.item  # the ticket may stay in the queue of a hung thread for long
        del self._waiting[ticket]
        if not self._waiting:
            self._idle.set()

    def _expire_at(self, deadline: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._next_expiry = deadline
        self._timer = self._loop.call_later(deadline - monotonic(), self._expire)

    def _expire(self) -> None:
        now = monotonic()
        for ticket in self._waiting:
            if ticket.deadline <= now and not ticket.future.done():
                ticket.error = Expired("the deadline passed before there was an answer")
                ticket.future.set_result(None)
        self._next_expiry = math.inf
        later = min((t.deadline for t in self._waiting if not t.future.done()), default=None)
        if later is not None:
            self._expire_at(later)

    def _run_next_inline(self) -> None:
        # empty behind an item that ran at once
        if self._has_more():
            first = self._left_over or self._queue.get_nowait()
            # None if the batcher was closed after this call was scheduled
            if first is not None:
                self._deliver(self._run_next(first))
        self._is_scheduled = self._has_more()
        if self._is_scheduled:
            self._loop.call_soon(self._run_next_inline)

    def _has_more(self) -> bool:
        return self._left_over is not None or not self._queue.empty()

    def _deliver(self, batch: Batch | None) -> None:
        if batch is None:
            return
        for ticket in batch.tickets:
            if not ticket.future.done():
                ticket.future.set_result(None)
        rate = batch.rows / batch.seconds if batch.seconds else self._rows_per_s
        self._rows_per_s += (rate - self._rows_per_s) * 0.1 if self._rows_per_s else rate
        self._on_batch(batch)

    # ---- in the thread, if there is one

    def _work(self) -> None:
        while (first := self._left_over or self._queue.get()) is not None:
            batch = self._run_next(first)
            with contextlib.suppress(RuntimeError):  # the loop is closed: no caller waits any more
                self._loop.call_soon_threadsafe(self._deliver, batch)

    def _run_next(self, first: Ticket[Item, Answer]) -> Batch | None:
        """Run and return the batch that begins with `first`; return None if no caller waits for any of it."""
        tickets, reason = self._gather(first)
        live, items = _with_items(tickets)
        return self._run_batch(live, items, reason) if live else None

    def _gather(self, first: Ticket[Item, Answer]) -> tuple[list[Ticket[Item, Answer]], str]:
        """Return the tickets of the next batch and why it is released; keep the one that no longer fits."""
        tickets = [first]
        rows = first.rows
        max_rows = self._sizer.rows
        self._left_over = None
        until = first.queued_at + self._max_wait_s
        while rows < max_rows:
            if not self._max_wait_s and self._queue.empty():
                return tickets, "free"
            try:
                ticket = self._next_ticket(until) if self._max_wait_s else self._queue.get_nowait()
            except Empty:
                return tickets, "waited"
            if ticket is None:
                self._queue.put(None)
                return tickets, "free"
            if rows + ticket.rows > max_rows:
                self._left_over = ticket
                return tickets, "full"
            tickets.append(ticket)
            rows += ticket.rows
        return tickets, "full"

    def _next_ticket(self, until: float) -> Ticket[Item, Answer] | None:
        left_s = until - perf_counter()
        return self._queue.get(timeout=left_s) if left_s > 0 else self._queue.get_nowait()

    def _run_batch(self, tickets: list[Ticket[Item, Answer]], items: list[Item], reason: str) -> Batch:
        began = perf_counter()
        self._running_since = began
        answers = self._answers(tickets, items)
        seconds = perf_counter() - began
        self._running_since = None
        rows = 0
        for ticket in tickets:
            rows += ticket.rows
        failed = has_tags = False
        for ticket, answer in zip(tickets, answers, strict=True):
            ticket.queue_s = began - ticket.queued_at
            ticket.run_s = seconds
            ticket.batch_rows = rows
            has_tags = has_tags or ticket.tag is not None
            if isinstance(answer, Exception):
                ticket.error = ticket.error or answer
                failed = True
            else:
                ticket.answer = answer
        # a run that raises is quick, or was repeated one by one: its time says nothing about the size
        if not failed:
            self._sizer.learn(rows, seconds)
        return Batch(rows, began, seconds, reason, tickets, has_tags)

    def _answers(self, tickets: list[Ticket[Item, Answer]], items: list[Item]) -> Sequence[Answer | Exception]:
        try:
            answers = self._run(items)
        except Exception as error:  # a model may raise anything
            failure = ModelFailed(f"the model raised {type(error).__name__}")
            return [failure] if len(items) == 1 else self._one_by_one(tickets, items)
        if len(answers) == len(items):
            return answers
        return [ModelFailed(f"the model returned {len(answers)} answers to {len(items)} items")] * len(items)

    def _one_by_one(self, tickets: list[Ticket[Item, Answer]], items: list[Item]) -> list[Answer | Exception]:
        """Run the items of a failed batch singly; after `MAX_FAILURES_IN_A_ROW` the fault is not in the items."""
        answers: list[Answer | Exception] = []
        for ticket, item in zip(tickets, items, strict=True):
            recent = answers[-MAX_FAILURES_IN_A_ROW:]
            if len(recent) == MAX_FAILURES_IN_A_ROW and all(isinstance(answer, ModelFailed) for answer in recent):
                answers.append(recent[-1])
            elif ticket.future.done() or ticket.deadline <= monotonic():
                answers.append(Expired("the deadline passed before there was an answer"))
            else:
                answers += self._answers([ticket], [item])
        mark_own_faults(answers)
        return answers


def mark_own_faults(answers: Sequence[object]) -> None:
    """Mark the failures among `answers` as their items' own, if other items of the batch did not fail."""
    failures = [answer for answer in answers if isinstance(answer, ModelFailed)]
    if len(failures) < sum(not isinstance(answer, Expired) for answer in answers):
        for failure in failures:
            failure.alone = True


def _fair_queue(client_of: Callable[[Item], Hashable]) -> FairQueue[Ticket[Item, Answer] | None]:
    return FairQueue(lambda ticket: None if ticket is None else client_of(ticket.item))


def _with_items(tickets: list[Ticket[Item, Answer]]) -> tuple[list[Ticket[Item, Answer]], list[Item]]:
    """Return the tickets whose callers still wait and have time, and their items."""
    live: list[Ticket[Item, Answer]] = []
    items: list[Item] = []
    now = monotonic()
    for ticket in tickets:
        if not ticket.future.done() and ticket.deadline > now:
            try:
                items.append(ticket.item)
            except AttributeError:  # the event loop may drop the item at any time
                continue
            live.append(ticket)
    return live, items
