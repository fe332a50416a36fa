"""Tracing: the W3C trace context of a request and, if spans are exported, its spans.

A span is made when it has ended, from times that the service measures anyway. So an unsampled request costs one look
at its headers. Spans go to a function that must not wait (`otlp.Exporter`).
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
# The flag of version 00.
SAMPLED = 1
Attributes = Mapping[str, str | int | float]
# Consecutive stages of a run, each with its seconds.
StageTimes = Iterable[tuple[str, float]]


class TraceContext(NamedTuple):
    """The ids of a trace and of a span in it, in hex, and whether the trace is recorded.

    `state` is the caller's `tracestate` header. It is passed on and not read.
    """

    trace_id: str
    span_id: str
    is_sampled: bool
    state: str = ""


class Span(NamedTuple):
    """A span that has ended. Times are in nanoseconds since 1970; `error` says why it failed."""

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
    """Return the context in a `traceparent` header, None if the header is malformed.

    A later version may have further fields; they are ignored.
    """
    match = TRACEPARENT.fullmatch(traceparent)
    if match is None or (match[1] == b"00" and match[5] is not None):
        return None
    return TraceContext(match[2].decode(), match[3].decode(), bool(int(match[4], 16) & SAMPLED))


class Tracer:
    """Traces a `share` of the requests whose caller has not decided, and those that callers trace.

    `export` takes a span. It must neither wait nor raise.
    """

    def __init__(self, export: Callable[[Span], None], share: float, draw: Callable[[], float] = random) -> None:
        self.export = export
        self._share = share
        self._draw = draw

    def start(self, parent: TraceContext | None, state: bytes = b"") -> RequestSpan | None:
        """Return the span of a request if it is sampled. `parent` and `state` come from the caller's headers."""
        if parent is None:
            return RequestSpan(self.export, None) if self._draw() < self._share else None
        return RequestSpan(self.export, parent._replace(state=state.decode("latin-1"))) if parent.is_sampled else None


class RequestSpan:
    """The span of a sampled request that is being answered. Seconds are those of `perf_counter`."""

    __slots__ = ("_epoch_ns", "_export", "_links", "_parent", "trace")

    def __init__(self, export: Callable[[Span], None], parent: TraceContext | None) -> None:
        self._export = export
        self._parent = parent
        self.trace = _new_span(parent)
        self._links: list[TraceContext] = []
        self._epoch_ns = time_ns() - perf_counter_ns()

    def add_child(
        self, name: str, start_s: float, end_s: float, attributes: Attributes, error: str | None = None
    ) -> None:
        """Export a part of the request."""
        times = self._ns(start_s), self._ns(end_s)
        self._export(Span(name, _new_span(self.trace), self.trace, *times, attributes, error=error))

    def add_run(
        self, engine: str, queued_s: float, started_s: float, stages: StageTimes, error: str | None = None
    ) -> None:
        """Export the wait for an engine, from `queued_s` to `started_s`, and the stages of the run that followed."""
        attributes = {"lvm.engine": engine}
        self.add_child("queue", queued_s, started_s, attributes)
        for stage, seconds in stages:
            self.add_child(stage, started_s, started_s + seconds, attributes, error)
            started_s += seconds

    def add_batch(
        self, name: str, start_s: float, end_s: float, attributes: Attributes, links: Sequence[TraceContext]
    ) -> TraceContext:
        """Export a batch with this request in it, in a trace of its own; return its context."""
        batch = _new_span(None)
        self._export(Span(name, batch, None, self._ns(start_s), self._ns(end_s), attributes, links))
        return batch

    def link(self, batch: TraceContext) -> None:
        """Link this span to a batch."""
        self._links.append(batch)

    def finish(self, name: str, start_s: float, end_s: float, attributes: Attributes, error: str | None) -> None:
        """Export the whole request."""
        times = self._ns(start_s), self._ns(end_s)
        self._export(Span(name, self.trace, self._parent, *times, attributes, self._links, is_server=True, error=error))

    def _ns(self, seconds: float) -> int:
        return round(seconds * 1e9) + self._epoch_ns


class BatchedRequest(NamedTuple):
    """A sampled request in a batch: when it was queued, and the stages of its run."""

    span: RequestSpan
    queued_s: float
    stages: StageTimes
    error: str | None


def export_batch_spans(
    engine: str, started_s: float, seconds: float, attributes: Attributes, requests: Sequence[BatchedRequest]
) -> None:
    """Export a batch and the runs of its sampled requests. Batch and requests link to each other."""
    contexts = [request.span.trace for request in requests]
    attributes = {"lvm.engine": engine, **attributes}
    batch = requests[0].span.add_batch(f"batch {engine}", started_s, started_s + seconds, attributes, contexts)
    for span, queued_s, stages, error in requests:
        span.link(batch)
        span.add_run(engine, queued_s, started_s, stages, error)


def export_remote_spans(engine: str, queue_s: float, stages: Sequence[tuple[str, float]]) -> None:
    """Export the run of the current request in an engine of another process, which has answered just now."""
    span = current_span.get()
    if span is not None:
        started_s = perf_counter() - sum(seconds for _, seconds in stages)
        span.add_run(engine, started_s - queue_s, started_s, stages)


def _new_span(parent: TraceContext | None) -> TraceContext:
    """Return the context of a new span below `parent`, or in a new trace."""
    span_id = f"{getrandbits(64) or 1:016x}"
    return parent._replace(span_id=span_id) if parent else TraceContext(f"{getrandbits(128) or 1:032x}", span_id, True)


# The request that the running code works for.
current_span: ContextVar[RequestSpan | None] = ContextVar("current_span", default=None)
