"""Workers whose nets are an owner's: the same answers, one promotion, and nobody hangs when the owner dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import numpy as np

from tests.conftest import PATIENCE_S, Process, until
from tests.e2e.test_workers import Callers, Start, ask, outcomes, pids


def owner_of(server: Process) -> int:
    """Return the process that owns the nets."""
    found = [pid for pid in pids(server) if b"\0own\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found[0] if found else 0


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
    assert shared.stop() == 0
    assert not shared.events("owner died") + shared.events("worker died")


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
    assert server.stop() == 0
