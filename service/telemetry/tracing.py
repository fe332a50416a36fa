"""Tracing: the trace that a request belongs to (W3C Trace Context) and, where spans are exported, its spans.

A span is told once it is over, from times that are known anyway, so a request that is not sampled pays for a look at
its headers. What is told goes to a function that must not wait (`otlp.Exporter`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from random import getrandbits, random
from time import perf_counter, perf_counter_ns, time_ns
from typing import NamedTuple

TRACEPARENT = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.S
)
SAMPLED = 1  # the flag of version 00
Attributes = Mapping[str, str | int | float]
StageTimes = Iterable[tuple[str, float]]  # stages and their seconds, one after another


class TraceContext(NamedTuple):
    """A place in a trace: the ids of the trace and of a span in it, in hex, and whether these are recorded."""

    trace_id: str
    span_id: str
    is_sampled: bool
    state: str = ""  # what vendors add: passed on, not read


class Span(NamedTuple):
    """A span that is over; times in nanoseconds since 1970, `error` says why it failed."""

    name: str
    trace: TraceContext
    parent: TraceContext | None
    start_ns: int
    end_ns: int
    attributes: Attributes
    links: Sequence[TraceContext] = ()
    is_server: bool = False
    error: str | None = None


def parse(traceparent: bytes) -> TraceContext | None:
    """Return what a `traceparent` header says, None where it is not one; a later version may say more than we read."""
    match = TRACEPARENT.fullmatch(traceparent)
    if match is None or (match[1] == b"00" and match[5] is not None):
        return None
    return TraceContext(match[2].decode(), match[3].decode(), bool(int(match[4], 16) & SAMPLED))


class Tracer:
    """Decides which requests are traced, and tells their spans to `export`.

    Args:
        export: takes a span; must neither wait nor raise.
        share: of the requests whose caller did not decide; what a caller decided holds.
        draw: random numbers in [0, 1).
    """

    def __init__(self, export: Callable[[Span], None], share: float, draw: Callable[[], float] = random) -> None:
        self.export, self._share, self._draw = export, share, draw

    def start(self, parent: TraceContext | None, state: bytes = b"") -> RequestSpan | None:
        """Return the record of a request that is sampled, whose caller's place is `parent`."""
        if parent is None:
            return RequestSpan(self, None) if self._draw() < self._share else None
        return RequestSpan(self, parent._replace(state=state.decode("latin-1"))) if parent.is_sampled else None


class RequestSpan:
    """What is recorded of a sampled request under way; seconds are `perf_counter`'s."""

    __slots__ = ("_epoch_ns", "_links", "_parent", "trace", "tracer")

    def __init__(self, tracer: Tracer, parent: TraceContext | None) -> None:
        self.tracer, self._parent = tracer, parent
        self.trace = _below(parent)
        self._links: list[TraceContext] = []
        self._epoch_ns = time_ns() - perf_counter_ns()

    def add_child(
        self, name: str, start_s: float, end_s: float, attributes: Attributes, error: str | None = None
    ) -> None:
        """Tell a part of it."""
        self._tell(
            Span(name, _below(self.trace), self.trace, self._ns(start_s), self._ns(end_s), attributes, error=error)
        )

    def ride(self, batch: TraceContext, engine: str, ride: BatchedRequest, began_s: float) -> None:
        """Tell what it did in a batch: wait for it, and run."""
        self._links.append(batch)
        self.run(engine, ride.since_s, began_s, ride.laps, ride.error)

    def run(self, engine: str, since_s: float, began_s: float, laps: StageTimes, error: str | None = None) -> None:
        """Tell a wait for an engine, and the stages of its run."""
        of = {"lvm.engine": engine}
        self.add_child("queue", since_s, began_s, of)
        for stage, seconds in laps:
            self.add_child(stage, began_s, began_s + seconds, of, error)
            began_s += seconds

    def finish(self, name: str, start_s: float, end_s: float, attributes: Attributes, error: str | None) -> None:
        """Tell the whole of it."""
        times = self._ns(start_s), self._ns(end_s)
        self._tell(Span(name, self.trace, self._parent, *times, attributes, self._links, is_server=True, error=error))

    def batch(
        self, engine: str, start_s: float, end_s: float, attributes: Attributes, links: Sequence[TraceContext]
    ) -> TraceContext:
        """Tell a batch that it was in, which is a trace of its own; return that one's place."""
        trace = _below(None)
        self._tell(Span(f"batch {engine}", trace, None, self._ns(start_s), self._ns(end_s), attributes, links))
        return trace

    def _tell(self, span: Span) -> None:
        self.tracer.export(span)

    def _ns(self, seconds: float) -> int:
        return round(seconds * 1e9) + self._epoch_ns


class BatchedRequest(NamedTuple):
    """A sampled request's part in a batch: since when it waited, and what the run consisted of."""

    record: RequestSpan
    since_s: float
    laps: StageTimes
    error: str | None


def export_batch_spans(
    engine: str, began_s: float, seconds: float, attributes: Attributes, rides: Sequence[BatchedRequest]
) -> None:
    """Tell a batch, and the part in it of each of its sampled requests; they link to each other."""
    links = [ride.record.trace for ride in rides]
    attributes = {"lvm.engine": engine, **attributes}
    batch = rides[0].record.batch(engine, began_s, began_s + seconds, attributes, links)
    for ride in rides:
        ride.record.ride(batch, engine, ride, began_s)


def export_remote_spans(engine: str, queue_s: float, laps: Sequence[tuple[str, float]]) -> None:
    """Tell what the request at hand did in an engine of another process, which answered just now."""
    record = current_span.get()
    if record is not None:
        began_s = perf_counter() - sum(seconds for _, seconds in laps)
        record.run(engine, began_s - queue_s, began_s, laps)


def _below(parent: TraceContext | None) -> TraceContext:
    """Return a new place below `parent`, or in a new trace."""
    span_id = f"{getrandbits(64) or 1:016x}"
    return parent._replace(span_id=span_id) if parent else TraceContext(f"{getrandbits(128) or 1:032x}", span_id, True)


current_span: ContextVar[RequestSpan | None] = ContextVar(
    "current_span", default=None
)  # whom the code at hand works for
