"""The budget of a request: microseconds of processor time by part of the service, beside the bare peer.

Service and bare peer run in this process, and their sockets are replaced by memory: nothing but our own Python, and
the libraries that it calls, takes time. Parts come from samples of the stack, the total from runs without samples.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from time import thread_time
from types import FrameType
from typing import Any

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from bench.options import ROOT, BenchOptions
from bench.peers.bare import Bare
from bench.peers.echo import FASTEST
from bench.untrained import draw_contexts
from loadtest.payloads import Exchange, encode
from loadtest.plan import Wire
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry
from service.app import Service, create_app
from service.http.connection import Connection
from service.processes.server import uvicorn_config
from service.settings import Settings, read_settings

CONTEXTS = 64
BLOCK = 32  # requests between two readings of the clock
SAMPLE_S = 0.0005
TOKEN = "a-token-for-the-budget"
TRACE = ("traceparent", f"00-{'1' * 32}-{'2' * 16}-00")
CELLS: Sequence[tuple[Wire, int, bool]] = [
    *((wire, connections, False) for wire in ("octet", "json") for connections in (1, 8, 32)),
    ("octet", 1, True),
]
# Where the time of a part is spent: files below `service`, or below the root, and functions of them.
PARTS: Mapping[str, Sequence[str]] = {
    "parse": ("http/connection.py", "http/messages.py", "http/headers.py"),
    "authenticate": ("http/auth.py",),
    "route": ("http/gateway.py", "http/routes/", "engines/router.py", "engines/breaker.py"),
    "admit": ("overload/", "http/gateway.py:_admit"),
    "decode": ("http/codec.py", "http/octets.py", "http/checks.py", "http/json_slices.py"),
    "queue": ("engines/batcher.py", "engines/batch_sizer.py", "engines/engine.py", "http/eager.py"),
    "net": ("models/runtimes/",),
    "check": ("engines/predict.py", "engines/drift.py", "models/drift.py", "models/vectors.py"),
    "live scores": ("engines/pairing.py",),
    "encode": ("http/routes/predict.py:_respond", "http/routes/predict.py:encode_answer", "http/routes/common.py"),
    "headers": ("http/gateway.py:_complete", "http/messages.py:head_of", "http/routes/common.py:headers_of"),
    "count": ("http/gateway.py:_end", "telemetry/", "engines/stats.py", "engines/engine.py:_on_batch"),
    "trace": ("http/gateway.py:_begin_trace", "telemetry/tracing.py"),
    "write": ("http/connection.py:_send", "http/connection.py:_finish", "http/connection.py:_next"),
}
# What the driver of this benchmark takes belongs to no part.
DRIVER, REST = "driver", "rest"
PLACES: Mapping[str, str] = {place: part for part, places in PARTS.items() for place in places} | {
    "bench/budget.py": DRIVER
}
# Makes the protocol of a new connection.
Connect = Callable[[], Any]


class Memory(asyncio.Transport):
    """The transport of a connection without a socket. It calls `on_write` with what is written."""

    def __init__(self, on_write: Callable[[bytes], None]) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.write = on_write  # type: ignore[assignment, method-assign]

    def is_closing(self) -> bool:
        """Return whether it was closed: never."""
        return False

    def pause_reading(self) -> None:
        """Ignore it: requests arrive one by one."""

    def resume_reading(self) -> None:
        """Ignore it."""

    def close(self) -> None:
        """Ignore it: uvicorn closes connections that are idle."""


class Driver:
    """Sends requests on several connections at once, and the next ones when all are answered.

    Args:
        connect: makes the protocol of a connection.
        writes: of one response.
    """

    def __init__(self, connect: Connect, writes: int, connections: int, requests: Sequence[bytes]) -> None:
        self._requests = cycle(requests)
        self._expected = writes * connections
        self._protocols = [connect() for _ in range(connections)]
        self.written: list[bytes] = []
        for protocol in self._protocols:
            protocol.connection_made(Memory(self._on_write))

    async def run(self, requests: int) -> float:
        """Send at least so many requests; return the seconds of processor that one took."""
        loop = asyncio.get_running_loop()
        turns = -(-requests // len(self._protocols))
        began = thread_time()
        for _ in range(turns):
            self.written.clear()
            self._done = loop.create_future()
            loop.call_soon(self._send)
            await self._done
        return (thread_time() - began) / (turns * len(self._protocols))

    def _send(self) -> None:
        for protocol, request in zip(self._protocols, self._requests, strict=False):
            protocol.data_received(request)

    def _on_write(self, data: bytes) -> None:
        self.written.append(data)
        if len(self.written) == self._expected:
            self._done.set_result(None)


def measure(options: BenchOptions, registry: Registry) -> list[dict[str, Any]]:
    """Return, for each of `CELLS`, microseconds of a request in all and by part, and those of the bare peer."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_measure(options, registry))


async def _measure(options: BenchOptions, registry: Registry) -> list[dict[str, Any]]:
    bare = _bare(registry.resolve("primary").path)
    return [await _cell(options, registry, bare, *cell) for cell in CELLS]


async def _cell(
    options: BenchOptions, registry: Registry, bare: Connect, wire: Wire, connections: int, is_known: bool
) -> dict[str, Any]:
    """Measure one cell; a caller who `is_known` sends a token and a trace."""
    settings = read_settings(registry=registry.root, **({"tokens": f"bench:{TOKEN}"} if is_known else {}))
    extra = [("authorization", f"Bearer {TOKEN}"), TRACE] if is_known else []
    exchange = Exchange("predict", wire, 1, options.dim)
    requests = encode(exchange, "http://bench", extra, draw_contexts(CONTEXTS, options.dim))
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        ours = Driver(_service(app, settings), 1, connections, requests)
        theirs = Driver(bare, 2, connections, requests)
        seconds, bare_seconds = await _least(options, ours, theirs)
        shares = await _shares(options, ours)
    return {
        "wire": wire,
        "connections": connections,
        "token_and_trace": "yes" if is_known else "no",
        "total": seconds * 1e6,
        "bare": bare_seconds * 1e6,
        "ratio": bare_seconds / seconds,
        "parts": {part: share * seconds * 1e6 for part, share in shares.items()},
    }


def _service(app: Service, settings: Settings) -> Connect:
    config = uvicorn_config(app, settings)
    config.load()
    return lambda: Connection(config, _state())


def _bare(version: Path) -> Connect:
    config = uvicorn.Config(Bare(load_checkpoint(version)), **FASTEST)
    config.load()
    return lambda: HttpToolsProtocol(config, _state(), {})


def _state() -> ServerState:
    state = ServerState()
    state.default_headers = [(b"date", b"Thu, 01 Jan 1970 00:00:00 GMT")]
    return state


async def _least(options: BenchOptions, *drivers: Driver) -> list[float]:
    """Return the least seconds of a request of each driver, by turns: other processes only ever add to them."""
    least = [await driver.run(BLOCK) for driver in drivers]
    for _ in range(round(options.rounds * options.seconds / (BLOCK * sum(least))) or 1):
        least = [min(known, await driver.run(BLOCK)) for known, driver in zip(least, drivers, strict=True)]
    return least


async def _shares(options: BenchOptions, driver: Driver) -> dict[str, float]:
    """Return the share of each part in the samples of the stack."""
    found: Counter[str] = Counter()
    with _sampled(found):
        for _ in range(options.rounds):
            until = thread_time() + options.seconds
            while thread_time() < until:
                await driver.run(BLOCK)
    return {part: found[part] / max(1, found.total()) for part in (*PARTS, DRIVER, REST)}


@contextmanager
def _sampled(found: Counter[str]) -> Iterator[None]:
    """Count samples of this thread's stack by the part that the innermost frame belongs to."""

    def sample(number: int, frame: FrameType | None) -> None:
        found[part_of(frame)] += 1

    before = signal.signal(signal.SIGALRM, sample)
    signal.setitimer(signal.ITIMER_REAL, SAMPLE_S, SAMPLE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def part_of(frame: FrameType | None) -> str:
    """Return the part that a frame works for: that of the innermost function, file or directory that has one."""
    while frame is not None:
        file = frame.f_code.co_filename.removeprefix(f"{ROOT}/").removeprefix("service/")
        directory = file.rpartition("/")[0] + "/"
        for place in (f"{file}:{frame.f_code.co_name}", file, directory):
            if place in PLACES:
                return PLACES[place]
        frame = frame.f_back
    return REST
