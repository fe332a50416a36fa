"""The owner of the device: the one process that loads the nets and runs batches over the rows of all workers.

It is a line-up without HTTP: it follows the registry, tries promoted versions out, and answers frames, not requests.
The supervisor holds its listening socket, so that a worker's connection waits for whoever comes next.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import orjson
import uvloop

from lvm.errors import Draining, ServiceError, Unavailable
from models.registry.alias import NET_ALIASES, Alias
from models.registry.registry import Registry
from models.registry.remote import local_directory
from models.vectors import Floats
from service.deploy.deployments import Lineup
from service.deploy.loading import RealLoaders
from service.deploy.registry_sync import Follower, follower_of, following
from service.engines.engine import Engine, Prediction
from service.engines.remote import Facts
from service.processes.device_client import name_of
from service.processes.frames import (
    BadFrame,
    Frame,
    Framed,
    Kind,
    write_fault,
)
from service.processes.heartbeat import on_supervisor_exit, send_heartbeat
from service.processes.server import SIGNALS, SWITCH_INTERVAL_S
from service.settings import Settings, read_settings
from service.tasks import CatchAndLog
from service.telemetry.log import configure, log_writer, logger
from service.telemetry.metrics import Metrics
from service.telemetry.shared_memory import SharedMetricValues

SOCKET = "owner.sock"  # in the directory of the cells, which is nobody else's
TICK_S = 0.1  # between two looks at what there is to tell
HOUR_S = 3600.0  # the longest deadline that a request may ask for


class Owner:
    """Answers for the engines of a line-up, whoever is loaded at the moment."""

    def __init__(self, lineup: Lineup, settings: Settings) -> None:
        self._lineup, self.settings = lineup, settings
        self._names: dict[Engine, bytes] = {}
        self._reads: dict[bytes, tuple[int, int, str]] = {}  # of all that ever served
        self._told = b""
        self.desks: set[Desk] = set()

    def tell(self) -> None:
        """Tell every worker who serves, if that is new to them."""
        engines = self._engines()
        self._names = {engine: name_of(Facts.of(engine)) for engine in engines.values()}
        self._reads |= {name: engine.reads for engine, name in self._names.items()}
        live = {str(alias): live for alias, live in self._lineup.live.items()}
        told = orjson.dumps({"engines": [*map(Facts.of, engines.values())], "live": live})
        if told != self._told:
            self._told = told
            for desk in self.desks:
                self.greet(desk)

    def greet(self, desk: Desk) -> None:
        """Tell one worker who serves."""
        desk.send(Frame(Kind.TOLD, text=self._told))

    async def answer(self, name: bytes, contexts: Floats, deadline: float) -> tuple[bytes, Prediction]:
        """Return who answered for the engine `name`, and what: the alias may serve another by now.

        Raises:
            Draining: nobody does, or one that reads otherwise.
            Overloaded, Expired, ModelFailed: as `Engine.predict`.
        """
        engine = self._engines().get(name.partition(b" ")[0].decode("latin-1"))
        if engine is None or self._reads.get(name) != engine.reads or contexts.shape[1:] != engine.shape:
            raise Draining("the model was exchanged for one that reads otherwise")
        if engine not in self._names:
            self.tell()  # before its first answer
        author = self._names[engine]
        return author, await engine.predict(contexts, deadline)

    def _engines(self) -> dict[str, Engine]:
        known = {**self._lineup.engines, Alias.CANDIDATE: self._lineup.candidate}
        return {alias: engine for alias, engine in known.items() if isinstance(engine, Engine)}


class Desk(Framed):
    """One worker's connection: a task for each of its questions; when it leaves, they end."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(most_of(owner.settings))
        self._owner = owner
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin by saying who serves."""
        super().connection_made(transport)
        self._owner.desks.add(self)
        self._owner.greet(self)

    def on_lost(self, why: Exception | None) -> None:
        """Run nothing more for a worker that is gone."""
        if why:
            logger().error("worker lost", reason=str(why))
        self._owner.desks.discard(self)
        for task in self._tasks.values():
            task.cancel()

    def on_frame(self, frame: Frame) -> None:
        """Take a question, or a question back; raises `BadFrame` where it is neither."""
        if frame.kind is Kind.CANCEL:
            task = self._tasks.pop(frame.id, None)
            if task:
                task.cancel()
        elif frame.kind is Kind.ASK and frame.id not in self._tasks and abs(frame.seconds - monotonic()) <= 2 * HOUR_S:
            self._tasks[frame.id] = asyncio.create_task(self._answer(frame))
        else:
            raise BadFrame(f"{frame.kind.name} {frame.id} by {frame.seconds}")

    async def _answer(self, frame: Frame) -> None:
        try:
            author, made = await self._owner.answer(frame.name, frame.rows, frame.seconds)
            self.send(Frame(Kind.ANSWER, frame.id, author, made.vectors[:, None], b"", made.batch_rows, made.infer_s))
        except ServiceError as error:
            self.send(Frame(Kind.FAULT, frame.id, text=write_fault(error)))
        except Exception as error:
            logger().error("unexpected", exc_info=error)
            self.send(Frame(Kind.FAULT, frame.id, text=write_fault(Unavailable("an unexpected error"))))
        finally:
            self._tasks.pop(frame.id, None)


def most_of(settings: Settings) -> int:
    """Return the bytes of the largest frame: the rows of a whole body, twice the size where they were float16."""
    return 2 * round(settings.max_body_mb * 1e6) + 1024


async def listen(owner: Owner, listener: socket.socket) -> asyncio.AbstractServer:
    """Have a desk for whoever connects; the address is the supervisor's and stays, on Python 3.13 as well."""
    loop = asyncio.get_running_loop()
    return await loop.create_unix_server(  # type: ignore[call-arg,unused-ignore]  # uvloop's takes it on any Python
        lambda: Desk(owner), sock=listener, cleanup_socket=False
    )


def own(slot: int, listener: int, line: int, local_directory: Path) -> int:
    """Be the owner: count in row `slot` below `home`, serve on the socket `listener`, report on the socket `line`.

    Raises:
        UnknownVersion, BadCheckpoint: what the aliases point at cannot be served.
    """
    settings = read_settings()
    configure(settings.log_level, worker="owner", pid=os.getpid())
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    metrics = Metrics(settings.slo_ms, SharedMetricValues(local_directory, slot))
    log_writer().on_drop(metrics.log_dropped.inc)
    with socket.socket(fileno=line) as reports, socket.socket(fileno=listener) as ours:
        uvloop.run(_own(settings, metrics, ours, reports, local_directory))
    return 0


async def _own(settings: Settings, metrics: Metrics, listener: socket.socket, line: socket.socket, place: Path) -> None:
    loop = asyncio.get_running_loop()
    leaving = asyncio.Event()
    for number in SIGNALS:
        loop.add_signal_handler(number, leaving.set)
    on_supervisor_exit(line, place, lambda: loop.call_soon_threadsafe(leaving.set), settings.stop_s)
    registry = Registry(local_directory(settings.registry, settings.cache))
    lineup = Lineup(registry, RealLoaders(settings), settings, metrics, aliases=NET_ALIASES)
    follower = follower_of(lineup, settings, metrics)
    async with AsyncExitStack() as stack:
        if await unless(leaving, stack.enter_async_context(following(lineup, follower, settings.grace_s))):
            owner = Owner(lineup, settings)
            owner.tell()
            server = await listen(owner, listener)
            await _watch(owner, lineup, follower, line, leaving)
            server.close()
            await _leave(owner, settings.drain_s + settings.grace_s)


async def unless(leaving: asyncio.Event, start: Coroutine[Any, Any, object]) -> bool:
    """Return whether a start came to its end before it was time to leave; it is cancelled else."""
    starting, left = asyncio.create_task(start), asyncio.create_task(leaving.wait())
    await asyncio.wait({starting, left}, return_when=asyncio.FIRST_COMPLETED)
    left.cancel()
    if starting.done():
        starting.result()
        return True
    starting.cancel()
    await asyncio.wait({starting})
    return False


async def _watch(
    owner: Owner, lineup: Lineup, follower: Follower | None, line: socket.socket, leaving: asyncio.Event
) -> None:
    """Say what there is to say, to the workers and to the supervisor, until it is time to leave."""
    guarded = CatchAndLog("tell the workers")
    at = 0.0
    while not leaving.is_set():
        with guarded:
            owner.tell()
            if monotonic() - at >= 1.0:
                at = monotonic()
                for each in (lineup, follower):
                    if each:
                        each.observe()
                if lineup.stuck_s() <= owner.settings.hang_s:
                    send_heartbeat(line)
        with suppress(TimeoutError):
            await asyncio.wait_for(leaving.wait(), TICK_S)


async def _leave(owner: Owner, most_s: float) -> None:
    """Have the workers go elsewhere, for `most_s` seconds at most, and answer what they asked."""
    until = monotonic() + most_s
    logger().info("draining", seconds=most_s)
    for desk in owner.desks:
        desk.send(Frame(Kind.LEAVING))
    while owner.desks and monotonic() < until:
        await asyncio.sleep(TICK_S)
