"""A process that is told to stop a hundred times, runs out of descriptors or out of memory: it answers what it took."""

from __future__ import annotations

import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import httpx
import pytest

from tests.conftest import PATIENCE_S, until
from tests.fakes import contexts
from tests.faults.conftest import Injected, Target, drain

Start = Callable[..., Target]
BODY = contexts()[0].tobytes()
OCTETS = {"content-type": "application/octet-stream"}
REQUEST = (
    b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\ncontent-length: 160\r\n\r\n" + BODY
)


def taken(server: Target) -> int:
    """Return how many requests are being answered, or have been."""
    server.sent += 1
    lines = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text.splitlines()
    names = 'lvm_in_flight_requests{route="/predict"}', 'lvm_requests_total{route="/predict",'
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith(names)))


def post(url: str) -> int:
    return httpx.post(f"{url}/predict", content=BODY, headers=OCTETS, timeout=PATIENCE_S).status_code


@pytest.mark.parametrize("pause_s", [0.0, pytest.param(0.02, marks=pytest.mark.faults)])
def test_a_storm_of_signals_loses_no_request_that_was_taken(pause_s: float, target: Start, injected: Injected) -> None:
    """A hundred SIGTERMs and SIGINTs, at once or over two seconds: all that was in flight is answered; it exits 0."""
    server = target(
        answers={"amn": "slow", "gru": "slow"}, environment={"LVM_TIMEOUT_MS": "60000", "LVM_MAX_BATCH": "16"}
    )
    with ExitStack() as stack:
        callers = [stack.enter_context(server.connect()) for _ in range(40)]
        for caller in callers:
            caller.sendall(REQUEST)
            server.sent += 1
        until(lambda: taken(server) == 40, "the requests to be taken")
        for number in range(100):
            with suppress(ProcessLookupError):
                server.popen.send_signal(signal.SIGINT if number % 2 else signal.SIGTERM)
            threading.Event().wait(pause_s)
        assert Counter(drain(caller)[:15] for caller in callers) == {b"HTTP/1.1 200 OK": 40}
    assert server.popen.wait(PATIENCE_S) == 0
    injected("SIGTERM and SIGINT in turn, under load", "all that was taken is answered, exit 0", 100)


@pytest.mark.faults
def test_a_storm_while_callers_come_and_go_breaks_no_answer(target: Start, injected: Injected) -> None:
    """Who gets a connection gets an answer, or is turned away before any of it: never half of one."""
    server = target(environment={"LVM_DRAIN_S": "0.5"})
    stop, found = threading.Event(), Counter[str]()

    def call() -> None:
        while not stop.is_set():
            try:
                found[str(post(server.url))] += 1
            except httpx.ConnectError:
                found["turned away"] += 1
            except httpx.TransportError as error:
                found[type(error).__name__] += 1

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: found["200"] > 50, "the load")
    for _ in range(100):
        server.popen.send_signal(signal.SIGTERM)
    status = server.popen.wait(PATIENCE_S)
    stop.set()
    for thread in threads:
        thread.join()
    assert status == 0
    assert found.keys() <= {"200", "turned away"}, found
    injected("SIGTERM, a hundred at once, under new connections", "answered or turned away, exit 0", 100)


@pytest.mark.faults
def test_a_process_out_of_descriptors_answers_who_is_in_and_recovers(target: Start, injected: Injected) -> None:
    server = target(limits={"RLIMIT_NOFILE": 48})
    assert server.http.get("/livez").status_code == 200
    for _ in range(3):
        with ExitStack() as stack:
            for _ in range(300):
                stack.enter_context(server.connect())
            for path in ("/livez", "/readyz", "/metrics"):
                assert server.http.get(path).status_code == 200, path
            assert server.http.post("/predict", content=BODY, headers=OCTETS).status_code == 200
            ledger = server.http.get("/ledger")  # it opens a file
            assert (ledger.status_code, ledger.headers.get("retry-after")) == (503, "1")
            injected("sockets beyond the last descriptor", "who is in is answered", 300)
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as fresh:
            server.sent += 1
            assert fresh.get("/readyz").status_code == 200
    assert server.popen.poll() is None


@pytest.mark.faults
def test_bodies_larger_than_the_memory_left_crash_nothing(target: Start, injected: Injected) -> None:
    """Twelve bodies of 50 MB to a process that may grow by 200 MB: each is answered, or its connection closed."""
    server = target(environment={"LVM_RECEIVE_S": "5", "LVM_TIMEOUT_MS": "60000"}, grow_mb=200)
    body = b" " * 50_000_000

    def send(_: int) -> str:
        with socket.create_connection(server.address, timeout=20) as connection, suppress(OSError):
            connection.sendall(
                b"POST /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 50000000\r\n\r\n"
            )
            connection.sendall(body)
            return drain(connection)[9:12].decode() or "closed"
        return "closed"

    with ThreadPoolExecutor(12) as pool:
        found = Counter(pool.map(send, range(12)))
    counted = sum(count for (route, _), count in server.counted().items() if route == "/predict")
    assert counted <= 12  # what could not be read for want of memory cannot be counted
    server.sent += counted
    assert found.keys() <= {"400", "413", "429", "500", "503", "closed"}, found
    assert found["closed"] < 12, found
    assert server.http.get("/livez").status_code == 200
    assert server.http.post("/predict", content=BODY, headers=OCTETS).status_code == 200
    for what, count in found.items():
        injected("a body larger than the memory left", what, count)
