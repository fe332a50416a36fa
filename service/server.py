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
from service.door import Call, HotRoute, Reply, check_length, problem_reply, request_id
from service.errors import (
    PROBLEM,
    Draining,
    HeadersTooLarge,
    Malformed,
    Overloaded,
    ServiceError,
    TooLarge,
    TooSlow,
)
from service.log import configure, logger
from service.settings import Settings

SO_ATTACH_FILTER = 26  # not in the socket module
CLOSE = (b"connection", b"close")
LINGER_S = 0.25  # for what is on its way in when the sockets close
MAX_PIPELINE = 64  # requests of one connection that wait for an earlier answer
MAX_HEAD = 16 * 1024  # bytes of a request line and headers


class CannotListen(Exception):
    """The address is taken, or is none."""


class HotCycle:
    """One request to a hot route on its way: body in, one write out, no ASGI between.

    Stands where uvicorn keeps its RequestResponseCycle, so pipelining, keep-alive and shutdown are
    uvicorn's own. Answers in its turn, whatever the answer is.
    """

    def __init__(self, protocol: Protocol, route: HotRoute, path: str, query: bytes, *, keep_alive: bool) -> None:
        self.route, self.keep_alive = route, keep_alive
        self.call = Call(protocol.headers, query, path, route.timeout_ms)
        self.message_event = asyncio.Event()  # uvicorn sets it; nobody waits
        self.disconnected = self.response_complete = self.is_whole = False
        self._protocol = protocol
        self._expects_continue = protocol.expect_100_continue
        self._parts: list[bytes] = []
        self._size = 0
        self._begun = False
        self._error: ServiceError | None = None
        self._task: asyncio.Task[Reply] | None = None

    def check_length(self) -> None:
        """Fail where the body says it is too long."""
        try:
            check_length(self.call.headers, self.route.max_body)
        except TooLarge as error:
            self.fail(error)

    def begin(self) -> None:
        """Be the request that is next on its connection."""
        self._begun = True
        self._protocol.running = self
        if self._expects_continue and not self.is_whole and not self._error:
            self._protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._go_on()

    def feed(self, part: bytes) -> None:
        """Take a part of the body."""
        self._parts.append(part)
        self._size += len(part)
        if self._size > self.route.max_body:
            self.fail(TooLarge(f"a body of more than {self.route.max_body} bytes"))

    def end(self) -> None:
        """The body is whole."""
        self.is_whole = True
        self._go_on()

    def fail(self, error: ServiceError) -> None:
        """Answer with `error`, when it is this request's turn, and close: what follows is not read."""
        self._error = self._error or error
        self._parts.clear()
        self._protocol.deaf = True
        self._go_on()

    def depart(self) -> None:
        """The caller is gone: stop what runs for it."""
        if not self.response_complete:
            self.route.depart()
            self._forget()

    def _go_on(self) -> None:
        if not self._begun or self.response_complete or self._task:
            return
        if self._error:
            self._finish(self.route.problem(self._error, self.call.id))
        elif self.is_whole:
            self.call.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts.clear()
            self._task = self._protocol.loop.create_task(self.route.answer(self.call))
            self._protocol.tasks.add(self._task)  # type: ignore[arg-type]  # uvicorn waits for them at shutdown
            self._task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Reply]) -> None:
        self._protocol.tasks.discard(task)
        if self.response_complete:
            return
        if task.cancelled():
            self._finish(self.route.problem(Draining("the grace is over"), self.call.id))
        elif error := task.exception():
            logger().error("unexpected", route=self.route.path, request_id=self.call.id, exc_info=error)
            self._finish(self.route.problem(ServiceError("an unexpected error"), self.call.id))
        else:
            self._finish(task.result())

    def _finish(self, reply: Reply) -> None:
        protocol = self._protocol
        if protocol.transport.is_closing():
            self.depart()
            return
        headers = self.route.headers(reply, self.call)
        self.keep_alive = self.keep_alive and not self._error and headers[-1] != CLOSE
        if not self.keep_alive and headers[-1] != CLOSE:
            headers.append(CLOSE)
        lines = b"".join([b"%b: %b\r\n" % header for header in headers])
        protocol.transport.write(b"".join((STATUS_LINE[reply.status], lines, b"\r\n", reply.body)))
        self.route.count(reply, self.call)
        self._forget()
        protocol.answered(keep_alive=self.keep_alive)

    def _forget(self) -> None:
        """Hold nothing that an idle connection would keep alive."""
        self.response_complete = True
        self._protocol.running = None
        task, self._task = self._task, None
        self.call.body = b""
        self._parts.clear()
        if task:
            task.cancel()


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with a short way for hot routes, and limits on what may come in and how slowly."""

    app: Any
    waiting_since: float | None = None  # monotonic; None while a request is being answered or none is begun
    writing_since: float | None = None  # monotonic; None while the caller reads what it is sent
    running: HotCycle | None = None
    deaf = False  # what still comes in is not looked at
    _unparsed_head = 0  # bytes of a head that is not complete
    _parsed_head = 0  # bytes of the request line, headers and trailers
    _in_head = False
    _ended = False  # whether a request ended in the bytes at hand
    _owes_next = False  # whether the next request waits for the last answer to be read

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock of the first request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.waiting_since = monotonic()

    def data_received(self, data: bytes) -> None:
        """Parse, unless the head of the request grows too long."""
        if self.deaf:
            return
        self._ended = False
        super().data_received(data)
        if self._in_head and not self._ended:
            self._unparsed_head += len(data)
            self._check_head(self._unparsed_head)

    def on_message_begin(self) -> None:
        """Start the clock of this request."""
        super().on_message_begin()
        self._unparsed_head, self._parsed_head, self._in_head = 0, 0, True
        self.waiting_since = monotonic()

    def on_url(self, url: bytes) -> None:
        """Take a part of the request line."""
        super().on_url(url)
        self._parsed_head += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer."""
        self._parsed_head += len(name) + len(value)
        if self._in_head:
            super().on_header(name, value)
        else:
            self._check_head(self._parsed_head)

    def on_headers_complete(self) -> None:
        """Start a cycle, hot or uvicorn's own, unless the head says what is not served."""
        self._in_head, self._unparsed_head = False, 0
        self._check_head(self._parsed_head)
        if self.parser.should_upgrade():
            self.refuse(Malformed("this is plain HTTP/1.1: no upgrades"))
        elif self.parser.get_http_version() == "1.1" and all(name != b"host" for name, _ in self.headers):
            self.refuse(Malformed("an HTTP/1.1 request names its host"))
        elif len(self.pipeline) >= MAX_PIPELINE:
            self.refuse(Overloaded(f"more than {MAX_PIPELINE} requests ahead of their answers"))
        if self.deaf:
            return
        path, _, query = self.url.partition(b"?")
        route = self.app.hot_route(path) if self.parser.get_method() == b"POST" else None
        if route is None:
            super().on_headers_complete()
        else:
            self._start_hot(route, path.decode("ascii"), query)

    def _start_hot(self, route: HotRoute, path: str, query: bytes) -> None:
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        cycle = HotCycle(self, route, path, query, keep_alive=keep_alive)
        cycle.check_length()
        self._line_up(cycle)

    def _line_up(self, cycle: HotCycle | Refusal) -> None:
        previous: Any = self.cycle
        self.cycle = cycle  # type: ignore[assignment]
        if previous is None or previous.response_complete:
            cycle.begin()
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))  # type: ignore[arg-type]

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if isinstance(cycle, HotCycle | Refusal):
            cycle.begin()
        else:
            super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """Take a part of the body, unless the request was refused."""
        cycle: Any = self.cycle
        if self.deaf:
            return
        if isinstance(cycle, HotCycle):
            cycle.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the clock: the request is whole."""
        self.waiting_since, self._ended = None, True
        cycle: Any = self.cycle
        if self.deaf:
            return
        if isinstance(cycle, HotCycle):
            cycle.end()
        else:
            super().on_message_complete()

    def answered(self, *, keep_alive: bool) -> None:
        """Go on to the next request of the connection, once the caller has read enough of the answer."""
        if not keep_alive:
            self.close_gently()
        elif self.flow.write_paused:
            self._owes_next = True
        else:
            self.on_response_complete()

    def close_gently(self) -> None:
        """Close; where the caller may still be sending, not before it had time to read the answer.

        Closing on unread bytes resets the connection, and a reset takes the answer with it.
        """
        self.waiting_since = None
        if self.deaf and not self.transport.is_closing():
            self.transport.write_eof()
            self.loop.call_later(LINGER_S, self.transport.close)
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        """Start the next request, and read no further while others wait behind it."""
        super().on_response_complete()
        if self.pipeline:
            self.flow.pause_reading()

    def pause_writing(self) -> None:
        """Start the clock of a caller who does not read."""
        super().pause_writing()
        self.writing_since = monotonic()

    def resume_writing(self) -> None:
        """Go on: the caller has read."""
        super().resume_writing()
        self.writing_since = None
        if self._owes_next:
            self._owes_next = False
            self.on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop what runs for a caller that is gone, and hold nothing of it."""
        super().connection_lost(exc)
        waiting = [cycle for cycle, _ in self.pipeline if isinstance(cycle, HotCycle)]
        for cycle in (self.running, self.cycle, *waiting):
            if isinstance(cycle, HotCycle):
                cycle.depart()
        self.pipeline.clear()
        self.cycle = None  # type: ignore[assignment]

    def shutdown(self) -> None:
        """Close as soon as nothing is owed: a request that is on its way in has a moment to arrive."""
        if self.waiting_since is None:
            super().shutdown()
        else:
            self.loop.call_later(LINGER_S, super().shutdown)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP."""
        self.refuse(Malformed(msg))

    def close_if_slow(self, before: float) -> None:
        """Close on a caller who has been slow to send, or to read, since `before`."""
        if (self.writing_since or before) < before:
            self.transport.abort()
        elif (self.waiting_since or before) < before:
            if self._in_head or isinstance(self.cycle, HotCycle):
                self.refuse(TooSlow("the request did not arrive in time"))
            else:
                self.transport.close()  # never said a word, or is answered already

    def refuse(self, error: ServiceError) -> None:
        """Answer the request that is coming in with `error`, in its turn, and close."""
        if self.deaf:
            return
        self.deaf = True
        cycle: Any = self.cycle
        if isinstance(cycle, HotCycle) and not cycle.is_whole:
            cycle.fail(error)
        elif cycle is not None and getattr(cycle, "more_body", False):
            self.transport.close()  # uvicorn's own: it tells the application
        else:
            self._line_up(Refusal(self, error))

    def _check_head(self, size: int) -> None:
        if size > MAX_HEAD:
            self.refuse(HeadersTooLarge(f"more than {MAX_HEAD} bytes of headers"))


class Refusal:
    """A request that never reached a route: in its turn it is answered, counted and the connection closed."""

    def __init__(self, protocol: Protocol, error: ServiceError) -> None:
        self.disconnected = self.response_complete = self.keep_alive = False
        self.message_event = asyncio.Event()
        self._protocol, self._error = protocol, error

    def begin(self) -> None:
        """Answer, and close."""
        error, transport = self._error, self._protocol.transport
        self.response_complete = True
        self._protocol.app.metrics.requests.add(OTHER, error.reason)
        reply = problem_reply(error, request_id(None))
        headers = [(b"content-type", PROBLEM), (b"content-length", b"%d" % len(reply.body)), *reply.headers, CLOSE]
        lines = b"".join([b"%b: %b\r\n" % header for header in headers])
        transport.write(b"".join((STATUS_LINE[reply.status], lines, b"\r\n", reply.body)))
        self._protocol.close_gently()


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
            before = monotonic() - self._settings.receive_s
            for connection in list(self.server_state.connections):
                if isinstance(connection, Protocol):
                    connection.close_if_slow(before)
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
    """Return a bound socket that does not listen yet.

    Raises:
        CannotListen: the address is taken, or is none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise CannotListen(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def serve(settings: Settings) -> int:
    """Serve until told to stop; return the exit status: 0 after a clean drain, else 1.

    Raises:
        CannotListen: the address cannot be bound.
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
