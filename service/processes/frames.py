"""Frames: what a worker and the owner of the device say to each other over a stream socket of one machine.

A frame is a head of 40 bytes, a name, and a body: rows of float32, or JSON; all little-endian. Many are under way at a
time, answered in any order. Deadlines are on the machine's monotonic clock.
"""

from __future__ import annotations

import asyncio
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

import numpy as np
import orjson

from lvm.errors import (
    Draining,
    Expired,
    ModelFailed,
    Overloaded,
    ServiceError,
    Unavailable,
)
from models.vectors import Floats

HEAD = Struct("<QIIIIIBB2xd")  # id; bytes after the head; n, T, D; rows of the batch; kind; bytes of the name; seconds
ROOM = 1 << 18  # bytes read at a time: a frame that is larger gets room of its own
NO_ROWS = np.zeros((0, 0, 0), np.float32)


class Kind(IntEnum):
    """What a frame is: the first two are a worker's, the others the owner's."""

    ASK = 1  # rows (n, T, D), of the engine `name`, by the time `seconds`
    CANCEL = 2  # the caller of an id has left
    ANSWER = 3  # vectors (n, 1, D), by the engine `name`, which took `seconds`
    FAULT = 4  # JSON: why an id gets no answer
    TOLD = 5  # JSON: who serves from now on
    LEAVING = 6  # no more questions, please: answers to those that are here still come


KINDS = {int(kind): kind for kind in Kind}
FAULTS: dict[str, type[Unavailable]] = {kind.reason: kind for kind in (Overloaded, Draining, ModelFailed)}


class BadFrame(Exception):
    """Bytes that are no frame."""


class Frame(NamedTuple):
    """One frame; a `name` is of an engine: `alias model/version`."""

    kind: Kind
    id: int = 0
    name: bytes = b""
    rows: Floats = NO_ROWS
    text: bytes = b""
    batch_rows: int = 0
    seconds: float = 0.0


def write(frame: Frame) -> list[bytes | memoryview]:
    """Return the pieces of a frame, its rows `(n, T, D)` as they lie."""
    rows = np.ascontiguousarray(frame.rows, "<f4")
    size = len(frame.name) + len(frame.text) + rows.nbytes
    head = HEAD.pack(frame.id, size, *rows.shape, frame.batch_rows, frame.kind, len(frame.name), frame.seconds)
    pieces: list[bytes | memoryview] = [head + frame.name + frame.text]
    return [*pieces, rows.reshape(-1).data.cast("B")] if rows.size else pieces


def size_of(data: memoryview, most: int) -> int:
    """Return the bytes of the frame that `data` begins with, 0 where they are too few to say.

    Raises:
        BadFrame: more than `most` follow its head.
    """
    if len(data) < HEAD.size:
        return 0
    size: int = HEAD.unpack_from(data)[1]
    if size > most:
        raise BadFrame(f"a frame of {size} bytes, at most {most}")
    return HEAD.size + size


def read(data: memoryview) -> Frame:
    """Return the one frame that `data` is, with a copy of its rows.

    Raises:
        BadFrame: its kind, or a size within it, means nothing.
    """
    identity, size, n, t, d, batch_rows, kind, named, seconds = HEAD.unpack_from(data)
    name, body = bytes(data[HEAD.size : HEAD.size + named]), data[HEAD.size + named :]
    if kind not in KINDS or named > size or ((n or t or d) and 4 * n * t * d != len(body)):
        raise BadFrame(f"kind {kind}, {size} bytes, {named} of them a name, for rows of {n} x {t} x {d}")
    rows = np.frombuffer(body, "<f4").reshape(n, t, d).copy() if n else NO_ROWS
    return Frame(KINDS[kind], identity, name, rows, b"" if n else bytes(body), batch_rows, seconds)


def write_fault(error: ServiceError) -> bytes:
    """Return the text of a fault."""
    alone = isinstance(error, ModelFailed) and error.alone
    fields = {"reason": error.reason, "detail": error.detail, "retry_after": error.retry_after, "alone": alone}
    return orjson.dumps(fields)


def read_fault(text: bytes) -> Unavailable | Expired:
    """Return the error that a fault tells of."""
    said = orjson.loads(text)
    if said["reason"] == Expired.reason:
        return Expired(said["detail"])
    error = FAULTS.get(said["reason"], Unavailable)(said["detail"], retry_after=said["retry_after"] or 1)
    if isinstance(error, ModelFailed):
        error.alone = said["alone"]
    return error


class Framed(asyncio.BufferedProtocol):
    """One end of a connection: calls `on_frame` with each frame that comes; aborts where what comes is none."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._room, self._begin, self._end = bytearray(ROOM), 0, 0
        self._transport: asyncio.Transport | None = None
        self._fault: BadFrame | None = None

    def on_frame(self, frame: Frame) -> None:
        """Take a frame; raises `BadFrame` where it should not have come."""

    def on_lost(self, why: Exception | None) -> None:
        """Learn that the connection has ended."""

    def send(self, frame: Frame) -> None:
        """Send a frame, if anybody is there; its rows must stay as they are."""
        if self.is_open:
            self._transport.writelines(write(frame))  # type: ignore[union-attr]  # it is open

    @property
    def is_open(self) -> bool:
        """Whether frames go out."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Close, once what was sent is gone."""
        if self._transport:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Have somebody to talk to."""
        self._transport = transport  # type: ignore[assignment]  # of a stream

    def connection_lost(self, exc: Exception | None) -> None:
        """Have nobody any more."""
        self.on_lost(self._fault or exc)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        return memoryview(self._room)[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take the frames that are whole now."""
        self._end += nbytes
        if self._fault:
            self._begin = self._end = 0
            return
        try:
            self._make_room(self._take())
        except BadFrame as error:
            self._fault = error
            self._transport.abort()  # type: ignore[union-attr]  # bytes came from it

    def _take(self) -> int:
        """Take what is whole; return the bytes of the frame that is not, 0 where that is not known."""
        data = memoryview(self._room)[: self._end]
        while 0 < (size := size_of(data[self._begin :], self._most)) <= self._end - self._begin:
            frame = read(data[self._begin : self._begin + size])
            self._begin += size
            self.on_frame(frame)
        return size

    def _make_room(self, size: int) -> None:
        """Have room for the rest of a frame of `size` bytes, and for its head where that is not known."""
        left = self._end - self._begin
        if left and self._begin + max(size, HEAD.size) <= len(self._room):
            return
        room = self._room if max(size, ROOM) == len(self._room) else bytearray(max(size, ROOM))
        room[:left] = self._room[self._begin : self._end]
        self._room, self._begin, self._end = room, 0, left
