"""The process: uvicorn with limits at the socket, a drain at SIGTERM, an exit status that means something."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.app import OTHER, Service, create_app
from service.door import Call, HotRoute, Reply, check_length, request_id
from service.errors import (
    PROBLEM,
    HeadersTooLarge,
    Malformed,
    ServiceError,
    TooLarge,
    TooSlow,
    problem,
)
from service.log import configure, logger
from service.settings import Settings

SO_ATTACH_FILTER = 26  # not in the socket module
CLOSE = (b"connection", b"close")
LINGER_S = 0.25  # for what is on its way in when the sockets close
MAX_HEAD = 16 * 1024  # bytes of a request line and headers


class HotCycle:
    """One request to a hot route on its way: body in, one write out, no ASGI between.

    Stands where uvicorn keeps its RequestResponseCycle, so pipelining, keep-alive and shutdown are
    uvicorn's own.
    """

    def __init__(self, protocol: Protocol, route: HotRoute, path: str, query: bytes, *, keep_alive: bool) -> None:
        self.route, self.keep_alive = route, keep_alive
        self.call = Call(protocol.headers, query, path, route.timeout_ms)
        self.message_event = asyncio.Event()  # uvicorn sets it; nobody waits
        self.disconnected = self.response_complete = False
        self._protocol = protocol
        self._parts: list[bytes] = []
        self._size = 0
        self._begun = self._whole = False
        self._task: asyncio.Task[Reply] | None = None

    def begin(self, *, expects_continue: bool = False) -> None:
        """Be the request that is next on its connection."""
        self._begun = True
        if expects_continue and not self._whole:
            self._protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            check_length(self.call.headers, self.route.max_body)
        except TooLarge as error:
            self._finish(self.route.problem(error, self.call.id))
        else:
            self._run_if_ready()

    def feed(self, part: bytes) -> None:
        """Take a part of the body."""
        self._parts.append(part)
        self._size += len(part)
        if self._size > self.route.max_body and not self.response_complete:
            error = TooLarge(f"a body of more than {self.route.max_body} bytes")
            self._finish(self.route.problem(error, self.call.id))

    def end(self) -> None:
        """The body is whole."""
        self._whole = True
        self._run_if_ready()

    def depart(self) -> None:
        """The caller is gone: stop what runs for it."""
        if self.response_complete:
            return
        self.response_complete = True
        self.route.depart()
        if self._task:
            self._task.cancel()

    def _run_if_ready(self) -> None:
        if not (self._begun and self._whole) or self.response_complete:
            return
        self.call.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._task = self._protocol.loop.create_task(self.route.answer(self.call))
        self._protocol.tasks.add(self._task)  # type: ignore[arg-type]  # uvicorn waits for them at shutdown
        self._task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Reply]) -> None:
        self._protocol.tasks.discard(task)
        if not task.cancelled() and not self.response_complete:
            self._finish(task.result())

    def _finish(self, reply: Reply) -> None:
        transport = self._protocol.transport
        if transport.is_closing():
            self.depart()
            return
        self.response_complete = True
        headers = self.route.headers(reply, self.call)
        self.keep_alive = self.keep_alive and headers[-1] != CLOSE
        if not self.keep_alive and headers[-1] != CLOSE:
            headers.append(CLOSE)
        lines = b"".join([b"%b: %b\r\n" % header for header in headers])
        transport.write(b"".join((STATUS_LINE[reply.status], lines, b"\r\n", reply.body)))
        self.route.count(reply, self.call)
        if not self.keep_alive:
            transport.close()
        self._protocol.on_response_complete()


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with a short way for hot routes, and limits on what may come in and how slowly."""

    app: Any
    waiting_since: float | None = None  # monotonic; None while a request is being answered or none is begun
    _head_bytes = 0
    _in_head = False
    _ended = False  # whether a request ended in the bytes at hand

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock of the first request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.waiting_since = monotonic()

    def data_received(self, data: bytes) -> None:
        """Parse, unless the head of the request grows too long."""
        self._ended = False
        super().data_received(data)
        if self._in_head and not self._ended:
            self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD:
            self.refuse(HeadersTooLarge(f"more than {MAX_HEAD} bytes of headers"))

    def on_message_begin(self) -> None:
        """Start the clock of this request."""
        super().on_message_begin()
        self._head_bytes, self._in_head = 0, True
        self.waiting_since = monotonic()

    def on_headers_complete(self) -> None:
        """Start a cycle, hot or uvicorn's own, unless the headers are too long."""
        self._in_head, self._head_bytes = False, 0
        if sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD:
            self.refuse(HeadersTooLarge(f"more than {MAX_HEAD} bytes of headers"))
        if self.transport.is_closing():
            return
        path, _, query = self.url.partition(b"?")
        route = self.app.hot_route(path) if self.parser.get_method() == b"POST" else None
        if route is None:
            super().on_headers_complete()
        else:
            self._start_hot(route, path.decode("ascii"), query)

    def _start_hot(self, route: HotRoute, path: str, query: bytes) -> None:
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        previous, cycle = self.cycle, HotCycle(self, route, path, query, keep_alive=keep_alive)
        self.cycle = cycle  # type: ignore[assignment]
        if previous is None or previous.response_complete:
            cycle.begin(expects_continue=self.expect_100_continue)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))  # type: ignore[arg-type]

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if isinstance(cycle, HotCycle):
            cycle.begin()
        else:
            super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """Take a part of the body, unless the request was refused."""
        if self.transport.is_closing():
            return
        cycle: Any = self.cycle
        if isinstance(cycle, HotCycle):
            cycle.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the clock: the request is whole."""
        self.waiting_since, self._ended = None, True
        if self.transport.is_closing():
            return
        cycle: Any = self.cycle
        if isinstance(cycle, HotCycle):
            cycle.end()
        else:
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel what runs for a caller that is gone."""
        super().connection_lost(exc)
        cycle: Any = self.cycle
        if isinstance(cycle, HotCycle):
            cycle.depart()
        for queued, _ in self.pipeline:
            if isinstance(queued, HotCycle):
                queued.depart()

    def shutdown(self) -> None:
        """Close as soon as nothing is owed: a request that is on its way in has a moment to arrive."""
        if self.waiting_since is None:
            super().shutdown()
        else:
            self.loop.call_later(LINGER_S, super().shutdown)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP."""
        self.refuse(Malformed(msg))

    def refuse(self, error: ServiceError) -> None:
        """Answer a request that never reached the application, and close."""
        if self.transport.is_closing():
            return
        self.app.metrics.requests.add(OTHER, error.reason)
        identity = request_id(None)
        body = problem(error.status, error.reason, error.detail, identity)
        head = b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n" % (
            error.status,
            error.title.encode(),
            PROBLEM,
            len(body),
            identity.encode(),
        )
        self.transport.write(head + b"connection: close\r\n\r\n" + body)
        self.transport.close()


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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say where."""
        await super().startup(sockets)
        self._listeners = sockets or ()
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            logger().info("listening", url=f"http://{host}:{port}")

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: once a second, close the connections that are too slow to receive from."""
        if counter % 10 == 0:
            late = monotonic() - self._settings.receive_s
            for connection in list(self.server_state.connections):
                if isinstance(connection, Protocol) and (connection.waiting_since or late) < late:
                    connection.refuse(TooSlow("the request did not arrive in time"))
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on a signal; unlike uvicorn's, the signal is not raised again, so a clean stop exits 0."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can listen to signals
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        yield
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        if self._process.is_draining:
            self.should_exit = True  # asked twice: no more waiting
            return
        self._process.is_draining = True
        logger().info("draining", signal=signal.Signals(number).name, seconds=self._settings.drain_s)
        asyncio.get_running_loop().call_later(self._settings.drain_s, self._stop)

    def _stop(self) -> None:
        for listener in self._listeners:
            turn_away(listener)
        asyncio.get_running_loop().call_later(LINGER_S, self._exit)

    def _exit(self) -> None:
        self.should_exit = True


def turn_away(listener: socket.socket) -> None:
    """Let the kernel drop what wants to connect, so that closing resets no connection already made.

    A socket filter of one instruction, "keep 0 bytes"; Linux only, elsewhere a caller may meet a reset.
    """
    if sys.platform == "linux":
        instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K, 0
        program = struct.pack("HL", 1, ctypes.addressof(instruction))
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def config_of(app: Service, settings: Settings) -> uvicorn.Config:
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
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(settings.grace_s)),
    )


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet; raises OSError where the address is taken."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    return listener


def serve(settings: Settings) -> int:
    """Serve until told to stop; return the exit status: 0 after a clean drain, else 1.

    Raises:
        OSError: the address cannot be bound.
        UnknownVersion, BadCheckpoint: what the aliases point at cannot be served.
    """
    configure(settings.log_level)
    app = create_app(settings)
    server = Server(config_of(app, settings), app, settings)
    with bind(settings.host, settings.port) as listener, contextlib.suppress(SystemExit):
        server.run(sockets=[listener])
    if app.state.process.failure:
        raise app.state.process.failure
    return 0 if server.started and not server.force_exit else 1
