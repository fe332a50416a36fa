"""The service under test on a core of its own, and its clients, the driver's processes, on the others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families

from bench.contract.samples import Samples, read
from bench.plan import ROOT, SHIPPED
from bench.servers import Launch, Server, launched, service
from loadtest import contexts
from models.predictor import load_predictor
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry, Version
from models.runtimes.torch import build_net
from models.training import publish

ALIAS = "fallback"  # GRU: heavy enough that refusing costs little beside answering
METRICS = "/metrics"  # what we ask for to count the others
PATIENCE_S = 60.0
Stock = tuple[Registry, tuple[Version, Version], Path]  # a registry, two versions in it, and what they answer
WORKLOAD = {"route": "predict", "wire": "octet", "query": f"model={ALIAS}", "arrivals": "poisson"}


@dataclass(frozen=True)
class Plan:
    """Where to write, the SLO in milliseconds, rows of a request, and the minutes of the soak."""

    out: Path
    slo_ms: float
    rows: int
    minutes: float


class Client:
    """One driver in a process of its own: its own connections and, where `source` is given, address."""

    def __init__(self, rig: Rig, name: str, rate: float, seconds: float, options: dict[str, Any]) -> None:
        self._rig, self.name = rig, name
        self._record = rig.plan.out / "records"
        given = {"url": rig.server.url, "name": name, "rate": f"{rate:.3f}", "seconds": seconds, **options}
        flags = [text for key, value in given.items() for text in (f"--{key.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "loadtest", "--json", "--record", str(self._record), *flags]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finish(self) -> dict[str, Any]:
        """Wait for the last answer; return the driver's summary.

        Raises:
            RuntimeError: the driver said nothing but why.
        """
        said, complaint = self._process.communicate()
        if not said:
            raise RuntimeError(f"{self.name}: {complaint.decode(errors='replace')}")
        summary: dict[str, Any] = json.loads(said)
        self._rig.sent.append(summary["sent"] + summary["warmup_sent"])
        return summary

    def samples(self) -> Samples:
        """Wait for the last answer; return what became of every arrival."""
        self.finish()
        return read(self._record / f"{self.name}.npz")


@dataclass(frozen=True)
class Rig:
    """A running service, its registry with two versions to swap, and the requests sent, by client that is done."""

    plan: Plan
    server: Server
    registry: Registry
    versions: tuple[Version, Version]
    answers: Path
    sent: list[int] = field(default_factory=list)

    def client(self, name: str, rate: float, seconds: float, **options: Any) -> Client:
        """Start a client that sends the workload, or what `options` of the driver say."""
        usual = {**WORKLOAD, "rows": self.plan.rows, "answers": self.answers, "connections": 1000, "timeout": 15}
        return Client(self, name, rate, seconds, {**usual, **options})

    def probe(self, name: str, route: str, rate: float, seconds: float) -> Client:
        """Start a prober of /livez or /readyz."""
        return Client(self, name, rate, seconds, {"route": route, "connections": 16, "timeout": 15})


@cache
def cores() -> tuple[list[int], list[int]]:
    """Return the cores of the service and those of the clients, the same where there is but one or no way to pin."""
    ours = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return (ours[:1], ours[1:]) if len(ours) > 1 and shutil.which("taskset") else (ours, ours)


def make_room() -> None:
    """Leave the service's core to it, this process and all clients that it starts."""
    if cores()[1] != cores()[0]:
        os.sched_setaffinity(0, cores()[1])


def launch(registry: Path) -> Launch:
    """Return how to start the service on its core, all else as it ships."""
    one, others = cores()
    plain = service(registry)
    pinned = ("taskset", "-c", str(one[0])) if one != others else ()
    return replace(plain, command=(*pinned, *plain.command))


@contextmanager
def running(plan: Plan, stock: Stock) -> Iterator[Rig]:
    """Run a service on `stock` and yield the rig; raises `NotStarted`."""
    registry, versions, answers = stock
    with launched(launch(registry.root), plan.out / "logs") as server:
        yield Rig(plan, server, registry, versions, answers)


def make_stock(out: Path) -> Stock:
    """Return a copy of the registry that ships with a second version of the net that is asked, and both's answers.

    The second has the first's weights with a little noise: their answers differ, but agree as those of a net that was
    trained again would, or its trial would end with the first one serving.
    """
    shutil.rmtree(out / "registry", ignore_errors=True)
    registry = Registry(Path(shutil.copytree(SHIPPED, out / "registry", symlinks=True)))
    one = registry.resolve(ALIAS)
    versions = (one, _other(registry, one))
    asked = contexts.load()
    known = {version.version: load_predictor(version.path, "cpu").predict_batch(asked) for version in versions}
    np.savez(out / "answers.npz", allow_pickle=False, **known)
    return registry, versions, out / "answers.npz"


def _other(registry: Registry, version: Version) -> Version:
    known = load_checkpoint(version.path)
    net = build_net(known)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.001 * torch.randn_like(parameter))
    card = replace(known.card, scores={}, limits=("Weights with noise: only to be swapped with the real ones.",))
    return publish.publish(registry, net.eval(), card, known.golden_context, {})


def counted(url: str) -> dict[str, int]:
    """Return requests by outcome, as /metrics has them, and their sum, `all`, but for those for /metrics."""
    outcomes: Counter[str] = Counter()
    for sample in _samples(url):
        if sample.name == "lvm_requests_total" and sample.labels["route"] != METRICS:
            outcomes[sample.labels["outcome"]] += int(sample.value)
    return {"all": outcomes.total(), **outcomes}


def series(url: str) -> int:
    """Return how many series /metrics has."""
    return sum(1 for _ in _samples(url))


def reloads(url: str) -> int:
    """Return how many versions went live behind `ALIAS` since the start."""
    wanted = {"alias": ALIAS, "outcome": "ok"}
    return sum(int(s.value) for s in _samples(url) if (s.name, s.labels) == ("lvm_reloads_total", wanted))


def _samples(url: str) -> Iterator[Any]:
    text = httpx.get(f"{url}{METRICS}", timeout=PATIENCE_S).text
    for family in text_string_to_metric_families(text):
        yield from family.samples
