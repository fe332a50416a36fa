"""The process: a drain at SIGTERM, an exit status that means something."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from time import monotonic
from typing import NoReturn

import uvicorn

from service.app import Service, create_app
from service.http.auth import Tokens
from service.http.connection import LINGER_S, Protocol
from service.settings import Settings, unknown_settings
from service.tasks import CatchAndLog
from service.telemetry.log import configure, log_writer, logger

SIGNALS = signal.SIGTERM, signal.SIGINT
SO_ATTACH_FILTER = 26  # not in the socket module
MALLOPT = {-3: 2**20, -1: 2**26}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h, in bytes
SWITCH_INTERVAL_S = (
    0.0005  # Python's own 5 ms, several times a batch, starve a net while the event loop is busy saying no
)


class CannotListen(Exception):
    """The address is taken, or is none, or is one that others reach while no token is wanted."""


class Server(uvicorn.Server):
    """A uvicorn server that drains: at SIGTERM or SIGINT /readyz says 503 at once, then it stops.

    For `drain_s` seconds requests are still answered, with `Connection: close`, so that balancers
    and keep-alive callers move away. Then new connections are turned away by the kernel while those
    already made are taken in, the sockets close, and what was accepted is finished.
    """

    _listeners: Sequence[socket.socket] = ()

    def __init__(self, config: uvicorn.Config, app: Service, settings: Settings) -> None:
        super().__init__(config)
        self._process, self._settings = app.state.process, settings
        self._tick = CatchAndLog("tick")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say where."""
        await super().startup(sockets)
        self._listeners = sockets or ()
        if self.started and sockets:
            self.announce()

    def announce(self) -> None:
        """Say where it listens."""
        host, port = self._listeners[0].getsockname()[:2]
        logger().info("listening", url=f"http://{host}:{port}")

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop; once a second, what else there is to do."""
        if counter % 10 == 0:
            with self._tick:
                self.each_second()
        return await super().on_tick(counter)

    def each_second(self) -> None:
        """Close the connections that are too slow or idle too long."""
        now, known = monotonic(), self._settings
        for connection in list(self.server_state.connections):
            if isinstance(connection, Protocol):
                connection.close_if_slow(now - known.receive_s, now - known.keep_alive_s)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on a signal; unlike uvicorn's, the signal is not raised again, so a clean stop exits 0."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can listen to signals
            return
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.drain, number.name)
        loop.add_signal_handler(signal.SIGHUP, self.ignore_hangup)
        yield
        for number in (*SIGNALS, signal.SIGHUP):
            loop.remove_signal_handler(number)

    def ignore_hangup(self) -> None:
        """Say that SIGHUP changes nothing: one process cannot be renewed without a gap."""
        logger().warning("hangup ignored", detail="restart it; the supervisor of --workers renews without a gap")

    def drain(self, why: str) -> None:
        """Answer on while others move away, then stop; asked twice, stop now.

        Until it has started there is nothing to finish, and what is being loaded may hang: end the process.
        """
        if not self.started:
            exit_before_start(why)
        if self._process.is_draining:
            self.should_exit = True  # asked twice: no more waiting
            return
        self._process.is_draining = True
        logger().info("draining", why=why, seconds=self._settings.drain_s)
        asyncio.get_running_loop().call_later(self._settings.drain_s, self._stop)

    def stop_accepting(self) -> None:
        """Have the kernel turn new callers away."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):  # where the kernel will not, a late caller may meet a reset
                stop_accepting(listener)

    def _stop(self) -> None:
        self.stop_accepting()
        asyncio.get_running_loop().call_later(LINGER_S, self._exit)

    def _exit(self) -> None:
        self.should_exit = True


def exit_before_start(why: str) -> NoReturn:
    """End the process, whatever hangs in its threads; status 0, as after any stop that loses nothing."""
    logger().info("told to stop before it was ready", why=why)
    log_writer().drain()
    os._exit(0)


def stop_accepting(listener: socket.socket) -> None:
    """Let the kernel drop what wants to connect, so that closing resets no connection already made.

    A socket filter of one instruction, "keep 0 bytes"; Linux only, elsewhere a caller may meet a reset.
    """
    if sys.platform == "linux":
        instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K, 0
        program = struct.pack("HL", 1, ctypes.addressof(instruction))
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def uvicorn_config(app: Service, settings: Settings) -> uvicorn.Config:
    """Return how uvicorn runs `app`; it logs nothing itself, every event is counted or logged by us."""
    return uvicorn.Config(
        app,
        http=Protocol,
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


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Return a bound socket that does not listen yet; `shared`, others of ours may be bound there too.

    Raises:
        CannotListen: the address is taken, or is none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError as error:
        raise CannotListen(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def lock_address(listener: socket.socket) -> socket.socket:
    """Return what keeps other services from the address of `listener` while it is open, before that listens as well.

    The kernel lets a second service bind an address on which nobody listens yet, or on which workers do. A name of
    Linux's own, which goes with its holder, and which is seen as far as the address is.

    Raises:
        CannotListen: another holds it.
    """
    host, port = listener.getsockname()[:2]
    holder = socket.socket(socket.AF_UNIX)
    try:
        if sys.platform == "linux":
            holder.bind(f"\0lvm {host} {port}")
    except OSError as error:
        holder.close()
        raise CannotListen(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return holder


def warn_of_unknown_settings() -> None:
    """Say which variables are no settings: what they were to change is at its default."""
    for name, nearest in unknown_settings(os.environ):
        logger().warning("unknown setting", name=name, nearest=nearest)


def check_exposure(address: str, tokens: Tokens, *, insecure: bool) -> None:
    """Refuse an address beyond loopback where callers need no token, unless that is what is wanted.

    Raises:
        CannotListen: it is not.
    """
    if len(tokens) or ip_address(address).is_loopback:
        return
    if not insecure:
        raise CannotListen(
            f"will not listen on {address}: others reach it, and no token is set. Set LVM_TOKENS or LVM_TOKENS_FILE, "
            "or listen on 127.0.0.1, or say --insecure (LVM_INSECURE=true) where the network keeps others out"
        )
    logger().warning("insecure", address=address, detail="no token is set: whoever reaches this address may call")


def serve(settings: Settings) -> int:
    """Serve until told to stop; return the exit status: 0 after a clean drain, else 1.

    Raises:
        BadSettings: the tokens cannot be read.
        CannotListen: the address cannot be bound, or is not to be.
        UnknownVersion, BadCheckpoint: what the aliases point at cannot be served.
    """
    configure(settings.log_level)
    warn_of_unknown_settings()
    app = create_app(settings)
    with bind(settings.host, settings.port) as listener, lock_address(listener):
        check_exposure(listener.getsockname()[0], app.tokens, insecure=settings.insecure)
        return run(Server(uvicorn_config(app, settings), app, settings), app, listener)


def return_freed_memory() -> None:
    """Have every body of a megabyte or more lie in pages of its own, which go back to the system when it is answered.

    glibc moves its threshold for that up to 32 MB; below it, bodies that grow side by side leave holes.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, size in MALLOPT.items():
            mallopt(option, size)


def run(server: Server, app: Service, listener: socket.socket) -> int:
    """Run a server to its end; return the exit status, or raise what kept the app from starting."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    return_freed_memory()
    with contextlib.suppress(SystemExit):
        server.run(sockets=[listener])
    if app.state.process.failure:
        raise app.state.process.failure
    if not server.started:
        logger().error("did not start")
    return 0 if server.started and not server.force_exit else 1
