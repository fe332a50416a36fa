"""Workers whose nets are an owner's: the same answers, one promotion, a clean stop, and nobody hangs when it dies."""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np

from tests.conftest import PATIENCE_S, Process, until
from tests.e2e.test_workers import CONTEXT, Callers, Start, ask, outcomes, pids

REQUEST = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\ncontent-length: 7680\r\n\r\n"
HELD = 20


def owner_of(server: Process) -> int:
    """Return the process that owns the nets."""
    for pid in pids(server):
        # A process that was killed may be gone by now.
        with suppress(FileNotFoundError, ProcessLookupError):
            if b"\0own\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return 0


def served_by(url: str, model: str) -> str | None:
    """Return the alias that answers for `model`, None if none does."""
    answer = httpx.post(f"{url}/predict", json={"context": CONTEXT.tolist(), "model": model}, timeout=PATIENCE_S)
    return answer.json().get("served_by")


def test_answers_are_those_of_one_process_and_a_promotion_reaches_all(process: Start) -> None:
    alone = process(LVM_THREADS="1")
    shared = process(LVM_WORKERS="2", LVM_OWNER="on", LVM_THREADS="1", LVM_RELOAD_S="0.05")
    with httpx.Client(timeout=PATIENCE_S) as client:
        one, other = ask(client, alone.url), ask(client, shared.url)
        assert other.content == one.content
        assert np.isfinite(np.frombuffer(one.content, "<f4")).all()
        assert other.headers["x-model-version"] == one.headers["x-model-version"]
    gru = shared.registry.resolve("fallback")
    shared.registry.point("primary", gru)

    def all_serve_it() -> bool:
        found = {}
        while len(found) < 2:
            with httpx.Client(timeout=PATIENCE_S) as client:
                headers = ask(client, shared.url).headers
            found[headers["x-worker"]] = headers["x-model-version"]
        return set(found.values()) == {gru.version}

    until(all_serve_it, "both workers to serve the promoted version")
    shared.registry.point("fallback-2", gru)
    until(lambda: served_by(shared.url, "fallback-2") == "fallback-2", "a second fallback to answer")
    assert shared.stop() == 0
    assert not shared.events("owner died") + shared.events("worker died")


def test_text_is_encoded_in_each_worker_for_the_nets_of_the_owner(process: Start) -> None:
    server = process(LVM_WORKERS="2", LVM_OWNER="on", LVM_THREADS="1", LVM_TIMEOUT_MS="60000")
    texts = ["Rabbits dig burrows.", "Hares live alone."]
    found = {}
    while len(found) < 2:
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
            embedded = client.post("/embed", json={"texts": texts, "model": "primary"})
            passages = client.post("/retrieve", json={"texts": texts, "k": 1}).json()
        found[embedded.headers["x-worker"]] = np.array(embedded.json()["vectors"])
        assert passages["read_as"] == "partial_context"
        assert "rerank_score" in passages["results"][0]
    one, other = found.values()
    np.testing.assert_array_equal(one, other)
    assert server.stop() == 0


def test_a_killed_owner_is_replaced_and_nobody_hangs(process: Start) -> None:
    server = process(LVM_WORKERS="2", LVM_OWNER="on", LVM_DRAIN_S="0.3")
    callers = Callers(server.url)
    until(lambda: outcomes(server.url).get("ok", 0) > 20, "some requests")
    victim = owner_of(server)
    os.kill(victim, signal.SIGKILL)
    until(lambda: owner_of(server) not in (0, victim), "another owner")
    before = outcomes(server.url)["ok"]
    until(lambda: outcomes(server.url)["ok"] > before + 20, "answers by it")
    counts = callers.stop()
    assert set(counts) == {"200", "503"}
    counted = outcomes(server.url)
    assert counted.pop("ok") == counts["200"]
    assert sum(counted.values()) == counts["503"]
    assert [event["status"] for event in server.events("owner died")] == [137]
    events = [event["event"] for event in server.log()]
    assert events.index("owner died") < len(events) - 1 - events[::-1].index("version live")
    scraped = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text
    assert {'lvm_worker_deaths_total{role="owner"} 1.0', 'lvm_worker_deaths_total{role="worker"} 0.0'} <= {
        *scraped.splitlines()
    }
    assert server.stop() == 0


def taken(url: str) -> float:
    """Return how many requests to /predict are being answered, or have been."""
    names = 'lvm_in_flight_requests{route="/predict"}', 'lvm_requests_total{route="/predict",'
    lines = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(names))


def status_of(caller: socket.socket) -> bytes:
    """Return the status line of all that comes until the other side closes."""
    with caller, caller.makefile("rb") as answer:
        return answer.read().partition(b"\r\n")[0]


def test_a_stop_answers_what_waits_at_the_owner_for_company(process: Start) -> None:
    """Workers leave before their owner does: what they took is answered, and everybody exits with 0."""
    patient = {"LVM_MAX_WAIT_MS": "700", "LVM_TIMEOUT_MS": "60000", "LVM_DRAIN_S": "0.1"}
    server = process(LVM_WORKERS="2", LVM_OWNER="on", **patient)
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    callers = [socket.create_connection(address, PATIENCE_S) for _ in range(HELD)]
    for caller in callers:
        caller.sendall(REQUEST + CONTEXT.tobytes())
    until(lambda: taken(server.url) == HELD, "the requests to be taken")
    server.popen.send_signal(signal.SIGTERM)
    assert Counter(map(status_of, callers)) == {b"HTTP/1.1 200 OK": HELD}
    assert server.popen.wait(PATIENCE_S) == 0
    assert not server.events("owner died") + server.events("worker died") + server.events("owner lost")
