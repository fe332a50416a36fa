"""Faults put into real processes: what was injected is counted, and what was sent is what `/metrics` says was sent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import PATIENCE_S, ROOT, Process
from tests.faults.versions import tiny_registry

REPORT = ROOT / "runs" / "faults" / "report.json"
NOTHING: Mapping[str, str] = {}
Injected = Callable[..., None]
_FOUND = pytest.StashKey[dict[tuple[str, str], int]]()
_IN_FULL = pytest.StashKey[bool]()


def sizes(quick: int, full: int) -> pytest.MarkDecorator:
    """Run a test with `count` = `quick` always, and `full` in `make faults`."""
    return pytest.mark.parametrize("count", [quick, pytest.param(full, marks=pytest.mark.faults)])


@pytest.fixture
def injected(request: pytest.FixtureRequest) -> Injected:
    """Return a function that counts faults: `injected("a bit flipped", "refused", 20)`; the totals are the report."""
    found = request.config.stash.setdefault(_FOUND, {})
    full = request.node.get_closest_marker("faults") is not None
    request.config.stash[_IN_FULL] = request.config.stash.get(_IN_FULL, False) or full

    def add(fault: str, held: str, count: int = 1) -> None:
        found[fault, held] = found.get((fault, held), 0) + count

    return add


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what was injected and what held, and leave it in runs/faults, after `make faults`."""
    if not config.stash.get(_IN_FULL, False):
        return
    found = [(fault, count, held) for (fault, held), count in config.stash[_FOUND].items()]
    terminalreporter.section("faults injected")
    for fault, count, held in found:
        terminalreporter.write_line(f"{count:>9,}  {fault}: {held}")
    total = sum(count for _, count, _ in found)
    terminalreporter.write_line(f"{total:>9,}  in all; {len(terminalreporter.stats.get('failed', []))} tests failed")
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"fault": fault, "injected": count, "held": held} for fault, count, held in found]
    REPORT.write_text(json.dumps({"total": total, "faults": rows}, indent=2) + "\n")


class Target(Process):
    """A real server process that faults are put to, with an exact count of the requests sent to it."""

    def __init__(self, registry: Path, log: Path, plan: dict[str, Any], **environment: str) -> None:
        self.sent, self._audit = 0, Path(plan["audit"])
        command = [sys.executable, "-m", "tests.faults.runner", json.dumps(plan)]
        super().__init__(registry, log, command, **environment)
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S, event_hooks={"request": [self._count]})

    def _count(self, request: httpx.Request) -> None:
        self.sent += 1

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def connect(self) -> socket.socket:
        """Return a new connection."""
        return socket.create_connection(self.address, timeout=PATIENCE_S)

    def exchange(self, *parts: bytes, requests: int = 1) -> bytes:
        """Send what a server should take for `requests` requests; return all it says before it closes."""
        self.sent += requests
        with self.connect() as connection:
            for part in parts:
                connection.sendall(part)
            return drain(connection)

    def opened(self, since: int = 0) -> list[str]:
        """Return what the audit hook heard from line `since` on."""
        return self._audit.read_text().splitlines()[since:]

    def counted(self) -> dict[tuple[str, str], int]:
        """Return the requests counted, by route and outcome; the scrape that asks is not among them."""
        self.sent += 1
        lines = httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text.splitlines()
        found = [line.split('"') for line in lines if line.startswith("lvm_requests_total{")]
        return {(part[1], part[3]): int(float(part[4].split()[-1])) for part in found}

    def check_totals(self) -> None:
        """Hold the metrics to the requests sent: exactly as many, once the last answer has been counted."""
        for _ in range(50):
            counted = self.counted()
            if sum(counted.values()) == self.sent - 1:
                return
            time.sleep(0.1)
        raise AssertionError(f"{self.sent - 1} requests were sent, these were counted: {counted}")


def lvm(
    commands: Sequence[Sequence[str]], environment: Mapping[str, str] = NOTHING, *, grow_mb: int = 0
) -> list[tuple[int, list[str], str]]:
    """Run commands one after the other in one new process; return the status, what the audit hook heard, and stderr.

    `grow_mb` megabytes are all the memory that it may take on top of what it has once torch is there.
    """
    plan = json.dumps({"commands": commands, "grow_mb": grow_mb})
    command = [sys.executable, "-m", "tests.faults.commands", plan]
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(told) for told in json.loads(done.stdout.splitlines()[-1])]


def drain(connection: socket.socket) -> bytes:
    """Return all that comes until the other side closes, or resets."""
    received = b""
    try:
        while chunk := connection.recv(1 << 16):
            received += chunk
    except ConnectionResetError:
        pass
    return received


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what is to be preloaded for writes to fail and clocks to jump; see shim.c."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the shim wants a C compiler and Linux")
    made = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, Path(__file__).with_name("shim.c"), "-ldl"], check=True)
    return made


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Callable[..., Target]]:
    """Return a function that starts a `Target`; at the end every one still alive must have counted what it was sent.

    `target(answers={"amn": "raises", "gru": "mean_of"})` serves fakes, without `answers` real nets; see `runner`.
    """
    started: list[Target] = []

    def start(registry: Path | None = None, /, environment: Mapping[str, str] = NOTHING, **plan: Any) -> Target:
        plan["audit"] = str(tmp_path / f"audit-{len(started)}.log")
        root = registry or tiny_registry(tmp_path / "registry")
        started.append(Target(root, tmp_path / f"target-{len(started)}.log", plan, **environment))
        return started[-1]

    yield start
    try:
        for each in started:
            if each.popen.poll() is None:
                each.check_totals()
    finally:
        for each in started:
            each.http.close()
            each.popen.send_signal(signal.SIGKILL)
            each.popen.wait()
