"""Every Prometheus metric of the service, with its labels and buckets, and the text of a scrape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from prometheus_client.exposition import choose_encoder

from models.registry.alias import EXPECTED, PREDICTORS
from service.telemetry.instruments import (
    Counter,
    Family,
    Gauge,
    Histogram,
    Info,
    Instrument,
    Labels,
    Levels,
    Others,
    ProcessInstruments,
    Share,
)
from service.telemetry.shared_memory import Key, MetricValues

# Seconds, seconds, number of edges.
FASTEST, SLOWEST, STEPS = 50e-6, 10.0, 40
COSINES = (0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
EXTRA_S = (-0.05, -0.005, -0.001, -0.0002, -0.00005, 0.0, 0.00005, 0.0002, 0.001, 0.005, 0.05)
ROWS = tuple(2.0**power for power in range(11))
# Cosine distances: 1 less the cosine.
DISTANCES = tuple(twentieths / 20 for twentieths in range(1, 25))
DIFFERENCES = tuple(hundredths / 100 for hundredths in (-40, -20, -15, *range(-10, 11), 15, 20, 40))
# Thirds of contexts by how alike their vectors are.
COHERENCES = ("low", "middle", "high")
RECIPROCALS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RANKS = (1.0, 3.0, 5.0, 10.0, 20.0, 50.0)
BASELINES = ("persistence", "mean", "weighted_mean")
# What a prediction is compared with the true next vector beside: itself, as NET.
NET = "net"
TENTHS = tuple(tenths / 10 for tenths in range(-2, 10))
NORMS = (0.5, 0.9, 0.99, 1.01, 1.1, 2.0, 10.0)
# The outcome of requests that a worker had not answered when it died.
LOST = "lost"
# Why an engine rejects a request, and why another engine answers it.
REASONS = ("expired", "overloaded", "draining", "breaker_open", "model_failed")
# Why a corpus is searched in this process and not in the index store.
INDEX_REASONS = ("index_away", "index_stale")
# "unrecorded": the alias in the registry could not be moved back.
RELOADS = ("ok", "refused", "failed", "rolled_back", "unrecorded")
ROLES = WORKER, OWNER = "worker", "owner"
# Requests in text have a total of their own, so that objectives for vectors do not see the time of the encoder.
TOTAL_TEXT = "total_text"
_VECTORS = ("decode", "queue", "infer", "encode", "total")
_SEARCH = ("search", "rerank")
_TEXT = ("embed", TOTAL_TEXT)
_TEXTS = ("decode", "queue", "encode", *_TEXT)
STAGES: dict[str, tuple[str, ...]] = {
    "/predict": (*_VECTORS, *_TEXT),
    "/v2/models/{model}/infer": _VECTORS,
    "/retrieve": (*_VECTORS, *_SEARCH, *_TEXT),
    "/embed": _TEXTS,
    "/v1/embeddings": _TEXTS,
}
# With LVM_GRPC_PORT.
GRPC_STAGES: dict[str, tuple[str, ...]] = {"grpc:infer": _VECTORS}
# With LVM_COMPAT=lnsp.
LNSP_STAGES: dict[str, tuple[str, ...]] = {"/infer": _VECTORS, "/infer/batch": _VECTORS}


def _furthest(values: Iterable[float]) -> float:
    return max(values, key=abs)


def latency_edges(slo_ms: Iterable[float]) -> tuple[float, ...]:
    """Return about 40 log-spaced edges in seconds from 50 us to 10 s. Every SLO is exactly an edge.

    Each SLO takes the place of the grid edge that is nearest to it in ratio.
    """
    slos = {ms / 1000 for ms in slo_ms}
    ratio = (SLOWEST / FASTEST) ** (1 / (STEPS - 1))
    edges = {float(f"{FASTEST * ratio**step:.3g}") for step in range(STEPS)}
    for slo in sorted(slos - edges):
        nearest = min(edges - slos, key=lambda edge: max(edge, slo) / min(edge, slo), default=slo)
        edges = edges - {nearest} | {slo}
    return tuple(sorted(edges))


class Metrics:
    """The metrics of one process. A scrape shows the sum of all processes whose numbers are beside `memory`.

    The latency objectives `slo_ms`, in milliseconds, are edges of `lvm_request_seconds`.
    """

    def __init__(self, slo_ms: Iterable[float] = (), memory: MetricValues | None = None) -> None:
        self._memory = memory or MetricValues()
        self._counter = partial(Counter, memory=self._memory)
        self._gauge = partial(Gauge, memory=self._memory)
        self._histogram = partial(Histogram, memory=self._memory)
        self._define_requests(latency_edges(slo_ms))
        self._define_overload()
        self._define_engines()
        self._define_deployment()
        self._define_inputs()
        self._define_shadow()
        self._define_live_scores()
        for alias in EXPECTED:
            self.precreate_alias(alias)
        self._process = ProcessInstruments(self._memory)
        shown = *self.instruments(), *self._process.families.values()
        self._by_name = {made.name: made for made in shown if isinstance(made, Instrument)}
        for key in self._memory.allocated():
            self._show(key)

    def _define_requests(self, edges: Sequence[float]) -> None:
        self.requests = self._counter("lvm_requests", "Requests by route and outcome.", ("route", "outcome"))
        self.seconds = self._histogram(
            "lvm_request_seconds", "Seconds of requests answered with 200.", ("route", "stage"), edges=edges
        )
        self.in_flight = self._gauge("lvm_in_flight_requests", "Requests being answered.", ("route",))
        self.ready = self._gauge("lvm_ready", "1 if /readyz answers 200, else 0.", join=min)
        self.log_dropped = self._counter("lvm_log_dropped", "Log lines that could not be written.").precreate()

    def _define_overload(self) -> None:
        self.in_flight_rows = self._gauge("lvm_in_flight_rows", "Rows admitted and not answered.").precreate()
        self.in_flight_bytes = self._gauge("lvm_in_flight_bytes", "Bytes admitted and not answered.").precreate()
        self.limit_rows = self._gauge("lvm_limit_rows", "Rows that may be in flight.")
        self.refusals = self._counter("lvm_refusals", "Requests rejected by admission control.", ("reason",))
        self.refusals.precreate(("rows", "bytes", "client"))
        self.rejections = self._counter("lvm_rejections", "Requests rejected by an engine.", ("engine", "reason"))
        self.fallbacks = self._counter(
            "lvm_fallbacks", "Requests answered by a fallback, or a search without Milvus.", ("reason",)
        )
        self.fallbacks.precreate((*REASONS, *INDEX_REASONS))

    def _define_engines(self) -> None:
        self.batch_rows = self._histogram("lvm_batch_rows", "Rows of a micro-batch.", ("engine",), edges=ROWS)
        self.batch_seconds = self._histogram(
            "lvm_batch_seconds", "Seconds of a micro-batch in the model.", ("engine",), edges=latency_edges(())[::2]
        )
        self.batch_released = self._counter("lvm_batches", "Micro-batches by why they ran.", ("engine", "reason"))
        self.queue_rows = self._gauge("lvm_queue_rows", "Rows waiting or running.", ("engine",))
        self.breaker = self._gauge("lvm_breaker_open", "1 open, 0.5 half-open, 0 closed.", ("engine",), join=max)

    def _define_deployment(self) -> None:
        self.model = Info(
            "lvm_model_info", "The version that each alias serves.", ("alias", "model", "version", "sha256", "runtime")
        )
        self.reloads = self._counter("lvm_reloads", "Alias changes by how they ended.", ("alias", "outcome"))
        self.store_looks = self._counter("lvm_store_looks", "Polls of the registry's object store.", ("outcome",))
        self.store_age = self._gauge(
            "lvm_store_age_seconds", "Seconds since that store last answered in full.", join=max
        )
        self.worker_deaths = self._counter("lvm_worker_deaths", "Processes that ended unexpectedly.", ("role",))
        self.worker_deaths.precreate(ROLES)

    def _define_inputs(self) -> None:
        self.input_norm = self._histogram(
            "lvm_input_norm", "Mean norm of a context's vectors.", ("engine",), edges=NORMS
        )
        self.input_neighbour_cosine = self._histogram(
            "lvm_input_neighbour_cosine", "Mean cosine of consecutive vectors.", ("engine",), edges=TENTHS
        )
        self.input_drift = self._gauge(
            "lvm_input_drift", "Standard deviations from the training data.", ("engine", "figure"), join=_furthest
        )
        self.drift_limit = self._gauge(
            "lvm_input_drift_limit", "Standard deviations beyond which /models has a warning.", ("figure",), join=min
        )

    def _define_shadow(self) -> None:
        self.shadowed = self._counter("lvm_shadow", "Requests also sent to the candidate.", ("outcome",))
        self.shadowed.precreate(("compared", "skipped", "failed"))
        self.shadow_cosine = self._histogram(
            "lvm_shadow_cosine", "Cosine of the candidate's answer to the given one.", edges=COSINES
        )
        self.shadow_overlap = self._histogram(
            "lvm_shadow_overlap", "Share of passages in both answers.", edges=TENTHS[2:]
        )
        self.shadow_extra_seconds = self._histogram(
            "lvm_shadow_extra_seconds", "Seconds that the candidate took longer, alone in a batch.", edges=EXTRA_S
        )
        self.shadow_difference = self._histogram(
            "lvm_shadow_difference",
            "Cosine to the true next vector, of the candidate less of the primary.",
            ("model", "version", "against", "coherence"),
            edges=DIFFERENCES,
        )

    def _define_live_scores(self) -> None:
        self.live_predictions = self._counter(
            "lvm_live_predictions",
            "Sampled predictions, and those whose true next vector arrived.",
            ("alias", "outcome"),
        )
        self.live_coverage = Share(
            "lvm_live_coverage",
            "Share of sampled predictions whose true next vector arrived.",
            ("alias",),
            counter=self.live_predictions,
            part="scored",
            whole="kept",
        )
        made_by = ("alias", "model", "version")
        self.card_cosine = Levels("lvm_card_cosine", "The lowest mean cosine on the card of a version.", made_by)
        self.live_distance = self._histogram(
            "lvm_live_distance",
            "Cosine distance to the true next vector, of predictions and of baselines for the same contexts.",
            (*made_by, "predictor"),
            edges=DISTANCES,
        )
        searched = ("corpus", "query")
        self.live_rank = self._histogram(
            "lvm_live_rank", "Place of the passage that came next, in answers of /retrieve.", searched, edges=RANKS
        )
        self.live_reciprocal_rank = self._histogram(
            "lvm_live_reciprocal_rank",
            "One over that place; 0 if the passage was not among the answers.",
            searched,
            edges=RECIPROCALS,
        )

    def totals(self, *instruments: Counter | Histogram) -> list[dict[Labels, Any]]:
        """Return the numbers of each instrument by label values, summed over all processes."""
        others = self._others()
        return [instrument.totals(others) for instrument in instruments]

    def precreate_alias(self, alias: str) -> None:
        """Show the counters of an alias from now on, so that their first count is an increase."""
        self.reloads.precreate((alias,), RELOADS)
        if alias in PREDICTORS:
            self.rejections.precreate((alias,), REASONS)

    def instruments(self) -> Iterator[Family]:
        """Yield every metric of the service."""
        yield from (value for value in vars(self).values() if isinstance(value, Family))

    def scrape(self, accept: str = "") -> Generator[None, None, tuple[bytes, str]]:
        """Return the text in the format that an Accept header asks for, and its media type.

        Yield where requests may be answered meanwhile.
        """
        _, media_type = choose_encoder(accept)
        openmetrics = media_type.startswith("application/openmetrics-text")
        self.observe_process()
        yield
        others = self._others()
        lines: list[str] = []
        for family in (*self.instruments(), *self._process.families.values()):
            yield
            lines += family.lines(others, openmetrics=openmetrics)
        end = ["# EOF"] if openmetrics else []
        return "".join([f"{line}\n" for line in (*lines, *end)]).encode(), media_type

    def observe_process(self) -> None:
        """Measure what the process uses: memory, processor time, descriptors."""
        self._process.update()

    def finalize(self) -> None:
        """Close the numbers of a process that is gone: count unanswered requests as lost, and reset the gauges."""
        for (route,), count in self.in_flight.reset().items():
            for _ in range(int(count)):
                self.requests.inc(route, LOST)
        for instrument in self._by_name.values():
            if isinstance(instrument, Gauge):
                instrument.reset()

    def _others(self) -> Others:
        """Return the numbers of the other processes. Label values that only they have are shown from now on."""
        found: defaultdict[Key, list[Sequence[float]]] = defaultdict(list)
        for key, numbers in self._memory.other_processes():
            if self._show(key):
                found[key].append(numbers)
        return found

    def _show(self, key: Key) -> bool:
        """Show the label values of a key from now on; return whether this release knows it."""
        name, *values = key
        instrument = self._by_name.get(name)
        if instrument is None or len(values) != len(instrument.label_names):
            return False
        instrument.labels(*values)
        return True
