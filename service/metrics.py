"""Every Prometheus instrument, its buckets and labels. Written by the event loop only, so lock-free."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, product
from typing import Self

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

FASTEST, SLOWEST, STEPS = 50e-6, 10.0, 40  # seconds, seconds, edges
ENGINES = ("primary", "fallback")
REASONS = ("expired", "overloaded", "draining", "breaker_open", "model_failed")  # to refuse, to fall back
STAGES: dict[str, tuple[str, ...]] = {"/predict": ("decode", "queue", "infer", "encode", "total")}
STAGES |= {"/v2/models/{model}/infer": STAGES["/predict"], "/retrieve": (*STAGES["/predict"], "search")}
Labels = tuple[str, ...]


def latency_edges(slo_ms: Iterable[float]) -> tuple[float, ...]:
    """Return about 40 log-spaced edges in seconds from 50 us to 10 s, with every SLO exactly an edge.

    Each SLO takes the place of the grid edge nearest to it in ratio.
    """
    ratio = (SLOWEST / FASTEST) ** (1 / (STEPS - 1))
    edges = {float(f"{FASTEST * ratio**step:.3g}") for step in range(STEPS)}
    for slo in sorted({ms / 1000 for ms in slo_ms}):
        free = edges - {ms / 1000 for ms in slo_ms}
        nearest = min(free, key=lambda edge: max(edge, slo) / min(edge, slo), default=slo)
        if slo not in edges:
            edges = edges - {nearest} | {slo}
    return tuple(sorted(edges))


class Series:
    """One histogram's counts for one set of label values."""

    __slots__ = ("counts", "edges", "total")

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges, self.counts, self.total = edges, [0] * (len(edges) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count `value` in its bucket (edges are inclusive upper bounds)."""
        self.counts[bisect_left(self.edges, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return the cumulative buckets as Prometheus wants them."""
        names = [*(repr(edge) for edge in self.edges), "+Inf"]
        return list(zip(names, map(float, accumulate(self.counts)), strict=True))


class Instrument:
    """A named family: values by label values, created on first use."""

    def __init__(self, name: str, text: str, labels: Labels) -> None:
        self.name, self.text, self.labels = name, text, labels


class Histogram(Instrument):
    """Histograms by label values; `prometheus_client`'s own scans its edges under a lock."""

    def __init__(self, name: str, text: str, labels: Labels, edges: Sequence[float]) -> None:
        super().__init__(name, text, labels)
        self.edges = edges
        self.series: dict[Labels, Series] = {}

    def of(self, *values: str) -> Series:
        """Return the histogram of these label values."""
        series = self.series.get(values)
        if series is None:
            series = self.series[values] = Series(self.edges)
        return series

    def family(self) -> Metric:
        """Return the scrape of this family."""
        family = HistogramMetricFamily(self.name, self.text, labels=self.labels)
        for values, series in self.series.items():
            family.add_metric(values, series.buckets(), series.total)
        return family


class Counter(Instrument):
    """Counts by label values."""

    def __init__(self, name: str, text: str, labels: Labels) -> None:
        super().__init__(name, text, labels)
        self.values: dict[Labels, float] = {}

    def expect(self, *label_values: Iterable[str]) -> Self:
        """Show every combination of these values from the start, so that its first count is a rise."""
        self.values.update(dict.fromkeys(product(*label_values), 0.0))
        return self

    def add(self, *values: str) -> None:
        """Count one."""
        self.values[values] = self.values.get(values, 0.0) + 1

    def family(self) -> Metric:
        """Return the scrape of this family."""
        family = CounterMetricFamily(self.name, self.text, labels=self.labels)
        for values, value in self.values.items():
            family.add_metric(values, value)
        return family


class Gauge(Counter):
    """Levels by label values."""

    def set(self, value: float, *values: str) -> None:
        """Set the level."""
        self.values[values] = value

    def clear(self) -> None:
        """Forget every level."""
        self.values.clear()

    def family(self) -> Metric:
        """Return the scrape of this family."""
        family = GaugeMetricFamily(self.name, self.text, labels=self.labels)
        for values, value in self.values.items():
            family.add_metric(values, value)
        return family


class Metrics(Collector):
    """The instruments of one process, and the registry that a scrape reads."""

    def __init__(self, slo_ms: Iterable[float] = ()) -> None:
        self.requests = Counter("lvm_requests", "Requests by route and how they ended.", ("route", "outcome"))
        self.seconds = Histogram(
            "lvm_request_seconds",
            "Seconds a request spent, by route and stage.",
            ("route", "stage"),
            latency_edges(slo_ms),
        )
        self.batch_rows = Histogram(
            "lvm_batch_rows", "Rows of a micro-batch.", ("engine",), [float(2**i) for i in range(11)]
        )
        self.batch_released = Counter("lvm_batches", "Micro-batches by why they ran.", ("engine", "reason"))
        self.in_flight = Gauge("lvm_in_flight_requests", "Requests being answered.", ("route",))
        self.rejections = Counter("lvm_rejections", "Requests refused by an engine.", ("engine", "reason"))
        self.rejections.expect(ENGINES, REASONS)
        self.fallbacks = Counter("lvm_fallbacks", "Requests that another engine answered.", ("reason",))
        self.fallbacks.expect(REASONS)
        self.reloads = Counter("lvm_reloads", "Alias changes picked up.", ("alias", "outcome"))
        self.reloads.expect((*ENGINES, "retriever"), ("ok", "refused", "failed"))
        self.queue_rows = Gauge("lvm_queue_rows", "Rows waiting or running.", ("engine",))
        self.breaker = Gauge("lvm_breaker_open", "1 open, 0.5 half-open, 0 closed.", ("engine",))
        self.ready = Gauge("lvm_ready", "1 where /readyz says 200.", ())
        self.model = Gauge(
            "lvm_model_info",
            "The version that each alias serves.",
            ("alias", "model", "version", "sha256", "runtime"),
        )
        self.registry = CollectorRegistry()
        self.registry.register(self)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the scrape of every instrument."""
        for instrument in vars(self).values():
            if isinstance(instrument, Histogram | Counter):
                yield instrument.family()
