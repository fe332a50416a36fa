"""What ships, with its own settings: seconds until ready, memory at idle, /retrieve beside /predict."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from time import sleep
from typing import Any

from bench.compare import WIRES
from bench.load import Workload, WrongAnswers, keep
from bench.machine import rss_mb
from bench.options import ROOT, SHIPPED, BenchOptions
from bench.servers import RunningServer, launched, service
from bench.stats import ratios, spread
from loadtest import contexts
from loadtest.payloads import Exchange, K
from loadtest.plan import Route
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry
from models.runtimes.torch import build_net, run_net

STARTS = 3
IDLE_S = 2.0
ROUTES: tuple[Route, ...] = ("predict", "retrieve")
# Large packages that the service does not load.
SPARED = ("torch", "nvidia", "sympy", "transformers")
LAUNCH = service(SHIPPED, "shipped")


def start(options: BenchOptions) -> dict[str, Any]:
    """Return seconds to the first 200 on /readyz, with files cached and not, and megabytes at idle."""
    found: dict[str, list[float]] = {"cold_s": [], "warm_s": [], "rss_mb": []}
    for _ in range(STARTS):
        evict((Path(sys.prefix), SHIPPED, ROOT / "service", ROOT / "models"))
        for name in ("cold_s", "warm_s"):
            with launched(LAUNCH, options.out / "logs") as server:
                found[name].append(server.ready_s)
                if name == "warm_s":
                    sleep(IDLE_S)
                    found["rss_mb"].append(rss_mb(server.pid))
    return {name: spread(values) for name, values in found.items()}


def retrieval(options: BenchOptions) -> list[dict[str, Any]]:
    """Return p50 (ms) of /predict and /retrieve at one connection, interleaved; raises `WrongAnswers`."""
    given = contexts.load()
    net = build_net(load_checkpoint(Registry(SHIPPED).resolve("primary").path))
    traffic = keep(options.out / "traffic" / "shipped", given, run_net(net, given))
    p50: dict[tuple[str, str], list[float]] = {}
    with launched(LAUNCH, options.out / "logs") as server:
        _check_passages(server)
        for _, wire, route in product(range(options.rounds), WIRES, ROUTES):
            workload = Workload(server, wire, traffic, route=route)
            workload.warm_up(1)
            p50.setdefault((route, wire), []).append(workload.measure(1, options.seconds)["p50_ms"])
    return [
        {
            "wire": wire,
            "predict_p50_ms": spread(p50["predict", wire]),
            "retrieve_p50_ms": spread(p50["retrieve", wire]),
            "ratio": ratios(p50["retrieve", wire], p50["predict", wire]),
        }
        for wire in WIRES
    ]


def _check_passages(server: RunningServer) -> None:
    context = contexts.load()[0]
    response = server.send(Exchange("retrieve", "json", 1, context.shape[1]), context)
    if len(response.json()["results"]) != K:
        raise WrongAnswers(f"{server.name}: /retrieve returned other than {K} passages")


def evict(roots: Iterable[Path]) -> None:
    """Ask the kernel to drop the files below `roots` from its cache; it keeps those that a process maps. Linux only."""
    if sys.platform != "linux":
        return
    for path in (path for root in roots for path in root.rglob("*")):
        if path.is_file() and not any(part in SPARED for part in path.parts):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
