"""What ships, as a stranger starts it: seconds until ready, memory at idle, /retrieve beside /predict."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from time import sleep
from typing import Any

from bench.figures import ratios, spread
from bench.load import measure, warm_up
from bench.plan import ROOT, SHIPPED, Plan
from bench.servers import Server, launched, rss_mb, service
from bench.traffic import Traffic, exchange_of, prepare
from loadtest import contexts
from loadtest.plan import Route, Wire
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry
from models.runtimes.torch import build_net, run_net

STARTS = 3
IDLE_S = 2.0
ROUTES: tuple[Route, ...] = ("predict", "retrieve")
WIRES: tuple[Wire, ...] = ("json", "octet")
SPARED = ("torch", "nvidia", "sympy", "transformers")  # large, and not the service's


def start(plan: Plan) -> dict[str, Any]:
    """Return seconds to the first 200 on /readyz, with files cached and not, and megabytes at idle."""
    found: dict[str, list[float]] = {"cold_s": [], "warm_s": [], "rss_mb": []}
    for _ in range(STARTS):
        evict((Path(sys.prefix), SHIPPED, ROOT / "service", ROOT / "models"))
        found["cold_s"].append(_started(plan).ready_s)
        with launched(service(SHIPPED, "shipped"), plan.out / "logs") as server:
            found["warm_s"].append(server.ready_s)
            sleep(IDLE_S)
            found["rss_mb"].append(rss_mb(server.pid))
    return {name: spread(values) for name, values in found.items()}


def retrieval(plan: Plan) -> list[dict[str, Any]]:
    """Return p50 (ms) of /predict and /retrieve at one connection, interleaved; raises `WrongAnswers`."""
    with launched(service(SHIPPED, "shipped"), plan.out / "logs") as server:
        sent = {(route, wire): _traffic(plan, server, route, wire) for route, wire in product(ROUTES, WIRES)}
        p50: dict[tuple[Route, Wire], list[float]] = {key: [] for key in sent}
        for _, wire, route in product(range(plan.rounds), WIRES, ROUTES):
            warm_up(server, sent[route, wire], 1)
            p50[route, wire].append(measure(server, sent[route, wire], 1, plan.seconds)["p50_ms"])
    return [
        {
            "wire": wire,
            "predict_p50_ms": spread(p50["predict", wire]),
            "retrieve_p50_ms": spread(p50["retrieve", wire]),
            "ratio": ratios(p50["retrieve", wire], p50["predict", wire]),
        }
        for wire in WIRES
    ]


def evict(roots: Iterable[Path]) -> None:
    """Ask the kernel to forget the files below `roots`; it keeps what some process has mapped. Linux only."""
    if sys.platform != "linux":
        return
    for path in (path for root in roots for path in root.rglob("*")):
        if path.is_file() and not any(part in SPARED for part in path.parts):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _started(plan: Plan) -> Server:
    with launched(service(SHIPPED, "shipped"), plan.out / "logs") as server:
        return server


def _traffic(plan: Plan, server: Server, route: Route, wire: Wire) -> Traffic:
    sent = contexts.load()
    exchange = exchange_of(wire, sent.shape[2], route=route)
    if route == "retrieve":
        return prepare(plan.out / "traffic", server, exchange, sent)
    net = build_net(load_checkpoint(Registry(SHIPPED).resolve("primary").path))
    return prepare(plan.out / "traffic", server, exchange, sent, run_net(net, sent))
