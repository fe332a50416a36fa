"""Frames: the messages between an HTTP worker and the device worker, over a stream socket of one machine.

A frame is a head of 40 bytes, a name, and a body: rows of float32, or JSON; all little-endian. Many requests are in
flight at a time and are answered in any order. Deadlines are on the machine's monotonic clock.
"""

from __future__ import annotations

import asyncio
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

import numpy as np
import orjson

from lvm.errors import Draining, Expired, ModelFailed, Overloaded, ServiceError, Unavailable
from models.vectors import Floats

# id; bytes after the head; n, T, D; rows of the batch; kind; bytes of the name; is declined; seconds
HEAD = Struct("<QIIIIIBB?xd")
BUFFER_BYTES = 1 << 18  # a larger frame gets a buffer of its own size
NO_ROWS = np.zeros((0, 0, 0), np.float32)


class FrameKind(IntEnum):
    """What a frame is: the first two come from an HTTP worker, the others from the device worker."""

    REQUEST = 1  # rows (n, T, D) for the engine `name`, with the deadline `seconds`
    CANCEL = 2  # of the request with this id
    ANSWER = 3  # vectors (n, 1, D) by the engine `name`, which took `seconds`
    ERROR = 4  # JSON: the error of the request with this id
    ENGINES = 5  # JSON: what serves from now on
    LEAVING = 6  # send no more requests; those that are here are still answered


KINDS = {int(kind): kind for kind in FrameKind}
ERRORS: dict[str, type[Unavailable]] = {error.reason: error for error in (Overloaded, Draining, ModelFailed)}


class BadFrame(Exception):
    """Bytes that are not a valid frame."""


class Frame(NamedTuple):
    """One frame; a `name` is that of an engine: `alias model/version`.

    `is_declined` is that of a request: its rows must not be kept for scores.
    """

    kind: FrameKind
    id: int = 0
    name: bytes = b""
    rows: Floats = NO_ROWS
    text: bytes = b""
    batch_rows: int = 0
    seconds: float = 0.0
    is_declined: bool = False


def encode(frame: Frame) -> list[bytes | memoryview]:
    """Return the pieces of a frame; its rows `(n, T, D)` are not copied."""
    rows = np.ascontiguousarray(frame.rows, "<f4")
    size = len(frame.name) + len(frame.text) + rows.nbytes
    name_size = len(frame.name)
    head = HEAD.pack(
        frame.id, size, *rows.shape, frame.batch_rows, frame.kind, name_size, frame.is_declined, frame.seconds
    )
    pieces: list[bytes | memoryview] = [head + frame.name + frame.text]
    return [*pieces, rows.reshape(-1).data.cast("B")] if rows.size else pieces


def frame_size(data: memoryview, max_bytes: int) -> int:
    """Return the bytes of the frame that `data` begins with, or 0 if its head is not complete.

    Raises:
        BadFrame: more than `max_bytes` follow the head.
    """
    if len(data) < HEAD.size:
        return 0
    size: int = HEAD.unpack_from(data)[1]
    if size > max_bytes:
        raise BadFrame(f"frame of {size} bytes; expected at most {max_bytes}")
    return HEAD.size + size


def decode(data: memoryview) -> Frame:
    """Return the frame that `data` is; its rows are a copy.

    Raises:
        BadFrame: its kind is unknown, or a size in it is wrong.
    """
    identity, size, n, t, d, batch_rows, kind, name_size, is_declined, seconds = HEAD.unpack_from(data)
    name, body = bytes(data[HEAD.size : HEAD.size + name_size]), data[HEAD.size + name_size :]
    if kind not in KINDS or name_size > size or ((n or t or d) and 4 * n * t * d != len(body)):
        raise BadFrame(f"frame of kind {kind}, {size} bytes, a name of {name_size}, rows of {n} x {t} x {d}")
    rows = np.frombuffer(body, "<f4").reshape(n, t, d).copy() if n else NO_ROWS
    return Frame(KINDS[kind], identity, name, rows, b"" if n else bytes(body), batch_rows, seconds, is_declined)


def encode_error(error: ServiceError) -> bytes:
    """Return the text of an `ERROR` frame."""
    alone = isinstance(error, ModelFailed) and error.alone
    fields = {"reason": error.reason, "detail": error.detail, "retry_after": error.retry_after, "alone": alone}
    return orjson.dumps(fields)


def decode_error(text: bytes) -> Unavailable | Expired:
    """Return the error in the text of an `ERROR` frame."""
    fields = orjson.loads(text)
    if fields["reason"] == Expired.reason:
        return Expired(fields["detail"])
    error = ERRORS.get(fields["reason"], Unavailable)(fields["detail"], retry_after=fields["retry_after"] or 1)
    if isinstance(error, ModelFailed):
        error.alone = fields["alone"]
    return error


class FrameProtocol(asyncio.BufferedProtocol):
    """One end of a connection: calls `on_frame` with each frame, and aborts the connection at a bad one."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray(BUFFER_BYTES)
        self._begin = 0
        self._end = 0
        self._transport: asyncio.Transport | None = None
        self._error: BadFrame | None = None

    def on_frame(self, frame: Frame) -> None:
        """Handle a frame; raises `BadFrame` if it must not come from that end."""

    def on_lost(self, why: Exception | None) -> None:
        """Handle the end of the connection."""

    def send(self, frame: Frame) -> None:
        """Send a frame if the connection is open; its rows must not change afterwards."""
        if self._transport and not self._transport.is_closing():
            self._transport.writelines(encode(frame))

    @property
    def is_open(self) -> bool:
        """Whether frames can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Close the connection when what was sent is written."""
        if self._transport:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]  # of a stream

    def connection_lost(self, exc: Exception | None) -> None:
        """Call `on_lost` with the reason."""
        self.on_lost(self._error or exc)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        return memoryview(self._buffer)[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """Handle the frames that are complete."""
        self._end += nbytes
        if self._error:
            self._begin = self._end = 0
            return
        try:
            self._make_room(self._handle_complete())
        except BadFrame as error:
            self._error = error
            if self._transport:
                self._transport.abort()

    def _handle_complete(self) -> int:
        """Handle complete frames; return the size of the one that is not, or 0 if that is not known."""
        data = memoryview(self._buffer)[: self._end]
        while 0 < (size := frame_size(data[self._begin :], self._max_bytes)) <= self._end - self._begin:
            frame = decode(data[self._begin : self._begin + size])
            self._begin += size
            self.on_frame(frame)
        return size

    def _make_room(self, size: int) -> None:
        """Make room for the rest of a frame of `size` bytes, or of its head if the size is not known."""
        left = self._end - self._begin
        if left and self._begin + max(size, HEAD.size) <= len(self._buffer):
            return
        wanted = max(size, BUFFER_BYTES)
        buffer = self._buffer if wanted == len(self._buffer) else bytearray(wanted)
        buffer[:left] = self._buffer[self._begin : self._end]
        self._buffer, self._begin, self._end = buffer, 0, left
