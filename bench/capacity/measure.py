"""The cost model of this machine: nets alone on a core, then the service, pinned to one, under load.

Closed loops show how large batches pay, but not what a request costs: their connections are few and their requests come
in bunches, so that much is done once for many and what is needed lies in the caches. Requests are therefore charged by
what they take in an open loop, at a share of the rate of the closed one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np

from bench import machine, metrics
from bench.capacity import retrieval_costs
from bench.capacity.costs import Costs, Curve, Line, NetCosts
from bench.compare import WIRES
from bench.contract import harness
from bench.load import CHECK_EVERY, Workload, keep
from bench.machine import processor_s, rss_mb
from bench.nets import RunMode, loading
from bench.options import SHIPPED
from bench.servers import Launch, RunningServer, launched
from loadtest import contexts
from loadtest.plan import Wire
from models.predictor import Predictor, load_predictor
from models.registry.registry import Registry, Version

NETS = ("amn", "gru", "gmn")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
REPEATS = 15
# Rows of a request and connections: small batches, of one request each.
ALONE = ((1, 1), (8, 1))
# Large batches, and an event loop that is kept busy.
TOGETHER = ((1, 32), (8, 16), (32, 8))
# Of the rate of the latter, in an open loop: four fifths of what it holds.
SHARE = 0.6
ALIASES = ("primary", "fallback")


def registry_of(out: Path, name: str) -> tuple[Registry, Version]:
    """Return a registry of one net that ships, which has both aliases, and its version."""
    shipped = next(version for version in Registry(SHIPPED).versions() if version.name == name)
    root = out / f"registry-{name}"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(shipped.path, root / shipped.path.relative_to(SHIPPED))
    registry = Registry(root)
    version = registry.find(shipped.id)
    for alias in ALIASES:
        registry.point(alias, version, why="to be measured")
    return registry, version


def launch_unlimited(registry: Registry) -> Launch:
    """Return how to start the service on its core; it admits all that the closed loops send, and has time for it."""
    return harness.launch(registry.root).having(LVM_CONCURRENCY="2048", LVM_TIMEOUT_MS="60000")


def costs(
    out: Path,
    names: Iterable[str] = NETS,
    wires: Sequence[Wire] = WIRES,
    seconds: float = 1.5,
    with_search: bool = False,
) -> Costs:
    """Return the costs of nets that ship and of requests for them on `wires`, from closed loops of `seconds` each."""
    nets = {}
    rest_mb = []
    for name in names:
        registry, version = registry_of(out, name)
        net = load_predictor(version.path, "cpu", threads=1)
        net.warm_up(BATCHES[-1])
        weight_mb = loading(version.path, RunMode("onnxruntime", "cpu", 1))["grown_mb"]
        with launched(launch_unlimited(registry), out / "logs") as server:
            nets[name] = _net(out, server, net, weight_mb, wires, seconds)
            rest_mb.append(rss_mb(server.pid) - len(ALIASES) * weight_mb)
    found = retrieval_costs.measure_retrieval(out, seconds) if with_search else None
    command = f"python -m bench.capacity measure --nets {' '.join(nets)} --seconds {seconds:g}"
    return Costs(machine.describe(), command, median(rest_mb), nets, found)


def _net(
    out: Path, server: RunningServer, net: Predictor, weight_mb: float, wires: Sequence[Wire], seconds: float
) -> NetCosts:
    given = contexts.load()
    traffic = keep(out / "traffic" / net.name, given, net.predict_batch(given))

    def closed(wire: Wire, rows: int, connections: int) -> LoadCost:
        workload = Workload(server, wire, traffic, rows)
        workload.warm_up(connections)
        return _cost_of(server, lambda: workload.measure(connections, seconds))

    def opened(wire: Wire, rows: int, most_per_second: float) -> LoadCost:
        workload = Workload(server, wire, traffic, rows)
        load = {"rate": f"{SHARE * most_per_second:.1f}", "arrivals": "poisson", "connections": 1000}
        limits = {"timeout": 10, "max_error_rate": 0.001, "check_every": CHECK_EVERY}
        return _cost_of(server, lambda: workload.run(**load, **limits, seconds=seconds))

    together = {wire: {rows: closed(wire, rows, connections) for rows, connections in TOGETHER} for wire in wires}
    batch = curve(net)
    # A net that is not quick has a thread, whose time is known as it is spent beside the event loop.
    if not net.runs_inline:
        alone = [closed("octet", rows, connections) for rows, connections in ALONE]
        batch = Curve.through([each.batch_s for each in (*alone, *together["octet"].values())])
    requests = {
        wire: Line.through(
            {
                rows: opened(wire, rows, each.most_per_second).request_s(batch, net.runs_inline)
                for rows, each in cells.items()
            }
        )
        for wire, cells in together.items()
    }
    return NetCosts(batch, net.runs_inline, requests, net.card.dim, net.card.context_length, weight_mb)


@dataclass(frozen=True)
class LoadCost:
    """What a load took: requests, batches and their rows, seconds of the event loop and of other threads."""

    requests: float
    batches: float
    rows: float
    loop_s: float
    aside_s: float

    @property
    def most_per_second(self) -> float:
        """Requests per second that a core has time for."""
        return self.requests / (self.loop_s + self.aside_s)

    @property
    def batch_s(self) -> tuple[float, float]:
        """Rows of a batch, and the seconds that the other threads spent on it."""
        return self.rows / self.batches, self.aside_s / self.batches

    def batches_s(self, batch: Curve) -> float:
        """Return the seconds that so many batches would take."""
        return self.batches * batch.at(self.rows / self.batches)

    def request_s(self, batch: Curve, is_inline: bool) -> float:
        """Return the seconds of the event loop for a request, without batches that run there."""
        return (self.loop_s - self.batches_s(batch) * is_inline) / self.requests


def curve(net: Predictor) -> Curve:
    """Return the seconds of processor that batches of a net take here."""
    given = contexts.load()
    return Curve(BATCHES, [_typical_s(net, np.resize(given, (rows, *given.shape[1:]))) for rows in BATCHES])


def _typical_s(net: Predictor, batch: contexts.Vectors) -> float:
    times = []
    for _ in range(REPEATS):
        began = process_time()
        net.predict_batch(batch)
        times.append(process_time() - began)
    return median(times)


def _cost_of(server: RunningServer, send: Callable[[], object]) -> LoadCost:
    before = metrics.counters(server.url)
    began = processor_s(server.pid)
    send()
    grown = metrics.growth(before, metrics.counters(server.url))
    ended = processor_s(server.pid)
    counts = {name: grown[name] for name in ("requests", "batches", "rows")}
    return LoadCost(**counts, loop_s=ended[0] - began[0], aside_s=ended[1] - began[1])
