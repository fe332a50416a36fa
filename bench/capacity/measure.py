"""The cost model of this machine: nets alone on a core, then the service, pinned to one, under load.

Closed loops show how large batches pay, but not what a request costs: their connections are few and their requests come
in bunches, so that much is done once for many and what is needed lies in the caches. Requests are therefore charged by
what they take in an open loop, at a share of the rate of the closed one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import process_time
from typing import NamedTuple

import numpy as np

from bench import load, machine, openloop, stages
from bench.capacity import searching
from bench.capacity.costs import Costs, Curve, Line, Net
from bench.capacity.processor import processor_s
from bench.contract import rig
from bench.plan import ROOT, SHIPPED
from bench.servers import Launch, Server, launched, rss_mb
from bench.service import WIRES
from bench.traffic import exchange_of, prepare
from loadtest import contexts
from loadtest.plan import Wire
from models.predictor import Predictor, load_predictor
from models.registry.registry import Registry, Version

NETS = ("amn", "gru", "gmn")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
REPEATS = 15
ALONE = ((1, 1), (8, 1))  # rows of a request, connections: small batches, of one request
TOGETHER = ((1, 32), (8, 16), (32, 8))  # large ones, and an event loop that is kept busy
SHARE = 0.6  # of the rate of that, in an open loop: four fifths of what it holds
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


def launch(registry: Registry) -> Launch:
    """Return how to start the service on its core; it lets in all that the closed loops offer, and takes its time."""
    plain = rig.launch(registry.root)
    return replace(plain, environment={**plain.environment, "LVM_CONCURRENCY": "2048", "LVM_TIMEOUT_MS": "60000"})


def costs(
    out: Path,
    names: Iterable[str] = NETS,
    wires: Sequence[Wire] = WIRES,
    seconds: float = 1.5,
    with_search: bool = False,
) -> Costs:
    """Return the costs of nets that ship and of requests for them on `wires`, from closed loops of `seconds` each."""
    nets, rest_mb = {}, []
    for name in names:
        registry, version = registry_of(out, name)
        net = load_predictor(version.path, "cpu", threads=1)
        net.warm_up(BATCHES[-1])
        weight_mb = weight(version)
        with launched(launch(registry), out / "logs") as server:
            nets[name] = _net(out, server, net, weight_mb, wires, seconds)
            rest_mb.append(rss_mb(server.pid) - len(ALIASES) * weight_mb)
    found = searching.search(out, seconds) if with_search else None
    command = f"python -m bench.capacity measure --nets {' '.join(nets)} --seconds {seconds:g}"
    return Costs(machine.describe(), command, median(rest_mb), nets, found)


def _net(out: Path, server: Server, net: Predictor, weight_mb: float, wires: Sequence[Wire], seconds: float) -> Net:
    def closed(wire: Wire, rows: int, connections: int) -> Spent:
        return _closed(out, server, net, Cell(wire, rows, connections), seconds)

    def opened(wire: Wire, rows: int, most_per_second: float) -> Spent:
        options = ("--rows", str(rows), "--arrivals", "poisson", "--connections", "1000")
        return _spend(server, lambda: openloop.offer(server, wire, SHARE * most_per_second, seconds, *options))

    together = {wire: {rows: closed(wire, rows, connections) for rows, connections in TOGETHER} for wire in wires}
    batch = curve(net)
    if not net.is_quick:  # it has a thread of its own, whose time is known as it is spent beside the event loop
        alone = [closed("octet", rows, connections) for rows, connections in ALONE]
        batch = Curve.through([each.batch_s for each in (*alone, *together["octet"].values())])
    requests = {
        wire: Line.through(
            {
                rows: opened(wire, rows, each.most_per_second).request_s(batch, net.is_quick)
                for rows, each in cells.items()
            }
        )
        for wire, cells in together.items()
    }
    return Net(batch, net.is_quick, requests, net.card.dim, net.card.context_length, weight_mb)


@dataclass(frozen=True)
class Spent:
    """What some load came to: requests, batches and their rows, seconds of the event loop and of other threads."""

    requests: float
    batches: float
    rows: float
    loop_s: float
    aside_s: float

    @property
    def most_per_second(self) -> float:
        """Requests a second that a core has time for."""
        return self.requests / (self.loop_s + self.aside_s)

    @property
    def batch_s(self) -> tuple[float, float]:
        """Rows of a batch, and the seconds that it took the other threads."""
        return self.rows / self.batches, self.aside_s / self.batches

    def batches_s(self, batch: Curve) -> float:
        """Return what so many batches would take."""
        return self.batches * batch.at(self.rows / self.batches)

    def request_s(self, batch: Curve, is_inline: bool) -> float:
        """Return what the event loop spends on a request, but for batches that run there."""
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


def weight(version: Version) -> float:
    """Return the megabytes that a process grows by when it loads a version."""
    command = [sys.executable, "-m", "bench.footprint", str(version.path.absolute()), "onnxruntime", "cpu", "1"]
    done = subprocess.run([*command, "float32"], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["grown_mb"])


class Cell(NamedTuple):
    """One closed loop: wire, rows of a request, connections."""

    wire: Wire
    rows: int
    connections: int


def _closed(out: Path, server: Server, net: Predictor, cell: Cell, seconds: float) -> Spent:
    given = contexts.load()
    exchange = exchange_of(cell.wire, net.card.dim, cell.rows)
    traffic = prepare(out / "traffic" / net.name, server, exchange, given, net.predict_batch(given))
    load.warm_up(server, traffic, cell.connections)
    return _spend(server, lambda: load.measure(server, traffic, cell.connections, seconds))


def _spend(server: Server, offer: Callable[[], object]) -> Spent:
    before, began = stages.scrape(server.url), processor_s(server.pid)
    offer()
    after, ended = stages.scrape(server.url), processor_s(server.pid)
    grown = {name: after[name] - before[name] for name in ("requests", "batches", "rows")}
    return Spent(**grown, loop_s=ended[0] - began[0], aside_s=ended[1] - began[1])
