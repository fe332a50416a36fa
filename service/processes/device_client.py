"""The device client: an engine provider whose engines run in the device worker, reached by frames over a socket."""

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
from service.engines.engine import Deployed, EngineInfo
from service.engines.pairing import is_declined
from service.engines.predict import Prediction
from service.engines.remote import EngineSet, RemoteEngine
from service.processes.frames import Frame, FrameKind, FrameProtocol, decode_error
from service.tasks import repeat
from service.telemetry.log import logger

RETRY_S = 0.05  # between two tries to connect
FIRST_WAIT_S = 5.0  # for the first engines; an HTTP worker then starts without any, and is not ready
LOST = "the process that runs the models is gone and is being replaced"
Future = asyncio.Future[Frame]
SetEngines = Callable[[EngineSet], None]


def frame_name(info: EngineInfo) -> bytes:
    """Return the name of an engine in frames."""
    return f"{info.alias} {info.name}/{info.version}".encode()


@lru_cache(maxsize=64)
def _model_and_version(name: bytes) -> tuple[str, str]:
    model, _, version = name.decode().partition(" ")[2].rpartition("/")
    return model, version


class Connection(FrameProtocol):
    """One connection to a device worker, and the requests that it has not answered.

    Args:
        max_bytes: of a frame.
        on_engines: called with the text of an `ENGINES` frame, and with nothing when the connection is lost.
    """

    def __init__(self, max_bytes: int, on_engines: Callable[[Connection, bytes], None]) -> None:
        super().__init__(max_bytes)
        self._on_engines = on_engines
        self._loop = asyncio.get_running_loop()
        self._ids = count()
        self._pending: dict[int, Future] = {}
        self._is_retired = False
        self.over = asyncio.Event()  # then it is time to connect again

    async def predict(self, name: bytes, contexts: Floats, deadline: float) -> Prediction:
        """Return what the engine `name` predicts; the way there and back counts as queue.

        Raises:
            Unavailable, Expired: as the engine there, or because the device worker is gone.
        """
        began = perf_counter()
        frame = await self._ask(name, contexts, deadline)
        if frame.kind is FrameKind.ERROR:
            raise decode_error(frame.text)
        queue_s = perf_counter() - began - frame.seconds
        model, version = _model_and_version(frame.name)
        return Prediction(frame.rows[:, 0], model, version, queue_s, frame.seconds, frame.batch_rows)

    async def _ask(self, name: bytes, contexts: Floats, deadline: float) -> Frame:
        if not self.is_open:
            raise Draining(LOST)
        number = next(self._ids)
        future: Future = self._loop.create_future()
        self._pending[number] = future
        request = Frame(FrameKind.REQUEST, number, name, contexts, seconds=deadline, is_declined=is_declined.get())
        self.send(request)
        timer = self._loop.call_later(deadline - monotonic(), _expire, future)
        try:
            return await future
        finally:
            timer.cancel()
            if self._pending.pop(number, None):  # unanswered
                self.send(Frame(FrameKind.CANCEL, number))
            self._close_if_done()

    def retire(self) -> None:
        """Close the connection when every request is answered."""
        self._is_retired = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._is_retired and not self._pending:
            self.close()

    def on_frame(self, frame: Frame) -> None:
        """Complete a request, pass on the engines, or look for the next device worker because this one leaves."""
        if frame.kind in (FrameKind.ANSWER, FrameKind.ERROR):
            future = self._pending.pop(frame.id, None)
            if future and not future.done():
                future.set_result(frame)
        elif frame.kind is FrameKind.ENGINES:
            self._on_engines(self, frame.text)
        elif frame.kind is FrameKind.LEAVING:
            self.over.set()

    def on_lost(self, why: Exception | None) -> None:
        """Fail the requests that are not answered."""
        if why:
            logger().error("owner lost", reason=str(why))
        lost, self._pending = self._pending, {}
        for future in lost.values():
            if not future.done():
                future.set_exception(Draining(LOST))
        self._on_engines(self, b"")
        self.over.set()


def _expire(future: Future) -> None:
    if not future.done():
        future.set_exception(Expired("the deadline passed before there was an answer"))


class DeviceClient:
    """Provides the engines of the device worker that listens at `path`, or of the one that replaces it."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._current: Connection | None = None
        self._connections: set[Connection] = set()

    async def open(self, set_remote_engines: SetEngines) -> None:
        """Connect, and stay connected; return when there are engines, or after `FIRST_WAIT_S` seconds."""
        self._set_remote_engines = set_remote_engines
        self._has_engines = asyncio.Event()
        self._task = asyncio.create_task(repeat("connect to the device worker", self._connect, RETRY_S))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_engines.wait(), FIRST_WAIT_S)

    async def close(self) -> None:
        """Close every connection."""
        self._task.cancel()
        for connection in self._connections:
            connection.close()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            _, connection = await loop.create_unix_connection(
                lambda: Connection(self._max_bytes, self._on_engines), str(self._path)
            )
            self._connections.add(connection)
            await connection.over.wait()

    def _on_engines(self, connection: Connection, text: bytes) -> None:
        """Pass on the engines behind a connection; none if it is lost, which an empty text means."""
        if text:
            before, self._current = self._current, connection
            self._set_remote_engines(_engine_set(connection, orjson.loads(text)))
            self._has_engines.set()
            if before and before is not connection:
                before.retire()
            return
        self._connections.discard(connection)
        if connection is self._current:
            self._current = None
            self._set_remote_engines(EngineSet({}, {}))


def _engine_set(connection: Connection, fields: dict[str, Any]) -> EngineSet:
    infos = [EngineInfo(**{**info, "shape": tuple(info["shape"])}) for info in fields["engines"]]
    engines = {info.alias: RemoteEngine(info, partial(connection.predict, frame_name(info))) for info in infos}
    return EngineSet(engines, {alias: Deployed(**each) for alias, each in fields["deployed"].items()})
