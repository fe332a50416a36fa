"""The service beside other servers and the echo, AMN, in interleaved rounds: closed loops, and an open one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, product
from typing import Any

import numpy as np

from bench import metrics
from bench.load import Workload, generator, keep
from bench.options import BenchOptions
from bench.peers.echo import constant
from bench.servers import ECHO, SERVICE, RunningServer
from bench.stats import ratios, spread
from bench.untrained import draw_contexts
from loadtest.plan import Wire
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry
from models.runtimes.torch import build_net, run_net

CONNECTIONS = (1, 8, 32, 64)
WIRES: tuple[Wire, ...] = ("json", "octet")
MANY, MANY_CONNECTIONS = 64, (1, 8)
CONTEXTS = 64
COMPARED = {"per_second": max, "p50_ms": min, "p99_ms": min}
FIGURES = ("per_second", "mean_ms", "p50_ms", "p95_ms", "p99_ms")
# The open loop: a share of the throughput of the closed one at so many connections.
OPEN_SHARE, OPEN_CONNECTIONS = 0.5, 32
OPEN_FIGURES = ("rate", "p50_ms", "p99_ms", "p99_by_p50", "lag_p99_ms")
# Wire, rows in a request, connections.
Cell = tuple[Wire, int, int]
Measurement = dict[str, Any]


def closed_loop(options: BenchOptions, registry: Registry, servers: Sequence[RunningServer]) -> dict[str, Any]:
    """Measure one row in a request, on both wires, at 1 to 64 connections; raises `WrongAnswers`."""
    cells = [(wire, 1, connections) for wire, connections in product(WIRES, CONNECTIONS)]
    return _report(_interleaved(options, registry, servers, cells))


def many_rows(options: BenchOptions, registry: Registry, servers: Sequence[RunningServer]) -> dict[str, Any]:
    """Measure 64 rows in an octet request; raises `WrongAnswers`."""
    cells: list[Cell] = [("octet", MANY, connections) for connections in MANY_CONNECTIONS]
    return _report(_interleaved(options, registry, servers, cells))


def open_loop(
    options: BenchOptions, closed: Mapping[str, Any], servers: Sequence[RunningServer]
) -> list[dict[str, Any]]:
    """Measure the service and the stronger naive app, each at half its own throughput; raises `WrongAnswers`."""
    traffic = keep(options.out / "traffic" / "open", draw_contexts(CONTEXTS, options.dim))
    cells = [cell for cell in closed["cells"] if cell["connections"] == OPEN_CONNECTIONS]
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _, cell, server in product(range(options.rounds), cells, servers):
        if server.name in (SERVICE, cell["strongest"]["naive"]["per_second"]):
            rate = OPEN_SHARE * cell["servers"][server.name]["per_second"]["median"]
            figures = _at_rate(Workload(server, cell["wire"], traffic), rate, options.seconds)
            rows.setdefault((cell["wire"], server.name), []).append(figures)
    return [
        {"wire": wire, "server": name} | {figure: spread(one[figure] for one in rounds) for figure in OPEN_FIGURES}
        for (wire, name), rounds in rows.items()
    ]


def compare(cell: Cell, measurements: Iterable[Measurement]) -> dict[str, Any]:
    """Return every server's figures in one cell, and the service's as ratios to every peer's.

    The naive app runs as people write it and tuned (one thread of torch, endpoints in the event loop), mosec
    with batches and without; in every figure the service is compared with the best variant of a peer.
    """
    wire, rows, connections = cell
    servers = by_server(one for one in measurements if (one["wire"], one["rows"], one["connections"]) == cell)
    strongest = {peer: _strongest({name: servers[name] for name in names}) for peer, names in _peers(servers)}
    return {
        "wire": wire,
        "rows": rows,
        "connections": connections,
        "servers": {name: {figure: spread(values[figure]) for figure in FIGURES} for name, values in servers.items()},
        "strongest": strongest,
        "ratios": {
            peer: {figure: ratios(servers[SERVICE][figure], servers[name][figure]) for figure, name in best.items()}
            for peer, best in strongest.items()
        },
    }


def by_server(measurements: Iterable[Measurement]) -> dict[str, dict[str, list[float]]]:
    """Return every figure's values by server, in the order of rounds."""
    found: dict[str, dict[str, list[float]]] = {}
    for one in measurements:
        for figure in FIGURES:
            found.setdefault(one["server"], {}).setdefault(figure, []).append(one[figure])
    return found


def _interleaved(
    options: BenchOptions, registry: Registry, servers: Sequence[RunningServer], cells: Sequence[Cell]
) -> list[Measurement]:
    given = draw_contexts(CONTEXTS, options.dim)
    right = run_net(build_net(load_checkpoint(registry.resolve("primary").path)), given)
    traffic = keep(options.out / "traffic", given, right)
    echoed = keep(options.out / "traffic" / "echo", given, np.tile(constant(options.dim), (CONTEXTS, 1)))
    found = []
    for number, (wire, rows, connections), server in product(range(options.rounds), cells, servers):
        workload = Workload(server, wire, echoed if server.name == ECHO else traffic, rows)
        named = {"round": number, "server": server.name, "wire": wire, "rows": rows, "connections": connections}
        found.append(named | _measure(workload, connections, options.seconds))
    return found


def _measure(workload: Workload, connections: int, seconds: float) -> Measurement:
    apart = workload.warm_up(connections)
    if workload.server.name != SERVICE:
        return {**workload.measure(connections, seconds), "apart": apart, "stages": {}}
    url = workload.server.url
    before = metrics.counters(url)
    figures = workload.measure(connections, seconds)
    stages = metrics.stages(metrics.growth(before, metrics.counters(url)), figures["mean_ms"])
    return {**figures, "apart": apart, "stages": stages}


def _at_rate(workload: Workload, rate: float, seconds: float) -> dict[str, float]:
    found = workload.run(rate=f"{rate:.1f}", seconds=seconds, warmup=1, timeout=10)
    p50, p99 = (found["latency_ms"][name] for name in ("p50", "p99"))
    lag = found["generator_lag_ms"]["p99"]
    return {"rate": rate, "p50_ms": p50, "p99_ms": p99, "p99_by_p50": p99 / p50, "lag_p99_ms": lag}


def _report(measurements: Sequence[Measurement]) -> dict[str, Any]:
    cells = dict.fromkeys((one["wire"], one["rows"], one["connections"]) for one in measurements)
    return {
        "generator": generator(),
        "apart": max(one["apart"] for one in measurements if one["server"] != ECHO),
        "cells": [compare(cell, measurements) for cell in cells],
        "stages": metrics.stage_table(measurements),
        "measurements": list(measurements),
    }


def _peers(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield every peer with its variants, which have its name and, after a comma, their own."""
    others = sorted(name for name in names if name != SERVICE)
    for peer, variants in groupby(others, lambda name: name.partition(", ")[0]):
        yield peer, list(variants)


def _strongest(variants: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, str]:
    """Return which variant has the best median of every figure that is compared."""
    return {
        figure: better(variants, key=lambda name: spread(variants[name][figure])["median"])
        for figure, better in COMPARED.items()
    }
