"""Where the time of a request goes, from the service's own histograms before and after a measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

STAGES = ("decode", "queue", "infer", "encode", "total")
Counts = dict[str, float]


def scrape(url: str, route: str = "/predict", engine: str = "primary") -> Counts:
    """Return the counters that matter here: seconds by stage, requests, seconds of processor, batches and rows."""
    counts: Counts = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            name = _named(sample.name, sample.labels, route, engine)
            if name:
                counts[name] = sample.value
    return counts


def between(before: Counts, after: Counts, mean_ms: float) -> dict[str, float]:
    """Return milliseconds per request by stage, of processor, and outside of the service; rows per batch.

    `mean_ms` is the latency that the client saw. `rest` is what the total has beyond its stages (the event loop,
    routing, headers, the write), `outside` what the client has beyond the total (kernel, sockets, parsing,
    waiting to be read).
    """
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    requests, batches = grown.get("requests", 0.0), grown.get("batches", 0.0)
    if not requests or not batches:
        return {}
    stages = {stage: grown[stage] / requests * 1e3 for stage in STAGES}
    named = sum(stages[stage] for stage in STAGES if stage != "total")
    return {
        **stages,
        "rest": stages["total"] - named,
        "outside": mean_ms - stages["total"],
        "client": mean_ms,
        "cpu": grown["cpu"] / requests * 1e3,
        "batch_rows": grown["rows"] / batches,
    }


def table(measurements: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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
