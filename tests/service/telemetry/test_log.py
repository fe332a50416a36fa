"""The log: one JSON object a line whoever speaks, lines of requests by lot, and failures that cannot flood it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
import structlog

from service.telemetry.log import MOST_FAILURES, AccessLog, LogWriter
from tests.conftest import PATIENCE_S, ROOT, Mount


def test_every_line_is_json_whoever_wrote_it() -> None:
    code = """
import logging
from service.telemetry.log import configure, logger
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
    code = "from service.telemetry import log as l; l.configure('info'); l.logger().info('one'); l.logger().info('two')"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        subprocess.run([sys.executable, "-u", "-c", code], cwd=ROOT, stderr=theirs, check=True)
        written = [ours.recv(4096) for _ in range(2)]
    assert [json.loads(line)["event"] for line in written] == ["one", "two"]
    assert all(line.endswith(b"\n") for line in written)


SMALL = 4096  # bytes that a pipe holds at least


class Pipe:
    """A pipe as small as may be, and a log writer that counts what it drops."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, SMALL)
        self.log = LogWriter(self.writer, most_bytes=2 * SMALL)
        self.dropped = 0
        self.log.on_drop(self.count)

    def count(self) -> None:
        self.dropped += 1


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    for end in (made.reader, made.writer):
        with suppress(OSError):
            os.close(end)


def test_counts_lines_that_nobody_reads_and_writes_again_if_somebody_does(pipe: Pipe) -> None:
    lines = [b"%03d" % number + b"x" * 1020 + b"\n" for number in range(100)]
    for line in lines:
        pipe.log.write(line)  # none waits, or the test would
    pipe.log.drain(0.01)  # nor does a stop
    read = b""
    while len(read) < (100 - pipe.dropped) * len(lines[0]):
        read += os.read(pipe.reader, SMALL)
    assert pipe.dropped >= 80
    assert read == b"".join(lines[: 100 - pipe.dropped])
    pipe.log.write(b"once more\n")
    assert os.read(pipe.reader, SMALL) == b"once more\n"


def test_writes_to_a_descriptor_that_does_not_block_as_to_another(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer, False)
    for number in range(6):
        pipe.log.write(b"%d" % number + b"x" * 1022 + b"\n")
    read = b""
    while len(read) < 6 * 1024:
        read += os.read(pipe.reader, SMALL)
    assert [line[:1] for line in read.splitlines()] == [b"0", b"1", b"2", b"3", b"4", b"5"]
    assert pipe.dropped == 0


@pytest.mark.parametrize("end", ["reader", "writer"])
def test_counts_lines_if_stderr_or_its_reader_is_gone(pipe: Pipe, end: str) -> None:
    os.close(getattr(pipe, end))
    for _ in range(3):
        pipe.log.write(b"to nobody\n")
    pipe.log.drain(PATIENCE_S)
    assert pipe.dropped == 3


def test_counts_what_was_dropped_before_anybody_counted() -> None:
    writer = LogWriter(-1)
    writer.write(b"to nobody\n")
    writer.drain(PATIENCE_S)
    counted: list[int] = []
    writer.on_drop(lambda: counted.append(1))
    assert counted == [1]


def test_begins_a_line_anew_if_the_last_was_cut_short_by_a_full_disk(mount: Mount) -> None:
    disk = mount("size=64k")
    log, rest = disk / "log", disk / "rest"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    writer, dropped = LogWriter(descriptor), []
    writer.on_drop(lambda: dropped.append(1))
    rest.write_bytes(b"x" * (64 * 1024 - 8192))
    for number in range(12):
        writer.write(b"%02d" % number + b"x" * 1000 + b"\n")
    writer.drain(PATIENCE_S)
    assert dropped
    rest.unlink()
    writer.write(b"room again\n")
    writer.drain(PATIENCE_S)
    os.close(descriptor)
    *whole, last = log.read_bytes().splitlines()
    assert last == b"room again"
    assert sum(len(line) == 1002 for line in whole) == 12 - len(dropped)


def run_in_process(code: str, **streams: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, **streams)  # type: ignore[call-overload, no-any-return]


def test_warnings_and_exceptions_that_nobody_caught_are_lines_like_any_other() -> None:
    code = """
import threading, warnings
from service.telemetry.log import configure
configure("info", worker=3)
warnings.warn("old")
thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()
class Bad:
    def __del__(self): raise KeyError("finalizer")
Bad()
print("printed", 1, file=__import__("sys").stderr)
"""
    *lines, printed = run_in_process(code, stderr=subprocess.PIPE).stderr.splitlines()
    warned, ended, finalized = map(json.loads, lines)
    assert "UserWarning: old" in warned["event"]
    assert ended["exception"].endswith("ZeroDivisionError: division by zero")
    assert finalized["exception"].endswith("KeyError: 'finalizer'")
    assert {line["worker"] for line in (warned, ended, finalized)} == {3}
    assert printed == b"printed 1"


def test_a_process_ends_though_nobody_reads_what_it_logged() -> None:
    """The end waits for what is queued, but not for ever."""
    reader, writer = os.pipe()
    code = (
        "from service.telemetry import log as l; l.configure('info')\nfor _ in range(1000): l.logger().info('x' * 1000)"
    )
    try:
        run_in_process(code, stderr=writer, timeout=PATIENCE_S)
    finally:
        os.close(reader)
        os.close(writer)


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
