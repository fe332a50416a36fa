"""The service under test on a core of its own, and its clients, processes of the load tester, on the others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine
from bench.contract.measures import MAX_ERRORS, MIN_OFFERED
from bench.load import LoadTest
from bench.options import SHIPPED
from bench.servers import Launch, RunningServer, launched, service
from bench.untrained import second_version
from loadtest import contexts
from models.predictor import load_predictor
from models.registry.registry import Registry, Version

# GRU: so heavy that rejecting costs little beside answering.
ALIAS = "fallback"
WORKLOAD = {"route": "predict", "wire": "octet", "query": f"model={ALIAS}", "arrivals": "poisson"}


@dataclass(frozen=True)
class ContractOptions:
    """Where to write, the SLO in milliseconds, rows of a request, and the minutes of the soak."""

    out: Path
    slo_ms: float
    rows: int
    minutes: float


@dataclass(frozen=True)
class Fixtures:
    """A registry, two versions in it to swap, and the file with their answers."""

    registry: Registry
    versions: tuple[Version, Version]
    answers: Path


@dataclass(frozen=True)
class Harness:
    """A running service, its fixtures, and every load test that was started on it."""

    options: ContractOptions
    server: RunningServer
    fixtures: Fixtures
    loads: list[LoadTest] = field(default_factory=list)

    def load(self, name: str, rate: float, seconds: float, **options: Any) -> LoadTest:
        """Start a client that sends the workload at `rate` per second; `options` are those of the load tester."""
        usual = {**WORKLOAD, "rows": self.options.rows, "answers": self.fixtures.answers}
        return self.start(name, rate, seconds, **{**usual, "connections": 1000, "timeout": 15, **options})

    def offer(self, rate: float, seconds: float, warmup: float = 1.0) -> dict[str, Any]:
        """Offer a rate for some seconds; return the summary of the load test, `ok` if the service held the SLO."""
        number = len(self.loads)
        limits = {"max_p99_ms": self.options.slo_ms, "max_error_rate": MAX_ERRORS, "min_offered": MIN_OFFERED}
        return self.load(f"offer-{number}", rate, seconds, seed=number, warmup=warmup, **limits).summary

    def probe(self, name: str, route: str, rate: float, seconds: float) -> LoadTest:
        """Start a client of /livez or /readyz."""
        return self.start(name, rate, seconds, route=route, connections=16, timeout=15)

    def start(self, name: str, rate: float, seconds: float, **options: Any) -> LoadTest:
        """Start a client with its own connections and, if `source` is given, its own address."""
        given = {"rate": f"{rate:.3f}", "seconds": seconds, **options}
        self.loads.append(LoadTest(self.server.url, name, self.options.out / "records", **given))
        return self.loads[-1]


@cache
def cores() -> tuple[list[int], list[int]]:
    """Return the cores of the service and those of the clients, the same if there is only one or no way to pin."""
    ours = machine.cores()
    return (ours[:1], ours[1:]) if machine.can_pin() else (ours, ours)


def leave_service_core() -> None:
    """Keep this process, and all clients that it starts, off the service's core."""
    if cores()[1] != cores()[0]:
        os.sched_setaffinity(0, cores()[1])


def launch(registry: Path) -> Launch:
    """Return how to start the service on its core, with the settings that ship."""
    one, others = cores()
    return service(registry).on(one) if one != others else service(registry)


@contextmanager
def running(options: ContractOptions, fixtures: Fixtures) -> Iterator[Harness]:
    """Run a service on the registry of `fixtures`; raises `NotStarted`."""
    with launched(launch(fixtures.registry.root), options.out / "logs") as server:
        yield Harness(options, server, fixtures)


def make_fixtures(out: Path) -> Fixtures:
    """Return a copy of the registry that ships with a second version of one net, and the answers of both.

    The second has the first's weights with a little noise: their answers differ, but agree as those of a net that was
    trained again would; otherwise the canary would roll it back.
    """
    shutil.rmtree(out / "registry", ignore_errors=True)
    registry = Registry(Path(shutil.copytree(SHIPPED, out / "registry", symlinks=True)))
    one = registry.resolve(ALIAS)
    versions = (one, second_version(registry, one))
    return Fixtures(registry, versions, write_answers(out / "answers.npz", versions))


def write_answers(path: Path, versions: tuple[Version, ...]) -> Path:
    """Write the answers of versions to the contexts that ship, as the load tester compares them; return the file."""
    given = contexts.load()
    answers = {version.version: load_predictor(version.path, "cpu").predict_batch(given) for version in versions}
    np.savez(path, allow_pickle=False, **answers)
    return path
