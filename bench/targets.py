"""What the reports have to show: every target as data, and how its value is found in the figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loadtest.tables import Figures, Step, at

Find = Callable[[Figures], float | None]


@dataclass(frozen=True)
class Target:
    """A figure, the limit that it must reach or not exceed, its unit, and how to find it (None: not measured)."""

    name: str
    sense: Literal[">=", "<="]
    limit: float
    unit: str
    find: Find

    def judge(self, figures: Figures) -> dict[str, Any]:
        """Return the target as a row of the report."""
        value = self.find(figures)
        named = {"name": self.name, "sense": self.sense, "limit": self.limit, "unit": self.unit}
        return {**named, "value": value, "is_met": None if value is None else self._is_met(value)}

    def _is_met(self, value: float) -> bool:
        return value >= self.limit if self.sense == ">=" else value <= self.limit


def number_at(*path: Step) -> Find:
    """Return a function that finds the number at the end of a path."""

    def find(figures: Figures) -> float | None:
        value = at(figures, *path)
        return None if value is None else float(value)

    return find


def _ratio(peer: str, figure: str, wire: str, connections: int) -> Find:
    cell = {"wire": wire, "connections": connections}
    return number_at("closed", "cells", cell, "ratios", peer, figure, "median")


def _p99_by_p50(wire: str) -> Find:
    return number_at("open", {"wire": wire, "server": "service"}, "p99_by_p50", "median")


def _retrieval(wire: str) -> Find:
    return number_at("retrieval", {"wire": wire}, "ratio", "median")


def _rows_per_second(figures: Figures) -> float | None:
    cells = at(figures, "rows", "cells") or ()
    return max((cell["rows"] * cell["servers"]["service"]["per_second"]["median"] for cell in cells), default=None)


def _exact(figures: Figures, table: str) -> Sequence[Figures]:
    """Return the rows of nets that run on the CPU in float32."""
    rows = at(figures, "nets", table) or ()
    return [row for row in rows if (row["device"], row["precision"]) == ("cpu", "float32")]


def _best(table: str, net: str, value: Callable[[Figures], float]) -> Find:
    return lambda figures: min((value(row) for row in _exact(figures, table) if row["net"] == net), default=None)


def _query_ms(row: Figures) -> float:
    return float(row["p50_ms"])


def _batch_us(row: Figures) -> float:
    return 1e3 * float(row["ms_per_sample"]["128"])


def _apart(figures: Figures) -> float | None:
    of_nets = [row["apart"] for row in _exact(figures, "query")]
    of_service = [figures[name]["apart"] for name in ("closed", "rows") if name in figures]
    return max(of_nets + of_service, default=None)


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
    Target("json, open loop at half capacity: p99 / p50", "<=", 5, "x", _p99_by_p50("json")),
    Target("octet, open loop at half capacity: p99 / p50", "<=", 5, "x", _p99_by_p50("octet")),
    Target("AMN on CPU, batch 1, p50", "<=", 0.10, "ms", _best("query", "amn", _query_ms)),
    Target("GRU on CPU, batch 1, p50", "<=", 1.0, "ms", _best("query", "gru", _query_ms)),
    Target("AMN on CPU, batch 128", "<=", 14, "us/row", _best("batch", "amn", _batch_us)),
    Target("GRU on CPU, batch 128", "<=", 250, "us/row", _best("batch", "gru", _batch_us)),
    Target("largest difference to torch's float32 answers", "<=", 1e-5, "", _apart),
    Target("KServe v2 JSON: difference to /predict", "<=", 1e-6, "", number_at("protocol", "kserve_json")),
    Target("Triton's HTTP client: difference to /predict", "<=", 1e-6, "", number_at("protocol", "triton_client")),
    Target("json, 1 connection: /retrieve p50 / /predict p50", "<=", 1.5, "x", _retrieval("json")),
    Target("octet, 1 connection: /retrieve p50 / /predict p50", "<=", 1.5, "x", _retrieval("octet")),
    Target("start to ready, files not cached", "<=", 5, "s", number_at("start", "cold_s", "median")),
    Target("resident memory at idle", "<=", 350, "MB", number_at("start", "rss_mb", "median")),
)
