"""The servers under test, each a process of its own: started, waited for, weighed, stopped."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from signal import SIGKILL
from time import perf_counter, sleep
from typing import Any, get_args

import httpx
import numpy as np

from bench.options import LENGTH, ROOT
from bench.peers import LEFT_OUT, PEERS
from loadtest.payloads import Exchange
from loadtest.plan import Wire
from models.registry.registry import Registry
from models.vectors import Floats

TIMEOUT_S = 60.0
SERVICE, BARE, NAIVE, TUNED, ECHO = "service", "bare", "naive", "naive, tuned", "echo"


class NotStarted(RuntimeError):
    """A server ended, or was not ready in time; its log has the reason."""


@dataclass(frozen=True)
class RunningServer:
    """A server that is ready: its URL and the seconds from its start until then."""

    name: str
    url: str
    pid: int
    ready_s: float
    # Path before /predict, if octets have a route of their own.
    octets: str = ""

    def base(self, wire: str) -> str:
        """Return the URL before /predict."""
        return self.url + self.octets if wire == "octet" else self.url

    def send(self, exchange: Exchange, context: Floats) -> httpx.Response:
        """Send one request with a context `(T, D)`; raises `httpx.HTTPError` unless the response is a 2xx."""
        (body,) = exchange.bodies(context[None])
        url = self.base(exchange.wire) + exchange.path
        return httpx.post(url, content=body, headers=exchange.headers, timeout=TIMEOUT_S).raise_for_status()


@dataclass(frozen=True)
class Launch:
    """How to start a server: its command, without the port, its environment, and the path that answers 200 if ready."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    octets: str = ""
    ready: str = "/readyz"

    def on(self, cores: Sequence[int]) -> Launch:
        """Return how to start it on these cores."""
        return replace(self, command=("taskset", "-c", ",".join(map(str, cores)), *self.command))

    def having(self, **settings: str) -> Launch:
        """Return how to start it with more environment variables."""
        return replace(self, environment={**self.environment, **settings})


def service(registry: Path, name: str = SERVICE) -> Launch:
    """Return how to start the service on a registry, with the settings that ship."""
    settings = {key: value for key, value in os.environ.items() if not key.startswith("LVM_")}
    return Launch(name, (sys.executable, "-m", "lvm", "serve"), {**settings, "LVM_REGISTRY": str(registry.absolute())})


def naive(version: Path, name: str = NAIVE) -> Launch:
    """Return how to start the naive app on a version, as people write it or, under the name TUNED, tuned."""
    command = (sys.executable, "-m", "bench.peers.naive", "--version", str(version.absolute()))
    return Launch(name, (*command, *(("--tuned",) if name == TUNED else ())), os.environ, "/octet")


def bare(version: Path) -> Launch:
    """Return how to start the least that serves a version."""
    command = (sys.executable, "-m", "bench.peers.bare", "--version", str(version.absolute()))
    return Launch(BARE, command, os.environ)


def echo(dim: int) -> Launch:
    """Return how to start the echo."""
    return Launch(ECHO, (sys.executable, "-m", "bench.peers.echo", "--dim", str(dim)), os.environ)


def describe(environment: Path) -> dict[str, Any]:
    """Return package and command of every other model server in a virtual environment, and those that are left out."""
    command = [str(environment / "bin" / "python"), "-m", "pip", "list", "--format", "freeze"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    found = {line.partition("==")[0]: line for line in listed}
    measured = {
        name: (found.get(peer.package, f"{peer.package} is not installed"), " ".join(peer.command))
        for name, peer in PEERS.items()
    }
    return {"measured": measured, "left_out": LEFT_OUT}


def peers(environment: Path, version: Path) -> list[Launch]:
    """Return how to start every other model server on a version, from a virtual environment."""
    python = str(environment.absolute() / "bin" / "python")
    known = {**os.environ, "BENCH_VERSION": str(version.absolute()), "BENTOML_DO_NOT_TRACK": "True"}
    return [Launch(name, (python, "-m", *peer.command), known, "/octet", peer.ready) for name, peer in PEERS.items()]


@contextmanager
def launched(launch: Launch, logs: Path) -> Iterator[RunningServer]:
    """Run a server from its first 200 until SIGTERM; raises `NotStarted`."""
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{launch.name}.log"
    port = free_port()
    command = (*launch.command, "--port", str(port))
    with log.open("wb") as output:
        began = perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(launch.environment), stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait(process, port, launch.ready, log)
        ready_s = perf_counter() - began
        yield RunningServer(launch.name, f"http://127.0.0.1:{port}", process.pid, ready_s, launch.octets)
    finally:
        _stop(process)


@contextmanager
def compared(registry: Registry, dim: int, logs: Path) -> Iterator[list[RunningServer]]:
    """Run the servers that are always compared: the service, the bare peer, the naive app twice, the echo."""
    primary = registry.resolve("primary").path
    launches = (service(registry.root), bare(primary), naive(primary), naive(primary, TUNED), echo(dim))
    with ExitStack() as stack:
        yield [stack.enter_context(launched(launch, logs)) for launch in launches]


@contextmanager
def responding(
    launches: Iterable[Launch], dim: int, logs: Path, failures: dict[str, str]
) -> Iterator[list[RunningServer]]:
    """Run those of `launches` that start and respond; `failures` gets the reason of every other one."""
    with ExitStack() as stack:
        servers = []
        for launch in launches:
            try:
                servers.append(stack.enter_context(_responding(launch, dim, logs)))
            except (NotStarted, OSError) as error:
                failures[launch.name] = str(error)
        yield servers


@contextmanager
def _responding(launch: Launch, dim: int, logs: Path) -> Iterator[RunningServer]:
    """Run a server that has responded on both wires: a front end may be ready before what is behind it fails."""
    with launched(launch, logs) as server:
        try:
            for wire in get_args(Wire):
                server.send(Exchange("predict", wire, 1, dim), np.ones((LENGTH, dim), np.float32))
        except httpx.HTTPError as error:
            raise NotStarted(f"{logs / launch.name}.log: {error}") from error
        yield server


def _wait(process: subprocess.Popen[bytes], port: int, ready: str, log: Path) -> None:
    end = perf_counter() + TIMEOUT_S
    while not _is_ready(port, ready):
        if process.poll() is not None or perf_counter() > end:
            raise NotStarted(f"{log}: {log.read_text(errors='replace')[-2000:]}")
        sleep(0.01)


def _is_ready(port: int, path: str) -> bool:
    probe = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with suppress(OSError, http.client.HTTPException), closing(probe):
        probe.request("GET", path)
        return probe.getresponse().status == 200
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # LitServe leaves its workers behind.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, SIGKILL)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
