"""A promotion, or a rollback, may die at any instant: the alias is whole, and the running server never notices."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from models.registry import manifest
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Move, Registry, Version
from tests.conftest import PATIENCE_S, ROOT, Process, until
from tests.faults.conftest import Injected

HASTE_S = 0.02  # within which a child that moves without end is killed
OCTETS = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}


class Crasher:
    """A warm process whose children move the alias and die."""

    def __init__(self, registry: Registry, versions: list[Version]) -> None:
        script = str(Path(__file__).with_name("crasher.py"))
        command = [sys.executable, script, str(registry.root), *(version.id for version in versions)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.popen = subprocess.Popen(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, **pipes)

    def order(self, **order: object) -> dict[str, int]:
        """Have a child carry out an order; return its wait status and its steps."""
        assert self.popen.stdin
        assert self.popen.stdout
        self.popen.stdin.write(json.dumps(order) + "\n")
        self.popen.stdin.flush()
        answer: dict[str, int] = json.loads(self.popen.stdout.readline())
        return answer


class Client:
    """One caller after another, in the background: who answered, and every answer that was none."""

    def __init__(self, url: str, body: bytes) -> None:
        self.sent, self.failures = 0, list[str]()
        self.versions: Counter[str] = Counter()
        self._url, self._body, self._done = f"{url}/predict", body, threading.Event()
        self._thread = threading.Thread(target=self._call)

    def _call(self) -> None:
        with httpx.Client(headers=OCTETS, timeout=60) as http:
            while not self._done.wait(0.005):
                self.sent += 1
                answer = http.post(self._url, content=self._body)
                self.versions[answer.headers.get("x-model-version", "")] += 1
                if answer.status_code != 200:
                    self.failures.append(answer.text)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Call all the while."""
        self._thread.start()
        try:
            yield
        finally:
            self._done.set()
            self._thread.join()


def orders(crasher: Crasher, count: int) -> Iterator[dict[str, Any]]:
    """Yield `count` orders: one for each line and call of both moves, or for the calls alone; then random instants."""
    steps = [*at_steps(crasher, "promote", count > 500), *at_steps(crasher, "rollback", count > 500)]
    yield from steps
    instants = random.Random(0)
    yield from ({"delay": instants.uniform(0, HASTE_S)} for _ in range(count - len(steps)))


def at_steps(crasher: Crasher, kind: str, lines: bool) -> list[dict[str, Any]]:
    """Return an order for each step of a move, which is done once to count them."""
    done = crasher.order(move=kind, lines=lines, step=0)
    assert done["status"] == 0
    return [{"move": kind, "lines": lines, "step": step} for step in range(1, done["steps"] + 1)]


def check_registry(registry: Registry, versions: list[Version], read: int) -> int:
    """Check what a crash left: a whole version, a readable ledger beyond `read` bytes, and that moves go on.

    Returns the bytes of the ledger by now.
    """
    was = registry.resolve("primary")
    (other,) = [version for version in versions if version != was]
    manifest.read_files(was.path)
    registry.point("primary", other, why="after a crash")
    assert registry.rollback("primary").after == was.id
    registry.point("primary", other, why="a step to go back")
    assert not list(registry.root.glob(".part-*"))
    with open(registry.root / "ledger.jsonl", "rb") as ledger:
        ledger.seek(read)
        assert all(Move(**json.loads(line)).alias == "primary" for line in ledger)
        return ledger.tell()


def counted(url: str) -> dict[str, float]:
    """Return the requests to /predict by outcome, as the server counted them."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text)
    samples = [sample for family in families for sample in family.samples if sample.name == "lvm_requests_total"]
    return {s.labels["outcome"]: s.value for s in samples if s.labels["route"] == "/predict" and s.value}


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.faults)])
def test_a_move_that_dies_leaves_a_whole_alias_and_a_server_that_lost_no_request(
    shipped: Path, process: Callable[..., Process], count: int, injected: Injected
) -> None:
    """Killed at every step of a promotion and a rollback and at random instants, the server running all the while."""
    for alias in ("fallback", "retriever"):  # nothing may stand in
        (shipped / alias).unlink()
    registry = Registry(shipped)
    versions = [version for version in registry.versions() if version.name in ("amn", "gmn")]
    registry.point("primary", versions[1])
    server, crasher = process(LVM_RELOAD_S="0.1", LVM_MAX_BATCH="8"), Crasher(registry, versions)
    client = Client(server.url, load_checkpoint(versions[0].path).golden_context[:1].tobytes())
    died: Counter[str] = Counter()
    read = (registry.root / "ledger.jsonl").stat().st_size
    with crasher.popen, client.calling(), httpx.Client(base_url=server.url, timeout=PATIENCE_S) as probe:
        for order in orders(crasher, count):
            assert crasher.order(**order)["status"] == signal.SIGKILL
            died[order.get("move", "random instant")] += 1
            read = check_registry(registry, versions, read)
            assert probe.get("/readyz").status_code == 200
        for version in versions:  # and it still follows
            registry.point("primary", version)
            seen = client.versions[version.version]
            until(lambda: client.versions[version.version] > seen, f"{version.id} to answer")  # noqa: B023
        crasher.popen.stdin.close()  # type: ignore[union-attr]
    assert client.failures == []
    assert set(client.versions) == {version.version for version in versions}
    assert counted(server.url) == {"ok": client.sent}
    assert [line for line in server.log() if line["level"] in ("warning", "error")] == []
    for move, deaths in died.items():
        injected(f"SIGKILL under a running server: {move}", "alias whole, no request lost", deaths)
