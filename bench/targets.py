"""What the report has to show: every target as data, and how its figure is read off the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Report = Mapping[str, Any]
Read = Callable[[Report], float | None]


@dataclass(frozen=True)
class Target:
    """A figure, the limit it must be at least or at most, its unit, and how to find it (None: not measured)."""

    name: str
    sense: Literal[">=", "<="]
    limit: float
    unit: str
    read: Read

    def judge(self, report: Report) -> dict[str, Any]:
        """Return the target as a row of the report."""
        value = self.read(report)
        is_met = None if value is None else value >= self.limit if self.sense == ">=" else value <= self.limit
        named = {"name": self.name, "sense": self.sense, "limit": self.limit, "unit": self.unit}
        return {**named, "value": value, "is_met": is_met}


def judge(report: Report) -> list[dict[str, Any]]:
    """Return every target as a row."""
    return [target.judge(report) for target in TARGETS]


def _row(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any]:
    return next((row for row in rows if wanted.items() <= row.items()), {})


def _at(tree: Any, *path: str) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _ratio(peer: str, figure: str, wire: str, connections: int) -> Read:
    def read(report: Report) -> float | None:
        cell = _row(_at(report, "closed", "cells") or (), wire=wire, connections=connections)
        value: float | None = _at(cell, "ratios", peer, figure, "median")
        return value

    return read


def _rows_per_second(report: Report) -> float | None:
    cells = _at(report, "rows", "cells") or ()
    return max((cell["rows"] * cell["servers"]["service"]["per_second"]["median"] for cell in cells), default=None)


def _open_loop(wire: str) -> Read:
    def read(report: Report) -> float | None:
        value: float | None = _at(_row(report.get("open", ()), wire=wire, server="service"), "p99_by_p50", "median")
        return value

    return read


def _query_ms(net: str) -> Read:
    return lambda report: _best(report, "query", net, lambda row: float(row["p50_ms"]))


def _batch_us(net: str) -> Read:
    return lambda report: _best(report, "batch", net, lambda row: 1e3 * float(row["ms_per_sample"]["128"]))


def _best(report: Report, table: str, net: str, value: Callable[[Mapping[str, Any]], float]) -> float | None:
    return min((value(row) for row in _exact(report, table) if row["net"] == net), default=None)


def _exact(report: Report, table: str) -> list[Mapping[str, Any]]:
    """Return the rows of nets that run on the CPU in float32."""
    rows = _at(report, "nets", table) or ()
    return [row for row in rows if (row["device"], row["precision"]) == ("cpu", "float32")]


def _apart(report: Report) -> float | None:
    of_nets = [row["apart"] for row in _exact(report, "query")]
    of_service = [report[name]["apart"] for name in ("closed", "rows") if name in report]
    return max(of_nets + of_service, default=None)


def _tree(*path: str) -> Read:
    def read(report: Report) -> float | None:
        value: float | None = _at(report, *path)
        return value

    return read


def _retrieval(wire: str) -> Read:
    def read(report: Report) -> float | None:
        value: float | None = _at(_row(report.get("retrieval", ()), wire=wire), "ratio", "median")
        return value

    return read


def _mosec(wire: str, connections: int, limit: float) -> Target:
    name = f"{wire}, {connections} connection(s): throughput / mosec"
    return Target(name, ">=", limit, "x", _ratio("mosec", "per_second", wire, connections))


TARGETS = (
    Target("json, 32 connections: throughput / naive", ">=", 5.5, "x", _ratio("naive", "per_second", "json", 32)),
    Target("octet, 32 connections: throughput / naive", ">=", 8, "x", _ratio("naive", "per_second", "octet", 32)),
    Target("json, 1 connection: p50 / naive", "<=", 0.40, "x", _ratio("naive", "p50_ms", "json", 1)),
    Target("octet, 1 connection: p50 / naive", "<=", 0.40, "x", _ratio("naive", "p50_ms", "octet", 1)),
    *(_mosec(wire, n, limit) for wire in ("json", "octet") for n, limit in ((1, 5.0), (32, 2.0), (64, 2.0))),
    Target("64 rows per octet request", ">=", 40_000, "rows/s", _rows_per_second),
    Target("json, open loop at half capacity: p99 / p50", "<=", 5, "x", _open_loop("json")),
    Target("octet, open loop at half capacity: p99 / p50", "<=", 5, "x", _open_loop("octet")),
    Target("AMN on CPU, batch 1, p50", "<=", 0.10, "ms", _query_ms("amn")),
    Target("GRU on CPU, batch 1, p50", "<=", 1.0, "ms", _query_ms("gru")),
    Target("AMN on CPU, batch 128", "<=", 14, "us/row", _batch_us("amn")),
    Target("GRU on CPU, batch 128", "<=", 250, "us/row", _batch_us("gru")),
    Target("largest difference to torch's float32 answers", "<=", 1e-5, "", _apart),
    Target("KServe v2 JSON: difference to /predict", "<=", 1e-6, "", _tree("protocol", "kserve_json")),
    Target("Triton's HTTP client: difference to /predict", "<=", 1e-6, "", _tree("protocol", "triton_client")),
    Target("json, 1 connection: /retrieve p50 / /predict p50", "<=", 1.5, "x", _retrieval("json")),
    Target("octet, 1 connection: /retrieve p50 / /predict p50", "<=", 1.5, "x", _retrieval("octet")),
    Target("start to ready, files not cached", "<=", 5, "s", _tree("start", "cold_s", "median")),
    Target("resident memory at idle", "<=", 350, "MB", _tree("start", "rss_mb", "median")),
)
