"""The link: how a worker reaches the owner of the device: a lender of engines, by frames over a socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import orjson

from lvm.errors import Draining, Expired
from models.vectors import Floats
from service.engines.engine import (
    Live,
    Prediction,
)
from service.engines.remote import (
    Borrow,
    Facts,
    Loan,
    Remote,
)
from service.processes.frames import (
    Frame,
    Framed,
    Kind,
    read_fault,
)
from service.tasks import repeat
from service.telemetry.log import logger

RETRY_S = 0.05  # between two tries to connect
PATIENCE_S = 5.0  # for the first word; a worker then starts without, and is not ready
GONE = "the process that runs the nets is gone, and is being replaced"
Future = asyncio.Future[Frame]


def name_of(facts: Facts) -> bytes:
    """Return what frames call an engine."""
    return f"{facts.alias} {facts.name}/{facts.version}".encode()


@lru_cache(maxsize=64)
def _author(name: bytes) -> tuple[str, str]:
    model, _, version = name.decode().partition(" ")[2].rpartition("/")
    return model, version


class Wire(Framed):
    """One connection to an owner, and what was asked over it and is not answered."""

    def __init__(self, most: int, tell: Callable[[Wire, bytes], None]) -> None:
        super().__init__(most)
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._numbers = count()
        self._pending: dict[int, Future] = {}
        self._retired = False
        self.over = asyncio.Event()  # time to look for another

    async def predict(self, name: bytes, contexts: Floats, deadline: float) -> Prediction:
        """Return what the engine `name` predicts; the way there and back counts as queue.

        Raises:
            Unavailable, Expired: as the owner's engine; or the owner is gone.
        """
        began = perf_counter()
        frame = await self._ask(name, contexts, deadline)
        if frame.kind is Kind.FAULT:
            raise read_fault(frame.text)
        queue_s = perf_counter() - began - frame.seconds
        return Prediction(frame.rows[:, 0], *_author(frame.name), queue_s, frame.seconds, frame.batch_rows)

    async def _ask(self, name: bytes, contexts: Floats, deadline: float) -> Frame:
        if not self.is_open:
            raise Draining(GONE)
        number = next(self._numbers)
        future: Future = self._loop.create_future()
        self._pending[number] = future
        self.send(Frame(Kind.ASK, number, name, contexts, seconds=deadline))
        timer = self._loop.call_later(deadline - monotonic(), _expire, future)
        try:
            return await future
        finally:
            timer.cancel()
            if self._pending.pop(number, None):  # nobody answered, and nobody need any more
                self.send(Frame(Kind.CANCEL, number))
            self._close_if_done()

    def retire(self) -> None:
        """Close, once everything that was asked is answered."""
        self._retired = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._retired and not self._pending:
            self.close()

    def on_frame(self, frame: Frame) -> None:
        """Hand an answer to whoever waits; learn who serves, or that the owner is leaving."""
        if frame.kind in (Kind.ANSWER, Kind.FAULT):
            future = self._pending.pop(frame.id, None)
            if future and not future.done():
                future.set_result(frame)
        elif frame.kind is Kind.TOLD:
            self._tell(self, frame.text)
        elif frame.kind is Kind.LEAVING:
            self.over.set()

    def on_lost(self, why: Exception | None) -> None:
        """Fail what was asked: an answer will not come."""
        if why:
            logger().error("owner lost", reason=str(why))
        lost, self._pending = self._pending, {}
        for future in lost.values():
            if not future.done():
                future.set_exception(Draining(GONE))
        self._tell(self, b"")
        self.over.set()


def _expire(future: Future) -> None:
    if not future.done():
        future.set_exception(Expired("the deadline passed before there was an answer"))


class Link:
    """Lends what the owner behind the socket at `path` serves; where that one goes, from the next who listens there."""

    def __init__(self, path: Path, most: int) -> None:
        self._path, self._most = path, most
        self._lender: Wire | None = None
        self._wires: set[Wire] = set()

    async def open(self, borrow: Borrow) -> None:
        """Connect, and keep connected; return once the owner has said who serves, or `PATIENCE_S` seconds passed."""
        self._borrow, self._told = borrow, asyncio.Event()
        self._keeper = asyncio.create_task(repeat("connect to the owner", self._connect, RETRY_S))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._told.wait(), PATIENCE_S)

    async def close(self) -> None:
        """Let go of the owner."""
        self._keeper.cancel()
        for wire in self._wires:
            wire.close()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            _, wire = await loop.create_unix_connection(lambda: Wire(self._most, self._hear), str(self._path))
            self._wires.add(wire)
            await wire.over.wait()

    def _hear(self, wire: Wire, text: bytes) -> None:
        """Pass on who serves by a wire; nobody, where no text says so because it is lost."""
        if text:
            before, self._lender = self._lender, wire
            self._borrow(_loan(wire, orjson.loads(text)))
            self._told.set()
            if before and before is not wire:
                before.retire()
            return
        self._wires.discard(wire)
        if wire is self._lender:
            self._lender = None
            self._borrow(Loan({}, {}))


def _loan(wire: Wire, told: dict[str, Any]) -> Loan:
    known = [Facts(**{**facts, "shape": tuple(facts["shape"])}) for facts in told["engines"]]
    engines = {facts.alias: Remote(facts, partial(wire.predict, name_of(facts))) for facts in known}
    return Loan(engines, {alias: Live(**live) for alias, live in told["live"].items()})
