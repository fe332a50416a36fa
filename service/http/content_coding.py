"""Content codings of request bodies: gzip, decoded in steps, within a limit, long bodies in a thread."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterator
from itertools import islice

from lvm.errors import Malformed, TooLarge, UnsupportedCoding
from service.http.headers import elements

GZIP = frozenset({b"gzip", b"x-gzip"})
WBITS = 16 + zlib.MAX_WBITS  # what zlib calls gzip
STEP = 2**17  # bytes that go in, and come out, at a time
AT_ONCE = 2  # steps on the event loop, in less than 1 ms
IN_THREAD = 32  # steps in a thread before what came out is counted
MAX_MEMBERS = 10_000  # each costs some microseconds, however short


async def decode(body: bytes, codings: bytes, limit: int, reserve: Callable[[int], None]) -> bytes:
    """Return a body without the `codings` of its Content-Encoding; `reserve` is called with the bytes in memory.

    Raises:
        UnsupportedCoding: it has other codings than gzip, once.
        Malformed: it is not gzip, or ends early.
        TooLarge: it has more than `limit` bytes.
    """
    named = [coding.lower() for coding in elements(codings) if coding.lower() != b"identity"]
    if not named:
        return body
    if len(named) > 1 or named[0] not in GZIP:
        raise UnsupportedCoding("unsupported Content-Encoding; expected gzip or identity")
    steps, parts, size = gunzip(body), [], 0
    found = list(islice(steps, AT_ONCE))
    while found:
        parts += found
        size += sum(map(len, found))
        if size > limit:
            raise TooLarge(f"the decoded body is longer than {limit} bytes")
        reserve(len(body) + size)
        found = await asyncio.get_running_loop().run_in_executor(None, list, islice(steps, IN_THREAD))
    return b"".join(parts)


def gunzip(body: bytes) -> Iterator[bytes]:
    """Yield what the members of a gzip file hold, in parts of at most `STEP` bytes; raises `Malformed`."""
    rest = memoryview(body)
    for _ in range(MAX_MEMBERS):
        member = zlib.decompressobj(WBITS)
        while not member.eof:
            taken = rest[:STEP]
            try:
                part = member.decompress(taken, STEP)
            except zlib.error as error:
                raise Malformed("the body is not gzip, as its Content-Encoding says") from error
            left = member.unused_data if member.eof else member.unconsumed_tail
            rest = rest[len(taken) - len(left) :]
            if not (part or rest or member.eof):
                raise Malformed("the gzip body ends early")
            yield part
        if not rest:
            return
    raise Malformed(f"the gzip body has more than {MAX_MEMBERS} members")
