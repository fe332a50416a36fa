"""Reads the service's /metrics: requests by outcome, and the time of a request by stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

METRICS = "/metrics"
TIMEOUT_S = 60.0
STAGES = ("decode", "queue", "infer", "encode", "total")
Counts = dict[str, float]


def scrape(url: str) -> Iterator[Any]:
    """Yield every sample of /metrics: name, labels, value."""
    for family in text_string_to_metric_families(httpx.get(f"{url}{METRICS}", timeout=TIMEOUT_S).text):
        yield from family.samples


def outcomes(url: str) -> dict[str, int]:
    """Return requests by outcome, and their sum as `all`; requests of /metrics itself are left out."""
    counts: Counter[str] = Counter()
    for sample in scrape(url):
        if sample.name == "lvm_requests_total" and sample.labels["route"] != METRICS:
            counts[sample.labels["outcome"]] += int(sample.value)
    return {"all": counts.total(), **counts}


def count_series(url: str) -> int:
    """Count the series of /metrics."""
    return sum(1 for _ in scrape(url))


def reloads(url: str, alias: str) -> int:
    """Count the versions that went live behind an alias since the start."""
    wanted = {"alias": alias, "outcome": "ok"}
    return sum(int(s.value) for s in scrape(url) if (s.name, s.labels) == ("lvm_reloads_total", wanted))


def counters(url: str, route: str = "/predict", engine: str = "primary") -> Counts:
    """Return seconds by stage, seconds of processor, and counts of requests, batches and rows since the start."""
    named = ((_named(sample.name, sample.labels, route, engine), sample.value) for sample in scrape(url))
    return {name: value for name, value in named if name}


def growth(before: Counts, after: Counts) -> Counts:
    """Return by how much every count grew."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def stages(grown: Counts, mean_ms: float) -> dict[str, float]:
    """Return milliseconds per request by stage, of processor, and outside of the service; rows per batch.

    `mean_ms` is the latency that the client measured. `rest` is what the total has beyond its stages (the event loop,
    routing, headers, the write), `outside` what the client has beyond the total (kernel, sockets, parsing,
    waiting to be read).
    """
    requests = grown.get("requests", 0.0)
    batches = grown.get("batches", 0.0)
    if not requests or not batches:
        return {}
    spent = {stage: grown[stage] / requests * 1e3 for stage in STAGES}
    return {
        **spent,
        "rest": spent["total"] - sum(spent[stage] for stage in STAGES if stage != "total"),
        "outside": mean_ms - spent["total"],
        "client": mean_ms,
        "cpu": grown["cpu"] / requests * 1e3,
        "batch_rows": grown["rows"] / batches,
    }


def stage_table(measurements: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per wire, rows and connections: the median over rounds of every figure."""
    cells: dict[tuple[str, int, int], list[Mapping[str, float]]] = {}
    for one in measurements:
        if one.get("stages"):
            cells.setdefault((one["wire"], one["rows"], one["connections"]), []).append(one["stages"])
    return [
        {"wire": wire, "rows": rows, "connections": connections}
        | {name: median(each[name] for each in rounds) for name in rounds[0]}
        for (wire, rows, connections), rounds in cells.items()
    ]


def _named(name: str, labels: Mapping[str, str], route: str, engine: str) -> str | None:
    if labels.get("route") == route and name == "lvm_request_seconds_sum":
        return labels["stage"]
    if labels.get("route") == route and name == "lvm_request_seconds_count" and labels["stage"] == "total":
        return "requests"
    if labels.get("engine") == engine and name in ("lvm_batch_rows_sum", "lvm_batch_rows_count"):
        return "rows" if name.endswith("sum") else "batches"
    return "cpu" if name == "process_cpu_seconds_total" else None
