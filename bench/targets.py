"""What the reports have to show: every target as data, and how its value is found in the figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loadtest.tables import Figures, Step, at

# The path to a figure, or a function that finds it; None: it was not measured.
Path = tuple[Step, ...]
Find = Callable[[Figures], float | None]
WIRES = ("json", "octet")


@dataclass(frozen=True)
class Target:
    """A figure, the limit that it must reach or not exceed, its unit, and where to find it."""

    name: str
    sense: Literal[">=", "<="]
    limit: float
    unit: str
    where: Path | Find

    def judge(self, figures: Figures) -> dict[str, Any]:
        """Return the target as a row of the report."""
        found = self.where(figures) if callable(self.where) else at(figures, *self.where)
        value = None if found is None else float(found)
        named = {"name": self.name, "sense": self.sense, "limit": self.limit, "unit": self.unit}
        return {**named, "value": value, "is_met": None if value is None else self._is_met(value)}

    def _is_met(self, value: float) -> bool:
        return value >= self.limit if self.sense == ">=" else value <= self.limit


def _ratio(peer: str, figure: str, wire: str, connections: int) -> Path:
    cell = {"wire": wire, "connections": connections}
    return "closed", "cells", cell, "ratios", peer, figure, "median"


def _rows_per_second(figures: Figures) -> float | None:
    cells = at(figures, "rows", "cells") or ()
    rates = [cell["rows"] * cell["servers"]["service"]["per_second"]["median"] for cell in cells]
    return max(rates, default=None)


def _exact(figures: Figures, table: str) -> Sequence[Figures]:
    """Return the rows of nets that run on the CPU in float32."""
    rows = at(figures, "nets", table) or ()
    return [row for row in rows if (row["device"], row["precision"]) == ("cpu", "float32")]


def _least(table: str, net: str, *path: str, scale: float = 1.0) -> Find:
    def find(figures: Figures) -> float | None:
        rows = [row for row in _exact(figures, table) if row["net"] == net]
        return min((scale * at(row, *path) for row in rows), default=None)

    return find


def _apart(figures: Figures) -> float | None:
    of_nets = [row["apart"] for row in _exact(figures, "query")]
    of_service = [figures[name]["apart"] for name in ("closed", "rows") if name in figures]
    return max(of_nets + of_service, default=None)


TARGETS = (
    Target("json, 32 connections: throughput / naive", ">=", 5.5, "x", _ratio("naive", "per_second", "json", 32)),
    Target("octet, 32 connections: throughput / naive", ">=", 8, "x", _ratio("naive", "per_second", "octet", 32)),
    Target("json, 1 connection: p50 / naive", "<=", 0.40, "x", _ratio("naive", "p50_ms", "json", 1)),
    Target("octet, 1 connection: p50 / naive", "<=", 0.40, "x", _ratio("naive", "p50_ms", "octet", 1)),
    *(
        Target(f"{wire}, {n} connection(s): throughput / bare", ">=", 0.9, "x", _ratio("bare", "per_second", wire, n))
        for wire in WIRES
        for n in (1, 8, 32)
    ),
    *(
        Target(f"{wire}, {n} connection(s): throughput / mosec", ">=", limit, "x",
               _ratio("mosec", "per_second", wire, n))
        for wire in WIRES
        for n, limit in ((1, 5.0), (32, 2.0), (64, 2.0))
    ),
    Target("64 rows per octet request", ">=", 40_000, "rows/s", _rows_per_second),
    *(
        Target(f"{wire}, open loop at half capacity: p99 / p50", "<=", 5, "x",
               ("open", {"wire": wire, "server": "service"}, "p99_by_p50", "median"))
        for wire in WIRES
    ),
    Target("AMN on CPU, batch 1, p50", "<=", 0.10, "ms", _least("query", "amn", "p50_ms")),
    Target("GRU on CPU, batch 1, p50", "<=", 1.0, "ms", _least("query", "gru", "p50_ms")),
    Target("AMN on CPU, batch 128", "<=", 14, "us/row", _least("batch", "amn", "ms_per_sample", "128", scale=1e3)),
    Target("GRU on CPU, batch 128", "<=", 250, "us/row", _least("batch", "gru", "ms_per_sample", "128", scale=1e3)),
    Target("largest difference to torch's float32 answers", "<=", 1e-5, "", _apart),
    Target("KServe v2 JSON: difference to /predict", "<=", 1e-6, "", ("protocol", "kserve_json")),
    Target("Triton's HTTP client: difference to /predict", "<=", 1e-6, "", ("protocol", "triton_client")),
    *(
        Target(f"{wire}, 1 connection: /retrieve p50 / /predict p50", "<=", 1.5, "x",
               ("retrieval", {"wire": wire}, "ratio", "median"))
        for wire in WIRES
    ),
    Target("start to ready, files not cached", "<=", 5, "s", ("start", "cold_s", "median")),
    Target("resident memory at idle", "<=", 350, "MB", ("start", "rss_mb", "median")),
)  # fmt: skip
