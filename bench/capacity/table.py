"""Tables of plans and of checks, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from bench.capacity.sizing import LOAD, SPARE
from loadtest.tables import Figures


def of_plan(found: Figures) -> list[tuple[str, str, str]]:
    """Return a plan as rows: the quantity, its value, and the reason."""
    demand = found["demand"]
    serving = found["serving"]
    limits = found["limits"]
    times = ", ".join(f"{name} {value:.1f} ms" for name, value in found["latency_ms"].items())
    fewest = limits["workers_if_the_net_took_no_time"]
    rows = [
        ("knee of a worker", f"{serving['knee']:,.0f}/s", f"p99 {demand['p99_ms']:g} ms, errors below 0.1 %, one core"),
        ("planned for", f"{serving['per_worker']:,.0f}/s", f"{LOAD} of the knee: {times}"),
        ("workers", f"{serving['workers']:,}", f"for {demand['rate']:,.0f}/s"),
        ("machines", f"{serving['machines']:,}",
         f"of {demand['cores']} cores, {serving['per_machine']} workers; {SPARE} to spare"),
        ("memory of a machine", f"{_gb(serving):.1f} GB", f"{serving['worker_mb']:.0f} MB a worker"),
        ("limited by", limits["what"],
         f"{limits['event_loop_us']:.0f} us there, {limits['net_us']:.0f} us in the net, per request"),
        ("GPUs", "not measured", f"a net that took no time would leave {fewest:,} workers at least"),
        ("traffic in", f"{limits['traffic_in_gbit']:.3g} Gbit/s", f"{demand['rows']} contexts by {demand['wire']}"),
    ]  # fmt: skip
    return rows + (_index_rows(found["index"], demand) if found["index"] else [])


def _index_rows(index: Figures, demand: Figures) -> list[tuple[str, str, str]]:
    beyond = ", extrapolated" if index["is_extrapolated"] else ""
    nodes = ceil(index["raw_gb"] / demand["memory_gb"])
    return [
        ("index shards", f"{index['shards']:,}", f"{index['kind']}, {index['vectors_per_shard']:,} vectors each"),
        ("search of a shard", f"{index['search_ms']:.3g} ms", f"of a core{beyond}"),
        ("search workers", f"{index['workers']:,}",
         f"{index['per_worker']:,.0f}/s each; every shard sees every request"),
        ("search machines", f"{index['machines']:,}", f"{index['per_machine']} workers; {SPARE} to spare"),
        ("memory of one", f"{_gb(index):.1f} GB",
         f"and {index['disk_gb_per_machine']:.1f} GB of disk, cached as memory allows"),
        ("Milvus instead", f"{nodes:,} nodes",
         f"at least, for {index['raw_gb']:,.0f} GB of raw vectors; its speed is not measured"),
    ]  # fmt: skip


def _gb(tier: Figures) -> float:
    return float(tier["per_machine"] * tier["worker_mb"]) / 1e3


def of_checks(rows: Sequence[Figures]) -> str:
    """Return the rows of `check` as text."""
    head = "net   rows  p99 ms  predicted/s (before, after)  measured/s  ratio  core left by others  ratio for that"
    return "\n".join([head, *map(_check_row, rows)])


def _check_row(row: Figures) -> str:
    before, after = row["predictions"]
    mark = "" if row["is_met"] else "  beyond 15 %"
    return (
        f"{row['net']:<6}{row['rows']:>4}{row['p99_ms']:>8g}{before:>15.1f} {after:>12.1f}{row['measured']:>12.1f}"
        f"{row['ratio']:>7.2f}{row['free']:>20.0%}{row['ratio_free']:>16.2f}{mark}"
    )
