"""Every Prometheus instrument, its buckets and labels. Written by the event loop only, so lock-free."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, product
from typing import ClassVar, Self

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from models.registry.alias import ALIASES, PREDICTORS
from service.telemetry.shared_memory import Key, MetricValues

FASTEST, SLOWEST, STEPS = 50e-6, 10.0, 40  # seconds, seconds, edges
COSINES = (0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
EXTRA_S = tuple(
    sign * ms / 1e3 for sign, row in ((-1, (50, 5, 1, 0.2, 0.05)), (1, (0, 0.05, 0.2, 1, 5, 50))) for ms in row
)
LOST = "lost"  # the outcome of requests whose worker died
REASONS = ("expired", "overloaded", "draining", "breaker_open", "model_failed")  # to refuse, to fall back
AWAY = ("index_away", "index_stale")  # why a corpus is searched here and not in the index store
RELOADS = ("ok", "refused", "failed", "rolled_back", "unrecorded")  # the last: its alias could not be moved back
ROLES = WORKER, OWNER = "worker", "owner"
STAGES: dict[str, tuple[str, ...]] = {"/predict": ("decode", "queue", "infer", "encode", "total")}
STAGES |= {"/v2/models/{model}/infer": STAGES["/predict"], "/retrieve": (*STAGES["/predict"], "search", "rerank")}
TOTAL_TEXT = "total_text"  # a request in text has a total of its own: an objective for vectors must not see it
STAGES |= {route: (*STAGES[route], "embed", TOTAL_TEXT) for route in ("/predict", "/retrieve")}
JOINS: Mapping[str, Callable[[Iterable[float]], float]] = {"process_start_time_seconds": min, "python_info": max}
Labels = tuple[str, ...]
Others = Mapping[Key, list[Sequence[float]]]  # the numbers of the workers beside this one


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


def _exemplar(trace_id: str, value: float, now: float) -> str:
    return f' # {{trace_id="{trace_id}"}} {value!r} {now:.3f}'


class Instrument:
    """A named family of numbers by label values, counted in `cells`."""

    kind: ClassVar[str]

    def __init__(self, cells: MetricValues, name: str, text: str, labels: Labels) -> None:
        self.cells, self.name, self.text, self.label_names = cells, name, text, labels

    def head(self, name: str) -> Iterator[str]:
        """Yield the lines that say what `name` is."""
        yield f"# HELP {name} {self.text}"
        yield f"# TYPE {name} {self.kind}"


class Series:
    """One histogram's counts for one set of label values, and the beginnings of its lines in a scrape."""

    __slots__ = ("_at", "_examples", "_heads", "_size", "_sum", "_tails", "_values", "edges")

    def __init__(self, histogram: Histogram, values: Labels) -> None:
        name, labels, cells = histogram.name, histogram.label_names, histogram.cells
        self.edges, self._size = histogram.edges, len(histogram.edges) + 2  # every edge, infinity, the sum
        self._at, self._values = cells.take((name, *values), self._size), cells.values
        self._sum = self._at + self._size - 1
        limits = [f'le="{limit}"' for limit in (*map(repr, self.edges), "+Inf")]
        self._heads = [f"{name}_bucket{_braces(labels, values, limit)}" for limit in limits]
        self._tails = [f"{name}_{part}{_braces(labels, values)}" for part in ("count", "sum")]
        self._examples: dict[int, tuple[str, float, float]] = {}

    def observe(self, value: float) -> None:
        """Count `value` in its bucket (edges are inclusive upper bounds)."""
        self._values[self._at + bisect_left(self.edges, value)] += 1
        self._values[self._sum] += value

    def add_exemplar(self, value: float, trace_id: str, now: float) -> None:
        """Remember which trace had `value`, at `now` (seconds since 1970), for its bucket; only this process knows."""
        self._examples[bisect_left(self.edges, value)] = trace_id, value, now

    def lines(self, others: Sequence[Sequence[float]], *, openmetrics: bool = False) -> Iterator[str]:
        """Yield the cumulative buckets, the count and the sum, with the numbers of `others` added.

        OpenMetrics shows the latest exemplar of each bucket; the other format has none.
        """
        ours = self._values[self._at : self._at + self._size]
        *counts, total = map(sum, zip(ours, *others, strict=True)) if others else ours
        count = 0.0
        examples = self._examples if openmetrics else {}
        for place, (head, count) in enumerate(zip(self._heads, accumulate(counts), strict=True)):
            yield f"{head} {count:.0f}{_exemplar(*examples[place]) if place in examples else ''}"
        if not openmetrics or self.edges[0] >= 0:  # beside edges below 0 it allows neither
            yield f"{self._tails[0]} {count:.0f}"
            yield f"{self._tails[1]} {total!r}"


class Histogram(Instrument):
    """Histograms by label values; `prometheus_client`'s own scans its edges under a lock."""

    kind = "histogram"

    def __init__(self, cells: MetricValues, name: str, text: str, labels: Labels, edges: Sequence[float]) -> None:
        super().__init__(cells, name, text, labels)
        self.edges = edges
        self._series: dict[Labels, Series] = {}

    def labels(self, *values: str) -> Series:
        """Return the histogram of these label values."""
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = Series(self, values)
        return series

    def show(self, *values: str) -> None:
        """Show these label values, also if they count nothing."""
        self.labels(*values)

    def lines(self, others: Others, *, openmetrics: bool = False) -> Iterator[str]:
        """Yield the scrape of this family; exemplars in OpenMetrics only."""
        yield from self.head(self.name)
        for values, series in self._series.items():
            yield from series.lines(others.get((self.name, *values), ()), openmetrics=openmetrics)


class Counter(Instrument):
    """Counts by label values."""

    kind = "counter"

    def __init__(
        self, cells: MetricValues, name: str, text: str, labels: Labels, join: Callable[[Iterable[float]], float] = sum
    ) -> None:
        super().__init__(cells, name, text, labels)
        self._join = join
        self._values = cells.values
        self._places: dict[Labels, int] = {}

    def precreate(self, *label_values: Iterable[str]) -> Self:
        """Show every combination of these values from the start, so that its first count is a rise."""
        for values in product(*label_values):
            self.index(*values)
        return self

    def show(self, *values: str) -> None:
        """Show these label values, also if they count nothing."""
        self.index(*values)

    def index(self, *values: str) -> int:
        """Return where in the cells these label values count."""
        at = self._places.get(values)
        if at is None:
            at = self._places[values] = self.cells.take((self.name, *values), 1)
        return at

    def inc(self, *values: str) -> None:
        """Count one."""
        at = self._places.get(values)
        self._values[self.index(*values) if at is None else at] += 1

    def value(self, *values: str) -> float:
        """Return what this process counts there."""
        return self._values[self.index(*values)]

    def lines(self, others: Others, *, openmetrics: bool = False) -> Iterator[str]:
        """Yield the scrape of this family; OpenMetrics names the family without `_total`."""
        sample = self.name + ("_total" if self.kind == "counter" else "")
        yield from self.head(self.name if openmetrics else sample)
        for values, at in self._places.items():
            theirs = [numbers[0] for numbers in others.get((self.name, *values), ())]
            yield f"{sample}{_braces(self.label_names, values)} {self._join([self._values[at], *theirs])!r}"


class Gauge(Counter):
    """Levels by label values; `join` makes one of several workers'."""

    kind = "gauge"

    def set(self, value: float, *values: str) -> None:
        """Set the level."""
        self._values[self.index(*values)] = value

    def dec(self, *values: str) -> None:
        """Count one less."""
        self._values[self.index(*values)] -= 1

    def empty(self) -> dict[Labels, float]:
        """Set every level to what changes no join; return those that were not 0."""
        levels = {values: self._values[at] for values, at in self._places.items()}
        for values in levels:
            self.set(math.inf if self._join is min else 0.0, *values)
        return {values: level for values, level in levels.items() if level}


class Info(Instrument):
    """Facts about this process: label values that are 1 where they hold."""

    kind = "gauge"

    def __init__(self, name: str, text: str, labels: Labels) -> None:
        super().__init__(MetricValues(), name, text, labels)
        self.label_sets: list[Labels] = []

    def lines(self, others: Others, *, openmetrics: bool = False) -> Iterator[str]:
        """Yield the scrape of this family; the same in both formats."""
        yield from self.head(self.name)
        for values in self.label_sets:
            yield f"{self.name}{_braces(self.label_names, values)} 1.0"


class ProcessMetrics:
    """What `prometheus_client` tells of a process, counted in `cells`: several workers show their sum.

    What a process counted outlives it; its successor in the row counts on.
    """

    def __init__(self, cells: MetricValues) -> None:
        self._cells, self._registry = cells, CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self._before: dict[tuple[Counter, Labels], float] = {}
        self.instruments: dict[str, Counter] = {}
        for family in self._registry.collect():
            labels = tuple(family.samples[0].labels) if family.samples else ()
            kind = Counter if family.type == "counter" else Gauge
            join = JOINS.get(family.name, sum)
            self.instruments[family.name] = kind(cells, family.name, family.documentation, labels, join)

    def observe(self) -> None:
        """Bring the instruments up to date."""
        for family in self._registry.collect():
            made = self.instruments[family.name]
            for sample in family.samples:
                self._set(made, tuple(sample.labels.values()), sample.value)

    def _set(self, made: Counter, values: Labels, value: float) -> None:
        at = made.index(*values)
        before = 0.0
        if not isinstance(made, Gauge):
            before = self._before.setdefault((made, values), self._cells.values[at])
        self._cells.values[at] = before + value


class Metrics:
    """The instruments of one process, and the text of a scrape, which counts the workers beside it in."""

    def __init__(self, slo_ms: Iterable[float] = (), cells: MetricValues | None = None) -> None:
        self._cells = cells or MetricValues()
        counter, gauge = partial(Counter, self._cells), partial(Gauge, self._cells)
        histogram = partial(Histogram, self._cells)
        self.requests = counter("lvm_requests", "Requests by route and how they ended.", ("route", "outcome"))
        self.seconds = histogram(
            "lvm_request_seconds",
            "Seconds a request spent, by route and stage.",
            ("route", "stage"),
            latency_edges(slo_ms),
        )
        self.batch_rows = histogram(
            "lvm_batch_rows", "Rows of a micro-batch.", ("engine",), [float(2**i) for i in range(11)]
        )
        self.batch_released = counter("lvm_batches", "Micro-batches by why they ran.", ("engine", "reason"))
        self.in_flight = gauge("lvm_in_flight_requests", "Requests being answered.", ("route",))
        self.in_flight_rows = gauge("lvm_in_flight_rows", "Rows let in and not answered.", ()).precreate()
        self.in_flight_bytes = gauge("lvm_in_flight_bytes", "Bytes of bodies let in and not answered.", ()).precreate()
        self.limit_rows = gauge("lvm_limit_rows", "Rows that may be in flight.", ())
        self.refusals = counter("lvm_refusals", "Requests refused at the door.", ("reason",))
        self.refusals.precreate(("rows", "bytes", "client"))
        self.rejections = counter("lvm_rejections", "Requests refused by an engine.", ("engine", "reason"))
        self.rejections.precreate(PREDICTORS, REASONS)
        self.fallbacks = counter(
            "lvm_fallbacks", "Requests that another engine, or a search here, answered.", ("reason",)
        )
        self.fallbacks.precreate((*REASONS, *AWAY))
        self.reloads = counter("lvm_reloads", "Alias changes picked up.", ("alias", "outcome"))
        self.reloads.precreate(ALIASES, RELOADS)
        self.store_looks = counter("lvm_store_looks", "Looks at the object store of the registry.", ("outcome",))
        self.store_age = gauge("lvm_store_age_seconds", "Seconds since that store last answered in full.", (), max)
        self.worker_deaths = counter("lvm_worker_deaths", "Workers, or their owner, that ended unasked.", ("role",))
        self.worker_deaths.precreate(ROLES)
        self.log_dropped = counter("lvm_log_dropped", "Lines of the log that could not be written.", ()).precreate()
        self.queue_rows = gauge("lvm_queue_rows", "Rows waiting or running.", ("engine",))
        self.breaker = gauge("lvm_breaker_open", "1 open, 0.5 half-open, 0 closed.", ("engine",), max)
        self.input_norm = histogram(
            "lvm_input_norm", "Mean length of a context's vectors.", ("engine",), (0.5, 0.9, 0.99, 1.01, 1.1, 2.0, 10.0)
        )
        self.input_neighbour_cosine = histogram(
            "lvm_input_neighbour_cosine",
            "Mean cosine of a context's neighbours.",
            ("engine",),
            [step / 10 for step in range(-2, 10)],
        )
        self.input_drift = gauge(
            "lvm_input_drift",
            "Deviations of the last inputs from those the net was trained on.",
            ("engine", "figure"),
            max,
        )
        self.shadowed = counter("lvm_shadow", "Requests put to the candidate as well.", ("outcome",))
        self.shadowed.precreate(("compared", "skipped", "failed"))
        self.shadow_cosine = histogram(
            "lvm_shadow_cosine", "Cosine of the candidate's answer to the one given.", (), COSINES
        )
        self.shadow_overlap = histogram(
            "lvm_shadow_overlap", "Share of the passages found that both answers find.", (), [n / 10 for n in range(10)]
        )
        self.shadow_extra_seconds = histogram(
            "lvm_shadow_extra_seconds", "Seconds the candidate took longer, both alone in their batch.", (), EXTRA_S
        )
        self.ready = gauge("lvm_ready", "1 where /readyz says 200.", (), min)
        self.model = Info(
            "lvm_model_info",
            "The version that each alias serves.",
            ("alias", "model", "version", "sha256", "runtime"),
        )
        self._process = ProcessMetrics(self._cells)
        counted = *self.instruments(), *self._process.instruments.values()
        self._by_name = {made.name: made for made in counted if not isinstance(made, Info)}
        for name, *values in self._cells.taken():
            self._by_name[name].show(*values)

    def instruments(self) -> Iterator[Histogram | Counter | Info]:
        """Yield every instrument of ours."""
        yield from (value for value in vars(self).values() if isinstance(value, Histogram | Counter | Info))

    def scrape(self, accept: str = "") -> tuple[bytes, str]:
        """Return the text, and its media type, in the format that an Accept header asks for.

        Written here because the event loop stands still meanwhile, and `prometheus_client` formats every line anew.
        """
        _, media_type = choose_encoder(accept)
        openmetrics = media_type.startswith("application/openmetrics-text")
        self.observe_process()
        others = self._others()
        shown = *self.instruments(), *self._process.instruments.values()
        lines = [line for made in shown for line in made.lines(others, openmetrics=openmetrics)]
        end = ["# EOF"] if openmetrics else []
        return "".join([f"{line}\n" for line in (*lines, *end)]).encode(), media_type

    def observe_process(self) -> None:
        """Bring up to date what the process uses: memory, time of processor, descriptors."""
        self._process.observe()

    def finalize(self) -> None:
        """Bring the numbers of a process that is gone to their end: no levels, what it was answering is lost."""
        lost = self.in_flight.empty()
        for (route,), count in lost.items():
            for _ in range(int(count)):
                self.requests.inc(route, LOST)
        for made in self._by_name.values():
            if isinstance(made, Gauge):
                made.empty()

    def _others(self) -> Others:
        """Return the numbers of the workers beside this one; what only they count is shown from now on."""
        found: defaultdict[Key, list[Sequence[float]]] = defaultdict(list)
        for key, numbers in self._cells.elsewhere():
            self._by_name[key[0]].show(*key[1:])
            found[key].append(numbers)
        return found
