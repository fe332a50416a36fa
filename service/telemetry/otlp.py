"""Spans to a collector: OpenTelemetry's own exporter, in its own thread. Wants the extra `otlp`.

The SDK's spans are made here without its tracer, whose `start_span` takes 20 us where this takes 4: all about a span
is known when it gets here.
"""

from __future__ import annotations

import logging
import threading
from functools import lru_cache
from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from service.telemetry.tracing import SAMPLED, Span, TraceContext

FLUSH_S = 2.0  # at the end, for what is left; a collector that is away must not hold up a stop
FINE, FLAGS, NO_STATE = Status(StatusCode.UNSET), TraceFlags(SAMPLED), TraceState()


class Exporter:
    """Sends spans to the collector at `endpoint`, a URL; where it does not keep up, the oldest are dropped.

    What else OpenTelemetry's variables say holds: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_BSP_*,
    OTEL_EXPORTER_OTLP_HEADERS, _TIMEOUT, _COMPRESSION, _CERTIFICATE.
    """

    def __init__(self, endpoint: str) -> None:
        logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)  # else callers could fill the log
        known = version("lvm-serve")
        service = Resource({"service.name": "lvm-serve", "service.version": known})
        self._resource = service.merge(OTELResourceDetector().detect())
        self._scope = InstrumentationScope("lvm-serve", known)
        self._processor = BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces"))

    def __call__(self, span: Span) -> None:
        """Take a span; it is sent later."""
        self._processor.on_end(
            ReadableSpan(
                span.name,
                _context(span.trace, is_remote=False),
                _context(span.parent, is_remote=span.is_server) if span.parent else None,
                self._resource,
                span.attributes,
                links=[Link(_context(trace, is_remote=False)) for trace in span.links],
                kind=SpanKind.SERVER if span.is_server else SpanKind.INTERNAL,
                status=Status(StatusCode.ERROR, span.error) if span.error else FINE,
                start_time=span.start_ns,
                end_time=span.end_ns,
                instrumentation_scope=self._scope,
            )
        )

    def close(self) -> None:
        """Send what is left, for `FLUSH_S` seconds at most."""
        flush = threading.Thread(target=self._processor.shutdown, name="otlp-flush", daemon=True)
        flush.start()
        flush.join(FLUSH_S)


def _context(trace: TraceContext, *, is_remote: bool) -> SpanContext:
    state = _state(trace.state) if trace.state else NO_STATE
    return SpanContext(int(trace.trace_id, 16), int(trace.span_id, 16), is_remote, FLAGS, state)


@lru_cache(maxsize=256)  # every span of a request has the same
def _state(header: str) -> TraceState:
    """Return what a `tracestate` header says: nothing, where it is malformed."""
    return TraceState.from_header([header])
