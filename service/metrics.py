"""Every Prometheus instrument, its buckets and labels. Written by the event loop only, so lock-free."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, product
from typing import ClassVar, Self

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

FASTEST, SLOWEST, STEPS = 50e-6, 10.0, 40  # seconds, seconds, edges
ENGINES = ("primary", "fallback")
COSINES = (0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
EXTRA_S = tuple(
    sign * ms / 1e3 for sign, row in ((-1, (50, 5, 1, 0.2, 0.05)), (1, (0, 0.05, 0.2, 1, 5, 50))) for ms in row
)
REASONS = ("expired", "overloaded", "draining", "breaker_open", "model_failed")  # to refuse, to fall back
STAGES: dict[str, tuple[str, ...]] = {"/predict": ("decode", "queue", "infer", "encode", "total")}
STAGES |= {"/v2/models/{model}/infer": STAGES["/predict"], "/retrieve": (*STAGES["/predict"], "search", "rerank")}
TOTAL_TEXT = "total_text"  # a request in text has a total of its own: an objective for vectors must not see it
STAGES |= {route: (*STAGES[route], "embed", TOTAL_TEXT) for route in ("/predict", "/retrieve")}
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


def _braces(labels: Labels, values: Labels, *more: str) -> str:
    pairs = [f'{label}="{_escaped(value)}"' for label, value in zip(labels, values, strict=True)]
    return "{" + ",".join([*pairs, *more]) + "}" if pairs or more else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class Series:
    """One histogram's counts for one set of label values, and the beginnings of its lines in a scrape."""

    __slots__ = ("_heads", "_tails", "counts", "edges", "total")

    def __init__(self, name: str, labels: Labels, values: Labels, edges: Sequence[float]) -> None:
        self.edges, self.counts, self.total = edges, [0] * (len(edges) + 1), 0.0
        limits = [f'le="{limit}"' for limit in (*map(repr, edges), "+Inf")]
        self._heads = [f"{name}_bucket{_braces(labels, values, limit)}" for limit in limits]
        self._tails = [f"{name}_{part}{_braces(labels, values)}" for part in ("count", "sum")]

    def observe(self, value: float) -> None:
        """Count `value` in its bucket (edges are inclusive upper bounds)."""
        self.counts[bisect_left(self.edges, value)] += 1
        self.total += value

    def lines(self) -> Iterator[str]:
        """Yield the cumulative buckets, the count and the sum."""
        count = 0
        for head, count in zip(self._heads, accumulate(self.counts), strict=True):
            yield f"{head} {count}"
        yield f"{self._tails[0]} {count}"
        yield f"{self._tails[1]} {self.total!r}"


class Instrument:
    """A named family of values by label values."""

    kind: ClassVar[str]

    def __init__(self, name: str, text: str, labels: Labels) -> None:
        self.name, self.text, self.labels = name, text, labels

    def head(self, name: str) -> Iterator[str]:
        """Yield the lines that say what `name` is."""
        yield f"# HELP {name} {self.text}"
        yield f"# TYPE {name} {self.kind}"


class Histogram(Instrument):
    """Histograms by label values; `prometheus_client`'s own scans its edges under a lock."""

    kind = "histogram"

    def __init__(self, name: str, text: str, labels: Labels, edges: Sequence[float]) -> None:
        super().__init__(name, text, labels)
        self.edges = edges
        self.series: dict[Labels, Series] = {}

    def of(self, *values: str) -> Series:
        """Return the histogram of these label values."""
        series = self.series.get(values)
        if series is None:
            series = self.series[values] = Series(self.name, self.labels, values, self.edges)
        return series

    def lines(self, *, openmetrics: bool) -> Iterator[str]:
        """Yield the scrape of this family; the same in both formats."""
        yield from self.head(self.name)
        for series in self.series.values():
            yield from series.lines()


class Counter(Instrument):
    """Counts by label values."""

    kind = "counter"

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

    def lines(self, *, openmetrics: bool) -> Iterator[str]:
        """Yield the scrape of this family; OpenMetrics names the family without `_total`."""
        sample = self.name + ("_total" if self.kind == "counter" else "")
        yield from self.head(self.name if openmetrics else sample)
        for values, value in self.values.items():
            yield f"{sample}{_braces(self.labels, values)} {value!r}"


class Gauge(Counter):
    """Levels by label values."""

    kind = "gauge"

    def set(self, value: float, *values: str) -> None:
        """Set the level."""
        self.values[values] = value

    def clear(self) -> None:
        """Forget every level."""
        self.values.clear()


class Metrics:
    """The instruments of one process, and the text of a scrape."""

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
        self.reloads.expect((*ENGINES, "candidate", "retriever"), ("ok", "refused", "failed"))
        self.queue_rows = Gauge("lvm_queue_rows", "Rows waiting or running.", ("engine",))
        self.breaker = Gauge("lvm_breaker_open", "1 open, 0.5 half-open, 0 closed.", ("engine",))
        self.input_norm = Histogram(
            "lvm_input_norm", "Mean length of a context's vectors.", ("engine",), (0.5, 0.9, 0.99, 1.01, 1.1, 2.0, 10.0)
        )
        self.input_neighbour_cosine = Histogram(
            "lvm_input_neighbour_cosine",
            "Mean cosine of a context's neighbours.",
            ("engine",),
            [step / 10 for step in range(-2, 10)],
        )
        self.input_drift = Gauge(
            "lvm_input_drift", "Deviations of the last inputs from those the net was trained on.", ("engine", "figure")
        )
        self.shadowed = Counter("lvm_shadow", "Requests put to the candidate as well.", ("outcome",))
        self.shadowed.expect(("compared", "skipped", "failed"))
        self.shadow_cosine = Histogram(
            "lvm_shadow_cosine", "Cosine of the candidate's answer to the one given.", (), COSINES
        )
        self.shadow_overlap = Histogram(
            "lvm_shadow_overlap", "Share of the passages found that both answers find.", (), [n / 10 for n in range(10)]
        )
        self.shadow_extra_seconds = Histogram(
            "lvm_shadow_extra_seconds", "Seconds the candidate took longer, both alone in their batch.", (), EXTRA_S
        )
        self.ready = Gauge("lvm_ready", "1 where /readyz says 200.", ())
        self.model = Gauge(
            "lvm_model_info",
            "The version that each alias serves.",
            ("alias", "model", "version", "sha256", "runtime"),
        )
        self._process = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._process)

    def instruments(self) -> Iterator[Histogram | Counter]:
        """Yield every instrument of ours."""
        yield from (value for value in vars(self).values() if isinstance(value, Histogram | Counter))

    def scrape(self, accept: str = "") -> tuple[bytes, str]:
        """Return the text, and its media type, in the format that an Accept header asks for.

        Written here because the event loop stands still meanwhile, and `prometheus_client` formats every
        line anew. The process's own few are still its.
        """
        encode, media_type = choose_encoder(accept)
        openmetrics = media_type.startswith("application/openmetrics-text")
        lines = (line for instrument in self.instruments() for line in instrument.lines(openmetrics=openmetrics))
        return "".join([f"{line}\n" for line in lines]).encode() + encode(self._process), media_type
