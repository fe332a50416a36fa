"""The serving process, alone or as one of several workers."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from service.app import create_app
from service.processes.server import SWITCH_INTERVAL_S, Server, run, uvicorn_config
from service.processes.sockets import CannotListen, bind, lock_address, urls
from service.settings import Settings
from tests.conftest import PATIENCE_S, Running
from tests.fakes import FakeLoader, mean_of, registry_of

Serve = Callable[..., Running]
CALLERS = 100


def test_rejects_an_address_that_another_service_has_locked() -> None:
    """The kernel lets both bind. The second would fail, or share the port, when it is ready."""
    with bind("127.0.0.1", 0, shared=True) as first, lock_address(first):
        port = first.getsockname()[1]
        taken = pytest.raises(CannotListen, match=f"cannot listen on 127.0.0.1:{port}: Address already in use")
        with bind("127.0.0.1", port, shared=True) as second, taken:
            lock_address(second)
    with bind("127.0.0.1", port, shared=True) as third:
        lock_address(third).close()


def test_answers_a_request_that_arrives_just_before_the_connection_closes(serve: Serve) -> None:
    """The server stops while the connection is idle and the event loop is too busy to read."""
    server = serve()
    host, port = server.url.removeprefix("http://").split(":")
    request = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
    is_busy, has_sent = threading.Event(), threading.Event()
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as caller:
        caller.sendall(request)
        assert caller.recv(4096).startswith(b"HTTP/1.1 200")
        connection = next(iter(server.server.server_state.connections))
        connection.loop.call_soon_threadsafe(lambda: (is_busy.set(), has_sent.wait(), connection.shutdown()))
        is_busy.wait()
        caller.sendall(request)
        has_sent.set()
        assert caller.recv(4096).startswith(b"HTTP/1.1 200")


def test_accepts_all_connections_that_wait_within_a_few_turns_of_the_event_loop(serve: Serve) -> None:
    """The loop's own server accepts one a turn. A probe would wait for the answers to all callers before it."""
    server = serve()
    host, port = server.url.removeprefix("http://").split(":")
    connections = server.server.server_state.connections
    loop_is_busy, have_connected, has_counted = threading.Event(), threading.Event(), threading.Event()
    turns = 0

    def wait_and_count(loop: asyncio.AbstractEventLoop) -> None:
        loop_is_busy.set()
        have_connected.wait()
        loop.call_soon(count_turns, loop)

    def count_turns(loop: asyncio.AbstractEventLoop) -> None:
        nonlocal turns
        turns += 1
        if len(connections) > CALLERS or turns == CALLERS:
            has_counted.set()
        else:
            loop.call_soon(count_turns, loop)

    with ExitStack() as stack:
        first = stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE_S))
        first.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert first.recv(4096).startswith(b"HTTP/1.1 200")
        loop = next(iter(connections)).loop
        loop.call_soon_threadsafe(wait_and_count, loop)
        loop_is_busy.wait()
        for _ in range(CALLERS):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE_S))
        have_connected.set()
        has_counted.wait()
    assert turns <= 10


class Unstarted(Server):
    """A server that only reads the interval of the interpreter."""

    interval = 0.0

    def run(self, sockets: Any = None) -> None:
        self.interval = sys.getswitchinterval()


def test_shortens_the_interval_after_which_a_thread_gets_the_interpreter(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Holds for every server, also a worker. With Python's interval a net would starve in a busy process."""
    before = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(before))
    settings = Settings(registry=registry_of(tmp_path, primary="amn").root)
    app = create_app(settings, FakeLoader(amn=mean_of))
    server = Unstarted(uvicorn_config(app, settings), app, settings)
    with socket.socket() as listener:
        assert run(server, app, listener) == 1
    assert server.interval == pytest.approx(SWITCH_INTERVAL_S)


def test_the_urls_of_an_address_are_those_of_service_console_and_documentation() -> None:
    assert urls("127.0.0.1", 80) == {
        "url": "http://127.0.0.1:80",
        "console": "http://127.0.0.1:80/",
        "docs": "http://127.0.0.1:80/docs",
    }
    assert urls("::1", 80)["url"] == "http://[::1]:80"
