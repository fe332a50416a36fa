"""The micro-batcher: whatever queued while the device was busy forms the next batch.

Callers live on the event loop. The work runs in one thread: tickets cross over in a queue and come back
a batch at a time. Or, where the work costs less than the way to a thread and back, on the loop itself.
Generic: knows items and how many rows each has, not what they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from queue import Empty, SimpleQueue
from time import monotonic, perf_counter
from typing import Generic, NamedTuple, TypeVar

from lvm.errors import (
    Draining,
    Expired,
    ModelFailed,
    Overloaded,
)
from service.engines.batch_sizer import Sizing
from service.overload.fairness import FairQueue
from service.telemetry.tracing import (
    Attributes,
    BatchedRequest,
    RequestSpan,
    StageTimes,
    current_span,
    export_batch_spans,
)

GIVE_UP = 3  # failures in a row
WINDOW = 2  # items of one request in the queue: one runs, one is ready

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Ticket(Generic[Item, Answer]):
    """One item on its way through: who waits for it, until when, and what became of it.

    `queue_s` and `infer_s` are seconds; `batch_rows` the rows that ran together.
    """

    __slots__ = (
        "answer",
        "batch_rows",
        "deadline",
        "error",
        "future",
        "infer_s",
        "item",
        "queue_s",
        "recorded",
        "rows",
        "since",
    )

    def __init__(self, item: Item, rows: int, deadline: float, future: asyncio.Future[None]) -> None:
        self.item, self.rows, self.deadline, self.future = item, rows, deadline, future
        self.since = perf_counter()
        self.queue_s = self.infer_s = 0.0
        self.batch_rows = 0
        self.answer: Answer
        self.error: Exception | None = None
        self.recorded: RequestSpan | None = current_span.get()

    def abandon(self) -> None:
        """Let go of the item: a ticket may stand in the queue of a hung thread for long."""
        del self.item

    @property
    def is_live(self) -> bool:
        """Whether somebody still waits for the answer, and has time."""
        return not self.future.done() and self.deadline > monotonic()


Queue = SimpleQueue["Ticket[Item, Answer] | None"] | FairQueue["Ticket[Item, Answer] | None"]


class Batch(NamedTuple):
    """What the batcher tells about a batch that ran: rows, when it began, seconds, and why it was released."""

    rows: int
    began: float  # of perf_counter
    seconds: float
    reason: str  # full | free | waited


Run = Callable[[list[Item]], Sequence["Answer | Exception"]]


class MicroBatcher(Generic[Item, Answer]):
    """Runs items in batches of up to `max_rows` rows, or those that are worth it, in order, in one thread of its own.

    `inline`, it runs them on the event loop, one batch a turn: for work that is sure to end and takes a
    fraction of a millisecond. Such a batch is what came in since the loop last turned.

    With a `client_of`, which says whose an item is, clients take turns.

    `run` maps n items to n answers, in order; an answer that is an exception fails its item alone. When
    `run` itself raises, the items of the batch are run one by one, so that one bad item fails alone.
    `laps` says for a trace what the seconds of a run went into, by an answer of it, None where there is none.
    """

    def __init__(
        self,
        run: Run[Item, Answer],
        *,
        name: str,
        max_rows: int,
        max_queue: int,
        max_wait_s: float = 0.0,
        inline: bool = False,
        client_of: Callable[[Item], Hashable] | None = None,
        on_batch: Callable[[Batch], None] = lambda batch: None,
        laps: Callable[[Answer | None, float], StageTimes] = lambda _, seconds: (("infer", seconds),),
    ) -> None:
        self._run, self._on_batch, self._laps, self._name = run, on_batch, laps, name
        self._sizing, self._max_queue, self._max_wait_s = Sizing(max_rows), max_queue, max_wait_s
        self._loop = asyncio.get_running_loop()
        self._queue: Queue[Item, Answer] = SimpleQueue() if client_of is None else _fair(client_of)
        self._waiting: dict[Ticket[Item, Answer], None] = {}
        self._next_check = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._rate = 0.0  # rows a second, smoothed
        self._running_since: float | None = None
        self._held: Ticket[Item, Answer] | None = None  # the one that did not fit into the last batch
        self._will_turn = False
        self.pending_rows = 0
        self._thread = None if inline else threading.Thread(target=self._work, name=f"batcher-{name}", daemon=True)
        if self._thread:
            self._thread.start()

    async def submit(self, items: Sequence[tuple[Item, int]], deadline: float) -> list[Ticket[Item, Answer]]:
        """Return the tickets of `items`, pairs of an item and its rows, once every answer is there.

        All are taken or none; two at a time stand in the queue, so that others get their turn between
        the parts of a large request. `deadline` is on the monotonic clock.

        Raises:
            Overloaded: their rows would overfill the queue.
            Draining: the batcher is closed, or its thread is dead.
            Expired: the deadline passed before there was an answer.
            Exception: what the first failed item failed with.
        """
        rows = sum([rows for _, rows in items])
        self._admit(rows)
        tickets: list[Ticket[Item, Answer]] = []
        try:
            for item, size in items:
                if len(tickets) >= WINDOW:
                    await tickets[-WINDOW].future
                tickets.append(self._enter(item, size, deadline))
            for ticket in tickets[-WINDOW:]:
                await ticket.future
        finally:
            self.pending_rows -= rows
            for ticket in tickets:
                self._leave(ticket)
        for ticket in tickets:
            if ticket.error is not None:
                raise ticket.error
        return tickets

    def backlog_s(self) -> int:
        """Return in how many whole seconds the waiting rows will have run, at least 1."""
        return max(1, math.ceil(self.pending_rows / self._rate)) if self._rate else 1

    def stuck_s(self) -> float:
        """Return for how many seconds the running batch has run, infinite where the thread is dead."""
        if self._is_dead():
            return math.inf
        since = self._running_since
        return 0.0 if since is None else perf_counter() - since

    async def close(self, timeout: float) -> None:
        """Take nothing more, wait until all that was taken is answered or `timeout` seconds passed."""
        self._closed = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        self._queue.put(None)

    def _is_dead(self) -> bool:
        return self._thread is not None and not self._thread.is_alive()

    # ---- on the event loop

    def _admit(self, rows: int) -> None:
        if self._closed or self._is_dead():
            raise Draining("this engine takes no more requests")
        if max(self.pending_rows + rows, self._queue.qsize()) > self._max_queue:
            raise Overloaded(f"{self.pending_rows} rows are waiting", retry_after=self.backlog_s())
        self.pending_rows += rows

    def _enter(self, item: Item, rows: int, deadline: float) -> Ticket[Item, Answer]:
        ticket: Ticket[Item, Answer] = Ticket(item, rows, deadline, self._loop.create_future())
        self._waiting[ticket] = None
        self._idle.clear()
        if deadline < self._next_check:
            self._check_at(deadline)
        self._queue.put(ticket)
        if self._thread is None and not self._will_turn:
            self._will_turn = True
            self._loop.call_soon(self._turn)
        return ticket

    def _leave(self, ticket: Ticket[Item, Answer]) -> None:
        if not ticket.future.done():
            ticket.future.cancel()  # the caller has left: the thread skips it
        ticket.abandon()
        del self._waiting[ticket]
        if not self._waiting:
            self._idle.set()

    def _check_at(self, deadline: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._next_check = deadline
        self._timer = self._loop.call_later(deadline - monotonic(), self._expire)

    def _expire(self) -> None:
        now = monotonic()
        for ticket in self._waiting:
            if ticket.deadline <= now and not ticket.future.done():
                ticket.error = Expired("the deadline passed before there was an answer")
                ticket.future.set_result(None)
        self._next_check = math.inf
        later = min((t.deadline for t in self._waiting if not t.future.done()), default=None)
        if later is not None:
            self._check_at(later)

    def _turn(self) -> None:
        first = self._held or self._queue.get_nowait()
        if first is not None:  # None where it was closed with a turn to come
            self._deliver(*self._serve(first))
        self._will_turn = self._held is not None or not self._queue.empty()
        if self._will_turn:
            self._loop.call_soon(self._turn)

    def _deliver(self, tickets: list[Ticket[Item, Answer]], batch: Batch | None) -> None:
        if batch is None:
            return
        for ticket in tickets:
            if not ticket.future.done():
                ticket.future.set_result(None)
        rate = batch.rows / batch.seconds if batch.seconds else self._rate
        self._rate += (rate - self._rate) * 0.1 if self._rate else rate
        self._on_batch(batch)
        rides = [self._ride(ticket, ticket.recorded, batch) for ticket in tickets if ticket.recorded is not None]
        if rides:
            told: Attributes = {"lvm.rows": batch.rows, "lvm.reason": batch.reason}
            export_batch_spans(self._name, batch.began, batch.seconds, told, rides)

    def _ride(self, ticket: Ticket[Item, Answer], recorded: RequestSpan, batch: Batch) -> BatchedRequest:
        answer = None if ticket.error else ticket.answer
        error = type(ticket.error).__name__ if ticket.error else None
        return BatchedRequest(recorded, ticket.since, self._laps(answer, batch.seconds), error)

    # ---- in the thread, where there is one

    def _work(self) -> None:
        while (first := self._held or self._queue.get()) is not None:
            served = self._serve(first)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver, *served)

    def _serve(self, first: Ticket[Item, Answer]) -> tuple[list[Ticket[Item, Answer]], Batch | None]:
        """Run the batch that begins with `first`; return its tickets that somebody waits for, if any."""
        tickets, reason = self._gather(first)
        live = [pair for pair in map(_take, tickets) if pair]
        return [ticket for ticket, _ in live], self._run_batch(live, reason) if live else None

    def _gather(self, first: Ticket[Item, Answer]) -> tuple[list[Ticket[Item, Answer]], str]:
        """Return the tickets of the next batch and why it is released; hold the one that no longer fits."""
        tickets, rows, most = [first], first.rows, self._sizing.rows
        self._held = None
        until = first.since + self._max_wait_s
        while rows < most:
            try:
                ticket = self._next(until)
            except Empty:
                return tickets, "waited" if self._max_wait_s else "free"
            if ticket is None:
                self._queue.put(None)
                return tickets, "free"
            if rows + ticket.rows > most:
                self._held = ticket
                return tickets, "full"
            tickets.append(ticket)
            rows += ticket.rows
        return tickets, "full"

    def _next(self, until: float) -> Ticket[Item, Answer] | None:
        patience = until - perf_counter() if self._max_wait_s else 0.0
        return self._queue.get(timeout=patience) if patience > 0 else self._queue.get_nowait()

    def _run_batch(self, live: list[tuple[Ticket[Item, Answer], Item]], reason: str) -> Batch:
        self._running_since = began = perf_counter()
        answers = self._answers(live)
        seconds = perf_counter() - began
        self._running_since = None
        rows, failed = sum(ticket.rows for ticket, _ in live), False
        for (ticket, _), answer in zip(live, answers, strict=True):
            ticket.queue_s, ticket.infer_s, ticket.batch_rows = began - ticket.since, seconds, rows
            if isinstance(answer, Exception):
                ticket.error, failed = ticket.error or answer, True
            else:
                ticket.answer = answer
        if not failed:  # what raises is quick, or was run one by one
            self._sizing.learn(rows, seconds)
        return Batch(rows, began, seconds, reason)

    def _answers(self, live: list[tuple[Ticket[Item, Answer], Item]]) -> Sequence[Answer | Exception]:
        try:
            answers = self._run([item for _, item in live])
        except Exception as error:  # whatever a net may raise; it is counted and told on
            failure = ModelFailed(f"the model raised {type(error).__name__}")
            return [failure] if len(live) == 1 else self._one_by_one(live)
        if len(answers) == len(live):
            return answers
        return [ModelFailed(f"the model gave {len(answers)} answers to {len(live)} items")] * len(live)

    def _one_by_one(self, live: list[tuple[Ticket[Item, Answer], Item]]) -> list[Answer | Exception]:
        """Run the items of a failed batch singly; after `GIVE_UP` failures in a row it is not the items."""
        answers: list[Answer | Exception] = []
        for ticket, item in live:
            recent = answers[-GIVE_UP:]
            if len(recent) == GIVE_UP and all(isinstance(answer, ModelFailed) for answer in recent):
                answers.append(recent[-1])
            elif ticket.is_live:
                answers += self._answers([(ticket, item)])
            else:
                answers.append(Expired("the deadline passed before there was an answer"))
        mark_alone(answers)
        return answers


def _fair(client_of: Callable[[Item], Hashable]) -> FairQueue[Ticket[Item, Answer] | None]:
    return FairQueue(lambda ticket: None if ticket is None else client_of(ticket.item))


def mark_alone(answers: Sequence[object]) -> None:
    """Mark the failures among answers of which some are none."""
    failures = [answer for answer in answers if isinstance(answer, ModelFailed)]
    if len(failures) < sum(not isinstance(answer, Expired) for answer in answers):
        for failure in failures:
            failure.alone = True


def _take(ticket: Ticket[Item, Answer]) -> tuple[Ticket[Item, Answer], Item] | None:
    """Return a ticket with its item, which the loop may let go of at any time; None where nobody waits."""
    try:
        return (ticket, ticket.item) if ticket.is_live else None
    except AttributeError:
        return None
