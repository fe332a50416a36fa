"""HTTP/1.1 at the socket: uvicorn's, with a short way for hot routes and limits on what a caller may do.

One connection's requests are answered in their turn, whatever the answer is; each is counted once; what is
refused is told why; and an idle connection holds nothing.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Coroutine
from time import monotonic, perf_counter
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from lvm.errors import (
    Draining,
    HeadersTooLarge,
    Malformed,
    Overloaded,
    ServiceError,
    TooLarge,
    TooSlow,
    Unauthorised,
    UnknownExpectation,
    UnknownHttpVersion,
)
from service.http.gateway import (
    BLANK,
    NOSNIFF,
    Call,
    Headers,
    HotRoute,
    Reply,
    declared_length,
    joined,
    problem_reply,
    request_id,
)
from service.http.headers import (
    combine,
    is_host,
    origin_form,
    path_of,
    tokens,
)
from service.http.problems import PROBLEM
from service.http.tcp import ending
from service.overload.fairness import Work
from service.telemetry.log import logger

OTHER = "other"  # the route label of what never reached a route
CLOSE = (b"connection", b"close")
KEEP_ALIVE = (b"connection", b"keep-alive")  # without it an HTTP/1.0 caller expects the end of the connection
CONTINUE = frozenset({b"100-continue"})
HALF_CLOSED_S = 5.0  # longest wait for the answer to a caller that has closed its own side
LINGER_S = 0.25  # for what is on its way in when the sockets close
LAST_TURNS = 8  # of LINGER_S each, at the end, for a request to arrive whole: its caller may be on a busy machine
MAX_PIPELINE = 64  # requests of one connection that wait for an earlier answer
MAX_SKIP = 2**20  # bytes of a refused body that are read, so that the connection stays
MAX_HEAD = 16 * 1024  # bytes of a request line and headers
AT_ONCE = 64 * 1024  # bytes that are parsed as they come: a context in JSON and its head, at the least
PIECE = 16 * 1024  # bytes that are parsed at once of more
CHUNKS = 4 * 1024  # the same, of a chunked body, which may be in chunks of a byte
SLICE_S = 0.002  # of parsing, after which others get their turn
END_OF_HEAD = b"\r\n\r\n"


class HotCycle:
    """One request to a hot route on its way: body in, one write out, no ASGI and no task between.

    Stands where uvicorn keeps its RequestResponseCycle, and among its tasks, so pipelining, keep-alive
    and shutdown are uvicorn's own. Answers in its turn, whatever the answer is. The answer starts as
    soon as the body is whole, while its bytes are in the cache; asyncio has such eager tasks only from
    Python 3.12.
    """

    message_event = asyncio.Event()  # uvicorn sets it; nobody waits

    def __init__(self, protocol: Protocol, route: HotRoute, call: Call, *, keep_alive: bool, is_http10: bool) -> None:
        self.route, self.call, self.keep_alive = route, call, keep_alive
        self._is_http10 = is_http10
        self.disconnected = self.response_complete = self.is_whole = False
        self._protocol = protocol
        self._expects_continue = protocol.expect_100_continue
        self._body: bytes = b""
        self._declared = declared_length(call.headers)
        self._begun = self._closes = False
        self._error: ServiceError | None = None
        self._answer: Coroutine[Any, None, Reply] | None = None

    @property
    def more_body(self) -> bool:
        """Whether a part of the body is still to come."""
        return not self.is_whole

    def knock(self) -> None:
        """Say whose it is and how many bytes the head declares, or be refused."""
        try:
            self.route.knock(self.call, self._declared)
        except (Unauthorised, TooLarge) as error:
            self.fail(error)
        except ServiceError as error:
            self._refuse(error)

    def begin(self) -> None:
        """Be the request that is next on its connection, and refused where its body would come in vain."""
        self._begun = True
        self._protocol.running = self
        try:
            self.call.place.check()
        except ServiceError as error:
            self._refuse(self._error or error)
        if self._expects_continue and not self.is_whole and not self._error:
            self._protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._go_on()

    def _refuse(self, error: ServiceError) -> None:
        """Answer with `error`; the connection stays where the body is short, and is here or sure to come."""
        if self.is_whole or (0 < self._declared <= min(MAX_SKIP, self.route.max_body) and not self._expects_continue):
            self._keep(error)
        else:
            self.fail(error)

    def _keep(self, error: ServiceError) -> None:
        """Remember what to answer, without its traceback, which holds this cycle: it would wait for the collector."""
        self._error = self._error or error.with_traceback(None)

    def feed(self, part: bytes) -> None:
        """Take a part of the body, unless the request is refused."""
        if self._error:
            return
        self._body = joined(self._body, part)
        size = len(self._body)
        try:
            if size > self.route.max_body:
                raise TooLarge(f"a body of more than {self.route.max_body} bytes")
            if size > self.call.place.size:
                self.call.place.grow(size + self._protocol.unread)
        except ServiceError as error:
            self.fail(error)

    @property
    def left(self) -> int:
        """Bytes that are sure to come still; 0 where the head does not say."""
        return max(0, self._declared - len(self._body))

    def end(self) -> None:
        """The body is whole."""
        self.is_whole = True
        self._go_on()

    def fail(self, error: ServiceError) -> None:
        """Answer with `error`, when it is this request's turn, and close: what follows is not read."""
        if self.response_complete:
            self._protocol.close_gently()
            return
        self._keep(error)
        self._closes = True
        self._body = b""
        self._protocol.deaf = True
        self._go_on()

    def depart(self) -> None:
        """The caller is gone: stop what runs for it."""
        if not self.response_complete:
            self.route.depart(self.call)
            self._forget()

    def cancel(self, msg: str | None = None) -> None:
        """Answer that the grace is over; uvicorn asks for it, as of any task that outlives the grace."""
        self._protocol.loop.call_soon(self._give_up)

    def _give_up(self) -> None:
        if not self.response_complete:
            self._finish(self.route.problem(Draining("the grace is over"), self.call.id))

    def _go_on(self) -> None:
        if not self._begun or self.response_complete or self._answer:
            return
        if self.is_whole and not self._error:
            self._enter()
        if self._error:
            self._tell(self._error)
        elif self.is_whole:
            self._protocol.tasks.add(self)  # type: ignore[arg-type]  # uvicorn waits for them at shutdown
            self._answer = self.route.answer(self.call)
            self._resume()

    def _tell(self, error: ServiceError) -> None:
        """Answer with `error`; at once where the service is too busy to say more than no."""
        protocol = self._protocol
        stays = self.keep_alive and not (self._closes or self.route.closes or protocol.transport.is_closing())
        if not stays or self._is_http10 or len(self.call.id) != len(BLANK):
            self._finish(self.route.problem(error, self.call.id))
            return
        self.route.refuse(error, self.call)
        dated = protocol.server_state.default_headers
        protocol.transport.write(self.route.refusal(error, self.call, dated, _as_bytes))
        self._forget()
        protocol.answered(keep_alive=True)

    def _enter(self) -> None:
        call = self.call
        call.body, self._body = self._body, b""
        call.restart()
        try:
            call.place.enter()
        except ServiceError as error:
            self._keep(error)

    def _resume(self, _: object = None) -> None:
        """Run the answer until it is there, or waits for a future that then resumes it."""
        if self._answer is None:
            return
        try:
            future = self._answer.send(None)
        except StopIteration as end:
            self._finish(end.value)
        except BaseException as error:
            logger().error("unexpected", route=self.route.path, **self.call.marks(), exc_info=error)
            self._finish(self.route.problem(ServiceError("an unexpected error"), self.call.id))
        else:
            future._asyncio_future_blocking = False  # what a task does to say that it took notice
            future.add_done_callback(self._resume)

    def _finish(self, reply: Reply) -> None:
        protocol = self._protocol
        if protocol.transport.is_closing():
            self.depart()
            return
        headers = self.route.headers(reply, self.call.id)
        self.keep_alive = self.keep_alive and not self._closes and headers[-1] != CLOSE
        if not self.keep_alive and headers[-1] != CLOSE:
            headers.append(CLOSE)
        elif self.keep_alive and self._is_http10:
            headers.append(KEEP_ALIVE)
        self.route.count(reply, self.call)  # before it is sent: an answer that somebody has is a counted one
        protocol.transport.write(_as_bytes(reply, protocol.server_state.default_headers + headers))
        self._forget()
        protocol.answered(keep_alive=self.keep_alive)

    def _forget(self) -> None:
        """Hold nothing that an idle connection would keep alive."""
        self.response_complete = True
        self._protocol.running = None
        self._protocol.tasks.discard(self)
        answer, self._answer = self._answer, None
        self.call.body = b""
        self.call.place.leave()
        self._body = b""
        if answer:
            answer.close()


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with a short way for hot routes, and limits on what may come in and how slowly."""

    app: Any
    waiting_since: float | None = None  # monotonic; None while a request is being answered or none is begun
    idle_since: float | None = None  # monotonic; None while a request is being answered or comes in
    writing_since: float | None = None  # monotonic; None while the caller reads what it is sent
    half_closed_since: float | None = None  # monotonic; None while the caller may send more
    running: HotCycle | None = None
    peer = ""  # its address
    url = b""  # of the request that is coming in, as far as it is known
    deaf = False  # what still comes in is not looked at
    _unparsed_head = 0  # bytes of a head that is not complete
    _parsed_head = 0  # bytes of the request line, headers and trailers
    _in_head = False
    _ended = False  # whether a request ended in the bytes at hand
    _is_chunked = False  # whether the body that comes in is
    _unread, _at = b"", 0  # what has come in, and up to where it is parsed
    _reading: asyncio.Future[None] | None = None  # done when that is parsed
    _owes_next = False  # whether the next request waits for the last answer to be read
    _offers_upgrade = False  # whether the head at hand does
    _was_pipelined = False  # whether the request that is being answered waited for an earlier answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock of the first request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.waiting_since = monotonic()
        self.peer = self.client[0] if self.client else ""

    def data_received(self, data: bytes) -> None:
        """Parse what is short at once; else the body of known length as one piece, and all other in pieces, in turn."""
        if len(data) <= AT_ONCE and not self._is_chunked and not self.unread:
            self._parse(data)
            return
        self._unread, self._at = self._unread[self._at :] + data, 0
        if self._reading is None:
            self._read_on()

    @property
    def unread(self) -> int:
        """Bytes that have come in and wait for their turn to be parsed."""
        return len(self._unread) - self._at

    def _read_on(self) -> None:
        work = self._read_pieces()
        if self._is_chunked or next(work, self) is None:
            self.flow.pause_reading()
            self._reading = self.app.slicer.start(self.peer, work)
            self._reading.add_done_callback(self._has_read)

    def _has_read(self, reading: asyncio.Future[None]) -> None:
        self._reading = None
        if not self.pipeline and not self.transport.is_closing():
            self.flow.resume_reading()

    def _read_pieces(self) -> Work[None]:
        """Parse what has come in; yield where it is a chunked body, whose chunks may be tiny, and takes long."""
        until = perf_counter() + SLICE_S
        while self.unread and self.parser is not None:
            start, self._at = self._at, min(len(self._unread), self._at + self._piece())
            self._parse(memoryview(self._unread)[start : self._at])
            if self._is_chunked and perf_counter() > until:
                yield
                until = perf_counter() + SLICE_S
        self._unread, self._at = b"", 0

    def _piece(self) -> int:
        """Return how many bytes to parse next: the rest of a body, a head, or some of what may be in many parts."""
        cycle: Any = self.cycle
        if isinstance(cycle, HotCycle) and not cycle.is_whole and not self._in_head:
            return cycle.left or CHUNKS
        head = self._unread.find(END_OF_HEAD, self._at, self._at + PIECE)
        return PIECE if head < 0 else head + len(END_OF_HEAD) - self._at

    def _parse(self, data: bytes | memoryview) -> None:
        """Parse, unless the head of the request grows too long."""
        if self.deaf:
            return
        self._ended = False
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.refuse(Malformed("the bytes received are not an HTTP request"))
        if self._in_head and not self._ended:
            self._unparsed_head += len(data)
            self._check_head(self._unparsed_head)

    def _feed(self, data: bytes | memoryview) -> None:
        """Parse; if the parser stops at an offer to upgrade, go on as if there were none (RFC 9110, 7.8)."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            rest, end = memoryview(data), offer.args[0]
        else:
            return
        while not self.deaf:
            head, rest = self._head_without_offer(), rest[end:]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            self.parser.feed_data(head)
            try:
                self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as offer:
                end = offer.args[0]
            else:
                return

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        """Start the clock of this request; uvicorn's scope is made when it is known to be uvicorn's."""
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._unparsed_head, self._parsed_head, self._in_head = 0, 0, True
        self.waiting_since, self.idle_since = monotonic(), None
        self._was_pipelined = False

    def on_url(self, url: bytes) -> None:
        """Take a part of the request line."""
        super().on_url(url)
        self._parsed_head += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer."""
        self._parsed_head += len(name) + len(value)
        if not self._in_head:
            self._check_head(self._parsed_head)
            return
        self.headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        """Start a cycle, hot or uvicorn's own, unless the head says what is not served."""
        self._in_head, self._unparsed_head = False, 0
        self._check_head(self._parsed_head)
        method = self.parser.get_method()
        self._offers_upgrade = self.parser.should_upgrade() and method != b"CONNECT"
        if self.deaf or self._offers_upgrade:
            return
        headers, version = dict(self.headers), self.parser.get_http_version()
        if len(headers) < len(self.headers):
            headers = combine(self.headers)
        self._is_chunked = b"transfer-encoding" in headers
        if fault := self._fault(method, version, headers):
            self.refuse(fault)
            return
        target, _, query = self.url.partition(b"?")
        path = target.decode("ascii") if b"%" not in target else path_of(target)
        route = self.app.hot_route(path) if method == b"POST" else None
        if (query or route is None) and b"#" in self.url:
            self.refuse(Malformed("the request target has a fragment"))
        elif route is None:
            self._start_asgi(version)
        else:
            self._start_hot(route, route.call(headers, query, path, self.peer), version)

    def _fault(self, method: bytes, version: str, headers: dict[bytes, bytes]) -> ServiceError | None:
        """Return why a request is refused for its head; bring its target into one form."""
        host = headers.get(b"host")
        if version not in ("1.1", "1.0"):
            return UnknownHttpVersion(f"the request is HTTP/{version}; expected HTTP/1.1 or HTTP/1.0")
        if host is None and version == "1.1":
            return Malformed("an HTTP/1.1 request names its host")
        if host and not is_host(host):
            return Malformed("the Host header does not name one host")
        if not self.url.startswith(b"/") and (fault := self._take_origin_form(method)):
            return fault
        if len(self.pipeline) >= MAX_PIPELINE:
            return Overloaded(f"more than {MAX_PIPELINE} requests ahead of their answers")
        if b"transfer-encoding" in headers or b"expect" in headers:
            return self._fault_of_body(version, headers)
        return None

    def _fault_of_body(self, version: str, headers: dict[bytes, bytes]) -> ServiceError | None:
        """Return why a request is refused for how its body comes; learn whether it waits for 100 Continue."""
        coding, expected = headers.get(b"transfer-encoding"), headers.get(b"expect", b"")
        if coding is not None and version == "1.0":
            return Malformed("HTTP/1.0 has no Transfer-Encoding")
        if coding is not None and coding.lower() != b"chunked":
            return Malformed("the Transfer-Encoding is not chunked")
        if version == "1.0":
            return None  # its Expect is ignored (RFC 9110, 10.1.1)
        if not tokens(expected) <= CONTINUE:
            return UnknownExpectation("the Expect header is not 100-continue")
        self.expect_100_continue = bool(expected) and (coding is not None or declared_length(headers) > 0)
        return None

    def _take_origin_form(self, method: bytes) -> ServiceError | None:
        if method == b"CONNECT":
            return Malformed("CONNECT is for proxies")
        self.url = b"/" if (method, self.url) == (b"OPTIONS", b"*") else origin_form(self.url)
        return Malformed("the request target is no path and no URL") if self.url.startswith(b"*") else None

    def _start_asgi(self, version: str) -> None:
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers
        super().on_headers_complete()
        if version == "1.0" and self.parser.should_keep_alive():
            self.cycle.keep_alive = True
            self.cycle.default_headers = [*self.cycle.default_headers, KEEP_ALIVE]

    def _start_hot(self, route: HotRoute, call: Call, version: str) -> None:
        keep_alive = self.parser.should_keep_alive()
        cycle = HotCycle(self, route, call, keep_alive=keep_alive, is_http10=version == "1.0")
        cycle.knock()
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
        if self._offers_upgrade:
            return  # its head will be parsed again
        self.waiting_since, self._ended, self._is_chunked = None, True, False
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
        """Start the next request, and read no further while others wait behind it.

        Stands in for uvicorn's, which arms a timer after every answer; here one sweep looks after all.
        """
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if not self.pipeline:
            self.idle_since = monotonic()
            return
        self._was_pipelined = True
        self._start_asgi_task(*self.pipeline.pop())
        if self.pipeline:
            self.flow.pause_reading()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Wait for the answer of a caller that closes its side behind its request (RFC 9112, 9.6), but of no other.

        One that waited before it closed has given up; its FIN looks the same.
        """
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        if not self._was_pipelined and not ending(self.transport).is_prompt:
            return False
        cycle.keep_alive = False
        self.half_closed_since = monotonic()
        return True

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
        if self._reading:
            self._reading.cancel()
        self._unread, self._at = b"", 0
        self.cycle = None  # type: ignore[assignment]

    def shutdown(self, turns: int = LAST_TURNS) -> None:
        """Close as soon as nothing is owed: a request that is on its way in has a moment, `turns`, to arrive.

        Bytes that are here are read first, also of a connection that was idle.
        """
        if turns and (self.waiting_since is not None or self._has_unread()):
            self.loop.call_later(LINGER_S, self.shutdown, turns - 1)
        else:
            super().shutdown()

    def _has_unread(self) -> bool:
        if self.transport.is_closing():
            return False
        there = select.poll()
        there.register(self.transport.get_extra_info("socket"), select.POLLIN)
        return bool(there.poll(0))

    def close_if_slow(self, before: float, idle_before: float) -> None:
        """Close on a caller slow to send, or to read, since `before`, or idle since `idle_before`, or gone."""
        if self._is_gone() or (self.writing_since or before) < before:
            self.transport.abort()
        elif (self.idle_since or idle_before) < idle_before:
            self.transport.close()
        elif (self.waiting_since or before) < before:
            if self._in_head or isinstance(self.cycle, HotCycle):
                self.refuse(TooSlow("the request did not arrive in time"))
            else:
                self.transport.close()  # never said a word, or is answered already

    def _is_gone(self) -> bool:
        """Return whether a caller that closed its side does not read either, or has waited for too long."""
        since = self.half_closed_since
        return since is not None and (since < monotonic() - HALF_CLOSED_S or ending(self.transport).is_reset)

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
        self.disconnected = self.response_complete = self.keep_alive = self.more_body = False
        self.message_event = asyncio.Event()
        self._protocol, self._error = protocol, error
        self._path = protocol.url.partition(b"?")[0].decode("latin-1")

    def begin(self) -> None:
        """Answer, and close."""
        self.response_complete = True
        app, error, identity = self._protocol.app, self._error, request_id(None)
        app.metrics.requests.inc(OTHER, error.reason)
        if app.access.wants(error.status):
            client = self._protocol.peer
            app.access.write(error.status, route=OTHER, outcome=error.reason, client=client, request_id=identity)
        reply = problem_reply(error, identity, self._path)
        headers = [
            *self._protocol.server_state.default_headers,  # Date, which uvicorn renews once a second
            (b"content-type", PROBLEM),
            (b"content-length", b"%d" % len(reply.body)),
            NOSNIFF,
            *reply.headers,
            CLOSE,
        ]
        self._protocol.transport.write(_as_bytes(reply, headers))
        self._protocol.close_gently()


def _as_bytes(reply: Reply, headers: Headers) -> bytes:
    parts = [STATUS_LINE[reply.status]]
    for name, value in headers:
        parts += (name, b": ", value, b"\r\n")
    parts += (b"\r\n", reply.body)
    return b"".join(parts)
