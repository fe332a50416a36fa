"""One HTTP/1.1 connection: bytes to requests, responses to bytes, and limits on what a client may send and how slowly.

uvicorn makes a `Connection` for each socket that it accepts (its `http=` class) and knows it by three things: it is
among `server_state.connections` while it is open, `shutdown` asks it to close, and, as a member of
`server_state.tasks`, `cancel` ends what still runs when the grace period is over.

The responses of a connection are sent in the order of its requests, whatever they are.
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from functools import partial
from time import monotonic, perf_counter
from typing import Any, NamedTuple, Protocol, cast

import httptools

from lvm.errors import (
    Draining,
    HeadersTooLarge,
    Malformed,
    Overloaded,
    ServiceError,
    TooSlow,
    UnknownExpectation,
    UnknownHttpVersion,
)
from service.http.eager import EagerTask
from service.http.gateway import UNEXPECTED, Gateway
from service.http.headers import combine, is_host, origin_form, path_of, tokens
from service.http.messages import Headers, Request, Response
from service.http.tcp import ending
from service.overload.fairness import Slicer, Work
from service.telemetry.log import logger

CLOSE = b"connection: close"
KEEP_ALIVE = b"connection: keep-alive"  # without it an HTTP/1.0 client expects the connection to end
CONTINUE = frozenset({b"100-continue"})
CONTINUE_LINE = b"HTTP/1.1 100 Continue\r\n\r\n"
END_OF_HEAD = b"\r\n\r\n"
HALF_CLOSED_S = 5.0  # longest wait for the response to a client that has closed its own side
LINGER_S = 0.25  # for bytes that are on their way when a socket closes
LAST_WAITS = 8  # of LINGER_S each, for a client that is still sending at shutdown, or when its connection closes
MAX_PIPELINE = 64  # requests of one connection that wait for an earlier response
MAX_SKIP = 2**20  # bytes of an unread body that are skipped to keep the connection
MAX_HEAD = 16 * 1024  # bytes of a request line and headers
MAX_KNOWN, MAX_KNOWN_HEAD = 512, 1024  # heads that are remembered, and bytes of each
AT_ONCE = 64 * 1024  # bytes that are parsed as they arrive: at least a context in JSON, with its head
PIECE = 16 * 1024  # bytes of a longer input that are parsed at a time
CHUNKS = 4 * 1024  # the same, of a chunked body, whose chunks may be a byte long
SLICE_S = 0.002  # of parsing, before other connections get their turn


class ServerState(Protocol):
    """What is used of uvicorn's `ServerState`; `default_headers` holds the Date, and is replaced once a second."""

    connections: set[Any]
    tasks: set[Any]
    default_headers: Headers


class Application(Protocol):
    """What is used of the application that uvicorn was given."""

    gateway: Gateway
    slicer: Slicer


class Head(NamedTuple):
    """A head that was parsed before. Callers send the same head again and again, so it is not parsed again."""

    method: bytes
    path: str
    query: bytes
    headers: dict[bytes, bytes]
    declared: int


# By their bytes. They depend on nothing else, so all connections share them.
known_heads: dict[bytes, Head] = {}


class Incoming(Request):
    """A request on a connection, while it arrives and until its response is sent."""

    transport: asyncio.Transport
    is_ready = is_whole = is_first = is_started = was_pipelined = False
    keep_alive = is_http10 = expects_continue = False
    task: EagerTask[Response] | None = None
    response: Response | None = None
    waiter: asyncio.Future[None] | None = None

    async def wait_for_turn(self) -> None:
        """Wait until it is the first of its connection; raises its failure."""
        while not (self.is_first or self.failure):
            await self._wait()
        if self.failure:
            raise self.failure

    async def read(self) -> None:
        """Wait until the body is complete, and ask for it if the client waits for that; raises as `Request.read`."""
        if self.expects_continue and not (self.is_whole or self.failure):
            self.transport.write(CONTINUE_LINE)
        while not (self.is_whole or self.failure):
            await self._wait()
        if self.failure:
            raise self.failure

    @property
    def can_be_skipped(self) -> bool:
        """Whether the rest of its body is sure to come, and short: to skip it costs less than a new connection."""
        return 0 < self.declared <= MAX_SKIP and not self.expects_continue

    def become_first(self) -> None:
        """Continue: every earlier request of the connection is answered."""
        self.is_first = True
        self.is_ready = self.is_whole
        self.wake()

    def fail(self, error: ServiceError) -> None:
        """Have it answered with `error`, kept without its traceback, which would hold the request."""
        self.failure = self.failure or error.with_traceback(None)
        self.body = b""
        self.wake()

    def cancel(self) -> None:
        """Stop what runs for it."""
        if self.task:
            self.task.cancel()

    def wake(self) -> None:
        """Continue with what waits for it."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def _wait(self) -> None:
        self.waiter = asyncio.get_running_loop().create_future()
        await self.waiter


class Connection(asyncio.Protocol):
    """The HTTP/1.1 protocol at a socket. uvicorn's argument `app_state` is not used."""

    def __init__(
        self,
        config: Any,
        server_state: ServerState,
        app_state: object = None,
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        app: Application = config.loaded_app
        self._gateway = app.gateway
        self._slicer = app.slicer
        self._server = server_state
        self.loop = _loop or asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._peer = ""  # the client's address
        self._pipeline: deque[Incoming] = deque()  # requests without a sent response, the first of them being answered
        self._incoming: Incoming | None = None  # the one whose body is arriving
        # Clocks, in seconds of `monotonic`; None while they stand still.
        self._waiting_since: float | None = None  # for the rest of a request, or the first one
        self._idle_since: float | None = None
        self._writing_since: float | None = None  # the client does not read what it is sent
        self._half_closed_since: float | None = None
        # Of the request that is arriving:
        self._url = b""
        self._headers: Headers = []
        self._in_head = False
        self._parsed_head = 0  # bytes of the request line, headers and trailers
        self._unparsed_head = 0  # bytes of a head that is not complete
        self._is_chunked = False
        self._offers_upgrade = False
        self._repeatable: Head | None = None  # its head, if it may be remembered
        # Of the input:
        self._ignores_input = False
        self._is_still_sending = False  # while its bytes are ignored
        self._message_ended = False  # in the bytes at hand
        self._unread, self._at = b"", 0  # what has arrived, and up to where it is parsed
        self._reading: asyncio.Future[None] | None = None  # done when that is parsed
        self._is_reading_paused = False
        self._owes_next = False  # whether the next request waits until the client has read the last response
        self._parser = self._new_parser()

    def _new_parser(self) -> Any:
        parser = httptools.HttpRequestParser(self)
        # Pipelined requests behind a `Connection: close` must not be an error of the parser, before the response.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    # ---- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock of the first request."""
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if isinstance(peer, tuple) else ""
        self._server.connections.add(self)
        self._server.tasks.add(self)
        self._waiting_since = monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop what runs for the client, and hold nothing of it."""
        self._server.connections.discard(self)
        self._server.tasks.discard(self)
        for request in self._pipeline:
            request.cancel()
        self._pipeline.clear()
        if self._reading:
            self._reading.cancel()
        self._unread, self._at = b"", 0
        self._incoming = self._parser = None

    def data_received(self, data: bytes) -> None:
        """Parse short input at once; of longer input, a body of known length as one piece, all else in small pieces."""
        if len(data) <= AT_ONCE and not self._is_chunked and not self._unread:
            if self._pipeline or self._incoming or self._in_head or self._ignores_input:
                self._parse(data)
            else:
                self._parse_request(data)
            return
        self._unread, self._at = self._unread[self._at :] + data, 0
        if self._reading is None:
            self._read_on()

    def eof_received(self) -> bool:
        """Wait for the response if a client closes its side right behind its request (RFC 9112, 9.6).

        A client that waited before it closed has given up; its FIN looks the same.
        """
        last = self._pipeline[-1] if self._pipeline else None
        if last is None or not last.is_whole:
            return False
        if not last.was_pipelined and not ending(self._transport).closed_after_sending:
            return False
        last.keep_alive = False
        self._half_closed_since = monotonic()
        return True

    def pause_writing(self) -> None:
        """Start the clock of a client that does not read."""
        self._writing_since = monotonic()

    def resume_writing(self) -> None:
        """Continue: the client has read."""
        self._writing_since = None
        if self._owes_next:
            self._owes_next = False
            self._next()

    # ---- called by the server

    def shutdown(self, waits: int = LAST_WAITS) -> None:
        """Close as soon as every request is answered. A request that is arriving has `waits` short waits to arrive.

        Bytes that are here are read first, also of a connection that was idle.
        """
        if waits and (self._waiting_since is not None or self._has_unread()):
            self.loop.call_later(LINGER_S, self.shutdown, waits - 1)
        elif self._pipeline:
            self._pipeline[-1].keep_alive = False
        else:
            self._transport.close()

    def cancel(self, msg: object = None) -> None:
        """Answer every request that still runs: the grace period is over."""
        for request in self._pipeline:
            request.fail(Draining("the server is shutting down and the grace period is over"))
            request.cancel()

    def close_if_slow(self, before: float, idle_before: float) -> None:
        """Close if the client has been slow to send or to read since `before`, idle since `idle_before`, or is gone."""
        if self._is_gone() or (self._writing_since or before) < before:
            self._transport.abort()
        elif (self._idle_since or idle_before) < idle_before:
            self._transport.close()
        elif (self._waiting_since or before) < before:
            if self._in_head or (self._incoming and not self._incoming.response):
                self.loop.call_soon(self._refuse_slow, self._waiting_since)
            else:
                self._transport.close()  # it never sent a byte, or is answered

    def _refuse_slow(self, since: float | None) -> None:
        """Reject the request that has been arriving since `since`, unless it is complete by now."""
        if since is not None and self._waiting_since == since:
            self._refuse(TooSlow("the request did not arrive in time"))

    def _is_gone(self) -> bool:
        """Return whether a client that closed its side does not read either, or has waited for too long."""
        since = self._half_closed_since
        return since is not None and (since < monotonic() - HALF_CLOSED_S or ending(self._transport).is_reset)

    def _has_unread(self) -> bool:
        if self._transport.is_closing():
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket"), select.POLLIN)
        return bool(poll.poll(0))

    # ---- input

    def _read_on(self) -> None:
        work = self._read_pieces()
        if self._is_chunked or next(work, self) is None:
            self._reading = self._slicer.start(self._peer, work)
            self._reading.add_done_callback(self._has_read)
            self._regulate_reading()

    def _has_read(self, reading: asyncio.Future[None]) -> None:
        self._reading = None
        self._regulate_reading()

    def _read_pieces(self) -> Work[None]:
        """Parse what has arrived; yield if it is a chunked body, whose chunks may be tiny, and takes long."""
        until = perf_counter() + SLICE_S
        while self._at < len(self._unread) and self._parser is not None:
            start, self._at = self._at, min(len(self._unread), self._at + self._piece())
            self._parse(memoryview(self._unread)[start : self._at])
            if self._is_chunked and perf_counter() > until:
                yield
                until = perf_counter() + SLICE_S
        self._unread, self._at = b"", 0

    def _piece(self) -> int:
        """Return how many bytes to parse next: the rest of a body, a head, or some of what may be in many parts."""
        if self._incoming is not None and not self._in_head:
            return max(0, self._incoming.declared - len(self._incoming.body)) or CHUNKS
        head = self._unread.find(END_OF_HEAD, self._at, self._at + PIECE)
        return PIECE if head < 0 else head + len(END_OF_HEAD) - self._at

    def _regulate_reading(self) -> None:
        """Read no further while input waits to be parsed, or a request waits behind another."""
        pause = self._reading is not None or len(self._pipeline) > 1
        if pause == self._is_reading_paused or self._transport.is_closing():
            return
        self._is_reading_paused = pause
        if pause:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _parse_request(self, data: bytes) -> None:
        """Parse what is most often one whole request, whose head was parsed before."""
        end = data.find(END_OF_HEAD) + len(END_OF_HEAD)
        head = data[:end]
        known = known_heads.get(head)
        if known is not None and len(data) == end + known.declared:
            self._take(known, data[end:])
            return
        self._repeatable = None
        self._parse(data)
        self._remember(head, len(data))

    def _remember(self, head: bytes, size: int) -> None:
        """Keep the head of the request that was parsed, if it was alone and whole in `size` bytes."""
        parsed = self._repeatable
        if parsed is not None and len(head) <= MAX_KNOWN_HEAD and size == len(head) + parsed.declared:
            if len(known_heads) >= MAX_KNOWN:
                known_heads.clear()
            known_heads[head] = parsed

    def _take(self, head: Head, body: bytes) -> None:
        """Start a whole request, as the parser would."""
        self._waiting_since = self._idle_since = None
        request = Incoming(head.method, head.path, head.query, head.headers, self._peer, head.declared)
        request.body = body
        request.keep_alive = request.is_whole = request.is_ready = True
        self._queue(request)
        self._start(request)

    def _parse(self, data: bytes | memoryview) -> None:
        """Parse, unless the head of the request grows too long; start a request whose body is only partly here."""
        if self._ignores_input:
            self._is_still_sending = True
            return
        self._message_ended = False
        try:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                self._pass_over(offer, memoryview(data))
        except httptools.HttpParserCallbackError as error:
            self._refuse(_failure_of(error.__context__))
        except httptools.HttpParserError:
            self._refuse(Malformed("the bytes received are not an HTTP request"))
        if self._in_head and not self._message_ended:
            self._unparsed_head += len(data)
            if self._unparsed_head > MAX_HEAD:
                self._refuse_head()
        if self._incoming is not None and not self._incoming.is_started:
            self._start(self._incoming)

    def _pass_over(self, offer: httptools.HttpParserUpgrade, rest: memoryview) -> None:
        """Parse on behind an offer to upgrade, at which the parser stops, as if there were none (RFC 9110, 7.8)."""
        while not self._ignores_input:
            head, rest = self._head_without_offer(), rest[offer.args[0] :]
            self._parser = self._new_parser()
            try:
                self._parser.feed_data(head)
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as next_offer:
                offer = next_offer

    def _head_without_offer(self) -> bytes:
        version = self._parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self._parser.get_method(), self._url, version)]
        lines += [b"%b: %b" % header for header in self._headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    # ---- called by the parser

    def on_message_begin(self) -> None:
        """Start the clock of a request."""
        self._url, self._headers = b"", []
        self._unparsed_head = self._parsed_head = 0
        self._in_head = True
        self._waiting_since, self._idle_since = monotonic(), None

    def on_url(self, url: bytes) -> None:
        """Take a part of the request target."""
        self._url += url
        self._parsed_head += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer."""
        self._parsed_head += len(name) + len(value)
        if self._in_head:
            self._headers.append((name.lower(), value.strip(b" \t")))
        elif self._parsed_head > MAX_HEAD:
            self._refuse_head()

    def on_headers_complete(self) -> None:
        """Queue the request, unless its head asks for something that is not served."""
        self._in_head, self._unparsed_head = False, 0
        if self._parsed_head > MAX_HEAD:
            self._refuse_head()
        parser = self._parser
        method, version = parser.get_method(), parser.get_http_version()
        self._offers_upgrade = parser.should_upgrade() and method != b"CONNECT"
        if self._ignores_input or self._offers_upgrade:
            return
        headers = dict(self._headers)
        if len(headers) < len(self._headers):
            headers = combine(self._headers)
        self._is_chunked = b"transfer-encoding" in headers
        if fault := self._fault(method, version, headers):
            self._refuse(fault)
            return
        target, _, query = self._url.partition(b"?")
        path = target.decode("ascii") if b"%" not in target else path_of(target)
        length = int(headers.get(b"content-length", 0))  # the parser has checked it
        request = self._incoming = Incoming(method, path, query, headers, self._peer, length)
        request.keep_alive = parser.should_keep_alive()
        request.is_http10 = version == "1.0"
        if b"expect" in headers and not request.is_http10:
            request.expects_continue = bool(headers[b"expect"]) and (self._is_chunked or length > 0)
        elif request.keep_alive and not request.is_http10 and length:
            self._repeatable = Head(method, path, query, headers, length)
        self._queue(request)

    def on_body(self, body: bytes) -> None:
        """Take a part of the body, unless the request was rejected or is answered."""
        request = self._incoming
        if self._ignores_input or request is None or request.failure or request.response:
            return
        if not request.is_started and not request.body:
            request.body = body
            return
        try:
            request.add(body, len(self._unread) - self._at)
        except ServiceError as error:
            request.fail(error)

    def on_message_complete(self) -> None:
        """Stop the clock: the request is complete."""
        if self._offers_upgrade:
            return  # its head will be parsed again
        self._waiting_since, self._message_ended, self._is_chunked = None, True, False
        request, self._incoming = self._incoming, None
        if self._ignores_input or request is None:
            return
        request.is_whole = True
        request.is_ready = request.is_first
        if not request.is_started:
            self._start(request)
        elif request.waiter:
            request.wake()

    # ---- heads that are rejected

    def _fault(self, method: bytes, version: str, headers: dict[bytes, bytes]) -> ServiceError | None:
        """Return why a request is rejected for its head; bring its target into origin form."""
        host = headers.get(b"host")
        if version not in ("1.1", "1.0"):
            return UnknownHttpVersion(f"the request is HTTP/{version}; expected HTTP/1.1 or HTTP/1.0")
        if host is None and version == "1.1":
            return Malformed("missing Host header")
        if host and not is_host(host):
            return Malformed("malformed Host header; expected one host")
        if not self._url.startswith(b"/") and (fault := self._use_origin_form(method)):
            return fault
        if b"#" in self._url:
            return Malformed("the request target has a fragment")
        if len(self._pipeline) > MAX_PIPELINE:
            return Overloaded(f"more than {MAX_PIPELINE} pipelined requests wait for their responses")
        if b"transfer-encoding" in headers or b"expect" in headers:
            return self._fault_of_framing(version, headers)
        return None

    def _fault_of_framing(self, version: str, headers: dict[bytes, bytes]) -> ServiceError | None:
        """Return why a request is rejected for how its body arrives."""
        coding = headers.get(b"transfer-encoding")
        if coding is not None and version == "1.0":
            return Malformed("HTTP/1.0 has no Transfer-Encoding")
        if coding is not None and coding.lower() != b"chunked":
            return Malformed("unsupported Transfer-Encoding; expected chunked")
        # the Expect of HTTP/1.0 is ignored (RFC 9110, 10.1.1)
        if version != "1.0" and not tokens(headers.get(b"expect", b"")) <= CONTINUE:
            return UnknownExpectation("unsupported Expect header; expected 100-continue")
        return None

    def _use_origin_form(self, method: bytes) -> ServiceError | None:
        if method == b"CONNECT":
            return Malformed("CONNECT is for proxies")
        self._url = b"/" if (method, self._url) == (b"OPTIONS", b"*") else origin_form(self._url)
        if self._url.startswith(b"*"):
            return Malformed("malformed request target; expected a path or a URL")
        return None

    def _refuse_head(self) -> None:
        self._refuse(HeadersTooLarge(f"the headers are longer than {MAX_HEAD} bytes"))

    def _refuse(self, error: ServiceError) -> None:
        """Answer the request that is arriving with `error`, in its turn, and close."""
        if self._ignores_input or self._transport.is_closing():
            return
        self._ignores_input = True
        request = self._incoming
        if request is None:
            path = self._url.partition(b"?")[0].decode("latin-1")
            method = self._parser.get_method() if self._url and self._parser else b""
            request = Incoming(method, path, b"", {}, self._peer)
            self._queue(request)
        elif request.response is not None:
            self._close_gently()
            return
        request.keep_alive = False
        request.fail(error)
        if not request.is_started:
            self._start(request)

    # ---- requests and responses

    def _queue(self, request: Incoming) -> None:
        request.transport = self._transport
        request.is_first = not self._pipeline
        request.was_pipelined = not request.is_first
        self._pipeline.append(request)
        if request.was_pipelined:
            self._regulate_reading()

    def _start(self, request: Incoming) -> None:
        request.is_started = True
        task = EagerTask(self._gateway.handle(request), partial(self._finish, request), self.loop)
        if not request.response:
            request.task = task

    def _finish(self, request: Incoming, response: Response | None) -> None:
        """Send a response, unless it has to wait for an earlier one."""
        request.task, request.response = None, response
        if response is None:
            self._transport.abort()
        elif request.is_first and not self._owes_next and self._pipeline:
            self._send(request, response)

    def _send(self, request: Incoming, response: Response) -> None:
        self._pipeline.popleft()
        if self._transport.is_closing():
            return
        keep_alive = request.keep_alive and not response.closes and (request.is_whole or request.can_be_skipped)
        lines = [response.head, *map(b": ".join, self._server.default_headers), b"", response.body]
        if not keep_alive:
            lines.insert(1, CLOSE)
        elif request.is_http10:
            lines.insert(1, KEEP_ALIVE)
        self._transport.write(b"\r\n".join(lines))
        request.body = response.body = b""
        if not keep_alive:
            self._ignores_input = True
            self._close(request)
        elif self._writing_since is not None:
            self._owes_next = True
        else:
            self._next()

    def _next(self) -> None:
        """Continue with the next request of the connection."""
        if self._is_reading_paused:
            self._regulate_reading()
        if not self._pipeline:
            self._idle_since = monotonic()
            return
        request = self._pipeline[0]
        request.become_first()
        if request.response:
            self._send(request, request.response)

    def _close(self, request: Incoming) -> None:
        self._waiting_since = None
        is_unread = self._half_closed_since is None and (self._at < len(self._unread) or self._has_unread())
        if request.is_whole and not is_unread:
            self._transport.close()
        else:
            self._close_gently()

    def _close_gently(self) -> None:
        """Close, but not before the client had time to read the response: it may still be sending.

        To close on unread bytes resets the connection, and a reset discards the response.
        """
        self._waiting_since = None
        if not self._transport.is_closing():
            self._transport.write_eof()
            self.loop.call_later(LINGER_S, self._close_unless_sending, LAST_WAITS)

    def _close_unless_sending(self, waits: int) -> None:
        """Close, but wait up to `waits` times for a client that sends its whole request before it reads."""
        if waits and self._is_still_sending:
            self._is_still_sending = False
            self.loop.call_later(LINGER_S, self._close_unless_sending, waits - 1)
        else:
            self._transport.close()


def _failure_of(error: BaseException | None) -> ServiceError:
    """Return the response to an exception in what the parser calls."""
    if isinstance(error, MemoryError):
        return Overloaded("no memory is left for the request")
    logger().error("unexpected", exc_info=error)
    return ServiceError(UNEXPECTED)
