"""gRPC of real processes: beside HTTP, with several workers, through a death, a restart and a stop; bad settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import LVM, PATIENCE_S, Process, until

Start = Callable[..., Process]
CONTEXT = np.random.default_rng(0).standard_normal((1, 5, 384)).astype("<f4")
OCTETS = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}
RETRY = {"maxAttempts": 5, "initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 3}
POLICY = {"name": [{}], "retryPolicy": {**RETRY, "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"]}}
OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)
RETRYING = [OWN_CONNECTION, ("grpc.service_config", json.dumps({"methodConfig": [POLICY]}))]


def address(server: Process) -> str:
    return server.events("listening")[0]["grpc"]


def tensor() -> Any:
    asked = triton.InferInput("context", list(CONTEXT.shape), "FP32")
    asked.set_data_from_numpy(CONTEXT)
    return asked


def outcomes(url: str) -> dict[str, float]:
    """Return the calls of ModelInfer by outcome, from a scrape of any worker."""
    text = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    mine = [s for s in samples if s.name == "lvm_requests_total" and s.labels["route"] == "grpc:infer"]
    return {s.labels["outcome"]: s.value for s in mine if s.value}


def pids(server: Process) -> list[int]:
    children = Path(f"/proc/{server.popen.pid}/task/{server.popen.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def has_grpc(pid: int) -> bool:
    """Return whether a process has loaded grpc."""
    return "cygrpc" in Path(f"/proc/{pid}/maps").read_text()


class Callers:
    """Threads that call a hundred times a second, each on its own connection, and count the outcomes."""

    def __init__(self, address: str) -> None:
        self.counts: Counter[str] = Counter()
        self._address, self._done = address, threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(3)]
        for thread in self._threads:
            thread.start()

    def _call(self) -> None:
        mine: Counter[str] = Counter()
        with triton.InferenceServerClient(self._address, channel_args=RETRYING) as client:
            while not self._done.wait(0.01):
                try:
                    client.infer("primary", [tensor()], client_timeout=PATIENCE_S)
                    mine["ok"] += 1
                except triton.InferenceServerException as error:
                    mine[error.status()] += 1
        self.counts += mine

    def stop(self) -> Counter[str]:
        self._done.set()
        for thread in self._threads:
            thread.join()
        return self.counts


def test_a_process_answers_both_wires_alike_and_finishes_its_calls_when_it_stops(process: Start) -> None:
    server = process(LVM_GRPC_PORT="0", LVM_DRAIN_S="0.2", LVM_ACCESS_LOG="1", LVM_MAX_WAIT_MS="500")
    expected = httpx.post(f"{server.url}/predict", content=CONTEXT.tobytes(), headers=OCTETS, timeout=PATIENCE_S)
    trace = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "x-request-id": "traced"}
    with grpc.insecure_channel(address(server)) as channel:
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        with triton.InferenceServerClient(address(server)) as client:
            answer = client.infer("primary", [tensor()], headers=trace)
            assert answer.as_numpy("vector").tobytes() == expected.content
            # It waits half a second for company while the process is told to stop.
            last: list[Any] = []
            client.async_infer("primary", [tensor()], lambda result, error: last.append(error or result))
            until(lambda: server.events("request"), "the first call to be logged")
            server.popen.send_signal(signal.SIGTERM)
            assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
            until(lambda: last, "the last call")
    assert server.stop() == 0
    assert last[0].as_numpy("vector").tobytes() == expected.content
    line = next(line for line in server.events("request") if line["request_id"] == "traced")
    assert (line["route"], line["outcome"], line["trace_id"]) == ("grpc:infer", "ok", "a" * 32)


def test_workers_share_the_port_and_outlive_a_death_and_a_restart(process: Start) -> None:
    server = process(LVM_GRPC_PORT="0", LVM_WORKERS="2", LVM_DRAIN_S="0.2")
    first = set(pids(server))
    assert not has_grpc(server.popen.pid)
    assert all(map(has_grpc, first))
    seen: set[str] = set()
    while len(seen) < 2:
        with grpc.insecure_channel(address(server), [OWN_CONNECTION]) as channel:
            asked = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
            seen.add(dict(asked.with_call(b"")[1].trailing_metadata())["x-worker"])
    callers = Callers(address(server))
    until(lambda: outcomes(server.url), "calls")
    server.popen.send_signal(signal.SIGHUP)
    until(lambda: len(pids(server)) == 2 and first.isdisjoint(pids(server)), "two new workers")
    counts = callers.stop()
    assert counts.keys() == {"ok"}
    assert outcomes(server.url)["ok"] == counts["ok"]
    os.kill(pids(server)[0], signal.SIGKILL)
    until(lambda: server.events("worker died"), "a death")
    with grpc.insecure_channel(address(server)) as channel:
        asked = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
        assert asked(b"", wait_for_ready=True)
    assert server.stop() == 0


def test_without_a_port_nothing_of_grpc_is_loaded(process: Start) -> None:
    assert not has_grpc(process().popen.pid)


def ends(environment: dict[str, str], *options: str, program: tuple[str | Path, ...] = (LVM,)) -> tuple[int, str]:
    command = (*program, "serve", "--port", "0", *options)
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=PATIENCE_S
    )
    return done.returncode, done.stderr


def test_without_the_extra_the_setting_is_an_error_that_names_it() -> None:
    code = "import sys; sys.modules['grpc'] = None; from lvm.__main__ import main; main()"
    for workers in ("1", "2"):
        status, text = ends({"LVM_GRPC_PORT": "0", "LVM_WORKERS": workers}, program=(sys.executable, "-c", code))
        assert status == 78
        assert "LVM_GRPC_PORT" in text
        assert "lvm-serve[grpc]" in text


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_that_is_taken_is_an_error(process: Start, workers: str) -> None:
    server = process(LVM_GRPC_PORT="0")
    taken = address(server).rpartition(":")[2]
    status, text = ends({"LVM_GRPC_PORT": taken, "LVM_REGISTRY": str(server.registry.root), "LVM_WORKERS": workers})
    assert (status, f"cannot listen on 127.0.0.1:{taken}" in text) == (78, True)


def test_other_machines_are_not_served_without_a_token() -> None:
    status, text = ends({"LVM_GRPC_PORT": "0", "LVM_HOST": "0.0.0.0"})
    assert (status, "no token is set" in text) == (78, True)
