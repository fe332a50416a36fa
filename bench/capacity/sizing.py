"""From a rate and an objective to workers, machines, memory and shards of the index."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

from bench.capacity.costs import BadCosts, Costs, Line, SearchCosts
from bench.capacity.knee import NoKnee, knee, simulate, worker_of
from bench.capacity.simulation import Worker
from loadtest import contexts
from loadtest.payloads import Exchange
from loadtest.plan import Wire
from models.runtimes.inline import MAX_INLINE_S

# Fraction of the knee that is planned for, as in docs/operations.md.
LOAD = 0.7
# Machines more, so that one may be away.
SPARE = 1
# The net that is loaded beside the one that answers.
FALLBACK = "gru"
# `lvm corpus` makes an approximate index of more vectors.
EXACT = 25_000
# Seconds of simulated time for the latency at the planned load.
LOOK_S = 20.0
SHARDS = tuple(2**power for power in range(15))


@dataclass(frozen=True)
class Demand:
    """The load to plan for: requests per second, p99 in milliseconds, contexts of a request, and the machines."""

    rate: float
    p99_ms: float
    net: str = "amn"
    wire: Wire = "octet"
    rows: int = 1
    vectors: int = 0
    cores: int = 2
    memory_gb: float = 8.0


class Tier(NamedTuple):
    """Machines of one kind: processes of one core each, in requests per second, machines with the spare one."""

    knee: float
    per_worker: float
    workers: int
    per_machine: int
    machines: int
    worker_mb: float


def plan(costs: Costs, demand: Demand) -> dict[str, Any]:
    """Return the plan for a demand.

    Raises:
        BadCosts: the net, the wire or searching was not measured, or a worker needs more than a machine has.
        NoKnee: the p99 limit is below the time of a single request on an idle worker.
    """
    worker = worker_of(costs, demand.net, demand.wire, demand.rows)
    weights = [costs.nets[name].mb for name in {demand.net, FALLBACK} & costs.nets.keys()]
    tier = _tier(worker, demand, demand.p99_ms, costs.process_mb + sum(weights))
    at_load = simulate(worker, demand.rate / tier.workers, LOOK_S)
    return {
        "demand": vars(demand),
        "serving": tier._asdict(),
        "latency_ms": {f"p{percentile}": at_load.p_ms(percentile) for percentile in (50, 95, 99)},
        "limits": _limits(costs, demand, worker),
        "index": _index(costs, demand) if demand.vectors else None,
        "costs": {"machine": costs.machine["processor"], "date": costs.machine["date"], "command": costs.command},
    }


def _tier(worker: Worker, demand: Demand, p99_ms: float, worker_mb: float, copies: int = 1) -> Tier:
    """Return the machines that carry the rate `copies` times over."""
    per_machine = min(demand.cores, int(demand.memory_gb * 1e3 / worker_mb))
    if not per_machine:
        raise BadCosts(f"a worker needs {worker_mb / 1e3:.1f} GB, a machine has {demand.memory_gb:g}")
    found = knee(worker, p99_ms)
    workers = copies * ceil(demand.rate / (LOAD * found))
    return Tier(found, LOAD * found, workers, per_machine, ceil(workers / per_machine) + SPARE, worker_mb)


def _limits(costs: Costs, demand: Demand, worker: Worker) -> dict[str, Any]:
    """Return what limits a worker, what an accelerator could save at most, and the traffic."""
    loop_s = worker.read_s + worker.answer_s
    net_s = 1 / worker.most_per_second - loop_s
    known = costs.nets[demand.net]
    exchange = Exchange("predict", demand.wire, demand.rows, known.dim)
    size = len(exchange.bodies(contexts.load()[:1])[0])
    return {
        "event_loop_us": loop_s * 1e6,
        "net_us": net_s * 1e6,
        "what": "the event loop" if loop_s > net_s else "the net",
        "workers_if_the_net_took_no_time": ceil(demand.rate * loop_s / LOAD),
        "traffic_in_gbit": demand.rate * size * 8 / 1e9,
    }


def _index(costs: Costs, demand: Demand) -> dict[str, Any]:
    """Return the shards of the index, so many that the fewest machines search them."""
    if costs.search is None:
        raise BadCosts("searching was not measured")
    shards, tier = _sharded(costs, costs.search, demand)
    rows = ceil(demand.vectors / shards)
    return {
        "kind": _kind(rows),
        "shards": shards,
        "vectors_per_shard": rows,
        "search_ms": _query_s(costs.search, rows) * 1e3,
        "is_extrapolated": rows > max(costs.search.measured),
        **tier._asdict(),
        "disk_gb_per_machine": 1e-9 * rows * costs.search.disk_bytes,
        "raw_gb": 4e-9 * demand.vectors * costs.search.dim,
    }


def _sharded(costs: Costs, search: SearchCosts, demand: Demand) -> tuple[int, Tier]:
    """Return the number of shards that needs the fewest machines: more are tried as long as that helps."""
    best: tuple[int, Tier] | None = None
    for shards in SHARDS:
        try:
            worker, worker_mb = _searcher(costs, search, demand, shards)
            tier = _tier(worker, demand, demand.p99_ms / 2, worker_mb, shards)
        except (BadCosts, NoKnee):
            # Too large, or too slow.
            continue
        if best and tier.workers / tier.per_machine >= best[1].workers / best[1].per_machine:
            break
        best = shards, tier
    if best is None:
        raise BadCosts("no machine of that memory holds a shard, or none searches it in time")
    return best


def _searcher(costs: Costs, search: SearchCosts, demand: Demand, shards: int) -> tuple[Worker, float]:
    """Return a worker that searches one of so many shards, and its megabytes.

    Every shard sees every request, and the slowest decides: a request is late once in 100 times if a shard is once
    in 100 / `shards` (Dean and Barroso, 2013). A short simulation does not see so far; instead, a shard has half of the
    request's time.
    """
    rows = ceil(demand.vectors / shards)
    each = search.exact_bytes if _kind(rows) == "exact" else search.approximate_bytes
    half_s = search.request_s / 2
    search_s = _query_s(search, rows)
    worker = Worker(1, half_s, half_s, Line(0.0, search_s), is_inline=search_s <= MAX_INLINE_S)
    return worker, costs.process_mb + 1e-6 * rows * each


def _kind(rows: int) -> str:
    return "exact" if rows <= EXACT else "approximate"


def _query_s(search: SearchCosts, rows: int) -> float:
    return search.exact.at(rows) if _kind(rows) == "exact" else search.approximate.at(rows**0.5)
