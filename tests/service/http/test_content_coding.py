"""Content codings: what a gzip body decodes to, and that it takes no more room than it may."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from typing import Any

import pytest

from lvm.errors import (
    Malformed,
    Overloaded,
    TooLarge,
    UnsupportedCoding,
)
from service.http.content_coding import (
    MAX_MEMBERS,
    STEP,
    decode,
    gunzip,
)

TEXT = bytes(range(256)) * 5000


def decoded(body: bytes, codings: bytes = b"gzip", limit: int = 10**7, hold: Any = lambda size: None) -> bytes:
    return asyncio.run(decode(body, codings, limit, hold))


@pytest.mark.parametrize("text", [b"", b"x", TEXT, b"\0" * 5_000_000], ids=["empty", "short", "long", "dense"])
@pytest.mark.parametrize("codings", [b"gzip", b"X-GZip", b"identity , gzip", b"gzip,"])
def test_gzip_is_decoded(text: bytes, codings: bytes) -> None:
    assert decoded(gzip.compress(text), codings) == text


@pytest.mark.parametrize("codings", [b"", b"identity", b"Identity, identity"])
def test_identity_is_left_as_it_is(codings: bytes) -> None:
    assert decoded(b"text", codings) == b"text"


@pytest.mark.parametrize("codings", [b"deflate", b"br", b"zstd", b"gzip, gzip", b"gzip, br", b"gzip;q=1", b"nonsense"])
def test_rejects_other_codings(codings: bytes) -> None:
    with pytest.raises(UnsupportedCoding) as told:
        decoded(gzip.compress(b"text"), codings)
    assert told.value.headers == ((b"accept-encoding", b"gzip"),)


def test_members_are_joined() -> None:
    pieces = [TEXT[at : at + 100_000] for at in range(0, len(TEXT), 100_000)]
    assert decoded(b"".join(map(gzip.compress, [*pieces, b""]))) == TEXT


WHOLE = gzip.compress(TEXT)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"text", TEXT, WHOLE[:1], WHOLE[:-1], WHOLE[:-8], WHOLE + b"x", WHOLE + b"\0\0", WHOLE + WHOLE[:5]),
        WHOLE[:-8] + bytes(8),
        WHOLE[:500] + b"\xff" * 500 + WHOLE[1000:],
        zlib.compress(TEXT),
        gzip.compress(b"") * (MAX_MEMBERS + 1),
    ],
)
def test_rejects_what_is_not_whole_gzip(body: bytes) -> None:
    with pytest.raises(Malformed):
        decoded(body)


def test_stops_at_the_limit_and_holds_what_came_out() -> None:
    """A body that would be 1 GB is decoded to about the limit only."""
    held: list[int] = []
    bomb = gzip.compress(b"\0" * 10**7) * 100
    with pytest.raises(TooLarge):
        decoded(bomb, limit=10**7, hold=held.append)
    assert len(bomb) + 10**7 // 2 < held[-1] <= len(bomb) + 10**7
    assert held == sorted(held)


def test_no_room_for_what_comes_out_ends_it() -> None:
    def hold(size: int) -> None:
        if size > 10**6:
            raise Overloaded("no room")

    with pytest.raises(Overloaded):
        decoded(gzip.compress(b"\0" * 10**7), hold=hold)


def test_each_step_is_small() -> None:
    assert max(map(len, gunzip(gzip.compress(b"\0" * 10**7)))) <= STEP


def test_the_event_loop_turns_while_a_long_body_is_decoded() -> None:
    async def turns() -> int:
        task = asyncio.create_task(decode(gzip.compress(b"\0" * 10**8), b"gzip", 10**9, lambda size: None))
        count = 0
        while not task.done():
            await asyncio.sleep(0)
            count += 1
        return count

    assert asyncio.run(turns()) > 10
