"""Several workers behind one port: one sum of metrics, and no lost request when a worker dies or restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from models.cores import POOLS, cores
from tests.conftest import LVM, PATIENCE_S, Process, until

Start = Callable[..., Process]
CONTEXT = np.random.default_rng(0).standard_normal((5, 384)).astype("<f4")
OCTETS = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}


def ask(client: httpx.Client, url: str) -> httpx.Response:
    return client.post(f"{url}/predict", content=CONTEXT.tobytes(), headers=OCTETS)


def outcomes(url: str) -> dict[str, float]:
    """Return the requests to /predict by outcome, from a scrape of any worker."""
    text = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    mine = [s for s in samples if s.name == "lvm_requests_total" and s.labels["route"] == "/predict"]
    return {s.labels["outcome"]: s.value for s in mine if s.value}


def worker_of(url: str) -> str:
    """Return the number of the worker that answers a new connection."""
    return str(httpx.get(f"{url}/readyz", timeout=PATIENCE_S).headers["x-worker"])


def pids(server: Process) -> list[int]:
    """Return the process ids of the living workers."""
    children = Path(f"/proc/{server.popen.pid}/task/{server.popen.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


class Callers:
    """Threads that send requests without pause, each on its own connection, and count the statuses."""

    def __init__(self, url: str, count: int = 4) -> None:
        self.counts: Counter[str] = Counter()
        self._url, self._done = url, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        mine: Counter[str] = Counter()
        with httpx.Client(timeout=PATIENCE_S) as client:
            while not self._done.is_set():
                try:
                    mine[str(ask(client, self._url).status_code)] += 1
                except httpx.TransportError:
                    mine["broken"] += 1
        self.counts += mine

    def stop(self) -> Counter[str]:
        self._done.set()
        for thread in self._threads:
            thread.join()
        return self.counts


def test_every_worker_answers_shows_the_sum_of_all_and_follows_a_promotion(process: Start) -> None:
    server = process(LVM_WORKERS="2", LVM_RELOAD_S="0.05")
    seen: Counter[str] = Counter()
    while len(seen) < 2:
        with httpx.Client(timeout=PATIENCE_S) as client:
            seen[ask(client, server.url).headers["x-worker"]] += 1
    for _ in range(8):
        assert outcomes(server.url) == {"ok": sum(seen.values())}
    gru = server.registry.resolve("fallback")
    server.registry.point("primary", gru)

    def all_serve_it() -> bool:
        found = {}
        while len(found) < 2:
            with httpx.Client(timeout=PATIENCE_S) as client:
                headers = ask(client, server.url).headers
            found[headers["x-worker"]] = headers["x-model-version"]
        return set(found.values()) == {gru.version}

    until(all_serve_it, "both workers to serve the promoted version")
    assert server.stop() == 0


def test_the_options_of_the_command_reach_the_workers(shipped: Path, tmp_path: Path) -> None:
    command = [LVM, "serve", "--port", "0", "--workers", "2", "--registry", shipped, "--device", "cpu", "--text"]
    server = Process(shipped, tmp_path / "log", command, LVM_REGISTRY="/nowhere", LVM_DEVICE="cuda")
    served = httpx.get(f"{server.url}/models", timeout=PATIENCE_S).json()["aliases"]["primary"]["id"]
    (listening,) = server.events("listening")
    assert server.stop() == 0
    assert served == server.registry.resolve("primary").id
    assert listening["console"] == f"{server.url}/"
    assert listening["docs"] == f"{server.url}/docs"


def test_workers_share_the_cores_as_do_the_pools_of_their_libraries(
    process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in POOLS:
        monkeypatch.delenv(name, raising=False)
    server = process(LVM_WORKERS="auto")
    known = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pids(server)]
    assert len(known) == cores() or cores() == 1
    for environment in known:
        assert {b"LVM_THREADS=1", b"OMP_NUM_THREADS=1", b"RAYON_NUM_THREADS=1"} <= set(environment)


def test_replaces_a_killed_worker_and_keeps_its_counts(process: Start) -> None:
    server = process(LVM_WORKERS="2")
    callers = Callers(server.url)
    until(lambda: outcomes(server.url).get("ok", 0) > 50, "some requests")
    before, victim = pids(server), pids(server)[0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(pids(server)) == 2 and victim not in pids(server), "a new worker")
    until(lambda: len({worker_of(server.url) for _ in range(8)}) == 2, "the new worker to answer")
    counts = callers.stop()
    assert set(before) - {victim} <= set(pids(server))
    assert set(counts) <= {"200", "broken"}
    assert counts["broken"] <= 4  # at most what was in flight
    counted = outcomes(server.url)
    assert set(counted) <= {"ok", "lost"}
    assert counts["200"] <= counted["ok"]
    assert sum(counted.values()) <= counts.total()
    assert counts.total() - sum(counted.values()) <= counts["broken"]  # requests that no worker had read
    with httpx.Client(timeout=PATIENCE_S) as client:
        for _ in range(10):
            assert ask(client, server.url).status_code == 200
    assert outcomes(server.url)["ok"] == counted["ok"] + 10
    assert [event["status"] for event in server.events("worker died")] == [137]
    assert 'lvm_worker_deaths_total{role="worker"} 1.0' in httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text


def test_a_rolling_restart_fails_no_request(process: Start) -> None:
    server = process(LVM_WORKERS="2", LVM_DRAIN_S="0.3")
    before = set(pids(server))
    callers = Callers(server.url)
    os.kill(server.popen.pid, signal.SIGHUP)
    until(lambda: len(pids(server)) == 2 and not before & set(pids(server)), "two successors")
    counts = callers.stop()
    assert set(counts) == {"200"}
    assert outcomes(server.url) == {"ok": counts["200"]}
    assert not server.events("worker died")


def test_shutdown_answers_accepted_requests_and_exits_with_0(process: Start) -> None:
    server = process(LVM_WORKERS="2", LVM_DRAIN_S="0.3")
    callers = Callers(server.url)
    until(lambda: outcomes(server.url).get("ok", 0) > 20, "some requests")
    server.popen.send_signal(signal.SIGTERM)
    assert server.popen.wait(PATIENCE_S) == 0
    assert set(callers.stop()) <= {"200", "broken"}  # connections are refused after the sockets have closed


def test_shutdown_ends_a_rolling_restart(process: Start) -> None:
    """Also if a successor starts after the shutdown has begun."""
    server = process(LVM_WORKERS="2", LVM_DRAIN_S="0.1")
    os.kill(server.popen.pid, signal.SIGHUP)
    until(lambda: len(pids(server)) == 3, "a successor")
    assert server.stop() == 0


@pytest.mark.faults
def test_shutdown_kills_a_worker_that_does_not_exit(process: Start) -> None:
    server = process(LVM_WORKERS="2", LVM_DRAIN_S="0", LVM_GRACE_S="0.5")
    os.kill(pids(server)[0], signal.SIGSTOP)
    assert server.stop() == 137
    assert server.events("worker hangs")


def test_rejects_a_port_that_another_service_uses(process: Start, shipped: Path) -> None:
    server = process(LVM_WORKERS="2")
    port = server.url.rpartition(":")[2]
    for workers in ("1", "2"):
        command = [LVM, "serve", "--port", port, "--workers", workers]
        env = {**os.environ, "LVM_REGISTRY": str(shipped)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 78
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr


def test_log_lines_name_their_worker(process: Start) -> None:
    server = process(LVM_WORKERS="2", LVM_ACCESS_LOG="1")
    with httpx.Client(timeout=PATIENCE_S) as client:
        number = ask(client, server.url).headers["x-worker"]
    until(lambda: server.events("request"), "the line")
    line = server.events("request")[0]
    assert str(line["worker"]) == number
    assert line["pid"] in pids(server)


def test_a_corrupt_primary_ends_the_start_with_its_exit_status(shipped: Path) -> None:
    weights = (shipped / "primary").resolve() / "weights.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    command = [LVM, "serve", "--port", "0", "--workers", "2"]
    done = subprocess.run(command, env={**os.environ, "LVM_REGISTRY": str(shipped)}, capture_output=True, check=False)
    assert done.returncode == 65, done.stderr


def test_workers_drain_when_their_supervisor_is_killed(process: Start) -> None:
    server = process(LVM_WORKERS="2", LVM_DRAIN_S="0")
    workers = pids(server)
    directory = Path(Path(f"/proc/{workers[0]}/cmdline").read_bytes().split(b"\0")[-2].decode())
    assert directory.is_dir()
    server.popen.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "the workers to exit")
    assert not directory.exists()


def test_a_reader_whose_requests_reach_several_workers_shows_every_score(process: Start) -> None:
    server = process(LVM_WORKERS="2", LVM_TRUTH_SHARE="1")
    article = np.random.default_rng(1).standard_normal((30, 384)).astype("<f4")
    used = set()
    for start in range(26):
        # a new connection each time, which may be another worker's
        answer = httpx.post(
            f"{server.url}/predict", content=article[start : start + 5].tobytes(), headers=OCTETS, timeout=PATIENCE_S
        )
        used.add(answer.headers["x-worker"])
    assert len(used) == 2

    def scored() -> int:
        aliases = httpx.get(f"{server.url}/models", timeout=PATIENCE_S).json()["live"]["aliases"]
        count: int = aliases.get("primary", {}).get("scored", 0)
        return count

    until(lambda: scored() == 25, "scores")
