"""The serving process: it drains at SIGTERM, and its exit status reports how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from time import monotonic
from typing import TYPE_CHECKING, NoReturn

import uvicorn

from service.app import Service, create_app
from service.http.connection import LINGER_S, Connection
from service.processes.acceptor import Acceptor
from service.processes.heartbeat import SIGNALS
from service.processes.sockets import (
    CannotListen,
    bind,
    check_exposure,
    lock_address,
    reserve_port,
    stop_accepting,
    urls,
)
from service.settings import Settings
from service.tasks import CatchAndLog
from service.telemetry.log import configure, log_writer, logger, warn_of_unknown_settings

if TYPE_CHECKING:
    from service.grpc.server import GrpcServer

# M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h, in bytes.
MALLOPT = {-3: 2**20, -1: 2**26}
# A thread that leaves a net waits this long for the interpreter while the event loop is busy. Python's default of 5 ms
# is several times the run of a batch.
SWITCH_INTERVAL_S = 0.0005


class Server(uvicorn.Server):
    """A uvicorn server that drains at SIGTERM or SIGINT: /readyz answers 503 at once, and the server stops later.

    For `drain_s` seconds it still answers requests, with `Connection: close`, so that load balancers and keep-alive
    clients move away. Then the kernel drops new connections, the sockets close, and requests in flight finish.
    """

    _listeners: Sequence[socket.socket] = ()
    _acceptors: Sequence[Acceptor] = ()

    def __init__(self, config: uvicorn.Config, app: Service, settings: Settings) -> None:
        super().__init__(config)
        self._process = app.state.process
        self._grpc = app.grpc
        self._settings = settings
        self._catch = CatchAndLog("tick")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, and announce it."""
        await super().startup(sockets)
        # Not before: with these limits, the versions take a tenth longer to load.
        return_freed_memory()
        self._listeners = sockets or ()
        if self.started and sockets and self._grpc:
            await self._start_grpc(self._grpc, sockets[0].getsockname()[0])
        if self.started and sockets:
            self._acceptors = [Acceptor(listener, self._make_protocol) for listener in sockets]
            self.announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting connections, and finish those that are there."""
        for acceptor in self._acceptors:
            await acceptor.close()
        if self._grpc:
            self._wait_for(asyncio.create_task(self._grpc.stop(self._settings.grace_s)))
        await super().shutdown(sockets)

    async def _start_grpc(self, server: GrpcServer, host: str) -> None:
        try:
            await server.start(host, self._settings.grpc_port or 0)
        except RuntimeError as error:
            self._process.failure = CannotListen(f"cannot listen on {host}:{self._settings.grpc_port}: {error}")
            self.should_exit = True

    def _wait_for(self, task: asyncio.Task[None]) -> None:
        """Have the shutdown wait for a task, as it does for connections."""
        self.server_state.tasks.add(task)
        task.add_done_callback(self.server_state.tasks.discard)

    def _make_protocol(self) -> asyncio.Protocol:
        """Return the protocol of a new connection, as uvicorn makes it."""
        make: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def announce(self) -> None:
        """Log the address."""
        host, port = self._listeners[0].getsockname()[:2]
        calls = {"grpc": f"{host}:{self._grpc.port}"} if self._grpc else {}
        logger().info("listening", **urls(host, port), **calls)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop. uvicorn calls this ten times a second."""
        if counter % 10 == 0:
            with self._catch:
                self.each_second()
        return await super().on_tick(counter)

    def each_second(self) -> None:
        """Close the connections that are too slow, or idle for too long."""
        if self._grpc:
            self._grpc.update()
        now, known = monotonic(), self._settings
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.close_if_slow(now - known.receive_s, now - known.keep_alive_s)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on a signal. Unlike uvicorn, do not raise it again, so that a clean stop exits with 0."""
        # Only the main thread can handle signals.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.drain, number.name)
        loop.add_signal_handler(signal.SIGHUP, self.ignore_hangup)
        yield
        for number in (*SIGNALS, signal.SIGHUP):
            loop.remove_signal_handler(number)

    def ignore_hangup(self) -> None:
        """Log that SIGHUP has no effect."""
        logger().warning("hangup ignored", detail="only --workers restarts without a gap; stop and start this process")

    def drain(self, why: str) -> None:
        """Answer requests for `drain_s` seconds, then stop. A second call stops at once.

        Before the server has started there is nothing to finish, and loading may hang: the process exits.
        """
        if not self.started:
            exit_before_start(why)
        if self._process.is_draining:
            self.should_exit = True
            return
        self._process.is_draining = True
        if self._grpc:
            self._grpc.update()
        logger().info("draining", why=why, seconds=self._settings.drain_s)
        asyncio.get_running_loop().call_later(self._settings.drain_s, self._stop)

    def stop_accepting(self) -> None:
        """Make the kernel drop new connections, if it can."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                stop_accepting(listener)

    def _stop(self) -> None:
        self.stop_accepting()
        asyncio.get_running_loop().call_later(LINGER_S, self._exit)

    def _exit(self) -> None:
        self.should_exit = True


def exit_before_start(why: str) -> NoReturn:
    """Exit with status 0, even if threads hang. No request is lost."""
    logger().info("told to stop before it was ready", why=why)
    log_writer().drain()
    os._exit(0)


def uvicorn_config(app: Service, settings: Settings) -> uvicorn.Config:
    """Return how uvicorn runs `app`. uvicorn logs nothing, because the service counts or logs every event."""
    return uvicorn.Config(
        app,
        http=Connection,
        loop="uvloop",
        ws="none",
        lifespan="on",
        proxy_headers=False,
        access_log=False,
        log_config=None,
        log_level="critical",
        server_header=False,
        date_header=True,
        timeout_graceful_shutdown=max(1, round(settings.grace_s)),
    )


def serve(settings: Settings) -> int:
    """Serve until a signal comes; return the exit status: 0 after a clean drain, else 1.

    Raises:
        BadSettings: The tokens cannot be read.
        CannotListen: The address is in use, or exposed without a token.
        UnknownVersion, BadCheckpoint: The version that an alias names cannot be served.
    """
    configure(settings.log_level)
    warn_of_unknown_settings()
    app = create_app(settings)
    with ExitStack() as stack:
        listener = stack.enter_context(bind(settings.host, settings.port))
        stack.enter_context(lock_address(listener))
        check_exposure(listener.getsockname()[0], app.tokens, insecure=settings.insecure)
        if settings.grpc_port is not None:
            port = stack.enter_context(reserve_port(settings.host, settings.grpc_port))
            settings = settings.model_copy(update={"grpc_port": port})
        return run(Server(uvicorn_config(app, settings), app, settings), app, listener)


def run(server: Server, app: Service, listener: socket.socket) -> int:
    """Run a server until it stops; return the exit status, or raise the error that kept the app from starting."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with contextlib.suppress(SystemExit):
        server.run(sockets=[listener])
    if app.state.process.failure:
        raise app.state.process.failure
    if not server.started:
        logger().error("did not start")
    return 0 if server.started and not server.force_exit else 1


def return_freed_memory() -> None:
    """Make malloc give each body of a megabyte or more pages of its own, which it returns when they are freed.

    By default glibc raises this threshold up to 32 MB. Below it, bodies that grow side by side leave holes.
    """
    # Another C library may have no mallopt.
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for option, size in MALLOPT.items():
            libc.mallopt(option, size)
        libc.malloc_trim(0)
