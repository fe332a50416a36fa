"""The service beside its rivals and the echo, AMN, in interleaved rounds: closed loop, one row and many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np

from bench import stages
from bench.figures import ratios, spread
from bench.load import generator, measure, warm_up
from bench.peers.echo import constant
from bench.plan import Plan
from bench.servers import ECHO, SERVICE, Server
from bench.traffic import Traffic, exchange_of, prepare
from bench.versions import draw
from loadtest.plan import Wire
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry
from models.runtimes.torch import build_net, run_net
from models.vectors import Floats

CONNECTIONS = (1, 8, 32, 64)
WIRES: tuple[Wire, ...] = ("json", "octet")
MANY, MANY_CONNECTIONS = 64, (1, 8)
CONTEXTS = 64
COMPARED = {"per_second": max, "p50_ms": min, "p99_ms": min}
FIGURES = ("per_second", "mean_ms", "p50_ms", "p95_ms", "p99_ms")
Cell = tuple[Wire, int, int]  # wire, rows in a request, connections
Measurement = dict[str, Any]


def closed_loop(plan: Plan, registry: Registry, servers: Sequence[Server]) -> dict[str, Any]:
    """Measure one row in a request, on both wires, at 1 to 64 connections; raises `WrongAnswers`."""
    cells = [(wire, 1, connections) for wire, connections in product(WIRES, CONNECTIONS)]
    return _report(_interleaved(plan, registry, servers, cells))


def many_rows(plan: Plan, registry: Registry, servers: Sequence[Server]) -> dict[str, Any]:
    """Measure 64 rows in an octet request; raises `WrongAnswers`."""
    cells: list[Cell] = [("octet", MANY, connections) for connections in MANY_CONNECTIONS]
    return _report(_interleaved(plan, registry, servers, cells))


def _interleaved(plan: Plan, registry: Registry, servers: Sequence[Server], cells: Sequence[Cell]) -> list[Measurement]:
    contexts = draw(CONTEXTS, plan.dim)
    right = run_net(build_net(load_checkpoint(registry.resolve("primary").path)), contexts)
    sent = {
        (server.name, wire, rows): _traffic(plan.out / "traffic", server, wire, rows, contexts, right)
        for server in servers
        for wire, rows in dict.fromkeys((wire, rows) for wire, rows, _ in cells)
    }
    order = product(range(plan.rounds), cells, servers)
    return [_one(plan, n, cell, server, sent[server.name, cell[0], cell[1]]) for n, cell, server in order]


def _traffic(directory: Path, server: Server, wire: Wire, rows: int, contexts: Floats, right: Floats) -> Traffic:
    if server.name == ECHO:
        right = np.tile(constant(right.shape[1]), (len(contexts), 1))
    return prepare(directory, server, exchange_of(wire, right.shape[1], rows), contexts, right)


def _one(plan: Plan, number: int, cell: Cell, server: Server, traffic: Traffic) -> Measurement:
    wire, rows, connections = cell
    known = warm_up(server, traffic, connections)
    is_ours = server.name == SERVICE
    before = stages.scrape(server.url) if is_ours else {}
    figures = measure(server, traffic, connections, plan.seconds)
    spent = stages.between(before, stages.scrape(server.url), figures["mean_ms"]) if is_ours else {}
    named = {"round": number, "server": server.name, "wire": wire, "rows": rows, "connections": connections}
    return {**named, **figures, "apart": known["apart"], "stages": spent}


def _report(measurements: Sequence[Measurement]) -> dict[str, Any]:
    cells = dict.fromkeys((one["wire"], one["rows"], one["connections"]) for one in measurements)
    return {
        "generator": generator(),
        "apart": max(one["apart"] for one in measurements if one["server"] != ECHO),
        "cells": [compare(cell, measurements) for cell in cells],
        "stages": stages.table(measurements),
        "measurements": list(measurements),
    }


def compare(cell: Cell, measurements: Iterable[Measurement]) -> dict[str, Any]:
    """Return every server's figures in one cell, and the service's as ratios to every rival's.

    The naive app runs as people write it and tuned (one thread of torch, endpoints in the event loop), mosec
    with batches and without; whichever variant is better in this figure is the rival, so that it is the strongest.
    """
    wire, rows, connections = cell
    here = [one for one in measurements if (one["wire"], one["rows"], one["connections"]) == cell]
    servers = by_server(here)
    strongest = {rival: _strongest({name: servers[name] for name in names}) for rival, names in _rivals(servers)}
    return {
        "wire": wire,
        "rows": rows,
        "connections": connections,
        "servers": {name: {figure: spread(values[figure]) for figure in FIGURES} for name, values in servers.items()},
        "strongest": strongest,
        "ratios": {
            rival: {name: ratios(servers[SERVICE][name], servers[peer][name]) for name, peer in best.items()}
            for rival, best in strongest.items()
        },
    }


def by_server(measurements: Iterable[Measurement]) -> dict[str, dict[str, list[float]]]:
    """Return every figure's values by server, in the order of rounds."""
    found: dict[str, dict[str, list[float]]] = {}
    for one in measurements:
        for figure in FIGURES:
            found.setdefault(one["server"], {}).setdefault(figure, []).append(one[figure])
    return found


def _rivals(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield every rival with its variants, which have its name and, after a comma, their own."""
    others = sorted(name for name in names if name != SERVICE)
    for rival, variants in groupby(others, lambda name: name.partition(", ")[0]):
        yield rival, list(variants)


def _strongest(variants: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, str]:
    """Return which variant has the best median of every figure that is compared."""
    return {
        figure: better(variants, key=lambda name: spread(variants[name][figure])["median"])
        for figure, better in COMPARED.items()
    }
