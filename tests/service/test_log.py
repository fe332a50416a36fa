"""The log: one JSON object a line whoever speaks, lines of requests by lot, and failures that cannot flood it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
import structlog

from service.log import MOST_FAILURES, AccessLog
from tests.conftest import ROOT


def test_every_line_is_json_whoever_wrote_it() -> None:
    code = """
import logging
from service.log import configure, logger
configure("info")
logger().info("ours", alias="primary")
logging.getLogger("some.package").warning("theirs: %s", "two\\nlines")
try:
    raise ValueError("why")
except ValueError:
    logging.getLogger("some.package").exception("failed")
logging.getLogger("some.package").info("nobody asked")
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, check=True).stderr
    ours, theirs, failed = map(json.loads, said.splitlines())
    assert (ours["event"], ours["level"], ours["alias"]) == ("ours", "info", "primary")
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("theirs: two\nlines", "warning", "some.package")
    assert failed["exception"].endswith("ValueError: why")
    assert ours.keys() & theirs.keys() & failed.keys() >= {"event", "level", "timestamp"}


def test_a_line_is_one_write_so_that_workers_do_not_mix_theirs() -> None:
    """Also unbuffered, as in the image; a datagram is what one write wrote."""
    code = "from service.log import configure, logger; configure('info'); logger().info('one'); logger().info('two')"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        subprocess.run([sys.executable, "-u", "-c", code], cwd=ROOT, stderr=theirs, check=True)
        written = [ours.recv(4096) for _ in range(2)]
    assert [json.loads(line)["event"] for line in written] == ["one", "two"]
    assert all(line.endswith(b"\n") for line in written)


def test_requests_have_a_line_by_lot_and_failures_always() -> None:
    lots = iter([0.1, 0.3, 0.3])
    access = AccessLog(0.2, lambda: next(lots), lambda: 0.0)
    assert [access.wants(status) for status in (200, 200, 500)] == [True, False, True]
    nobody = AccessLog(0, clock=lambda: 0.0)
    assert [nobody.wants(status) for status in (200, 422, 429, 499, 503)] == [False] * 4 + [True]


def test_a_flood_of_failures_is_cut_off_and_counted() -> None:
    now = 0.0
    access = AccessLog(0, clock=lambda: now)
    assert sum(access.wants(503) for _ in range(1000)) == MOST_FAILURES
    now = 1.0
    assert access.wants(503)
    with structlog.testing.capture_logs() as lines:
        access.write(503, outcome="overloaded", served_by="")
        access.write(200, outcome="ok")
    failed = {"event": "request failed", "log_level": "error", "status": 503, "outcome": "overloaded"}
    assert lines == [
        {**failed, "left_out": 1000 - MOST_FAILURES},
        {"event": "request", "log_level": "info", "status": 200, "outcome": "ok"},
    ]


@pytest.mark.parametrize("status", [200, 503])
def test_all_means_all(status: int) -> None:
    access = AccessLog(1, clock=lambda: 0.0)
    assert all(access.wants(status) for _ in range(100))
