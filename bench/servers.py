"""The servers under test, each a process of its own: started, waited for, weighed, stopped."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep

from bench.plan import ROOT
from models.registry import Registry

PATIENCE_S = 60.0
SERVICE, NAIVE, TUNED, ECHO = "service", "naive", "naive, tuned", "echo"
NAIVES = (NAIVE, TUNED)


class NotStarted(RuntimeError):
    """A server ended, or was not ready in time; its log says why."""


@dataclass(frozen=True)
class Server:
    """A server that is ready: where it listens and how many seconds it took from its start."""

    name: str
    url: str
    pid: int
    ready_s: float
    octets: str = ""  # path before /predict, where octets have a route of their own

    def base(self, wire: str) -> str:
        """Return the URL before /predict."""
        return self.url + self.octets if wire == "octet" else self.url


@dataclass(frozen=True)
class Launch:
    """How to start a server: its command, without the port, and what its environment has more."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    octets: str = ""


def service(registry: Path, name: str = SERVICE) -> Launch:
    """Return how to start the service on a registry, all else as it ships."""
    lvm = str(Path(sys.executable).with_name("lvm"))
    settings = {key: value for key, value in os.environ.items() if not key.startswith("LVM_")}
    return Launch(name, (lvm, "serve"), {**settings, "LVM_REGISTRY": str(registry.absolute())})


def naive(version: Path, name: str = NAIVE) -> Launch:
    """Return how to start the naive app on a version, as people write it or, under the name TUNED, tuned."""
    command = (sys.executable, "-m", "bench.peers.naive", "--version", str(version.absolute()))
    return Launch(name, (*command, *(("--tuned",) if name == TUNED else ())), os.environ, "/octet")


def echo(dim: int) -> Launch:
    """Return how to start the echo."""
    return Launch(ECHO, (sys.executable, "-m", "bench.peers.echo", "--dim", str(dim)), os.environ)


@contextmanager
def launched(launch: Launch, logs: Path) -> Iterator[Server]:
    """Run a server from its first 200 on /readyz until SIGTERM; raises `NotStarted`."""
    logs.mkdir(parents=True, exist_ok=True)
    log, port = logs / f"{launch.name}.log", _free_port()
    command = (*launch.command, "--port", str(port))
    with log.open("wb") as output:
        began = perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=dict(launch.environment), stdout=output, stderr=output)
    try:
        _wait(process, port, log)
        ready_s = perf_counter() - began
        yield Server(launch.name, f"http://127.0.0.1:{port}", process.pid, ready_s, launch.octets)
    finally:
        _stop(process)


@contextmanager
def field(registry: Registry, dim: int, logs: Path) -> Iterator[list[Server]]:
    """Run all that is compared, side by side: the service, the naive app twice, the echo."""
    primary = registry.resolve("primary").path
    launches = (service(registry.root), naive(primary), naive(primary, TUNED), echo(dim))
    with ExitStack() as stack:
        yield [stack.enter_context(launched(launch, logs)) for launch in launches]


def rss_mb(pid: int) -> float:
    """Return the resident memory of a process in megabytes (10^6 bytes)."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) * 1024 / 1e6
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(shown.stdout) * 1024 / 1e6


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = perf_counter() + PATIENCE_S
    while not _is_ready(port):
        if process.poll() is not None or perf_counter() > end:
            raise NotStarted(f"{log}: {log.read_text(errors='replace')[-2000:]}")
        sleep(0.01)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    connection.close()
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
