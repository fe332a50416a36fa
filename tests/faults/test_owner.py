"""Workers whose nets are an owner's, all relieved under load: nobody notices."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.conftest import Process, until
from tests.e2e.test_owner import owner_of
from tests.e2e.test_workers import Callers, outcomes, pids
from tests.faults.conftest import Injected


def relieve(server: Process) -> None:
    """Send a SIGHUP; return once others are there and have answered."""
    before, old = set(pids(server)), owner_of(server)
    os.kill(server.popen.pid, signal.SIGHUP)
    until(lambda: len(pids(server)) == 3 and not before & set(pids(server)), "three successors")
    assert owner_of(server) not in (0, old)
    answered = outcomes(server.url)["ok"]
    until(lambda: outcomes(server.url)["ok"] > answered + 20, "answers by them")


@pytest.mark.faults
def test_owner_and_workers_are_relieved_under_load_without_a_failed_request(
    process: Callable[..., Process], injected: Injected
) -> None:
    """Three SIGHUPs: each time an owner and two workers follow others, and every answer is a 200 that is counted."""
    server = process(LVM_WORKERS="2", LVM_OWNER="on", LVM_DRAIN_S="0.3", LVM_TIMEOUT_MS="60000")
    callers = Callers(server.url)
    for _ in range(3):
        relieve(server)
    counts = callers.stop()
    assert set(counts) == {"200"}
    assert outcomes(server.url) == {"ok": counts["200"]}
    assert server.stop() == 0
    assert not server.events("owner died") + server.events("worker died") + server.events("owner lost")
    injected("SIGHUP to workers and their owner, under load", "all are relieved, no request fails", 3)
