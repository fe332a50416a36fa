"""The log: one JSON object a line, lines for a share of requests, and a limit for failures."""

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

from service.telemetry.log import MAX_FAILURES, AccessLog, LogWriter
from tests.conftest import PATIENCE_S, ROOT, Mount


def test_lines_of_the_service_and_of_libraries_are_json() -> None:
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
logging.getLogger("some.package").info("below the level")
"""
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, check=True).stderr
    ours, theirs, failed = map(json.loads, output.splitlines())
    assert (ours["event"], ours["level"], ours["alias"]) == ("ours", "info", "primary")
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("theirs: two\nlines", "warning", "some.package")
    assert failed["exception"].endswith("ValueError: why")
    assert ours.keys() & theirs.keys() & failed.keys() >= {"event", "level", "timestamp"}


def test_writes_each_line_at_once_so_that_lines_of_workers_do_not_mix() -> None:
    """Also if stderr is unbuffered, as in the image. A datagram is what one call wrote."""
    code = "from service.telemetry import log as l; l.configure('info'); l.logger().info('one'); l.logger().info('two')"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        subprocess.run([sys.executable, "-u", "-c", code], cwd=ROOT, stderr=theirs, check=True)
        written = [ours.recv(4096) for _ in range(2)]
    assert [json.loads(line)["event"] for line in written] == ["one", "two"]
    assert all(line.endswith(b"\n") for line in written)


SMALL = 4096  # the least size of a pipe in bytes


class Pipe:
    """A pipe of the least size, and a log writer that counts the lines it drops."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, SMALL)
        self.log = LogWriter(self.writer, max_bytes=2 * SMALL)
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


def test_counts_lines_while_the_pipe_is_full_and_writes_again_when_it_is_read(pipe: Pipe) -> None:
    lines = [b"%03d" % number + b"x" * 1020 + b"\n" for number in range(100)]
    for line in lines:
        pipe.log.write(line)  # would block if the writer waited
    pipe.log.drain(0.01)  # returns although the pipe is full
    read = b""
    while len(read) < (100 - pipe.dropped) * len(lines[0]):
        read += os.read(pipe.reader, SMALL)
    assert pipe.dropped >= 80
    assert read == b"".join(lines[: 100 - pipe.dropped])
    pipe.log.write(b"once more\n")
    assert os.read(pipe.reader, SMALL) == b"once more\n"


def test_writes_every_line_to_a_descriptor_that_does_not_block(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer, False)
    for number in range(6):
        pipe.log.write(b"%d" % number + b"x" * 1022 + b"\n")
    read = b""
    while len(read) < 6 * 1024:
        read += os.read(pipe.reader, SMALL)
    assert [line[:1] for line in read.splitlines()] == [b"0", b"1", b"2", b"3", b"4", b"5"]
    assert pipe.dropped == 0


@pytest.mark.parametrize("end", ["reader", "writer"])
def test_counts_lines_if_stderr_or_its_reader_is_closed(pipe: Pipe, end: str) -> None:
    os.close(getattr(pipe, end))
    for _ in range(3):
        pipe.log.write(b"unread\n")
    pipe.log.drain(PATIENCE_S)
    assert pipe.dropped == 3


def test_counts_lines_that_were_dropped_before_on_drop() -> None:
    writer = LogWriter(-1)
    writer.write(b"unread\n")
    writer.drain(PATIENCE_S)
    counted: list[int] = []
    writer.on_drop(lambda: counted.append(1))
    assert counted == [1]


def test_starts_a_new_line_if_a_full_disk_cut_the_last_one_short(mount: Mount) -> None:
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


def test_logs_warnings_and_uncaught_exceptions() -> None:
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


def test_a_process_exits_although_its_log_is_not_read() -> None:
    """The exit waits for queued lines, but not for ever."""
    reader, writer = os.pipe()
    code = (
        "from service.telemetry import log as l; l.configure('info')\nfor _ in range(1000): l.logger().info('x' * 1000)"
    )
    try:
        run_in_process(code, stderr=writer, timeout=PATIENCE_S)
    finally:
        os.close(reader)
        os.close(writer)


def test_logs_a_share_of_requests_and_every_failure() -> None:
    draws = iter([0.1, 0.3, 0.3])
    access = AccessLog(0.2, lambda: next(draws), lambda: 0.0)
    assert [access.wants(status) for status in (200, 200, 500)] == [True, False, True]
    none = AccessLog(0, clock=lambda: 0.0)
    assert [none.wants(status) for status in (200, 422, 429, 499, 503)] == [False] * 4 + [True]


def test_limits_lines_for_failures_and_counts_the_rest() -> None:
    now = 0.0
    access = AccessLog(0, clock=lambda: now)
    assert sum(access.wants(503) for _ in range(1000)) == MAX_FAILURES
    now = 1.0
    assert access.wants(503)
    with structlog.testing.capture_logs() as lines:
        access.write(503, outcome="overloaded", served_by="")
        access.write(200, outcome="ok")
    failed = {"event": "request failed", "log_level": "error", "status": 503, "outcome": "overloaded"}
    assert lines == [
        {**failed, "left_out": 1000 - MAX_FAILURES},
        {"event": "request", "log_level": "info", "status": 200, "outcome": "ok"},
    ]


@pytest.mark.parametrize("status", [200, 503])
def test_a_share_of_1_logs_every_request(status: int) -> None:
    access = AccessLog(1, clock=lambda: 0.0)
    assert all(access.wants(status) for _ in range(100))
