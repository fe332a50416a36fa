"""Frames arrive as they were sent, in whatever pieces; bad bytes end their connection only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lvm.errors import (
    Expired,
    ModelFailed,
    Overloaded,
    ServiceError,
)
from service.processes.frames import (
    HEAD,
    Frame,
    FrameKind,
    FrameProtocol,
    decode_error,
    encode,
    encode_error,
)

ROWS = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
FRAMES = (
    Frame(FrameKind.REQUEST, 7, b"primary amn/1", ROWS, seconds=2.5),
    Frame(FrameKind.ENGINES, text=b"{}"),
    Frame(FrameKind.CANCEL, 9),
)


class End(FrameProtocol):
    """An end that keeps its frames, and says if it was aborted."""

    def __init__(self, max_bytes: int = 1 << 20) -> None:
        super().__init__(max_bytes)
        self.frames: list[Frame] = []
        self.aborted = False
        transport: Any = self
        self.connection_made(transport)

    def on_frame(self, frame: Frame) -> None:
        self.frames.append(frame)

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True

    def feed(self, data: bytes, step: int) -> None:
        while data and not self.aborted:
            room = self.get_buffer(-1)
            count = min(step, len(room), len(data))
            room[:count] = data[:count]
            self.buffer_updated(count)
            data = data[count:]


def as_bytes(*frames: Frame) -> bytes:
    return b"".join(bytes(piece) for frame in frames for piece in encode(frame))


@pytest.mark.parametrize("step", [1, 7, 41, 1 << 20])
def test_frames_arrive_as_they_were_sent_in_any_pieces(step: int) -> None:
    end = End()
    end.feed(as_bytes(*FRAMES) * 3, step)
    assert len(end.frames) == 9
    for sent, come in zip(FRAMES * 3, end.frames, strict=True):
        assert come.rows.shape == sent.rows.shape
        assert (come.rows == sent.rows).all()
        assert come._replace(rows=ROWS) == sent._replace(rows=ROWS)


def test_receives_a_frame_larger_than_the_buffer() -> None:
    large = Frame(FrameKind.REQUEST, 1, rows=np.ones((200, 5, 384), np.float32))
    end = End(max_bytes=1 << 24)
    end.feed(as_bytes(FRAMES[1], large, FRAMES[0]), 1 << 16)
    assert [frame.rows.shape for frame in end.frames] == [(0, 0, 0), (200, 5, 384), (2, 3, 4)]


def test_aborts_at_the_head_of_a_frame_over_the_limit() -> None:
    end = End(max_bytes=64)
    end.feed(as_bytes(FRAMES[0])[: HEAD.size], 1 << 10)
    assert end.aborted


def test_random_bytes_are_frames_or_abort_the_connection() -> None:
    rng, aborted, known = np.random.default_rng(0), 0, as_bytes(*FRAMES)
    for _ in range(2000):
        data = bytearray(known)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(256)
        end = End()
        end.feed(bytes(data[: rng.integers(1, len(data))]), int(rng.integers(1, 200)))
        aborted += end.aborted
    assert 0 < aborted < 2000


@pytest.mark.parametrize("error", [Overloaded("full", retry_after=7), Expired("late"), ModelFailed("odd")])
def test_an_error_keeps_its_type_detail_and_retry_after(error: ServiceError) -> None:
    found = decode_error(encode_error(error))
    assert (type(found), found.detail, found.retry_after) == (type(error), error.detail, error.retry_after)
